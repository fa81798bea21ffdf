"""The model that learns: a frozen base, a small adapter beside every linear layer, log-probabilities of replies.

The reference model is the same module with the adapter switched off. Replies to one prompt lie behind it in one row
and share its keys and values, so a prompt is computed once however many replies it has. Logits are made for a part of
the vocabulary at a time and never kept. Knows nothing of rewards, texts or files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from .basemodel import BaseModel, linear_names
from .layers import LoraLinear, Switch, lighten, share_changed
from .packed import Linear, rows_of

_ATTENTION = "stillhouse_shared_prefix"
_CHUNK = 1024  # tokens of the vocabulary whose logits exist at once
_WIDEST_INITIAL = math.sqrt(5)  # PEFT's own start for A: uniform, 1/sqrt(in)


class Group(NamedTuple):
    """One prompt and its replies, as token ids."""

    prompt_ids: Sequence[int]
    replies: Sequence[Sequence[int]]

    @property
    def tokens(self) -> int:
        """That a forward pass has to read."""
        return len(self.prompt_ids) + sum(len(reply) - 1 for reply in self.replies)


class Scores(NamedTuple):
    """Of every token of every reply; R replies, T tokens of the longest, 0 behind a reply's end."""

    logp: Tensor  # (R, T), natural log, with gradient
    entropy: Tensor  # (R, T), of the distribution the token was drawn from; without gradient
    mask: Tensor  # (R, T), 1.0 where there is a token


