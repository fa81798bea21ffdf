"""The vocabulary of a checkpoint folder: its `tokenizer.json`, and what the files beside it say of begin and end.

Text and control tokens are taken apart here: plain text goes to a tokenizer that knows no control token, so that no
normalization can make one of it. Knows nothing of any runtime; the PyTorch and MLX backends share it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..r1.errors import BadModelFile

# Ends of turn and of text that checkpoints do not always list among their `eos_token_id`; llama.cpp's list, as far as
# the families go that are served from folders.
_ENDS = (
    "<|endoftext|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|end|>",
    "<｜end▁of▁sentence｜>",
    "</s>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)


class HfVocabulary:
    """Text to token ids and back, for any thread."""

    def __init__(
        self,
        tokenizer: dict[str, Any],
        *,
        size: int | None = None,
        bos_id: int | None = None,
        end_ids: frozenset[int] = frozenset(),
        begin_text: str = "",
        end_text: str = "",
    ) -> None:
        """`tokenizer` is a parsed `tokenizer.json`; `size` is the model's, which may have rows that no text uses.

        Raises `BadModelFile`.
        """
        added: list[dict[str, Any]] = tokenizer.get("added_tokens") or []
        bare = tokenizer | {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        try:
            self._text = Tokenizer.from_str(json.dumps(bare))
            vocab = tokenizer["model"]["vocab"]
            known = dict(vocab) if isinstance(vocab, dict) else {entry[0]: i for i, entry in enumerate(vocab)}
            self.control: dict[str, int] = {token["content"]: token["id"] for token in added}
            self._hidden = frozenset(token["id"] for token in added if token.get("special"))
        except Exception as error:  # the library raises nothing more exact
            raise BadModelFile(f"tokenizer.json cannot be read: {error}", "download the file again") from None
        last = max([*known.values(), *self.control.values()], default=-1)
        self.size = last + 1 if size is None else size
        if last >= self.size:
            raise BadModelFile(
                f"tokenizer.json has {last + 1} tokens and the model {self.size}",
                "take both from the same checkpoint",
            )
        self.bos_id = bos_id
        named = {self.control[name] for name in _ENDS if name in self.control}
        self.end_ids = frozenset(i for i in end_ids | named if i < self.size)
        self._boundaries = begin_text, end_text
        self._names: list[str | None] = [None] * self.size
        for name, token_id in (known | self.control).items():
            self._names[token_id] = name
        self._is_control = frozenset(self.control.values())
        self._byte_level = _has(tokenizer.get("decoder"), "ByteLevel") or _has(
            tokenizer.get("pre_tokenizer"), "ByteLevel"
        )
        self._pieces: dict[int, bytes] = {}
        # Longest first: where one begins with another, the tokenizers library takes the longest too.
        ordered = sorted(added, key=lambda token: -len(token["content"]))
        self._split = re.compile("|".join(map(_pattern, ordered)) or r"(?!)")

    def boundary_texts(self) -> tuple[str, str]:
        """The begin- and end-of-sequence tokens as chat templates write them, "" where there is none."""
        return self._boundaries

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, in which control tokens count as such; nothing is put in front."""
        ids: list[int] = []
        end = 0
        for found in self._split.finditer(text):
            ids += self._encode_text(text[end : found.start()])
            assert found.lastindex is not None  # one group an alternative: the token without its white space
            ids.append(self.control[found[found.lastindex]])
            end = found.end()
        return ids + self._encode_text(text[end:])

    def piece(self, token_id: int) -> bytes:
        """The bytes of one token; not always whole characters, and none for a row of the model that no text uses."""
        known = self._pieces.get(token_id)
        if known is None:
            name = self._names[token_id]
            if name is None:
                known = b""
            elif token_id in self._is_control:
                known = name.encode()
            else:
                known = _byte_level(name) if self._byte_level else _sentencepiece(name)
            self._pieces[token_id] = known
        return known

    def shown(self, token_id: int) -> bytes:
        """The bytes of one token as a reader sees them: none for a control token."""
        return b"" if token_id in self._hidden else self.piece(token_id)

    def _encode_text(self, text: str) -> list[int]:
        return self._text.encode(text, add_special_tokens=False).ids if text else []


