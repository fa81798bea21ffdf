"""One `stillhouse quantize`: from what was asked to files under their names.

Source, importance, types, plan; then the disk and the memory are looked at, and only then is anything written. A file
is sealed, measured where that was asked for, and gets its name last. It parses no arguments.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..r1.cache import title_of
from ..r1.errors import BadModelFile, UserError
from ..r1.gguf import read_header
from . import gguf as writer
from .errors import QualityTooLow, SourceInvalid
from .gguf_blocks import library
from .plan import QUALITY, UNKNOWN, Plan, make_plan, reserved
from .recipes import NUMBERS, Choice, assign, find_recipe, fitted, is_quantizable, lacking_importance
from .report import tell, tell_needs
from .source import Checkpoint, find_checkpoint
from .weights import Weights, from_checkpoint, from_gguf

if TYPE_CHECKING:
    from .importance import Importance
    from .kld import Quality
    from .sensitivity import Costs

FOLDER_TYPES = ("mlx", "nf4", "int4")  # what they begin with


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for."""

    source: str
    types: tuple[str, ...] = ()  # () = a mix, by `target_bits` or `target_bytes`
    output: Path | None = None
    imatrix: Path | None = None
    calibration: str = ""
    sensitivity: Path | None = None
    target_bits: float = 0.0  # a weight
    target_bytes: int = 0
    overrides: tuple[tuple[str, str], ...] = ()
    tokenizer_pre: str = ""
    measures: bool = False
    max_kld: float = 0.0  # 0 = whatever it is
    dry_run: bool = False
    resume: bool = False
    force: bool = False
    allow_requantize: bool = False
    threads: int = 1
    offline: bool = False

    @property
    def is_measured(self) -> bool:
        """Whether every file is compared with its source before it gets its name."""
        return self.measures or bool(self.max_kld)

    @property
    def has_target(self) -> bool:
        """Whether a mix for a size was asked for."""
        return bool(self.target_bits or self.target_bytes)


@dataclass(frozen=True, slots=True)
class _Rung:
    """One file of the ladder."""

    recipe: str
    choice: Choice
    predicted_kl: float | None


def run(options: Options) -> int:
    """Make the files. Raises `UserError` and its kinds."""
    source = _find(options)
    options = _make_folders(options, source)
    if not options.types and not options.has_target:
        return 0
    checkpoint, weights = _read(options, source)
    importance = _importance(options, checkpoint, weights)
    values = importance.values if importance else {}
    plans = [_plan(options, weights, rung, importance) for rung in _rungs(options, checkpoint, weights, importance)]
    if not options.force and not options.dry_run:
        plans = [plan for plan in plans if not _is_there(plan.path, options.resume)]
    if not plans:
        return 0
    wanted = writer.outputs(plans, weights, values)
    tell(weights, plans, print if options.dry_run else _note)
    if options.dry_run:
        tell_needs(weights, plans, values, writer.memory_needed(wanted, options.threads), options.threads)
        return 0
    writer.check_room(wanted, options.threads, resume=options.resume)
    try:
        hashes = writer.write(wanted, weights, values, threads=options.threads, resume=options.resume)
    except SourceInvalid:
        for output in wanted:
            writer.discard(output)
        raise
    except KeyboardInterrupt:
        print(
            "stopped: what was written is kept, and the same command with --resume goes on from there", file=sys.stderr
        )
        raise
    return _deliver(wanted, checkpoint, weights, hashes, options)


def _find(options: Options) -> Checkpoint | Path:
    try:
        return find_checkpoint(options.source, offline=options.offline)
    except BadModelFile as error:
        raise SourceInvalid(error.message, error.hint) from None


def _make_folders(options: Options, source: Checkpoint | Path) -> Options:
    """Have the types made that are folders (MLX's, PyTorch's); what is left to do."""
    folders = tuple(type for type in options.types if type.lower().startswith(FOLDER_TYPES))
    if not folders:
        return options
    from .folders import make_folders

    make_folders(_needed(source if isinstance(source, Checkpoint) else None), folders, options)
    others = tuple(type for type in options.types if type not in folders)
    # A target belongs to MLX's mix where that is all that was asked for.
    return replace(options, types=others) if others else replace(options, types=(), target_bits=0.0, target_bytes=0)


def _read(options: Options, source: Checkpoint | Path) -> tuple[Checkpoint | None, Weights]:
    try:
        if isinstance(source, Path):
            return None, from_gguf(source, allow_requantize=options.allow_requantize)
        return source, from_checkpoint(source, options.tokenizer_pre)
    except BadModelFile as error:
        raise SourceInvalid(error.message, error.hint) from None