@dataclass(slots=True)
class Policy:
    """A base model with an adapter."""

    base: BaseModel
    rank: int
    alpha: float
    seed: int = 0
    checkpointing: bool = False  # keep fewer activations and compute them again
    switch: Switch = field(default_factory=Switch, init=False)
    layers: dict[str, LoraLinear] = field(default_factory=dict, init=False)  # by their module's name in transformers

    def __post_init__(self) -> None:
        module: Any = self.base.module
        _teach_attention()
        module.set_attn_implementation(_ATTENTION)
        generator = torch.Generator().manual_seed(self.seed)
        for name in linear_names(self.base.shape):
            parent, _, last = name.rpartition(".")
            layer = LoraLinear(module.get_submodule(name), self.rank, self.alpha, self.switch)
            bound = math.sqrt(6 / ((1 + _WIDEST_INITIAL**2) * layer.base.in_features))
            with torch.no_grad():
                layer.a.copy_(torch.empty(layer.a.shape).uniform_(-bound, bound, generator=generator))
            setattr(module.get_submodule(parent), last, layer)
            self.layers[name] = layer
        lighten(module)
        if self.checkpointing:
            module.activation_checkpointing_enable({"use_reentrant": False})
        module.train(self.checkpointing)  # the models have no dropout; recomputing asks for this mode

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(iter(self.layers.values())).a.device

    def parameters(self) -> list[nn.Parameter]:
        """What is trained, in a fixed order."""
        return [weights for layer in self.layers.values() for weights in (layer.a, layer.b)]

    def adapter(self) -> dict[str, tuple[Tensor, Tensor]]:
        """A (rank, in) and B (out, rank) of every layer; no copies."""
        return {name: (layer.a.detach(), layer.b.detach()) for name, layer in self.layers.items()}

    def load_adapter(self, adapter: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Take the weights of another adapter of the same rank and layers."""
        with torch.no_grad():
            for name, layer in self.layers.items():
                a, b = adapter[name]
                layer.a.copy_(a)
                layer.b.copy_(b)

    def change(self) -> float:
        """How large the adapter is beside the weights it changes: the mean of |scale B A| / |W| over the layers."""
        return sum(map(share_changed, self.layers.values())) / len(self.layers)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The base model, without the adapter, for as long as this lasts."""
        self.switch.on = False
        try:
            yield
        finally:
            self.switch.on = True

    def score(self, groups: Sequence[Group], temperature: float = 1.0) -> Scores:
        """Log-probability and entropy of every token of every reply, in their order; one forward pass for all."""
        packed = pack(groups, self.device)
        model: Any = self.base.module
        hidden = self.hidden(packed)
        logp, entropy = log_probabilities(hidden, model.lm_head, packed.targets, temperature=temperature)
        return Scores(packed.spread(logp), packed.spread(entropy), packed.mask.to(logp.dtype))

    def hidden(self, packed: Packed) -> Tensor:
        """What the last block leaves before each token that is scored: (M, D)."""
        model: Any = self.base.module
        embedded = model.model.embed_tokens(packed.ids)[None]
        if embedded.dtype.itemsize < 4:  # products may be in 16 bits, sums over the layers not
            embedded = embedded.float()
        states = model.model(
            inputs_embeds=embedded,
            position_ids=packed.positions[None],
            segments=packed.segments,
            use_cache=False,
        ).last_hidden_state[0]
        return states[packed.rows]


# Many replies in one row


class Segment(NamedTuple):
    """Where a prompt and its replies lie in the row."""

    prompt: slice
    replies: Tensor  # (R, L), a reply's rows; behind its end any other
    real: Tensor  # (R, L), bool: not behind its end
    sees: Tensor  # (L, prompt + L), bool: all of the prompt, and of its own reply what came before


class Packed(NamedTuple):
    """Groups in one row of N tokens; M tokens to be scored."""

    ids: Tensor  # (N,)
    positions: Tensor  # (N,), as if every reply followed its prompt alone
    segments: tuple[Segment, ...]
    rows: Tensor  # (M,), whose hidden state predicts the token
    targets: Tensor  # (M,)
    mask: Tensor  # (R, T), bool

    def spread(self, values: Tensor) -> Tensor:
        """One value a scored token, (M,) -> (R, T), 0 behind a reply's end."""
        at = self.mask.flatten().nonzero()[:, 0]
        return values.new_zeros(self.mask.numel()).index_put((at,), values).view(self.mask.shape)


def pack(groups: Sequence[Group], device: torch.device) -> Packed:
    """Lay groups behind one another; a reply's last token is only predicted, never read."""
    ids: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    rows: list[int] = []
    targets: list[int] = []
    lengths: list[int] = []

    def integers(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    for prompt_ids, replies in groups:
        prompt = slice(len(ids), len(ids) + len(prompt_ids))
        ids += prompt_ids
        positions += range(len(prompt_ids))
        starts: list[int] = []
        for reply in replies:
            here = len(ids)
            ids += reply[:-1]
            positions += range(len(prompt_ids), len(prompt_ids) + len(reply) - 1)
            rows += [prompt.stop - 1, *range(here, len(ids))]
            targets += reply
            lengths.append(len(reply))
            starts.append(here)
        read = integers([len(reply) - 1 for reply in replies])[:, None]
        longest, before = int(read.max()) if replies else 0, len(prompt_ids)
        at = torch.arange(longest, device=device)[None]
        places = (integers(starts)[:, None] + at).clamp(max=len(ids) - 1)
        sees = torch.ones(longest, before + longest, dtype=torch.bool, device=device).tril(before)
        segments.append(Segment(prompt, places, at < read, sees))
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    return Packed(
        integers(ids), integers(positions), tuple(segments), integers(rows), integers(targets), mask.to(device)
    )


def _teach_attention() -> None:
    """Tell transformers of an attention in which replies see their prompt and themselves, and not one another."""
    from transformers import AttentionInterface

    AttentionInterface.register(_ATTENTION, _shared_prefix_attention)


def _shared_prefix_attention(
    module: Any,
    query: Tensor,  # (1, heads, N, head)
    key: Tensor,  # (1, kv heads, N, head)
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    segments: tuple[Segment, ...],
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: (1, N, heads, head) out."""
    if torch.is_grad_enabled() and query.requires_grad:  # its insides are many times as large as what goes in
        attended: Any = checkpoint(
            _attend, query, key, value, segments, scaling, use_reentrant=False, preserve_rng_state=False
        )
    else:
        attended = _attend(query, key, value, segments, scaling)
    return attended, None


def _attend(query: Tensor, key: Tensor, value: Tensor, segments: Sequence[Segment], scaling: float) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    grouped = query.device.type == "cpu"  # its kernel shares keys among heads; CUDA's with a mask does not
    if repeats > 1 and not grouped:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    parts: list[Tensor] = []
    for segment in segments:
        prompt, replies = segment.prompt, segment.replies
        prompt_key, prompt_value = key[:, :, prompt], value[:, :, prompt]
        own = functional.scaled_dot_product_attention(
            query[:, :, prompt], prompt_key, prompt_value, is_causal=True, scale=scaling, enable_gqa=grouped
        )
        parts.append(own[0].transpose(0, 1))  # (P, heads, head)
        count, longest = replies.shape
        if not longest:
            continue
        mine, keys, values = (it[0, :, replies].transpose(0, 1) for it in (query, key, value))  # (R, heads, L, head)
        attended = functional.scaled_dot_product_attention(
            mine,
            torch.cat([prompt_key.expand(count, -1, -1, -1), keys], 2),
            torch.cat([prompt_value.expand(count, -1, -1, -1), values], 2),
            attn_mask=segment.sees,
            scale=scaling,
            enable_gqa=grouped,
        )
        parts.append(attended.transpose(1, 2)[segment.real])
    return torch.cat(parts)[None]


# Log-probabilities without the logits


def log_probabilities(
    hidden: Tensor, head: nn.Linear | Linear, targets: Tensor, *, temperature: float = 1.0, chunk: int = _CHUNK
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy at its place: (M, D), V rows of D, (M,) -> (M,), (M,).

    Logits are divided by the temperature. They exist once, for `chunk` of the V rows at a time. The gradient goes to
    `hidden` only; the entropy has none.
    """
    return _LogProbabilities.apply(hidden, head, targets, temperature, chunk)  # pyright: ignore[reportReturnType]


class _LogProbabilities(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        context: Any, hidden: Tensor, head: nn.Linear | Linear, targets: Tensor, temperature: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        # A sum over e^logit grows from part to part, times e^-top with the largest logit so far. The gradient of a
        # log-probability is made on the way as well; one number a row scales it later.
        learns = context.needs_input_grad[0]
        total = torch.zeros(len(hidden), 1, dtype=_wide(hidden.dtype), device=hidden.device)
        weighted, wanted, top = torch.zeros_like(total), torch.zeros_like(total), torch.full_like(total, -math.inf)
        mean = torch.zeros_like(hidden, dtype=total.dtype) if learns else None  # of the rows, by chance
        for start in range(0, head.out_features, chunk):
            rows = rows_of(head, slice(start, start + chunk))
            logits = _logits(hidden, rows, temperature)  # (M, chunk)
            places = targets[:, None] - start
            here = (places >= 0) & (places < len(rows))
            wanted = torch.where(here, logits.gather(-1, places.clamp(0, len(rows) - 1)), wanted)
            largest = torch.maximum(top, logits.amax(-1, keepdim=True))
            shrink = (top - largest).exp_()
            chances = (logits - largest).exp_()
            total = total * shrink + chances.sum(-1, keepdim=True)
            weighted = weighted * shrink + torch.linalg.vecdot(chances, logits)[:, None]
            if mean is not None:
                mean.mul_(shrink).add_(chances.to(rows.dtype) @ rows)
            top = largest
        whole = top + total.log()
        logp, entropy = (wanted - whole)[:, 0], (whole - weighted / total)[:, 0]
        if mean is not None:
            slopes = (rows_of(head, targets) - mean.div_(total)).div_(temperature)
            context.save_for_backward(slopes.to(hidden.dtype))
        context.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(context: Any, gradient: Tensor, _: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (slopes,) = context.saved_tensors
        return slopes * gradient.to(slopes.dtype)[:, None], None, None, None, None


def _logits(rows: Tensor, head: Tensor, temperature: float) -> Tensor:
    logits = functional.linear(rows.to(head.dtype), head)
    return logits.to(_wide(logits.dtype)).div_(temperature)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def micro_batches(groups: Sequence[Group], budget: int) -> list[list[int]]:
    """Indices of groups that go through the model together: as many as `budget` tokens hold, longest first.

    A group that is larger goes alone.
    """
    order = sorted(range(len(groups)), key=lambda index: (-groups[index].tokens, index))
    batches: list[list[int]] = []
    left: list[int] = []
    for index in order:
        place = next((n for n, room in enumerate(left) if room >= groups[index].tokens), None)
        if place is None:
            batches.append([])
            left.append(budget)
            place = len(left) - 1
        batches[place].append(index)
        left[place] -= groups[index].tokens
    return batches
