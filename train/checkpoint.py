"""A run's folder: its configuration, its log, its completions, and checkpoints that are whole or not there.

run1/config.toml            as it ran, every setting
run1/log.jsonl              one object a step, and one for every evaluation
run1/completions.jsonl      what was said, and what it got
run1/checkpoints/000010/    adapter, optimizer, state: enough to go on as if nothing had happened
run1/checkpoints/best/      the best by held-out accuracy
run1/adapter/               the newest adapter in PEFT's format
run1/adapter.gguf           and in llama.cpp's, for `stillhouse serve MODEL --lora run1`
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, NamedTuple

import torch

from ..r1.errors import UserError
from .board import Board
from .config import RunConfig, dump_config
from .export import Adapter, check_belongs_to, load_peft, replace_folder, save_gguf, save_peft
from .jsonl import as_line, read_whole
from .policy import Policy

_CONFIG, _LOG, _COMPLETIONS, _STATE = "config.toml", "log.jsonl", "completions.jsonl", "state.json"
BEST = "best"
_ROOM = "make room, then go on with --resume; what was saved before is whole"


class Restored(NamedTuple):
    """What a checkpoint brings back besides the weights."""

    step: int
    state: dict[str, Any]


class RunFolder:
    """One run on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._board: Board | None = None

    def begin(self, config: RunConfig, *, resume: bool, kind: Literal["grpo", "sft"] = "grpo") -> None:
        """Make the folder, or find it again. Raises `UserError` rather than write over another run."""
        records = self.records()
        if not resume and (records or self._numbered()):
            raise UserError(f"{self.path} holds a run already", "go on with --resume, or choose another --out")
        if resume and not self.is_begun:
            raise UserError(f"there is no run in {self.path} to go on with", "leave --resume out")
        found = "sft" if any(record["kind"] == "sft" for record in records) else "grpo"
        if records and found != kind:
            raise UserError(
                f"the run in {self.path} was begun with `train {found}`", f"choose another --out; --start {self.path}"
            )
        folder = self.path / "checkpoints"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.glob("*.old"):  # stopped between two renames
                if not old.with_suffix("").exists():
                    os.replace(old, old.with_suffix(""))
        except OSError as error:
            raise _unwritable(folder, error) from None
        self._board = Board(self.path) if config.save.tensorboard else None

    def start(self, config: RunConfig, restored: Restored | None) -> None:
        """Write the configuration down, and drop what the log says of steps after those that were restored.

        Called when all fits together: the configuration of a run that is refused stays what it was.
        """
        self._forget_after(restored.step if restored else -1)
        _write(self.path / _CONFIG, dump_config(config))

    @property
    def is_begun(self) -> bool:
        """Whether there is a run to go on with."""
        return (self.path / _CONFIG).exists()

    def log(self, record: Mapping[str, Any]) -> None:
        """Add a line to the log."""
        self._append(_LOG, [record])
        if self._board is not None:
            self._board.add(record)

    def keep(self, completions: Iterable[Mapping[str, Any]]) -> None:
        """Add lines to the completions."""
        self._append(_COMPLETIONS, completions)

    def records(self) -> list[dict[str, Any]]:
        """The log so far."""
        return read_whole(self.path / _LOG)

    def completions(self) -> list[dict[str, Any]]:
        """What was said so far."""
        return read_whole(self.path / _COMPLETIONS)

    def save(
        self,
        step: int,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        state: Mapping[str, Any],
        *,
        keep: int = 2,
        best: bool = False,
    ) -> None:
        """Write a checkpoint, and the adapter for serving; what is older than the newest `keep` goes.

        Raises `UserError` where the disk is full; what was there stays whole.
        """

        def fill(partial: Path) -> None:
            save_peft(adapter_of(policy), partial / "adapter")
            data = io.BytesIO()  # PyTorch's own writer does not say that the disk is full
            torch.save(optimizer.state_dict(), data)
            (partial / "optimizer.pt").write_bytes(data.getbuffer())
            told = json.dumps({"step": step, "state": state}, ensure_ascii=False)
            (partial / _STATE).write_text(told, encoding="utf-8")

        folder = self.path / "checkpoints"
        try:
            replace_folder(folder / f"{step:06d}", fill)
            if best:
                replace_folder(folder / BEST, fill)
            save_peft(adapter_of(policy), self.path / "adapter")
            save_gguf(adapter_of(policy), self.path / "adapter.gguf")
        except UserError as error:
            raise UserError(error.message, _ROOM) from None
        for old in self._numbered()[: -max(1, keep)]:
            shutil.rmtree(old, ignore_errors=True)

    def restore(
        self, policy: Policy, optimizer: torch.optim.Optimizer | None = None, *, best: bool = False
    ) -> Restored | None:
        """Bring the newest checkpoint back, or the best; `None` where there is none yet. Raises `UserError`."""
        numbered = self._numbered()
        folder = self.path / "checkpoints" / BEST if best else numbered[-1] if numbered else None
        if folder is None or not folder.exists():
            return None
        adapter = load_peft(folder / "adapter")
        check_belongs_to(adapter, policy.base.fingerprint, policy.base.paths[0].name)
        _check_size(adapter, policy, folder)
        policy.load_adapter(adapter.matrices)
        try:
            told = json.loads((folder / _STATE).read_text(encoding="utf-8"))
            if optimizer is not None:
                optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
            return Restored(int(told["step"]), told["state"])
        except (OSError, ValueError, KeyError, RuntimeError, EOFError, UnpicklingError) as error:
            hint = "delete it to go on from the one before"
            words = str(error).partition("\n")[0].partition(". ")[0]  # PyTorch explains at length
            raise UserError(f"the checkpoint {folder} is damaged: {words}", hint) from None

    def _forget_after(self, step: int) -> None:
        """Drop what log and completions say of later steps: they will be made again."""
        for name in (_LOG, _COMPLETIONS):
            path = self.path / name
            if path.exists():
                _write(path, "".join(as_line(it) for it in read_whole(path) if it.get("step", 0) <= step))

    def _numbered(self) -> list[Path]:
        return sorted(it for it in (self.path / "checkpoints").glob("[0-9]*") if it.name.isdigit())

    def _append(self, name: str, records: Iterable[Mapping[str, Any]]) -> None:
        try:
            with (self.path / name).open("a", encoding="utf-8") as file:
                file.writelines(map(as_line, records))
        except OSError as error:
            raise _unwritable(self.path / name, error) from None


