"""How a model on disk reads a conversation: its tokenizer and its chat template, from a checkpoint or a GGUF file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..backends.base import Vocabulary
from ..backends.hf_vocabulary import read_chat_template, read_vocabulary
from ..backends.open import open_vocabulary
from ..r1.prompt import ChatTemplate
from .calibration import Reader
from .source import Checkpoint


def checkpoint_reader(checkpoint: Checkpoint) -> Reader:
    """Of a folder with a `tokenizer.json`."""
    vocabulary = read_vocabulary(checkpoint.folder, checkpoint.config["vocab_size"])
    return _reader(vocabulary, read_chat_template(checkpoint.folder), *vocabulary.boundary_texts())


def gguf_reader(paths: Sequence[Path]) -> Reader:
    """Of a GGUF file; its weights are not read."""
    words = open_vocabulary(paths)
    return _reader(words.vocabulary, words.chat_template, words.begin_text, words.end_text)


def _reader(vocabulary: Vocabulary, template: str | None, begin: str, end: str) -> Reader:
    return Reader(
        encode=vocabulary.encode,
        bos_id=vocabulary.bos_id,
        template=ChatTemplate(template, vocabulary.control, bos=begin, eos=end),
        end_text=end,
    )
