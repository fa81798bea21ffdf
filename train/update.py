"""One optimizer step, the same for supervised and reinforcement learning. Knows nothing of rewards."""

from __future__ import annotations

import ctypes
import math
import sys

import torch

from ..backends import machine
from ..r1.errors import UserError
from .config import ModelConfig, OptimizerConfig
from .policy import Policy


def place(config: ModelConfig) -> tuple[torch.device, torch.dtype]:
    """Where the model goes, and in what type."""
    name = config.device
    if name == "auto":
        has_metal = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if has_metal else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"there is no device {name!r}: {error}", 'model.device = "auto" takes what there is') from None
    return device, torch.bfloat16 if config.dtype == "bf16" else torch.float32


def use_threads(threads: int) -> None:
    """Have PyTorch compute with so many threads; 0 = what the engine takes then."""
    torch.set_num_threads(threads or machine.compute_threads())


def make_optimizer(policy: Policy, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the adapter."""
    return torch.optim.AdamW(
        policy.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, foreach=False
    )


def rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate of a step, counted from 1: a linear start, then constant or a cosine down to a tenth."""
    warm = min(1.0, step / config.warmup) if config.warmup else 1.0
    if config.schedule == "constant":
        return config.lr * warm
    progress = max(0, step - config.warmup) / max(1, steps - config.warmup)
    return config.lr * warm * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)


def clip_and_step(
    policy: Policy, optimizer: torch.optim.Optimizer, config: OptimizerConfig, lr: float, loss: float
) -> float:
    """Clip the gradient and take the step; the gradient's norm before. Raises `UserError` where it is no number."""
    norm = float(torch.nn.utils.clip_grad_norm_(policy.parameters(), config.clip or math.inf, foreach=False))
    if not (math.isfinite(norm) and math.isfinite(loss)):
        raise UserError(
            f"the loss ({loss}) or its gradient ({norm}) is not a number; this step was not taken",
            "lower optimizer.lr and go on with --resume; a checkpoint that cannot be gone on from may be deleted",
        )
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return norm


def give_back_memory() -> None:
    """Have the C library return what was freed: batches of many sizes leave holes that grow from step to step."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:  # glibc
        trim(0)


def peak_memory() -> int:
    """Bytes that this process has had at most."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
