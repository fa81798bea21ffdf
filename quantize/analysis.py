"""What a quantization asks of the analysis, in one call each: importance, price list, the loss of a file.

Here texts become tokens, progress is shown, and PyTorch is asked for, in its own files. The maths is in `importance`,
`sensitivity` and `kld`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..backends.base import LoadOptions
from ..backends.open import INSTALL, open_scorer
from ..r1.errors import UserError
from .calibration import Part, Texts, chunks_of, pack, read_texts
from .candidates import gguf_candidates
from .importance import Importance
from .kld import Quality
from .measure import CONTEXT, ExactBase, hold, measure
from .progress import meter
from .readers import checkpoint_reader, gguf_reader
from .sensitivity import Candidate, Sensitivity
from .source import Checkpoint

HELD_OUT: tuple[Part, ...] = ("reasoning", "general")
BUILTIN = "builtin"
IMPORTANCE_CHUNKS = 256  # 131,072 tokens: more changes nothing, see docs/measuring.md
FISHER_CHUNKS = 16  # 8192 tokens: each costs a pass forwards and one back
MEASURED_CHUNKS = 32  # of each text


def calibration_texts(name: str) -> Texts:
    """A file of texts to calibrate with, or the pack's (`builtin`)."""
    return pack("calibration") if name == BUILTIN else read_texts(Path(name))


def collect_importance(source: Checkpoint | Path, calibration: str, *, threads: int) -> Importance:
    """Have a model read texts, and note how strongly each of its inputs is used. A path is a GGUF file's."""
    texts = calibration_texts(calibration)
    if isinstance(source, Path):
        from .gguf_importance import collect as collect_from_gguf

        chunks = chunks_of(texts, gguf_reader([source]), CONTEXT, IMPORTANCE_CHUNKS)
        with meter(f"importance of {chunks.size} tokens", len(chunks), "chunk") as show:
            return collect_from_gguf(source, chunks, (texts.name,), threads=threads, progress=show)
    decoder = _decoder(source, threads)
    from .pytorch_importance import collect

    chunks = chunks_of(texts, checkpoint_reader(source), CONTEXT, IMPORTANCE_CHUNKS)
    with meter(f"importance of {chunks.size} tokens", decoder.count, "layer") as show:
        return collect(decoder, chunks, (texts.name,), show)


def find_sensitivity(
    checkpoint: Checkpoint, calibration: str, types: Sequence[str], importance: Importance | None, *, threads: int
) -> Sensitivity:
    """Price every matrix in every one of ggml's types."""
    return find_prices(checkpoint, calibration, gguf_candidates(types), importance, threads=threads)


def find_prices(
    checkpoint: Checkpoint,
    calibration: str,
    candidates: Sequence[Candidate],
    importance: Importance | None,
    *,
    threads: int,
) -> Sensitivity:
    """Price every matrix in every candidate, of whatever format."""
    decoder = _decoder(checkpoint, threads)
    from .pytorch_sensitivity import analyse

    texts = calibration_texts(calibration)
    chunks = some_of(chunks_of(texts, checkpoint_reader(checkpoint), CONTEXT), FISHER_CHUNKS)
    with meter(f"sensitivity over {chunks.size} tokens", 2 * decoder.count + 1, "layer") as show:
        return analyse(decoder, chunks, candidates, text=texts.name, importance=importance, progress=show)


def some_of(chunks: Any, most: int) -> Any:
    """At most so many chunks, evenly from all of the text: files are often sorted."""
    return chunks[np.linspace(0, len(chunks) - 1, min(most, len(chunks))).round().astype(int)]


@dataclass(slots=True)
class Judge:
    """Measures files against one checkpoint, which reads each text once."""

    checkpoint: Checkpoint
    threads: int
    texts: dict[str, Texts] = field(
        default_factory=lambda: {"reasoning": pack("reasoning"), "general": pack("general")}
    )
    _bases: dict[str, ExactBase] = field(default_factory=dict)

    def measure(self, path: Path) -> dict[str, Quality]:
        """What a file has lost, by text."""
        for name, texts in self.texts.items():
            if name not in self._bases:
                self._bases[name] = exact_base(self.checkpoint, texts, name, self.threads)
        scorer = open_scorer([path], LoadOptions(threads=self.threads), context=CONTEXT)
        try:
            found = {}
            for name, base in self._bases.items():
                with meter(f"{path.name} reads {name}", len(base.chunks), "chunk") as show:
                    found[name] = measure(base, scorer, show)
            return found
        finally:
            scorer.close()


def measure_file(path: Path, checkpoint: Checkpoint, *, threads: int) -> dict[str, Quality]:
    """What a GGUF file has lost of a checkpoint, on the pack's two held-out texts."""
    return Judge(checkpoint, threads).measure(path)


def exact_base(
    checkpoint: Checkpoint,
    texts: Texts,
    name: str,
    threads: int,
    context: int = CONTEXT,
    most: int = MEASURED_CHUNKS,
) -> ExactBase:
    """Have a checkpoint read a text, one layer in memory at a time."""
    decoder = _decoder(checkpoint, threads)
    from .pytorch_layers import read_states

    chunks = some_of(chunks_of(texts, checkpoint_reader(checkpoint), context), most)
    with meter(f"{checkpoint.name} reads {name}", decoder.count, "layer") as show:
        states = read_states(decoder, chunks, show)
    return ExactBase(chunks, states, hold(SourceMatrix(checkpoint, decoder.head)))


@dataclass(frozen=True, slots=True)
class SourceMatrix:
    """A checkpoint's tensor as a `Matrix`."""

    checkpoint: Checkpoint
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns."""
        return self.checkpoint.tensors[self.name].matrix

    def read(self, start: int, stop: int) -> Any:
        """Rows as float32."""
        return self.checkpoint.rows(self.name, start, stop)


def _decoder(checkpoint: Checkpoint, threads: int) -> Any:
    try:
        import torch

        from .pytorch_layers import Decoder
    except ImportError as error:
        raise UserError(f"the analysis needs PyTorch and transformers: {error}", INSTALL["pytorch"]) from None
    torch.set_num_threads(threads)
    return Decoder(checkpoint)
