"""The server under test: which it is, what it can be made to say, and under which names it takes a setting.

A case needs a model that says exactly what the case is about. There are three ways to get one, tried in this order:

- *scripted*: our own `echo` backend says what stands behind `script:`;
- *steered*: a real model with a large `logit_bias` on a few tokens and a repetition penalty that lets each of them
  come once, in order; it needs the ids of tokens, from the server's `/tokenize`;
- *asked*: any model, plain: enough where only budgets, parameters and history matter.
"""

from __future__ import annotations

from contextlib import suppress
from functools import cached_property, lru_cache
from typing import Any, cast

from ...r1.errors import UserError
from .client import Broken, Client, Refused, Reply

OPEN, CLOSE, END = "<think>", "</think>", "(end)"
_END_NAMES = ("<｜end▁of▁sentence｜>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|return|>", "</s>", "<eos>")
_BIASES = (100, 84, 68, 54, 42, 32)  # of the tokens that are to come first, second, …
_QUESTION = "Please begin."

# Owner of the model in /v1/models -> setting -> the fields that ask for it.
_NAMES: dict[str, dict[str, Any]] = {
    "stillhouse": {
        "budget": lambda n: {"thinking_budget": n},
        "plain_end": {"empty_answer": "allow"},
        "minimum": lambda n: {"min_thinking_tokens": n},
        "no_thoughts": ({"thinking_budget": 0}, {"reasoning_effort": "none"}),
    },
    "llamacpp": {
        "budget": lambda n: {"thinking_budget_tokens": n, "reasoning_budget_message": "\nTime to answer.\n"},
        "no_thoughts": ({"thinking_budget_tokens": 0}, {"reasoning_effort": "none"}),
    },
    "vllm": {
        "budget": lambda n: {"thinking_token_budget": n},
        "no_thoughts": ({"thinking_token_budget": 0},),
        "resumed": {"continue_final_message": True, "add_generation_prompt": False},
    },
    "sglang": {
        "budget": lambda n: {"custom_params": {"thinking_budget": n}},
        "no_thoughts": ({"reasoning_effort": "none"},),
        "resumed": {"continue_final_message": True},
    },
}
_NAMES["me"] = {  # llama-cpp-python's own server
    "schema": lambda schema: {"response_format": {"type": "json_object", "schema": schema}},
}
_ELSE: dict[str, Any] = {  # a server that we do not know: every name at once, as most ignore what they do not know
    "budget": lambda n: {
        "thinking_budget": n,
        "thinking_token_budget": n,
        "thinking_budget_tokens": n,
        "reasoning_budget": n,
        "reasoning_max_tokens": n,
    },
    "no_thoughts": ({"reasoning_effort": "none"}, {"thinking_budget": 0, "reasoning_budget": 0}),
}
_SWITCH_OFF = {"chat_template_kwargs": {"enable_thinking": False}}


class Fail(Exception):
    """A case is not met; the words say what came back."""


class NotApplicable(Exception):
    """A case says nothing about this server; the words say why."""


def expect(holds: bool, found: str) -> None:
    """Fail the case with what was found, unless the promise holds."""
    if not holds:
        raise Fail(found)


