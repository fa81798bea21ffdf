"""How a model on disk reads a conversation: its tokenizer and its chat template, from a checkpoint or a GGUF file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..backends.open import open_vocabulary
from ..r1.prompt import ChatTemplate
from .calibration import Reader
from .source import Checkpoint
from .vocabulary import CONTROL, USER_DEFINED, read_vocabulary


def checkpoint_reader(checkpoint: Checkpoint) -> Reader:
    """Of a folder with a `tokenizer.json`."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json"))
    known = read_vocabulary(checkpoint.folder, checkpoint.config["vocab_size"], pre="unused").metadata
    tokens, kinds = known["tokenizer.ggml.tokens"], known["tokenizer.ggml.token_type"]
    control = {
        text: n for n, (text, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind in (CONTROL, USER_DEFINED)
    }
    bos, eos = (known.get(f"tokenizer.ggml.{role}_token_id") for role in ("bos", "eos"))
    begin, end = (tokens[number] if number is not None else "" for number in (bos, eos))
    return Reader(
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        bos_id=bos if known.get("tokenizer.ggml.add_bos_token") else None,
        template=ChatTemplate(known.get("tokenizer.chat_template"), control, bos=begin, eos=end),
        end_text=end,
    )


def gguf_reader(paths: Sequence[Path]) -> Reader:
    """Of a GGUF file; its weights are not read."""
    words = open_vocabulary(paths)
    vocabulary = words.vocabulary
    return Reader(
        encode=vocabulary.encode,
        bos_id=vocabulary.bos_id,
        template=ChatTemplate(words.chat_template, vocabulary.control, bos=words.begin_text, eos=words.end_text),
        end_text=words.end_text,
    )