def _importance(options: Options, checkpoint: Checkpoint | None, weights: Weights) -> Importance | None:
    """Read or collected, compared with the model, and what it lacks said."""
    from . import importance as files

    if options.imatrix is not None:
        found = files.read(options.imatrix)
    elif options.calibration and not options.dry_run:
        from .analysis import collect_importance

        found = collect_importance(checkpoint or weights.files[0].path, options.calibration, threads=options.threads)
        path = _folder(options) / f"{_stem(weights)}.imatrix.gguf"
        files.write(path, found)
        _note(f"importance matrix: {path}")
    else:
        return None
    matrices = {tensor.name: tensor.matrix[1] for tensor in weights.tensors if is_quantizable(tensor)}
    fit = files.fit(found, {name: cols for name, cols in matrices.items() if name.startswith("blk.")})
    for words, names in (("says nothing of", fit.missing), ("has columns that were never used in", fit.dead)):
        for name in names[:1]:
            more = f" and {len(names) - 1} more" if names[1:] else ""
            _note(f"note: the importance matrix {words} {name}{more}")
    return found


def _rungs(
    options: Options, checkpoint: Checkpoint | None, weights: Weights, importance: Importance | None
) -> list[_Rung]:
    known = importance.values if importance else {}
    costs = _costs(options, checkpoint, weights, importance)
    rungs: list[_Rung] = []
    for type in options.types:
        recipe = find_recipe(type)
        choice = assign(recipe, weights, options.overrides, has_importance=bool(known))
        lacking = lacking_importance(choice.types, recipe, known)
        if lacking and not (options.dry_run and options.calibration):
            raise UserError(
                f"{recipe} is garbage without an importance matrix ({lacking[0]} would be {choice.types[lacking[0]]})",
                "give one with --imatrix, or have one collected with --calibration",
            )
        rungs.append(_Rung(recipe, choice, _predicted(costs, choice)))
    if options.has_target:
        if costs is None:
            raise UserError("a mix needs a price list", "give --calibration builtin, or a --sensitivity file")
        rungs += _mixes(options, weights, costs)
    return rungs


def _costs(
    options: Options, checkpoint: Checkpoint | None, weights: Weights, importance: Importance | None
) -> Costs | None:
    """The price list, read or found; `None` where nobody asked for one."""
    from . import sensitivity as files

    if options.sensitivity is not None and options.sensitivity.is_file():
        return files.read(options.sensitivity).costs
    if not options.has_target:
        return None
    if not options.calibration:
        raise UserError(
            "a mix for a size needs to know what each matrix is worth",
            "give a text with --calibration (or --calibration builtin), or a --sensitivity file of an earlier run",
        )
    from .analysis import find_sensitivity
    from .candidates import TYPES

    found = find_sensitivity(_needed(checkpoint), options.calibration, TYPES, importance, threads=options.threads)
    path = options.sensitivity or _folder(options) / f"{_stem(weights)}.sensitivity.json"
    files.write(path, found)
    _note(f"price list: {path}")
    return found.costs


def _mixes(options: Options, weights: Weights, costs: Costs) -> list[_Rung]:
    """The best types for a size, by predicted KL divergence; where files are measured anyway, rivals for it."""
    from .allocate import allocate, frontier

    fixed = sum(tensor.size * 4 for tensor in weights.tensors if tensor.name not in costs)
    if options.target_bits:
        budget = int(weights.parameters * options.target_bits / 8) - fixed
    else:
        header = len(_plan(options, weights, _Rung("Q8_0", assign("Q8_0", weights), None), None).header)
        budget = options.target_bytes - header - 32 * len(weights.tensors) - fixed
    bits = options.target_bits or 8 * (budget + fixed) / weights.parameters
    rungs = []
    for plan in frontier(costs, budget) if options.is_measured else [allocate(costs, budget)]:
        choice = fitted(weights, plan.assignment | _forced(options, weights))
        rungs.append(_Rung(f"MIX_{bits:.2f}".replace(".", "_"), choice, _predicted(costs, choice)))
    return rungs


def _forced(options: Options, weights: Weights) -> dict[str, str]:
    plain = assign("F32", weights).types
    forced = assign("F32", weights, options.overrides).types
    return {name: type for name, type in forced.items() if type != plain[name]}


def _predicted(costs: Costs | None, choice: Choice) -> float | None:
    """The KL divergence that the price list tells; `None` where it lacks a type."""
    if costs is None or any(choice.types[name] not in types for name, types in costs.items() if name in choice.types):
        return None
    return sum(types[choice.types[name]].kl for name, types in costs.items() if name in choice.types)


