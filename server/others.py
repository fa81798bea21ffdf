"""Fields that clients send to other servers, and that change the answer there: refused by name, with what to say here.

Nothing that changes an answer is ignored silently. A value that asks for nothing (false, 0, an empty list) passes, and
so does whatever only tells how a request is billed, stored, routed or cached.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_BUDGET = "say thinking_budget"
_TEMPLATE = "serve with --chat-template"
_RAW = "there is nothing like it here; leave it out"

REFUSED: dict[str, str] = {  # field -> what to do instead
    # OpenAI's
    "web_search_options": "nothing is searched here; give what it should know as text",
    "verbosity": "ask for a short or a long answer in the messages",
    "reasoning": "say reasoning_effort or thinking_budget",
    "text": "say response_format",
    "input": "say messages",
    "instructions": "say a system message",
    "previous_response_id": "send the whole conversation as messages",
    # Anthropic's, DeepSeek's, Qwen's
    "thinking": "say thinking_budget or reasoning_effort",
    "thinking_token_budget": _BUDGET,
    "thinking_budget_tokens": _BUDGET,
    "max_thinking_tokens": _BUDGET,
    "reasoning_budget": _BUDGET,
    "system": "say a system message",
    "stop_sequences": "say stop",
    # vLLM's
    "use_beam_search": _RAW,
    "length_penalty": _RAW,
    "stop_token_ids": "say stop, with their text",
    "include_stop_str_in_output": "a stop string is never part of the reply",
    "min_tokens": _RAW,
    "truncate_prompt_tokens": "shorten the conversation",
    "prompt_logprobs": "log-probabilities of a prompt are not served",
    "allowed_token_ids": "say choice, regex or grammar",
    "bad_words": "say logit_bias",
    "documents": "give them as text in the messages",
    "chat_template": _TEMPLATE,
    "mm_processor_kwargs": "this model reads text only",
    "guided_json_object": "say response_format",
    "guided_whitespace_pattern": _RAW,
    "structural_tag": "say tools or grammar",
    "return_token_ids": "POST /tokenize tells them",
    "return_tokens_as_token_ids": "POST /tokenize tells them",
    "logits_processors": _RAW,
    "add_special_tokens": "the template decides which tokens begin a prompt",
    "thinking_mode": _BUDGET,
    # llama-server's
    "json_schema": "say response_format",
    "n_predict": "say max_tokens",
    "n_probs": "say logprobs and top_logprobs",
    "samplers": "the order is fixed; docs/sampling.md tells it",
    "mirostat": _RAW,
    "dynatemp_range": _RAW,
    "repeat_last_n": "say penalty_last_n",
    "dry_sequence_breakers": _RAW,
    "t_max_predict_ms": "say max_tokens",
    "image_data": "this model reads text only",
    "lora": "serve with --lora",
    "post_sampling_probs": "log-probabilities are the model's own, before sampling",
    # Ollama's
    "options": "say its fields at the top level: temperature, top_p, …",
    "think": "say reasoning_effort or thinking_budget",
    "format": "say response_format",
    "template": _TEMPLATE,
    "images": "this model reads text only",
}
MUST_BE_TRUE: dict[str, str] = {  # field -> what to do instead where it is false
    "enable_thinking": 'say thinking_budget 0, or chat_template_kwargs {"enable_thinking": false}',
    "include_reasoning": "say reasoning_format hidden",
    "separate_reasoning": "say reasoning_format inline",
    "skip_special_tokens": "control tokens are never shown",
    "spaces_between_special_tokens": _RAW,
}
HARMLESS = (  # accepted; no answer depends on them
    *("metadata", "store", "service_tier", "prediction", "prompt_cache_key", "prompt_cache_retention"),
    *("safety_identifier", "user", "priority", "request_id", "cache_salt", "cache_prompt", "id_slot", "keep_alive"),
    *("guided_decoding_backend", "timings_per_token", "return_progress", "stream_reasoning", "mirostat_tau"),
    *("mirostat_eta", "dynatemp_exponent", "early_stopping"),
)


def refuse(extra: dict[str, Any] | None, elsewhere: Mapping[str, str]) -> None:
    """Raise a `ValueError` for the first of the unlisted fields that would change the answer; forget the others.

    `elsewhere` has more of these, which another path serves: field -> what to do instead.
    """
    refused = REFUSED | dict(elsewhere)
    complaint = next(filter(None, (_complaint(name, value, refused) for name, value in (extra or {}).items())), None)
    if complaint:
        raise ValueError(complaint)
    if extra:
        extra.clear()


def _complaint(name: str, value: Any, refused: Mapping[str, str]) -> str | None:
    if name in MUST_BE_TRUE and value is False:
        return f"{name}: can't be false here; {MUST_BE_TRUE[name]}"
    if name in refused and not _asks_for_nothing(name, value):
        return f"{name}: not served; {refused[name]}"
    return None


_NEUTRAL: Mapping[str, Any] = {"verbosity": "medium", "length_penalty": 1, "best_of": 1, "n_predict": -1}


def _asks_for_nothing(name: str, value: Any) -> bool:
    return not value or value == _NEUTRAL.get(name)
