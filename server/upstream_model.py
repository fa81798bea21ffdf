"""A model that upstreams serve: what of a request they are asked, what is kept to here, and what is refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..r1.errors import UserError
from ..r1.thinking import Rules, Tags, Thinking
from .errors import ApiError
from .model import Named, ServedModel
from .reply import BOUNDLESS, Ask
from .schema import ChatRequest, CompletionRequest, FormFields, ReasoningFields, SamplingFields
from .upstream import Upstream
from .upstream_pool import Upstreams, beginnings, blocks
from .upstream_reply import TAGS, UpstreamRequest

_STREAMED = {"stream": True, "stream_options": {"include_usage": True}}
_OURS = frozenset({"model", "n", "max_tokens", "max_completion_tokens", "stream", "stream_options"})  # asked anew
_STOPS = frozenset({"stop", "stop_scope"})
_RULES = frozenset(ReasoningFields.model_fields) - {"chat_template_kwargs", "reasoning_effort"}
_FORMS = frozenset(FormFields.model_fields)
_UNPROMISED = {  # field of a chat -> why no server but a Stillhouse keeps it
    "min_thinking_tokens": "nothing keeps an upstream from closing its thoughts",
    "penalty_scope": "an upstream's penalties count what they count",
    "preserve_thinking": "the upstream's template decides",
    **dict.fromkeys(sorted(_FORMS - {"response_format"}), "it is not in OpenAI's protocol; say response_format"),
}
_BY_CUTTING = ("thinking_budget", "answer_reserve_tokens", "break_loops", "empty_answer")


@dataclass(frozen=True, kw_only=True)
class UpstreamModel(Named):
    """What upstreams serve, under our name for it."""

    engine: Upstreams

    @property
    def tags(self) -> Tags:
        """The thinking tags, as text."""
        return TAGS

    @property
    def context_length(self) -> int | None:
        """Tokens, prompt and reply together, where the upstreams tell."""
        return self.engine.context_length


AnyModel = ServedModel | UpstreamModel
"""What a surface may be asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamAsk(Ask):
    """A request for upstreams."""

    path: str
    body: Mapping[str, Any]
    prefix: Sequence[tuple[bytes, int]]
    continues: bool  # whether its thoughts may be closed by force, and the answer asked for anew
    keeps_rules: bool = False  # here, and not upstream
    no_thoughts: bool = False

    @property
    def can_cut(self) -> bool:
        """Where the upstream can go on with a reply that was cut."""
        return self.continues

    @property
    def prompt_tokens(self) -> None:
        """Only the upstream counts them."""
        return None

    def room(self, context_length: int | None) -> int:
        """What is asked for, or the whole context: how much of it the prompt takes is not known here."""
        return (self.max_tokens or context_length or BOUNDLESS) if self.keeps_rules else BOUNDLESS

    def request(self, request_id: str, index: int, room: int, steer: Thinking) -> UpstreamRequest:
        """As upstreams are asked for it; every one of `n` draws by a seed of its own."""
        seed = self.body.get("seed")
        return UpstreamRequest(
            id=request_id,
            path=self.path,
            body=dict(self.body) if seed is None else {**self.body, "seed": seed + index},
            steer=steer,
            max_tokens=self.max_tokens,
            prefix=self.prefix,
            can_cut=self.can_cut,
            no_thoughts=self.no_thoughts,
        )


def connect(
    model: str | None, urls: Sequence[str], *, key: str | None, parallel: int, silence_s: float, alias: str | None
) -> tuple[UpstreamModel, list[str]]:
    """Find upstreams and what they serve; also the troubles of those that are down. Raises `UserError`."""
    members = [Upstream(url, model=model, key=key, silence_s=silence_s) for url in urls]
    if len({upstream.url for upstream in members}) < len(members):
        raise UserError("an upstream is named twice", "each --upstream takes another URL")
    upstreams = Upstreams(members, parallel)
    troubles = upstreams.probe()
    (name,) = {upstream.traits.model for upstream in members if upstream.traits}
    source = f"{len(members)} upstreams" if len(members) > 1 else f"upstream {members[0].name}"
    aliases = frozenset({name} | ({model} if model else set()))
    return UpstreamModel(name=alias or name, aliases=aliases, source=source, engine=upstreams), troubles