def read_vocabulary(folder: Path, size: int | None = None) -> HfVocabulary:
    """The vocabulary of a checkpoint folder, for a model with `size` rows of logits. Raises `BadModelFile`."""
    tokenizer = _read_json(folder / "tokenizer.json")
    if tokenizer is None:
        raise BadModelFile(
            f"{folder.name} has no tokenizer.json",
            "save the fast tokenizer beside the weights: AutoTokenizer.from_pretrained(...).save_pretrained(folder)",
        )
    texts = _read_json(folder / "special_tokens_map.json") or {}
    settings = _read_json(folder / "tokenizer_config.json") or {}
    config = _read_json(folder / "config.json") or {}
    generation = _read_json(folder / "generation_config.json") or {}
    ids = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or [] if "content" in token}
    begin, end = (_content(settings.get(key, texts.get(key))) for key in ("bos_token", "eos_token"))
    put_in_front = _first_special(tokenizer.get("post_processor"))
    if settings.get("add_bos_token") is False:
        put_in_front = None
    elif settings.get("add_bos_token"):
        put_in_front = begin
    ends = {ids[end]} if end in ids else set[int]()
    for told in (config.get("eos_token_id"), generation.get("eos_token_id")):
        ends.update(told if isinstance(told, list) else [told] if isinstance(told, int) else [])
    return HfVocabulary(
        tokenizer,
        size=size,
        bos_id=ids.get(put_in_front) if put_in_front else None,
        end_ids=frozenset(ends),
        begin_text=begin,
        end_text=end,
    )


def read_chat_template(folder: Path) -> str | None:
    """The chat template of a checkpoint folder: a file of its own, or a field of `tokenizer_config.json`."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    told = (_read_json(folder / "tokenizer_config.json") or {}).get("chat_template")
    if isinstance(told, list):  # several with names; the one for chat is the default
        told = next((entry.get("template") for entry in told if entry.get("name") == "default"), None)
    return told if isinstance(told, str) else None


def _read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file, `None` where there is no such file. Raises `BadModelFile`."""
    if not path.is_file():
        return None
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadModelFile(f"{path.name} of {path.parent.name} is no JSON: {error}", "download it again") from None
    if not isinstance(told, dict):
        raise BadModelFile(f"{path.name} of {path.parent.name} holds no JSON object", "download it again")
    return told


def _content(token: Any) -> str:
    """The text of a special token, which is written as a string or as an object."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else ""


def _first_special(processor: Any) -> str | None:
    """The special token that a post-processor puts before a text."""
    if not isinstance(processor, dict):
        return None
    if processor.get("type") == "Sequence":
        return next(filter(None, map(_first_special, processor.get("processors") or [])), None)
    first = (processor.get("single") or [{}])[0]
    return first["SpecialToken"]["id"] if "SpecialToken" in first else None


def _has(part: Any, kind: str) -> bool:
    """Whether a part of a tokenizer, or one within it, is of some type."""
    if isinstance(part, dict):
        return part.get("type") == kind or any(_has(value, kind) for value in part.values())
    return isinstance(part, list) and any(_has(value, kind) for value in part)


def _pattern(token: dict[str, Any]) -> str:
    """One added token as an expression with one group: its text, with the white space that it takes along."""
    before, after = r"\s*" if token.get("lstrip") else "", r"\s*" if token.get("rstrip") else ""
    return f"{before}({re.escape(token['content'])}){after}"


def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's names for the 256 bytes: printable ones are themselves, the others come from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return {chr(byte if byte in printable else next(others)): byte for byte in range(256)}


_BYTES = _bytes_of_characters()
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level(name: str) -> bytes:
    try:
        return bytes(map(_BYTES.__getitem__, name))
    except KeyError:  # a name of plain text in a vocabulary of byte names
        return name.encode()


def _sentencepiece(name: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(name)
    return bytes([int(byte[1], 16)]) if byte else name.replace("▁", " ").encode()
