"""What the surfaces share: from a request's fields to an `Ask`, and the pieces of replies that look alike."""

from __future__ import annotations

import math
from typing import Any

from ..backends.base import PromptTooLong, Sampling
from ..r1.errors import BadForm
from ..r1.grammar import Form
from ..r1.split import State
from ..r1.thinking import Rules
from ..r1.tools import BadTool, Format, form_of_calls
from .errors import ApiError
from .model import Named, ServedModel
from .reply import EngineAsk, LogProb, Usage
from .schema import ChatRequest, SamplingFields


def check_model(model: Named, name: str | None) -> None:
    """Refuse a model that is not the one being served."""
    if not model.answers_to(name):
        raise ApiError(
            404,
            f"the model {name!r} is not served here; this is {model.name!r}",
            code="model_not_found",
            param="model",
        )


def ask_for(
    model: ServedModel,
    body: SamplingFields,
    prompt_ids: list[int],
    state: State,
    *,
    max_tokens: int | None,
    top_logprobs: int | None,
    rules: Rules,
    form: Form | None = None,
    begun: str = "",
    calls: Format | None = None,
) -> EngineAsk:
    """Put a request together for the engine. Raises where its prompt or its numbers cannot be."""
    if not prompt_ids:
        raise ApiError(400, "the prompt is empty", param="prompt")
    if len(prompt_ids) >= model.context_length:
        error = PromptTooLong(len(prompt_ids), model.context_length - 1)
        param = "messages" if isinstance(body, ChatRequest) else "prompt"
        raise ApiError(400, str(error), code="context_length_exceeded", param=param)
    return EngineAsk(
        prompt_ids=prompt_ids,
        state=state,
        sampling=_sampling(model, body),
        rules=rules,
        max_tokens=max_tokens,
        n=body.n or 1,
        top_logprobs=top_logprobs,
        ignore_eos=bool(body.ignore_eos),
        form=form,
        begun=begun,
        calls=calls,
    )


def check_calls(body: ChatRequest) -> None:
    """Refuse results of calls that nobody made."""
    made: set[str] = set()
    for index, message in enumerate(body.messages):
        made.update(call.id for call in message.tool_calls or ())
        param, words = f"messages.{index}.tool_call_id", ""
        if message.tool_calls and message.role != "assistant":
            param, words = f"messages.{index}.tool_calls", ": only an assistant's turn makes calls"
        elif message.role == "tool" and message.tool_call_id is None:
            words = " is required: it tells whose result this is"
        elif message.role == "tool" and message.tool_call_id not in made:
            words = f": no assistant's turn before it has a call with the id {message.tool_call_id!r}"
        if words:
            raise ApiError(400, param + words, param=param, code="invalid_value")


def form_of(model: ServedModel, body: ChatRequest) -> Form | None:
    """The form that a request wants its answers in, compiled. Raises 400 and names the part that can't be kept."""
    asked, use = body.form, body.tool_use
    if asked and use and not use.must_call and asked.kind != "json_schema":
        raise ApiError(400, f"{asked.param}: can't be kept beside tools; a JSON schema can", param=asked.param)
    try:
        form = model.grammars.compile(asked.kind, asked.text) if asked else None
    except BadForm as error:
        raise _bad_form(asked.param if asked else "", error.part, error) from None
    if use is None:
        return form
    schema = asked.text if asked else None
    try:
        return form_of_calls(use, model.call_format, model.grammars, model.vocabulary.control, schema)
    except BadTool as error:
        raise _bad_form(
            f"tools.{body.place_of(use.tools[error.index])}.function.parameters", error.part, error
        ) from None
    except BadForm as error:
        raise _bad_form("tools", "", error) from None


def _bad_form(param: str, part: str, error: Exception) -> ApiError:
    param = f"{param}.{part}" if part else param
    return ApiError(400, f"{param}: {error}", param=param, code="invalid_value")


def usage_json(usage: Usage) -> dict[str, Any]:
    """OpenAI's `usage`."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def logprob_json(model: ServedModel, entry: LogProb) -> dict[str, Any]:
    """One entry of OpenAI's `logprobs.content`."""
    return _token_json(model, entry.token_id, entry.logprob) | {
        "top_logprobs": [_token_json(model, token_id, logprob) for token_id, logprob in entry.top]
    }


def token_text(model: ServedModel, token_id: int) -> str:
    """A token as text, for showing: half a character is U+FFFD."""
    return model.vocabulary.piece(token_id).decode(errors="replace")


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold: minus infinity becomes -9999, as vLLM has it."""
    return logprob if math.isfinite(logprob) else -9999.0


def _token_json(model: ServedModel, token_id: int, logprob: float) -> dict[str, Any]:
    piece = model.vocabulary.piece(token_id)
    return {"token": piece.decode(errors="replace"), "logprob": finite(logprob), "bytes": list(piece)}


def _sampling(model: ServedModel, body: SamplingFields) -> Sampling:
    bias = tuple((int(token_id), value) for token_id, value in (body.logit_bias or {}).items())
    for token_id, _ in bias:
        if token_id >= model.vocabulary.size:
            raise ApiError(
                400,
                f"logit_bias: there is no token {token_id}; the last is {model.vocabulary.size - 1}",
                param="logit_bias",
            )
    chosen = {
        "temperature": body.temperature if body.temperature is not None else model.advice.temperature,
        "top_p": body.top_p if body.top_p is not None else model.advice.top_p,
        "top_k": None if body.top_k is None else max(0, body.top_k),
        "repetition_penalty": body.repetition_penalty or body.repeat_penalty,
    }
    for field in (
        "min_p",
        "typical_p",
        "presence_penalty",
        "frequency_penalty",
        "penalty_last_n",
        "dry_multiplier",
        "dry_base",
        "dry_allowed_length",
        "dry_penalty_last_n",
        "xtc_probability",
        "xtc_threshold",
        "seed",
    ):
        chosen[field] = getattr(body, field)
    return Sampling(logit_bias=bias, **{field: value for field, value in chosen.items() if value is not None})
