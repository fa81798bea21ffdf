"""Files in, a loaded backend out: the only place that chooses one, and the only one that imports runtimes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..r1.errors import BadModelFile, UserError
from ..r1.gguf import read_header
from .base import Backend, LoadOptions, Vocabulary
from .scorer import Scorer

PYTORCH_INSTALL = 'pip install "stillhouse[torch]"'


class Opened(NamedTuple):
    """A model that is ready, and what else its files say about it."""

    backend: Backend
    chat_template: str | None
    begin_text: str  # the begin- and end-of-sequence tokens as templates write them
    end_text: str


def open_backend(paths: Sequence[Path], options: LoadOptions) -> Opened:
    """Load a model. Raises `BadModelFile` or `UserError` in words that name the file and the way out."""
    if not paths:
        raise BadModelFile("there is no model file", "name a file, a catalogue entry or a hub repository")
    if paths[0].suffix != ".gguf":
        raise UserError(
            f"{paths[0].name} is not a GGUF file, and no other format can be served yet",
            "pull a GGUF of the model: stillhouse list --all",
        )
    return _open_llamacpp(tuple(paths), options)


def open_echo(parallel: int = 4, context: int | None = None) -> Opened:
    """The backend without a model, for trying clients."""
    from .echo import Echo

    return Opened(Echo(parallel=parallel, context_length=context or 4096), None, "<|begin|>", "<|end|>")


class Words(NamedTuple):
    """How a model reads text."""

    vocabulary: Vocabulary
    chat_template: str | None
    begin_text: str
    end_text: str


def open_vocabulary(paths: Sequence[Path]) -> Words:
    """The vocabulary of a GGUF model without its weights; it stays in memory."""
    header = read_header(paths[0])
    from .llamacpp_vocabulary import load_vocabulary

    vocabulary = load_vocabulary(paths[0])
    return Words(vocabulary, header.chat_template, *vocabulary.boundary_texts())


def open_scorer(paths: Sequence[Path], options: LoadOptions, *, context: int) -> Scorer:
    """Load a model to read texts of at most `context` tokens with: a GGUF file, or a checkpoint's safetensors."""
    if not paths:
        raise BadModelFile("there is no model file", "name a file, a catalogue entry or a hub repository")
    if paths[0].suffix != ".safetensors":
        for path in paths:
            read_header(path)  # every byte count is checked before any C code reads the file
        from .llamacpp_scorer import LlamaScorer

        return LlamaScorer(tuple(paths), options, context=context)
    try:
        from .pytorch_scorer import TorchScorer
    except ImportError as error:
        raise UserError(f"PyTorch or transformers is not installed: {error}", PYTORCH_INSTALL) from None
    return TorchScorer(paths[0].parent, options)


def open_watched(path: Path, callback: Any, *, threads: int, context: int) -> Scorer:
    """A GGUF model whose operations are shown to one of ggml's evaluation callbacks; in memory, not on a GPU."""
    read_header(path)
    from .llamacpp_scorer import LlamaScorer

    options = LoadOptions(threads=threads, gpu_layers=0)
    return LlamaScorer((path,), options, context=context, watch=callback)


def _open_llamacpp(paths: tuple[Path, ...], options: LoadOptions) -> Opened:
    headers = [read_header(path) for path in paths]  # every byte count is checked before any C code reads the file
    header = headers[0]
    if not any(part.tensors for part in headers):
        raise BadModelFile(f"{paths[0].name} holds a vocabulary and no weights", "pull the whole model")
    try:
        from .llamacpp import LlamaCpp
    except ImportError as error:
        raise UserError(f"llama.cpp is not installed: {error}", "pip install llama-cpp-python") from None
    backend = LlamaCpp(paths, header, options)
    return Opened(backend, header.chat_template, *(backend.vocabulary.boundary_texts()))
