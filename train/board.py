"""A run's log as TensorBoard reads it, where a writer of its files is installed. Knows nothing of what is logged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..r1.errors import UserError


class Board:
    """Scalars by step, in `tensorboard/` of a run's folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "tensorboard"
        self._kind = _writer()
        self._writer: Any = None

    def add(self, record: Mapping[str, Any]) -> None:
        """Every number of a record; of an interval its middle."""
        step = int(record.get("step", 0))
        if self._writer is None:  # what an interrupted run wrote of later steps is not shown
            self._writer = self._kind(str(self._folder), purge_step=step)
        for name, value in record.items():
            number = value[0] if isinstance(value, (list, tuple)) and value else value
            if name not in ("step", "kind") and isinstance(number, (int, float)):
                self._writer.add_scalar(f"{record.get('kind', 'run')}/{name}", number, step)
        self._writer.flush()


def _writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise UserError(
                "save.tensorboard needs a writer of TensorBoard's files", "pip install tensorboard, or tensorboardX"
            ) from None
    return SummaryWriter