def upstream_chat_ask(model: UpstreamModel, body: ChatRequest) -> Ask:
    """What of a chat the upstreams are asked, and what is kept to here. Raises 400 where neither can be."""
    upstreams = model.engine
    body_json = _fields(body)
    max_tokens = body.max_completion_tokens or body.max_tokens
    is_formed = bool(body.form or body.tool_use)
    can_cut = upstreams.can_continue and not is_formed
    _refuse_logprobs(body_json)
    own: frozenset[str] = _RULES | _STOPS
    rules = _passive_rules(body)
    no_thoughts = False
    if upstreams.are_ours:
        own = frozenset({"reasoning_format"})
    else:
        _check(body, body_json, can_cut=can_cut, is_formed=is_formed)
        rules = _rules(body, can_cut)
        no_thoughts = can_cut and body.budget == 0
        if can_cut:
            own |= {"reasoning_effort"}
    asked = {key: value for key, value in body_json.items() if key not in own} | _STREAMED
    if max_tokens is not None:
        asked["max_tokens"] = max_tokens
    return UpstreamAsk(
        state="answering" if no_thoughts else "undecided",
        rules=rules,
        max_tokens=max_tokens,
        n=body.n or 1,
        path="/v1/chat/completions",
        body=asked,
        prefix=beginnings(map(str, [*asked.get("tools", ()), *asked["messages"]])),
        continues=can_cut,
        keeps_rules=can_cut and not upstreams.are_ours,
        no_thoughts=no_thoughts,
    )


def upstream_completion_ask(model: UpstreamModel, body: CompletionRequest, max_tokens: int) -> Ask:
    """What of a text completion the upstreams are asked."""
    body_json = _fields(body)
    _refuse_logprobs(body_json)
    if body.echo and not isinstance(body.prompt, str):
        raise ApiError(400, "echo: a prompt of token ids is text to its upstream only; leave it out", param="echo")
    asked = {key: value for key, value in body_json.items() if key not in ("echo", "stop")} | _STREAMED
    return UpstreamAsk(
        state="answering",
        rules=_passive_rules(body),
        max_tokens=max_tokens,
        n=body.n or 1,
        path="/v1/completions",
        body=asked | {"max_tokens": max_tokens},
        prefix=beginnings(blocks(str(body.prompt))),
        continues=False,
    )


def _fields(body: SamplingFields) -> dict[str, Any]:
    """What the caller has said, as it is said to an upstream."""
    said = body.model_dump(mode="json", by_alias=True, exclude_none=True)
    return {key: value for key, value in said.items() if key not in _OURS}


def _check(body: ChatRequest, said: Mapping[str, Any], *, can_cut: bool, is_formed: bool) -> None:
    """Refuse what no upstream but a Stillhouse can be made to do."""
    for name, why in _UNPROMISED.items():
        if said.get(name) not in (None, False):
            raise ApiError(400, f"{name}: can't be promised through an upstream: {why}", param=name)
    if body.messages[-1].role == "assistant":
        words = "messages: can't be promised through an upstream: to go on with an assistant's message"
        raise ApiError(400, words, param="messages")
    for name in _BY_CUTTING:
        if not can_cut and said.get(name) not in (None, False, "allow"):
            why = "a reply with tools or a form is not cut" if is_formed else "it can't go on with a reply that was cut"
            raise ApiError(400, f"{name}: can't be promised through this upstream: {why}", param=name)


def _rules(body: ChatRequest, can_cut: bool) -> Rules:
    return Rules(
        budget=(body.budget or None) if can_cut else None,
        reserve=body.answer_reserve_tokens if can_cut else 0,
        break_loops=can_cut and body.break_loops is not False,
        want_answer=can_cut and body.empty_answer != "allow",
        inline=body.reasoning_format == "inline",
        stops=body.stops,
        stop_scope=body.stop_scope or "answer",
    )


def _passive_rules(body: SamplingFields) -> Rules:
    """Rules that leave everything to the upstream but how the thoughts are told, and a raw text's stop strings."""
    is_chat = isinstance(body, ChatRequest)
    return Rules(
        reserve=0,
        break_loops=False,
        want_answer=False,
        inline=isinstance(body, ChatRequest) and body.reasoning_format == "inline",
        stops=() if is_chat else body.stops,
    )


def _refuse_logprobs(said: Mapping[str, Any]) -> None:
    if said.get("logprobs") not in (None, False):
        words = "logprobs: can't be promised through an upstream: its tokens are its own"
        raise ApiError(400, words, param="logprobs")
