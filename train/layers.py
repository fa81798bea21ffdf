"""The layers that a policy puts in place of transformers': the same numbers, with less kept for the gradient.

A norm keeps its input and one number a row, a gated product its two factors, a linear layer its input and the narrow
inside of its adapter; everything else is computed again. Weights other than the adapter's have no gradient. Knows
nothing of prompts and replies.
"""

# pyright: reportIncompatibleMethodOverride=false
# autograd's own signatures are `*args`

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(slots=True)
class Switch:
    """Whether the adapter counts; shared by all its layers."""

    on: bool = True


class LoraLinear(nn.Module):
    """A frozen linear layer and a low-rank change to it: x W' + scale x A' B'."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, switch: Switch) -> None:
        super().__init__()
        self.base = base
        self.scale = alpha / rank
        self.switch = switch
        self.a = nn.Parameter(torch.empty(rank, base.in_features, dtype=torch.float32, device=base.weight.device))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank, dtype=torch.float32, device=base.weight.device))

    @property
    def weight(self) -> Tensor:
        """The frozen part; others ask it for its type and place."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        """In x's type; the frozen product in the type of its weights, the adapter's in its own."""
        if not self.switch.on:
            return functional.linear(x.to(self.weight.dtype), self.weight, self.base.bias).to(x.dtype)
        rows = x.reshape(-1, x.shape[-1])
        y: Any = _Lora.apply(rows, self.weight, self.base.bias, self.a, self.b, self.scale)
        return y.view(*x.shape[:-1], -1)


@torch.no_grad()
def share_changed(layer: LoraLinear) -> float:
    """|scale B A| / |W| of one layer."""
    # |B A|² = trace(A A' B' B): two small products instead of a whole matrix
    square = ((layer.a @ layer.a.T) * (layer.b.T @ layer.b)).sum().clamp(min=0)
    return float(square.sqrt() * layer.scale / layer.base.weight.float().norm())


class Norm(nn.Module):
    """RMSNorm with the weights of another module; they are frozen."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight = norm.weight
        self.variance_epsilon = float(norm.variance_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        """In x's type, or in float32 inside where that is narrower."""
        return _Norm.apply(x, self.weight, self.variance_epsilon)  # pyright: ignore[reportReturnType]


class GatedMlp(nn.Module):
    """silu(gate) * up, then down; the projections are another module's."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        return self.down_proj(_Gate.apply(self.gate_proj(x), self.up_proj(x)))


def lighten(module: Any) -> None:
    """Replace the norms and the MLPs of a transformers model of the llama family."""
    for block in module.model.layers:
        block.input_layernorm = Norm(block.input_layernorm)
        block.post_attention_layernorm = Norm(block.post_attention_layernorm)
        for name in ("q_norm", "k_norm"):
            if hasattr(block.self_attn, name):
                setattr(block.self_attn, name, Norm(getattr(block.self_attn, name)))
        block.mlp = GatedMlp(block.mlp)
    module.model.norm = Norm(module.model.norm)


class _Lora(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        y = functional.linear(x.to(weight.dtype), weight, bias)
        wide = x.to(a.dtype) if x.dtype.itemsize < a.dtype.itemsize else x
        low = wide @ a.to(wide.dtype).T  # (M, rank)
        context.save_for_backward(x, weight, a, b, low)
        context.scale = scale
        if y.dtype == low.dtype:
            return y.addmm_(low, b.to(low.dtype).T, alpha=scale)
        return torch.addmm(y.to(low.dtype), low, b.T, alpha=scale).to(x.dtype)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:
        x, weight, a, b, low = context.saved_tensors
        wide = gradient.to(low.dtype)
        through = (wide @ b.to(wide.dtype)).mul_(context.scale)  # (M, rank)
        down_a = (through.T @ x.to(wide.dtype)).to(a.dtype)
        down_b = (wide.T @ low).mul_(context.scale).to(b.dtype)
        down = None
        if context.needs_input_grad[0]:
            down = (gradient.to(weight.dtype) @ weight).to(wide.dtype)
            down = down.addmm_(through, a.to(wide.dtype)).to(x.dtype)
        return down, None, None, down_a, down_b, None


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.float() if x.dtype.itemsize < 4 else x
        scale = wide.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()
        context.save_for_backward(x, weight, scale)
        return (wide * scale).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:
        x, weight, scale = context.saved_tensors
        wide = x.to(scale.dtype)
        weighted = gradient.to(scale.dtype) * weight
        along = (weighted * wide).mean(-1, keepdim=True).mul_(scale.square())
        return torch.addcmul(weighted, wide, along, value=-1).mul_(scale).to(x.dtype), None, None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, gate: Tensor, up: Tensor) -> Tensor:
        context.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:
        gate, up = context.saved_tensors
        down_gate = torch.ops.aten.silu_backward(gradient * up, gate)
        return down_gate, functional.silu(gate).mul_(gradient)
