"""The layers that a policy puts in place of transformers': the same numbers, with less kept for the gradient.

A norm keeps its input and one number a row, a linear layer its input and the narrow inside of its adapter, the last one
of an MLP the two factors of its input; everything else is computed again. The frozen matrix is asked for when it is
needed, forward and backward, and not kept: it may be packed. Weights other than the adapter's have no gradient. Knows
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

from .packed import Linear, rows_of


@dataclass(slots=True)
class Switch:
    """Whether the adapter counts; shared by all its layers."""

    on: bool = True


class LoraLinear(nn.Module):
    """A frozen linear layer and a low-rank change to it: x W' + scale x A' B'."""

    def __init__(self, base: nn.Linear | Linear, rank: int, alpha: float, switch: Switch) -> None:
        super().__init__()
        weight = base.weight
        self.base = base
        self.scale = alpha / rank
        self.switch = switch
        self.a = nn.Parameter(torch.empty(rank, base.in_features, dtype=torch.float32, device=weight.device))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank, dtype=torch.float32, device=weight.device))
        self.base_norm = float(weight.detach().float().norm())  # |W|

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        """In x's type; the frozen product in the type of its weights, the adapter's in its own."""
        if not self.switch.on:
            return self._frozen(x)
        y: Any = _Lora.apply(x.reshape(-1, x.shape[-1]), self.a, self.b, self)
        return y.view(*x.shape[:-1], -1)

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """The same for x = silu(gate) * up, which is not kept."""
        if not self.switch.on:
            return self._frozen(functional.silu(gate).mul_(up))
        y: Any = _GatedLora.apply(gate.reshape(-1, gate.shape[-1]), up.reshape(-1, up.shape[-1]), self.a, self.b, self)
        return y.view(*gate.shape[:-1], -1)

    def _frozen(self, x: Tensor) -> Tensor:
        weight = self.base.weight
        return functional.linear(x.to(weight.dtype), weight, self.base.bias).to(x.dtype)


@torch.no_grad()
def share_changed(layer: LoraLinear) -> float:
    """|scale B A| / |W| of one layer."""
    # |B A|² = trace(A A' B' B): two small products instead of a whole matrix
    square = ((layer.a @ layer.a.T) * (layer.b.T @ layer.b)).sum().clamp(min=0)
    return float(square.sqrt() * layer.scale) / layer.base_norm


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
        return self.down_proj.gated(self.gate_proj(x), self.up_proj(x))


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
    def forward(context: Any, x: Tensor, a: Tensor, b: Tensor, layer: LoraLinear) -> Tensor:
        y, low = _product(x, a, b, layer)
        context.save_for_backward(x, a, b, low)
        context.layer = layer
        return y

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:
        x, a, b, low = context.saved_tensors
        return *_gradients(gradient, x, a, b, low, context.layer, context.needs_input_grad[0]), None


class _GatedLora(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, gate: Tensor, up: Tensor, a: Tensor, b: Tensor, layer: LoraLinear) -> Tensor:
        y, low = _product(functional.silu(gate).mul_(up), a, b, layer)
        context.save_for_backward(gate, up, a, b, low)
        context.layer = layer
        return y

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:
        gate, up, a, b, low = context.saved_tensors
        opened = functional.silu(gate)
        down, down_a, down_b = _gradients(gradient, opened * up, a, b, low, context.layer, True)
        assert down is not None
        return torch.ops.aten.silu_backward(down * up, gate), opened.mul_(down), down_a, down_b, None


def _product(x: Tensor, a: Tensor, b: Tensor, layer: LoraLinear) -> tuple[Tensor, Tensor]:
    """x through a layer, and the inside of its adapter: (M, in) -> (M, out), (M, rank)."""
    weight = rows_of(layer.base)
    y = functional.linear(x.to(weight.dtype), weight, layer.base.bias)
    wide = x.to(a.dtype) if x.dtype.itemsize < a.dtype.itemsize else x
    low = wide @ a.to(wide.dtype).T
    if y.dtype == low.dtype:
        return y.addmm_(low, b.to(low.dtype).T, alpha=layer.scale), low
    return torch.addmm(y.to(low.dtype), low, b.T, alpha=layer.scale).to(x.dtype), low


def _gradients(
    gradient: Tensor, x: Tensor, a: Tensor, b: Tensor, low: Tensor, layer: LoraLinear, is_wanted: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Of x (where it is wanted), A and B."""
    wide = gradient.to(low.dtype)
    through = (wide @ b.to(wide.dtype)).mul_(layer.scale)  # (M, rank)
    down_a = (through.T @ x.to(wide.dtype)).to(a.dtype)
    down_b = (wide.T @ low).mul_(layer.scale).to(b.dtype)
    if not is_wanted:
        return None, down_a, down_b
    weight = rows_of(layer.base)
    down = (gradient.to(weight.dtype) @ weight).to(wide.dtype)
    return down.addmm_(through, a.to(wide.dtype)).to(x.dtype), down_a, down_b


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