def adapter_of(policy: Policy) -> Adapter:
    """A policy's adapter, for saving."""
    base = policy.base
    return Adapter(policy.adapter(), policy.rank, policy.alpha, base.shape, base.paths[0].name, base.fingerprint)


def start_from(policy: Policy, run: str) -> None:
    """Take another run's adapter as the beginning. Raises `UserError` where it does not fit."""
    adapter = load_peft(Path(run) / "adapter")
    check_belongs_to(adapter, policy.base.fingerprint, policy.base.paths[0].name)
    _check_size(adapter, policy, Path(run))
    policy.load_adapter(adapter.matrices)


def _check_size(adapter: Adapter, policy: Policy, where: Path) -> None:
    if (adapter.rank, adapter.alpha) != (policy.rank, policy.alpha):
        raise UserError(
            f"the adapter in {where} has rank {adapter.rank} and alpha {adapter.alpha:g}, and the run asks for "
            f"{policy.rank} and {policy.alpha:g}",
            f"--set lora.rank={adapter.rank} --set lora.alpha={adapter.alpha:g}",
        )


def _write(path: Path, text: str) -> None:
    """Put a text in a file's place, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: OSError) -> UserError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return UserError(f"{path} cannot be written: {error.strerror}", _ROOM if full else "choose another --out")
