"""Quantized checkpoints that are folders, MLX's and PyTorch's: names, room, and the files beside the weights.

A folder is written under `NAME.partial`, and gets its name when all of it is on the disk; what is stopped leaves
nothing behind. It knows no format: `mlxlm` and `pytorch` write the weights.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..r1.cache import size_text
from ..r1.errors import UserError
from .errors import NoRoom
from .source import Checkpoint

if TYPE_CHECKING:
    from .job import Options

PYTORCH_TYPES = ("nf4", "int4")
_mlx = re.compile(r"mlx(-[234568]bit(-g(32|64|128))?)?", re.IGNORECASE)
_beside = re.compile(
    r"(generation_config|tokenizer.*|vocab|merges|special_tokens_map|added_tokens|chat_template)\.(json|txt|model|jinja)"
)


def is_folder_type(type: str) -> bool:
    """Whether a type is a folder's: mlx, mlx-4bit, mlx-4bit-g32, nf4, int4."""
    return type.lower() in PYTORCH_TYPES or _mlx.fullmatch(type) is not None


def make_folders(checkpoint: Checkpoint, types: Sequence[str], options: Options) -> None:
    """Make one folder a type, and print their names. Raises `UserError` and its kinds."""
    for type in types:
        if not is_folder_type(type):
            raise UserError(
                f"there is no type {type!r}",
                "for MLX: mlx-4bit, mlx-4bit-g32, mlx-2bit to mlx-8bit, mlx with --target-bpw; for PyTorch: nf4, int4",
            )
    for type in types:
        kind = type.lower()
        folder = _name(checkpoint, kind, options, alone=len(types) == 1)
        if folder.exists() and not options.force and not options.dry_run:
            raise UserError(f"{folder} is there already", "--force makes it again; --output chooses another name")
        writer = _writer(kind)
        plan = writer.make_plan(checkpoint, kind, options)
        text = f"{folder}: {size_text(plan.size)}, {plan.bits_per_weight:.2f} bits per weight"
        if plan.about:
            text += f" ({plan.about})"
        print(text, file=sys.stdout if options.dry_run else sys.stderr)
        if options.dry_run:
            continue
        _check_room(folder, plan.size)
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            writer.write(checkpoint, plan, partial, options)
            copy_beside(checkpoint.folder, partial)
            _settle(partial, folder)
        except BaseException:  # Ctrl-C too
            shutil.rmtree(partial, ignore_errors=True)
            raise
        print(folder)


def _writer(kind: str) -> Any:
    if kind not in PYTORCH_TYPES:
        from . import mlxlm

        return mlxlm
    try:
        from . import pytorch
    except ImportError as error:
        raise UserError(f"{kind} is made by PyTorch: {error}", 'pip install "stillhouse[torch]"') from None
    return pytorch


def copy_beside(source: Path, folder: Path) -> None:
    """Copy tokenizer, template and generation settings, where the writer has not put its own."""
    for path in sorted(source.iterdir()):
        if _beside.fullmatch(path.name) and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)


def _name(checkpoint: Checkpoint, kind: str, options: Options, *, alone: bool) -> Path:
    """`--output` is the folder itself, or where several go; without it they are here, named after the model."""
    if options.output is not None and alone:
        return options.output
    bits = f"-{options.target_bits:g}bpw" if kind == "mlx" and options.target_bits else ""
    return (options.output or Path()) / f"{checkpoint.name.rpartition('/')[2]}-{kind}{bits}"


def _check_room(folder: Path, size: int) -> None:
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if size > free:
        raise NoRoom(
            f"{folder} needs {size_text(size)}, and {size_text(free)} are free", "make room, or name another --output"
        )


def _settle(partial: Path, folder: Path) -> None:
    """Have all of it on the disk, then give it its name."""
    for path in partial.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    old = folder.with_name(f"{folder.name}.old")
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