def _plan(options: Options, weights: Weights, rung: _Rung, importance: Importance | None) -> Plan:
    number = NUMBERS.get(rung.recipe, NUMBERS[_commonest(rung.choice)])
    extra: dict[str, Any] = {
        "general.quantized_by": "Stillhouse",
        "general.quantization_version": 2,
        "general.file_type": number,
        "stillhouse.version": __version__,
        "stillhouse.recipe": json.dumps(
            {"type": rung.recipe, "overrides": options.overrides, "predicted_kl": rung.predicted_kl}
        ),
        "stillhouse.source.name": weights.name,
        "stillhouse.source.files": [file.path.name for file in weights.files],
        "stillhouse.source.sha256": [UNKNOWN] * len(weights.files),
        "stillhouse.ggml.sha256": hashlib.sha256(Path(library()).read_bytes()).hexdigest(),
        QUALITY: reserved(),
    }
    if weights.revision:
        extra["stillhouse.source.revision"] = weights.revision
    if options.calibration:
        from .analysis import calibration_texts
        from .calibration import metadata

        extra |= metadata(calibration_texts(options.calibration))
    if importance is not None:
        extra |= {
            "quantize.imatrix.file": options.imatrix.name if options.imatrix else f"{_stem(weights)}.imatrix.gguf",
            "quantize.imatrix.dataset": ", ".join(importance.datasets),
            "quantize.imatrix.entries_count": len(importance.values),
            "quantize.imatrix.chunks_count": importance.chunks,
        }
    name = f"{_stem(weights)}-{rung.recipe}.gguf"
    path = _folder(options) / name
    if options.output is not None and not _is_folder(options.output):
        path = options.output
    return make_plan(path, rung.recipe, weights, rung.choice, extra)


def _commonest(choice: Choice) -> str:
    """What a mix is called after."""
    named = {"Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "Q3_K": "Q3_K_M"}
    counts = Counter(named.get(type, type) for type in choice.types.values() if type != "F32")
    return counts.most_common(1)[0][0] if counts else "F32"


def _stem(weights: Weights) -> str:
    """A file's name before its type, by GGUF's convention."""
    import gguf

    if weights.vocabulary is None:
        return title_of(weights.files[0].path.name)
    said = weights.metadata
    parts = (said.get(f"general.{key}") for key in ("name", "basename", "finetune", "version", "size_label"))
    return gguf.naming_convention(*parts, output_type=None)


def _is_folder(path: Path) -> bool:
    return path.is_dir() or path.suffix != ".gguf"


def _folder(options: Options) -> Path:
    if options.output is None:
        return Path()
    if not _is_folder(options.output):
        return options.output.parent
    if not options.dry_run:
        options.output.mkdir(parents=True, exist_ok=True)
    return options.output


def _needed(checkpoint: Checkpoint | None) -> Checkpoint:
    if checkpoint is None:
        raise UserError(
            "this can only be found from a checkpoint, and the source is a GGUF file",
            "name the folder or hub id it was made from, or give --imatrix and --sensitivity files",
        )
    return checkpoint


def _is_there(path: Path, resume: bool) -> bool:
    if not path.exists():
        return False
    if not resume:
        raise UserError(f"{path} is there already", "--force makes it again; --output chooses another name or folder")
    _note(f"{path} is done already")
    return True


def _deliver(
    wanted: Sequence[writer.Output],
    checkpoint: Checkpoint | None,
    weights: Weights,
    hashes: Mapping[str, str],
    options: Options,
) -> int:
    """Seal, measure, name. Of rivals for a name the best gets it; what is too bad is deleted at the end."""
    from . import card

    metadata: dict[str, Any] = {"stillhouse.source.sha256": [hashes[file.path.name] for file in weights.files]}
    judge = None
    if options.is_measured:
        from .analysis import Judge

        judge = Judge(_needed(checkpoint), options.threads)
    rivals: dict[Path, list[tuple[writer.Output, Mapping[str, Quality] | None]]] = {}
    for output in wanted:
        writer.seal(output, metadata)
        read_header(output.partial)
        quality = judge.measure(output.partial) if judge else None
        if quality:
            writer.seal(output, metadata | {QUALITY: reserved(card.quality_json(quality))})
        rivals.setdefault(output.plan.path, []).append((output, quality))
    too_bad: list[str] = []
    for group in rivals.values():
        group.sort(key=lambda pair: _loss(pair[1]))
        for output, _ in group[1:]:
            writer.discard(output)
        output, quality = group[0]
        if options.max_kld and _loss(quality) > options.max_kld:
            writer.discard(output)
            too_bad.append(f"{output.plan.path.name} has a KL divergence of {_loss(quality):.4f}")
            continue
        path = writer.publish(output)
        path.with_suffix(".md").write_text(card.text(output.plan, weights, hashes, quality), encoding="utf-8")
        print(path)
    if too_bad:
        hint = "take a larger type, or weigh it with --calibration"
        raise QualityTooLow(f"{too_bad[0]}, more than {options.max_kld:g}; it was deleted", hint)
    return 0


def _loss(quality: Mapping[str, Quality] | None) -> float:
    """The KL divergence on the text that suffers most."""
    return max((found.kl.value for found in quality.values()), default=0.0) if quality else 0.0


def _note(text: str) -> None:
    print(text, file=sys.stderr)
