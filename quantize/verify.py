"""`stillhouse verify`: is a file what it should be?

By itself: its structure, every block a number, its template, one BOS, `</think>` one token. Beside its source: both cut
10,000 texts into the same tokens and write twenty conversations alike, and every tensor is as near as its type allows.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..r1.errors import BadModelFile, BadPrompt
from ..r1.gguf import Header, read_header
from ..r1.prompt import CLOSE, OPEN
from .architectures import ARCHITECTURES, USUAL
from .errors import VerificationFailed
from .gguf_blocks import bits_per_weight, is_valid
from .plan import SLAB_WEIGHTS
from .progress import meter
from .readers import Reader, checkpoint_reader, gguf_reader
from .samples import conversations, strings
from .source import Checkpoint, find_checkpoint
from .weights import FLOATS, Tensor, Weights, from_checkpoint, from_gguf

SLACK_DB = 15.0  # under 6.02 dB a bit: a tensor that is worse than that is not a rounded one, but another one


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    what: str
    is_good: bool
    words: str


def run(file: Path, source: str, *, strings: int, threads: int, offline: bool) -> int:
    """Look at everything and print it. Raises `VerificationFailed` where something is wrong."""
    found = find_checkpoint(source, offline=offline) if source else None
    bad: list[Finding] = []
    for finding in findings(file, found, count=strings, threads=threads):
        print(f"{'ok  ' if finding.is_good else 'FAIL'}  {finding.what:<10} {finding.words}", flush=True)
        if not finding.is_good:
            bad.append(finding)
    if bad:
        raise VerificationFailed(f"{file.name} fails in {', '.join(f.what for f in bad)}", f"first: {bad[0].words}")
    return 0


def findings(file: Path, source: Checkpoint | Path | None, *, count: int, threads: int) -> Iterator[Finding]:
    """One after the other, the cheap ones first."""
    try:
        header = read_header(file)
        weights = from_gguf(file, allow_requantize=True)
    except BadModelFile as error:
        yield Finding("structure", False, error.message)
        return
    yield structure(header, weights)
    yield blocks(weights, threads)
    reader = gguf_reader([file])
    yield thoughts(reader)
    yield one_bos(reader)
    if isinstance(source, Checkpoint):
        theirs = checkpoint_reader(source)
        yield same_tokens(reader, theirs, count)
        yield same_prompts(reader, theirs)
    if source is not None:
        original = from_gguf(source) if isinstance(source, Path) else from_checkpoint(source, "unused")
        yield from errors(weights, original, threads)


def structure(header: Header, weights: Weights) -> Finding:
    """Every tensor that the architecture needs is there, and the vocabulary is as long as the embedding."""
    names = {tensor.name: tensor for tensor in weights.tensors}
    known = next((a for a in ARCHITECTURES if a.name == weights.architecture), None)
    parts = (*(f"{part}.weight" for part in USUAL), *(known.block if known else ()))
    needed = ["token_embd.weight", "output_norm.weight"]
    needed += [f"blk.{block}.{part}" for block in range(weights.blocks) for part in parts if known]
    missing = [name for name in needed if name not in names]
    if missing:
        return Finding("structure", False, f"{missing[0]} is missing ({len(missing)} tensors are)")
    rows = names["token_embd.weight"].matrix[0]
    if header.vocabulary_size != rows:
        words = f"it has {header.vocabulary_size} tokens, and its embedding {rows} rows"
        return Finding("structure", False, words)
    what = (
        f"{header.quantization} {weights.architecture}, {len(names)} tensors, {weights.parameters / 1e9:.3f}e9 weights"
    )
    return Finding("structure", True, what)


def blocks(weights: Weights, threads: int) -> Finding:
    """Every block of every tensor is read, and holds numbers."""
    jobs = [(tensor, *slab) for tensor in weights.tensors for slab in _slabs(tensor)]
    with ThreadPoolExecutor(threads) as pool:
        good = list(pool.map(lambda job: is_valid(job[0].type, job[0].read_raw(job[1], job[2])), jobs))
    bad = [job[0].name for job, is_good in zip(jobs, good, strict=True) if not is_good]
    words = f"{bad[0]} has a NaN or an infinity" if bad else "every block holds numbers"
    return Finding("blocks", not bad, words)


def thoughts(reader: Reader) -> Finding:
    """The tags around thoughts are one token each, and come back as they were."""
    ids = {tag: reader.encode(tag) for tag in (OPEN, CLOSE)}
    if not reader.template.can_think:
        return Finding("thoughts", True, "the vocabulary has no tags for thoughts")
    wrong = [tag for tag, found in ids.items() if len(found) != 1]
    words = f"{wrong[0]} takes {len(ids[wrong[0]])} tokens" if wrong else f"{OPEN} and {CLOSE} are one token each"
    return Finding("thoughts", not wrong, words)


def one_bos(reader: Reader) -> Finding:
    """A prompt begins with one begin-of-sequence token, whether the template writes it, the tokenizer, or both."""
    if reader.template.source is None:
        return Finding("template", True, "there is none")
    try:
        prompt = reader.template.render(conversations()[0])
    except BadPrompt as error:
        return Finding("template", False, error.message)
    ids = prompt.encode(reader.encode, reader.bos_id)
    if reader.bos_id is None:
        return Finding("template", True, "it renders; the model wants no BOS")
    count = ids.count(reader.bos_id)
    return Finding("template", count == 1, f"it renders; a prompt begins with {count} BOS")


def same_tokens(ours: Reader, theirs: Reader, count: int) -> Finding:
    """Both tokenizers make the same of many texts."""
    different = [text for text in strings(count) if list(ours.encode(text)) != list(theirs.encode(text))]
    if not different:
        return Finding("tokenizer", True, f"{count} texts give the same tokens")
    shown = min(different, key=len)
    return Finding("tokenizer", False, f"{len(different)} of {count} texts give others, such as {shown[:60]!r}")


def same_prompts(ours: Reader, theirs: Reader) -> Finding:
    """Both templates write conversations alike, or refuse them alike."""

    def rendered(reader: Reader, number: int) -> str:
        try:
            return reader.template.render(conversations()[number]).text
        except BadPrompt as error:
            return f"refused: {error.message}"

    count = len(conversations())
    different = [n for n in range(count) if rendered(ours, n) != rendered(theirs, n)]
    words = f"conversation {different[0]} differs" if different else f"{count} conversations are written alike"
    return Finding("prompts", not different, words)


def errors(ours: Weights, theirs: Weights, threads: int) -> Iterator[Finding]:
    """How far each tensor is from its source, in dB of signal over noise; by type, and the worst."""
    originals = {tensor.name: tensor for tensor in theirs.tensors}
    strangers = [t.name for t in ours.tensors if t.name not in originals or originals[t.name].shape != t.shape]
    if strangers:
        yield Finding("source", False, f"{strangers[0]} is not in the source, or of another shape there")
        return
    jobs = [(tensor, *slab) for tensor in ours.tensors for slab in _slabs(tensor)]
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])  # squared signal, squared noise

    def compare(job: tuple[Tensor, int, int]) -> tuple[str, float, float, int]:
        tensor, start, stop = job
        original = originals[tensor.name].read(start, stop)
        noise = tensor.read(start, stop) - original
        return tensor.name, float(np.vdot(original, original)), float(np.vdot(noise, noise)), original.size

    total = sum(tensor.size for tensor in ours.tensors)
    with ThreadPoolExecutor(threads) as pool, meter("comparing with the source", total, "w") as show:
        for name, signal, noise, size in pool.map(compare, jobs):
            sums[name][0] += signal
            sums[name][1] += noise
            show(size)
    decibels = {name: _decibels(*pair) for name, pair in sums.items()}
    by_type: dict[str, list[str]] = defaultdict(list)
    for tensor in ours.tensors:
        by_type[tensor.type].append(tensor.name)
    for type, names in by_type.items():
        worst = min(names, key=lambda name: decibels[name])
        least = 60.0 if type in FLOATS else max(3.0, 6.02 * min(bits_per_weight(type), 8) - SLACK_DB)
        if type in ("BF16", "F16"):
            least = 40.0
        words = f"{len(names)} in {type}: at worst {_shown(decibels[worst])} ({worst})"
        yield Finding("errors", decibels[worst] >= least, words)


def _decibels(signal: float, noise: float) -> float:
    return math.inf if not noise else 10 * math.log10(signal / noise) if signal else -math.inf


def _shown(decibels: float) -> str:
    return "exact" if decibels == math.inf else f"{decibels:.1f} dB"


def _slabs(tensor: Tensor) -> Iterator[tuple[int, int]]:
    rows, cols = tensor.matrix
    step = max(1, SLAB_WEIGHTS // cols)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
