"""A Hugging Face tokenizer as GGUF keys: tokens and their kinds, merges, special ids, chat template, pre-tokenizer.

llama.cpp cuts text into words by rules that are compiled into it; `tokenizer.ggml.pre` names one set of them. Which one
a tokenizer needs is found in three ways: by the hash of what it makes of the text that llama.cpp's converter uses, with
its begin-of-sequence token and without; then by the words of its own pre-tokenizer. It knows byte-level BPE, which all
R1 distills have. Source: llama.cpp's converter (conversion/base.py, gguf-py's vocab.py).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .architectures import Metadata
from .errors import SourceInvalid
from .source import read_json

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # tokenizer.ggml.token_type
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
KEYS = {"unk": "unknown", "sep": "seperator", "pad": "padding"}  # GGUF's own spelling

PROBE = (  # word for word what llama.cpp's converter encodes
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 "
    "3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ "
    "------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? "
    "'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)
HASHES = {  # SHA-256 of str(ids of PROBE) -> llama.cpp's name
    "b3f499bb4255f8ca19fccd664443283318f2fd2414d5e0b040fbdd0cc195d6c5": "deepseek-r1-qwen",
    "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2",
    "d4540891389ea895b53b399da6ac824becc30f2fba0e9ddbb98f92e55ca0e97c": "qwen2",
    "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5": "llama-bpe",
    "c136ed14d01c2745d4f60a9596ae66800e2b61fa45643e72436041855ad4089d": "smaug-bpe",
    "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249": "smollm",
    "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454": "gpt-2",
}
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SHAPES: dict[tuple[Any, ...], str] = {  # (steps of the pre-tokenizer, ignore_merges) -> llama.cpp's name
    ((("Split", _WORDS % "", "Isolated"), ("ByteLevel", False)), False): "qwen2",
    ((("Split", _WORDS % "{1,3}", "Isolated"), ("ByteLevel", False)), True): "llama-bpe",
    ((("Split", _WORDS % "{1,3}", "Isolated"), ("ByteLevel", False)), False): "smaug-bpe",
    ((("Digits", True), ("ByteLevel", True)), False): "smollm",
    ((("ByteLevel", True),), False): "gpt-2",
}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a GGUF file needs to know of a tokenizer."""

    metadata: Metadata
    pre: str  # "deepseek-r1-qwen"
    pre_by: Literal["hash", "hash without BOS", "pre-tokenizer", "option"]


def read_vocabulary(folder: Path, size: int, pre: str = "") -> Vocabulary:
    """The tokenizer of a checkpoint whose embedding has `size` rows; `pre` is taken unseen where it is given."""
    if not (folder / "tokenizer.json").is_file():
        raise SourceInvalid(
            f"{folder} has no tokenizer.json",
            "let transformers write it: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)",
        )
    tokenizer = read_json(folder / "tokenizer.json")
    options = folder / "tokenizer_config.json"
    config = read_json(options) if options.is_file() else {}
    model = tokenizer.get("model") or {}
    if (
        model.get("type") != "BPE"
        or model.get("byte_fallback")
        or (tokenizer.get("decoder") or {}).get("type") != "ByteLevel"
    ):
        raise SourceInvalid(
            f"the tokenizer in {folder} is not a byte-level BPE ({model.get('type') or 'of an unknown type'})",
            "llama.cpp's convert_hf_to_gguf.py may know it; quantize the GGUF file it writes",
        )
    added = _added_tokens(tokenizer, config)
    tokens, kinds = _tokens(model["vocab"], added, size)
    by: Literal["hash", "hash without BOS", "pre-tokenizer", "option"] = "option"
    if not pre:
        pre, by = _find_pre(folder, tokenizer)
    metadata: Metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [_merge(merge) for merge in model["merges"]],
    }
    network = read_json(folder / "config.json")
    metadata |= _special_ids(config, network, added)
    metadata |= _added_to_prompts(tokenizer, config)
    metadata |= _templates(folder, config)
    return Vocabulary({key: value for key, value in metadata.items() if value != []}, pre, by)


