"""The texts a model is calibrated with, and those it is measured on: conversations in, token ids out.

A file has one JSON object a line: {"messages": [{"role", "content"}, …]}, of which the last is the assistant's with its
thoughts in `<think>`; or {"prompt": …}, a question alone; or {"text": …}. The pack that comes with Stillhouse was made
for it; of its three parts `calibration` tunes, `reasoning` and `general` are measured on and tune nothing. It knows no
weights.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..r1.errors import BadPrompt, UserError
from ..r1.messages import Message
from ..r1.prompt import CLOSE, OPEN, ChatTemplate, answer_of
from .kld import Ids
from .measure import as_read, cut

Part = Literal["calibration", "reasoning", "general"]
_FOLDER = Path(__file__).with_name("texts")
FINGERPRINTS = "stillhouse.calibration.fingerprints"
_KEPT = 1024  # fingerprints in a file's metadata
_FINGERPRINT = 16  # hexadecimal digits of a conversation's SHA-256


@dataclass(frozen=True, slots=True)
class Sample:
    """One conversation, or one plain text."""

    messages: tuple[Message, ...] = ()
    text: str = ""

    @property
    def fingerprint(self) -> str:
        """What it is known by, so that no text tunes and measures."""
        words = self.text + "\0".join(f"{m.role}\0{m.content}" for m in self.messages)
        return hashlib.sha256(" ".join(words.split()).encode()).hexdigest()[:_FINGERPRINT]


@dataclass(frozen=True, slots=True)
class Texts:
    """Some samples under a name."""

    name: str
    samples: tuple[Sample, ...]

    @property
    def fingerprints(self) -> frozenset[str]:
        """Of all samples."""
        return frozenset(sample.fingerprint for sample in self.samples if sample.messages or sample.text.strip())


@dataclass(frozen=True, slots=True)
class Reader:
    """How a model reads a conversation: its tokens, and its template."""

    encode: Callable[[str], list[int]]  # control tokens count as such; nothing is put in front
    bos_id: int | None
    template: ChatTemplate
    end_text: str  # of the token that ends a reply

    def read(self, sample: Sample) -> list[int]:
        """The token ids that the model would have seen and written."""
        if not sample.messages:
            return self.encode(sample.text)
        *asked, replied = sample.messages
        if replied.role != "assistant":
            asked, replied = list(sample.messages), Message("assistant", "")
        if self.template.source is None:
            return self.encode("\n\n".join(message.content for message in sample.messages))
        prompt = self.template.render(asked, thinking=True)
        ids = prompt.encode(self.encode, self.bos_id)
        return ids + self.encode(self._written(replied, opened=prompt.thinking == "open"))

    def _written(self, reply: Message, *, opened: bool) -> str:
        """A reply as the model writes it behind its prompt; one without thinking tags thinks aloud."""
        thoughts, answer = _thoughts_of(reply.content), answer_of(reply)
        is_cut = bool(thoughts) and CLOSE not in reply.content
        if not self.template.can_think:
            text = "\n\n".join(part for part in (thoughts, answer) if part)
        elif thoughts:
            text = f"{'' if opened else OPEN + chr(10)}{thoughts}" + ("" if is_cut else f"\n{CLOSE}\n\n{answer}")
        else:
            text = f"{CLOSE}\n\n{answer}" if opened else answer
        return text if is_cut else text + self.end_text


def _thoughts_of(content: str) -> str:
    """What stands between the thinking tags; all of it where they are never closed."""
    before, closed, _ = content.partition(CLOSE)
    if OPEN not in before and not closed:
        return ""
    return before.replace(OPEN, "", 1).strip("\n")


def pack(part: Part) -> Texts:
    """One part of the pack that comes with Stillhouse."""
    return read_texts(_FOLDER / f"{part}.jsonl", name=f"stillhouse {part}")


def read_texts(path: Path, name: str = "") -> Texts:
    """Read samples, one JSON object a line; of a plain text file each paragraph is one. Raises `UserError`."""
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}", "name a .jsonl or .txt file in UTF-8") from None
    if path.suffix == ".jsonl":
        lines = enumerate(content.splitlines(), 1)
        samples = tuple(_sample(path, number, line) for number, line in lines if line.strip())
    else:
        samples = tuple(Sample(text=part) for part in content.split("\n\n")) if content.strip() else ()
    if not samples:
        raise UserError(f"{path} has no texts in it", 'one JSON object a line: {"messages": [...]} or {"text": ...}')
    return Texts(name or path.name, samples)


def _sample(path: Path, number: int, line: str) -> Sample:
    try:
        found: Any = json.loads(line)
        if isinstance(found, str):
            return Sample(text=found)
        if "messages" in found:
            messages = tuple(Message(str(m["role"]), str(m["content"])) for m in found["messages"])
            if not messages:
                raise KeyError("messages")
            return Sample(messages)
        if "prompt" in found:
            return Sample((Message("user", str(found["prompt"])),))
        return Sample(text=str(found["text"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{path.name}:{number} is neither a conversation nor a text",
            'each line is {"messages": [{"role": ..., "content": ...}]}, {"prompt": ...} or {"text": ...}',
        ) from None


def tokens_of(texts: Texts, reader: Reader) -> list[int]:
    """All samples one after the other; plain ones in a row are one text, as if they had never been apart."""
    ids: list[int] = []
    for is_plain, run in itertools.groupby(texts.samples, lambda sample: not sample.messages):
        if is_plain:
            ids += reader.encode("\n\n".join(sample.text for sample in run))
            continue
        for sample in run:
            try:
                ids += reader.read(sample)
            except BadPrompt as error:
                message = f"a conversation of {texts.name} cannot be written down: {error.message}"
                raise UserError(message, error.hint) from None
    return ids


def chunks_of(texts: Texts, reader: Reader, context: int, most: int | None = None) -> Ids:
    """The samples as full chunks (C, context) of what the model is given: each begins with BOS where it wants one."""
    try:
        chunks = cut(tokens_of(texts, reader), reader.bos_id, context, most)
    except UserError as error:
        raise UserError(f"{texts.name}: {error.message}", "add texts; `stillhouse calibrate` writes some") from None
    return np.asarray([as_read(chunk, reader.bos_id) for chunk in chunks], np.int32)


def metadata(texts: Texts) -> dict[str, str]:
    """What a file keeps of the texts it was tuned on, so that it is not measured on them; of very many, some."""
    known = sorted(texts.fingerprints)[:_KEPT]
    return {"stillhouse.calibration.texts": texts.name, FINGERPRINTS: " ".join(known)}


def shared(texts: Texts, fingerprints: Iterable[str]) -> int:
    """How many samples a text has in common with what a model was tuned on."""
    known = frozenset(fingerprints)
    return sum(sample.fingerprint in known for sample in texts.samples)


def refuse_shared(texts: Sequence[Texts], fingerprints: Iterable[str]) -> None:
    """A text that tuned a model says nothing of it. Raises `UserError`."""
    known = frozenset(fingerprints)
    for one in texts:
        if count := shared(one, known):
            raise UserError(
                f"{count} of the {len(one.samples)} texts in {one.name} were used for calibration",
                "measure on texts that tuned nothing; the pack's own are taken without --reasoning and --text",
            )