class Target:
    """One server. Raises `UserError` where there is none, or none that speaks OpenAI."""

    def __init__(self, client: Client, model: str | None = None) -> None:
        self.client = client
        entries = self._models()
        entry = next((entry for entry in entries if entry.get("id") == model), None)
        if entry is None and model is not None and entries:
            names = ", ".join(str(entry.get("id")) for entry in entries[:5])
            raise UserError(f"the server has no model {model!r}", f"it has {names}")
        entry = entry or (entries[0] if entries else {})
        self.model: str | None = model or entry.get("id")
        self.owner = str(entry.get("owned_by") or "").replace("_", "").lower()
        meta = entry.get("meta") or {}
        self.backend = str(meta.get("backend") or self.owner or "unknown")
        self.is_scripted = meta.get("backend") == "echo"
        context = entry.get("max_model_len") or meta.get("n_ctx")
        self.context: int | None = context if isinstance(context, int) else None  # tokens, prompt and reply
        self._token_ids = lru_cache(maxsize=None)(self._tokenized)

    def _models(self) -> list[dict[str, Any]]:
        try:
            found = self.client.get("/v1/models")["data"]
            return [entry for entry in found if isinstance(entry, dict)]
        except Refused as refused:
            hint = "give a key with --api-key" if refused.status in (401, 403) else "is this the base URL, up to /v1?"
            raise UserError(f"the server refuses /v1/models: {refused}", hint) from None
        except Broken as broken:
            raise UserError(f"the server cannot be reached: {broken}", "is it running, and at this address?") from None
        except (TypeError, KeyError, AttributeError):
            raise UserError(
                "what answers there is no OpenAI server: its /v1/models is no list", "is this the base URL, up to /v1?"
            ) from None

    # Asking

    def body(self, content: str, **fields: Any) -> dict[str, Any]:
        """A request with one question."""
        return {"model": self.model, "messages": [{"role": "user", "content": content}], **fields}

    def ask(self, content: str, **fields: Any) -> Reply:
        """Ask plainly, and take the reply whole."""
        return self.client.chat(self.body(content, temperature=0, **fields))

    def say(self, script: str, **fields: Any) -> Reply:
        """Have a scripted model say this, whole and streamed; both must come to the same."""
        return self.both(self.scripted(script, **fields))

    def scripted(self, script: str, **fields: Any) -> dict[str, Any]:
        """The request that has a scripted model say this."""
        return self.body(f"script:{script}", temperature=0, **fields)

    def steer(self, *tokens: str, **fields: Any) -> Reply:
        """Have a real model say these tokens, whole and streamed. `NotApplicable` where that cannot be had."""
        return self.both(self.steered(*tokens, **fields))

    def steered(self, *tokens: str, **fields: Any) -> dict[str, Any]:
        """The request that has a real model say these tokens, each once."""
        bias = {str(self.token_id(token)): weight for token, weight in zip(tokens, _BIASES[: len(tokens)], strict=True)}
        return self.body(
            _QUESTION,
            **{
                "temperature": 0,
                "logit_bias": bias,
                "repetition_penalty": 10,
                "repeat_penalty": 10,  # llama.cpp's name for it
                # Ours: count what was thought, or the tag would be said again; the default is what case 33 asks about.
                "penalty_scope": "all",
                "max_tokens": 64,
            }
            | fields,
        )

    def insisted(self, token: str, **fields: Any) -> dict[str, Any]:
        """The request that has a real model say one token over and over."""
        return self.body(_QUESTION, temperature=0, logit_bias={str(self.token_id(token)): 100}, **fields)

    def both(self, body: dict[str, Any]) -> Reply:
        """The same request whole and streamed. Fails the case where the two differ; gives the streamed one's chunks."""
        whole, streamed = self.client.chat(body), self.client.chat_streamed(body)
        for name in ("reasoning", "content", "finish", "closed_by"):
            one, other = getattr(whole, name), getattr(streamed, name)
            expect(one == other, f"{name} differs: {one!r:.40} whole, {other!r:.40} streamed")
        whole.chunks, whole.done = streamed.chunks, streamed.done
        return whole

    # What it has

    def setting(self, name: str, *value: Any) -> dict[str, Any] | None:
        """The fields that ask this server for something; `None` where it has no name for it."""
        fields: Any = _NAMES.get(self.owner, _ELSE).get(name)
        return cast("dict[str, Any] | None", fields(*value) if callable(fields) else fields)

    def schema(self, schema: dict[str, Any]) -> dict[str, Any]:
        """The fields that hold the answer to a JSON schema: OpenAI's, unless the server has others."""
        openai = {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": schema}}
        return self.setting("schema", schema) or {"response_format": openai}

    def budget(self, tokens: int) -> dict[str, Any]:
        """The fields for a thinking budget; `NotApplicable` where budgets do nothing here (case 18 fails for it)."""
        self.need_thinking()
        if not self.is_scripted and not self.budget_works:
            raise NotApplicable("it has no thinking budget (case 18)")
        return self.setting("budget", tokens) or {}

    @property
    def ways_without_thoughts(self) -> list[dict[str, Any]]:
        """Every documented way to ask for no thoughts."""
        return [*_NAMES.get(self.owner, _ELSE).get("no_thoughts", ()), _SWITCH_OFF]

    @cached_property
    def budget_works(self) -> bool:
        """Whether a small budget makes an answer come."""
        fields = self.setting("budget", 12)
        if not fields or not self.thinks:
            return False
        try:
            reply = self.ask("Prove that there are infinitely many primes.", max_tokens=72, **fields)
        except Refused:
            return False
        return bool(reply.reasoning and reply.content)

    @cached_property
    def thinks(self) -> bool:
        """Whether thoughts can be seen at all: in their own field, or as tags in the answer."""
        return self.is_scripted or self.splits is not None

    @cached_property
    def splits(self) -> bool | None:
        """Whether thoughts come apart from the answer; `None` where there are none to be seen."""
        if self.is_scripted:
            return True
        seen = [self.ask(_QUESTION, max_tokens=48)]
        for opener in ((), (OPEN,)):
            with suppress(NotApplicable):
                seen.append(self.client.chat(self.steered(*opener, " two", CLOSE, " four", END)))
        if any(reply.reasoning for reply in seen):
            return True
        return False if any(tag in reply.content for reply in seen for tag in (OPEN, CLOSE)) else None

    @cached_property
    def prompt_opens(self) -> bool | None:
        """Whether the template opens the thoughts; `None` where that cannot be found out."""
        if self.is_scripted:
            return True
        try:
            if "two" in self.client.chat(self.steered(" two", CLOSE, " four", END)).reasoning:
                return True
            return False if "two" in self.client.chat(self.steered(OPEN, " two", CLOSE, END)).reasoning else None
        except NotApplicable:
            return None

    def need_thinking(self) -> None:
        """Raises `NotApplicable` where the model does not think."""
        if not self.thinks:
            raise NotApplicable("no thoughts to be seen: this model does not think")

    def need_thoughts(self) -> None:
        """The same, and fails the case where thoughts are not set apart."""
        self.need_thinking()
        expect(self.splits is True, "thoughts and tags stand in content; they are not set apart")

    # Tokens

    @cached_property
    def end_token(self) -> str | None:
        """The text of the token that ends a turn, if it is a known one."""
        return next((name for name in _END_NAMES if len(self._token_ids(name)) == 1), None)

    def token_id(self, text: str) -> int:
        """The one token of a text. `NotApplicable` where there is no such token, or no way to ask."""
        ids = self._token_ids(self.end_token or "") if text == END else self._token_ids(text)
        if len(ids) != 1:
            raise NotApplicable(f"its vocabulary has no single token for {text!r}")
        return ids[0]

    def pieces(self, text: str) -> tuple[int, ...]:
        """The tokens of a text. `NotApplicable` where there is no way to ask."""
        return self._token_ids(text)

    def _tokenized(self, text: str) -> tuple[int, ...]:
        ids, empty = self._ask_tokens(text), self._ask_tokens("")
        return ids[len(empty) :] if empty and ids[: len(empty)] == empty else ids

    def _ask_tokens(self, text: str) -> tuple[int, ...]:
        for path, body in (
            ("/tokenize", {"content": text, "prompt": text, "add_special_tokens": False, "model": self.model}),
            ("/extras/tokenize", {"input": text}),
        ):
            try:
                return tuple(self.client.post(path, body)["tokens"])
            except (Refused, KeyError, TypeError):
                continue
        raise NotApplicable("it cannot be made to say this: the server tells no token ids")
