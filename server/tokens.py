"""`/v1/models`, `/tokenize` and `/detokenize`: what the model is, and how it reads text."""

from __future__ import annotations

from typing import Any

from .errors import ApiError
from .model import ServedModel
from .schema import DetokenizeRequest, TokenizeRequest
from .surface import check_model, token_text
from .upstream_model import AnyModel, UpstreamModel

__all__ = ["check_model", "detokenize", "model_json", "tokenize"]


def model_json(model: AnyModel) -> dict[str, Any]:
    """One entry of `/v1/models`."""
    meta: dict[str, Any] = {"backend": "openai"}
    if isinstance(model, ServedModel):
        meta = {
            "backend": model.engine.backend.name,
            "source": model.source,
            "vocabulary": model.vocabulary.size,
            "thinks": model.template.can_think,
        }
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "stillhouse",
        "max_model_len": model.context_length,
        "meta": meta,
    }


def tokenize(model: AnyModel, body: TokenizeRequest) -> dict[str, Any]:
    """Token ids of a text (control tokens in it count as such) or of a conversation as the model would read it."""
    model = _with_tokens(model, body.model)
    text = body.content if body.content is not None else body.prompt
    if (text is None) == (body.messages is None):
        raise ApiError(400, "give either content (a text) or messages (a conversation)", param="content")
    if body.messages is not None:
        prompt = model.template.render([message.message() for message in body.messages])
        ids = prompt.encode(model.vocabulary.encode, model.vocabulary.bos_id)
    else:
        ids = model.vocabulary.encode(text or "")
    reply: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": model.context_length}
    if body.with_pieces:
        reply["pieces"] = [token_text(model, token_id) for token_id in ids]
    return reply


def detokenize(model: AnyModel, body: DetokenizeRequest) -> dict[str, Any]:
    """The text of token ids."""
    model = _with_tokens(model, body.model)
    last = model.vocabulary.size - 1
    for token_id in body.tokens:
        if token_id > last:
            raise ApiError(400, f"tokens: there is no token {token_id}; the last is {last}", param="tokens")
    text = b"".join(model.vocabulary.piece(token_id) for token_id in body.tokens).decode(errors="replace")
    return {"content": text, "prompt": text}


def _with_tokens(model: AnyModel, name: str | None) -> ServedModel:
    check_model(model, name)
    if isinstance(model, UpstreamModel):
        raise ApiError(404, "this server's model is served by upstreams; only they know its tokens", code="no_tokens")
    return model