def _added_tokens(tokenizer: dict[str, Any], config: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The tokens beside the trained ones, by id; what tokenizer_config.json says of one counts more."""
    found = {int(token["id"]): token for token in tokenizer.get("added_tokens") or ()}
    for number, token in (config.get("added_tokens_decoder") or {}).items():
        if isinstance(token, dict) and "content" in token:
            found[int(number)] = {**found.get(int(number), {}), **token}
    return found


def _tokens(trained: dict[str, int], added: dict[int, dict[str, Any]], size: int) -> tuple[list[str], list[int]]:
    texts = {number: text for text, number in trained.items()}
    kinds = dict.fromkeys(texts, NORMAL)
    for number, token in added.items():
        text = token["content"]
        is_control = token.get("special") or _looks_special(text)
        texts[number] = text if is_control else text.replace("▁", " ")
        kinds[number] = CONTROL if is_control else USER_DEFINED
    highest = max(texts, default=0)
    if highest >= size:
        raise SourceInvalid(
            f"the tokenizer has the token {texts[highest]!r} with id {highest}, and the model has {size} tokens",
            "the tokenizer is another model's, or the embedding was not resized after adding tokens",
        )
    return (
        [texts.get(number, f"[PAD{number}]") for number in range(size)],
        [kinds.get(number, UNUSED) for number in range(size)],
    )


def _looks_special(text: str) -> bool:
    """Some models forget to say that a token controls."""
    bars = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or any(
        text.startswith(start) and text.endswith(end) for start, end in bars
    )


def _merge(merge: str | list[str]) -> str:
    """Two parts, joined by a space; a space inside of one is written as GPT-2 writes bytes."""
    if isinstance(merge, str):
        return merge
    return " ".join(part.replace(" ", "Ġ") for part in merge)


def _special_ids(config: dict[str, Any], network: dict[str, Any], added: dict[int, dict[str, Any]]) -> Metadata:
    ids = {token["content"]: number for number, token in sorted(added.items(), reverse=True)}
    found: dict[str, int] = {}
    for role in ROLES:
        token = config.get(f"{role}_token")
        text = token.get("content") if isinstance(token, dict) else token
        number = ids.get(text) if isinstance(text, str) else None
        if number is not None:
            found[role] = number
    for role in ROLES:
        number = network.get(f"{role}_token_id")
        if isinstance(number, int) and number >= 0:
            found.setdefault(role, number)
    return {f"tokenizer.ggml.{KEYS.get(role, role)}_token_id": number for role, number in found.items()}


def _added_to_prompts(tokenizer: dict[str, Any], config: dict[str, Any]) -> Metadata:
    """Whether a prompt gets a begin- and an end-of-sequence token; the post-processor knows better than the options."""
    flags: dict[str, bool] = {}
    texts = {role: config.get(f"{role}_token") for role in ROLES}
    texts = {role: token.get("content") if isinstance(token, dict) else token for role, token in texts.items()}
    processor = tokenizer.get("post_processor") or {}
    for step in processor.get("processors", [processor]):
        if step.get("type") == "ByteLevel":
            flags.setdefault("bos", False)
            flags.setdefault("eos", False)
        single = step.get("single") or [] if step.get("type") == "TemplateProcessing" else []
        if len(single) > 1:
            first = single[0].get("SpecialToken", {}).get("id")
            last = single[-1].get("SpecialToken", {}).get("id")
            if first:
                flags["bos"] = not config or first in (texts["bos"], texts["cls"])
            if last:
                flags["eos"] = not config or last == texts["eos"]
            between = [part.get("SpecialToken", {}).get("id") for part in _between(step.get("pair") or [])]
            if between:
                flags["sep"] = not last and between[0] is not None and between[0] in (texts["sep"], texts["eos"])
    for role in ROLES:
        if isinstance(config.get(f"add_{role}_token"), bool):
            flags.setdefault(role, config[f"add_{role}_token"])
    return {f"tokenizer.ggml.add_{role}_token": flag for role, flag in flags.items() if role in ("bos", "eos", "sep")}


def _between(pair: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a template for two sequences puts between them."""
    places = [i for i, part in enumerate(pair) if "Sequence" in part]
    return pair[places[0] + 1 : places[-1]] if places else []


def _templates(folder: Path, config: dict[str, Any]) -> Metadata:
    """The chat template, and others by name where there are some."""
    jinja, old = folder / "chat_template.jinja", folder / "chat_template.json"
    template: Any = config.get("chat_template")
    if jinja.is_file():
        template = jinja.read_text(encoding="utf-8")
        others = sorted((folder / "additional_chat_templates").glob("*.jinja"))
        if others:
            named = [{"name": path.stem, "template": path.read_text(encoding="utf-8")} for path in others]
            template = [{"name": "default", "template": template}, *named]
    elif template is None and old.is_file():
        template = read_json(old).get("chat_template")
    if isinstance(template, str):
        return {"tokenizer.chat_template": template} if template else {}
    found: Metadata = {}
    for choice in template or ():
        name = "".join(c if c.isascii() and c.isalnum() else "_" for c in choice.get("name", ""))
        key = "tokenizer.chat_template" + ("" if name == "default" else f".{name}")
        if name and choice.get("template"):
            found[key] = choice["template"]
    names = sorted(key.rpartition(".")[2] for key in found if key != "tokenizer.chat_template")
    return {"tokenizer.chat_templates": names, **found}


def _find_pre(
    folder: Path, tokenizer: dict[str, Any]
) -> tuple[str, Literal["hash", "hash without BOS", "pre-tokenizer"]]:
    from tokenizers import Tokenizer

    try:
        loaded = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises nothing more precise
        raise SourceInvalid(
            f"{folder / 'tokenizer.json'} cannot be read: {error}", "copy it from the hub again"
        ) from None
    for with_bos in (True, False):
        ids = loaded.encode(PROBE, add_special_tokens=with_bos).ids
        known = HASHES.get(hashlib.sha256(str(ids).encode()).hexdigest())
        if known:
            return known, "hash" if with_bos else "hash without BOS"
    pre = SHAPES.get((_steps(tokenizer.get("pre_tokenizer") or {}), bool(tokenizer["model"].get("ignore_merges"))))
    if pre is None:
        raise SourceInvalid(
            "no pre-tokenizer of llama.cpp is known to cut words as this tokenizer does",
            "if you know which one does, name it with --tokenizer-pre (qwen2, llama-bpe, …); `stillhouse verify` tells "
            "whether it was right",
        )
    return pre, "pre-tokenizer"


def _steps(pre: dict[str, Any]) -> tuple[Any, ...]:
    """What a pre-tokenizer does, without what changes no word."""
    if pre.get("type") == "Sequence":
        return tuple(step for part in pre.get("pretokenizers", ()) for step in _steps(part))
    if pre.get("type") == "Split" and not pre.get("invert"):
        return (("Split", (pre.get("pattern") or {}).get("Regex"), pre.get("behavior")),)
    if pre.get("type") == "ByteLevel" and not pre.get("add_prefix_space"):
        return (("ByteLevel", pre.get("use_regex", True)),)
    if pre.get("type") == "Digits":
        return (("Digits", pre.get("individual_digits", False)),)
    return (("unknown", str(pre)),)
