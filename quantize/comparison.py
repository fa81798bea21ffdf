"""A quantized model, a base, some texts: who reads what, and when, so that one model is in memory at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..backends.base import LoadOptions
from ..backends.open import open_scorer
from ..backends.scorer import Scorer
from ..r1.errors import UserError
from ..r1.gguf import read_header
from ..r1.hub import resolve
from .analysis import HELD_OUT, SourceMatrix, calibration_texts, exact_base, some_of
from .calibration import FINGERPRINTS, Reader, Texts, chunks_of, pack, read_texts, refuse_shared, tokens_of
from .kld import KldFile, Quality
from .measure import (
    Base,
    ExactBase,
    Matrix,
    cut,
    hold,
    keep_states,
    load_states,
    measure,
    save_states,
    write_kld,
)
from .progress import meter
from .readers import checkpoint_reader, gguf_reader
from .source import Checkpoint, find_checkpoint, open_checkpoint
from .weights import from_gguf


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for."""

    file: str
    reasoning: Path | None
    general: Path | None
    calibration: str
    states: Path | None
    chunks: int  # of each text at most
    context: int  # tokens a chunk
    threads: int
    offline: bool = False


def against_source(request: Request, source: str) -> dict[str, Quality]:
    """Compare with a checkpoint or a GGUF file; the quality by text."""
    paths = _files(request)
    texts = _texts(request)
    refuse_shared(list(texts.values()), _tuned_on(request, paths))
    found = find_checkpoint(source, offline=request.offline)
    bases = _bases(request, found, source, texts)
    scorer = open_scorer(paths, LoadOptions(threads=request.threads), context=request.context)
    try:
        return {name: _measured(request, name, base, scorer) for name, base in bases.items()}
    finally:
        scorer.close()


def against_kld(request: Request, path: Path) -> dict[str, Quality]:
    """Compare with what a `.kld` file kept of a base, on the text that is in it."""
    base = KldFile(path)
    scorer = open_scorer(_files(request), LoadOptions(threads=request.threads), context=base.context)
    try:
        return {path.stem: _measured(request, path.stem, base, scorer)}
    finally:
        scorer.close()


def write_kld_file(request: Request, path: Path) -> None:
    """Have the file read the general text, and keep what it says as llama-perplexity does."""
    paths = _files(request)
    texts = _texts(request)["general"]
    reader = _reader(paths)
    chunks = cut(tokens_of(texts, reader), reader.bos_id, request.context, request.chunks)
    scorer = open_scorer(paths, LoadOptions(threads=request.threads), context=request.context)
    try:
        with meter(f"{paths[0].name} reads {texts.name}", len(chunks), "chunk") as show:
            write_kld(path, scorer, chunks, show)
    finally:
        scorer.close()


def _files(request: Request) -> tuple[Path, ...]:
    return resolve(request.file, offline=request.offline).paths


def _texts(request: Request) -> dict[str, Texts]:
    given = {"reasoning": request.reasoning, "general": request.general}
    return {name: read_texts(path) if (path := given[name]) else pack(name) for name in HELD_OUT}


def _tuned_on(request: Request, paths: tuple[Path, ...]) -> set[str]:
    """The fingerprints of the texts that a file was tuned on, as far as it or the user tells; the pack's always."""
    known = set(pack("calibration").fingerprints)
    if request.calibration:
        known |= calibration_texts(request.calibration).fingerprints
    if paths[0].suffix != ".safetensors":
        told = read_header(paths[0]).metadata.get(FINGERPRINTS)
        known |= set(told.split()) if isinstance(told, str) else set()
    return known


def _reader(paths: tuple[Path, ...]) -> Reader:
    if paths[0].suffix == ".safetensors":
        return checkpoint_reader(open_checkpoint(paths[0].parent))
    return gguf_reader(paths)


def _bases(request: Request, source: Checkpoint | Path, name: str, texts: dict[str, Texts]) -> dict[str, ExactBase]:
    """What the base says of each text: kept from another time, or read now."""
    head = hold(_head(source))
    if request.states and request.states.exists():
        return load_states(request.states, name, head)
    if isinstance(source, Checkpoint):
        bases = {
            part: exact_base(source, one, part, request.threads, request.context, request.chunks)
            for part, one in texts.items()
        }
    else:
        bases = _read_by_gguf(request, source, texts, head)
    if request.states:
        save_states(request.states, bases, name)
    return bases


def _read_by_gguf(request: Request, path: Path, texts: dict[str, Texts], head: Matrix) -> dict[str, ExactBase]:
    paths = resolve(str(path)).paths
    reader = gguf_reader(paths)
    scorer = open_scorer(paths, LoadOptions(threads=request.threads), context=request.context)
    try:
        found = {}
        for part, one in texts.items():
            chunks = some_of(chunks_of(one, reader, request.context), request.chunks)
            with meter(f"{path.name} reads {part}", len(chunks), "chunk") as show:
                found[part] = keep_states(scorer, chunks, head, show)
        return found
    finally:
        scorer.close()


def _head(source: Checkpoint | Path) -> Matrix:
    """The output matrix: the embedding's, where the two are one."""
    if isinstance(source, Checkpoint):
        own = "lm_head.weight" in source.tensors and not source.config.get("tie_word_embeddings")
        return SourceMatrix(source, "lm_head.weight" if own else "model.embed_tokens.weight")
    tensors = {tensor.name: tensor for tensor in from_gguf(source, allow_requantize=True).tensors}
    return tensors.get("output.weight") or tensors["token_embd.weight"]


def _measured(request: Request, name: str, base: Base, scorer: Scorer) -> Quality:
    try:
        with meter(f"{request.file} reads {name}", len(base.chunks), "chunk") as show:
            return measure(base, scorer, show)
    except UserError as error:
        raise UserError(f"{request.file}: {error.message}", error.hint) from None
