"""The Fisher information of a checkpoint, one layer in memory at a time, turned into prices as soon as it is known.

Forwards, the input of every layer is kept; then from the last layer to the first each is loaded again, run on what was
kept, and the gradient is taken through it. One product of matrices for each weight matrix, (G*G)^T (X*X), is the sum of
its Fisher information over all positions; its candidates are rendered, and it is forgotten. At the output the
expectation over y is exact, p (1 - p), and the vocabulary goes by in slabs. A tied matrix has both shares, as embedding
and as output. Kernels that round their inputs to 8 bits, as llama.cpp's do on a processor, lose something even where
the weights lose nothing; the gradient at the inputs prices that, too.

Shapes: N texts, T tokens, D the width, V the vocabulary, P = N T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from .architectures import OUTSIDE
from .importance import Floats, Importance
from .kld import Ids
from .pytorch_layers import EMBEDDING, Decoder, Layer, batches
from .sensitivity import ROWS, Candidate, Cost, Sensitivity, price, sample_rows

_VOCABULARY_SLAB = 4096  # rows of the output matrix at once
_VOCABULARY_SAMPLE = 8  # times as many rows of it are rendered as of another matrix: few tokens matter, and much


@dataclass(slots=True)
class _Pass:
    """What one analysis is given, and what it has found so far."""

    decoder: Decoder
    chunks: Ids  # (N, T)
    scored: Tensor  # (N, T) of bool: positions whose prediction counts
    candidates: Sequence[Candidate]
    importance: Importance | None  # what the quantizer will be given; None = what is found on the way
    rows: int
    random: np.random.Generator
    progress: Callable[[int], None]
    costs: dict[str, dict[str, Cost]] = field(default_factory=dict)

    @property
    def blocks(self) -> set[int]:
        """In which lengths the candidates' kernels round their inputs."""
        return {candidate.input_block for candidate in self.candidates if candidate.input_block}

    @property
    def count(self) -> int:
        """Scored positions."""
        return int(self.scored.sum())


def analyse(
    decoder: Decoder,
    chunks: Ids,
    candidates: Sequence[Candidate],
    *,
    text: str,
    importance: Importance | None = None,
    rows: int = ROWS,
    seed: int = 0,
    first: int = 1,
    progress: Callable[[int], None] = lambda _: None,
) -> Sensitivity:
    """Price every matrix of a model in every candidate type, by what it predicts from position `first` of each text on.

    `progress` is told of every layer twice (there and back), and of the output once.
    """
    scored = torch.zeros(chunks.shape, dtype=torch.bool)
    scored[:, first:] = True
    work = _Pass(decoder, chunks, scored, candidates, importance, rows, np.random.default_rng(seed), progress)
    inputs = _forward(work)
    states, gradient, head = _through_head(work, inputs.pop())
    for number in reversed(range(decoder.count)):
        gradient = _through_layer(work, number, inputs.pop(), gradient)
        progress(1)
    _price_outside(work, states, head, gradient)
    return Sensitivity(work.costs, decoder.checkpoint.name, text, work.count)


def _forward(work: _Pass) -> list[Tensor]:
    """The input of every layer and the output of the last one, each (N, T, D)."""
    kept = [work.decoder.embed(work.chunks)]
    with torch.no_grad():
        for number in range(work.decoder.count):
            with work.decoder.layer(number) as layer:
                last = kept[-1]
                kept.append(torch.cat([work.decoder.run(layer, last[some]) for some in batches(last)]))
            work.progress(1)
    return kept


# 1. The output: what is predicted, and what y is


@dataclass(frozen=True, slots=True)
class _Head:
    """What the output said."""

    log_total: Tensor  # (P,) of the exponentials of the logits
    mass: Tensor  # (V,) how much Fisher information each row has
    rounding: dict[int, float]  # what 8-bit states cost, by the length of a block


def _through_head(work: _Pass, last: Tensor) -> tuple[Tensor, Tensor, _Head]:
    """Draw y, and take the gradient back through output matrix and norm: the states (P, D), the gradient (N, T, D)."""
    with work.decoder.norm() as norm:
        last = last.detach().requires_grad_()
        states = norm(last)
        flat = states.detach().reshape(-1, work.decoder.width)  # (P, D)
        scored = work.scored.reshape(-1, 1)
        log_total, drawn = _draw(work, flat)
        gradient, mass = torch.zeros_like(flat), []
        lengths = (flat * flat).sum(1, keepdim=True) * scored  # (P, 1)
        for start, matrix in _output_slabs(work.decoder):
            p = (flat @ matrix.T - log_total[:, None]).exp_()  # (P, slab)
            mass.append((p * (1 - p) * lengths).sum(0))
            here = (drawn >= start) & (drawn < start + len(matrix))
            p[here, drawn[here] - start] -= 1
            gradient += (p * scored) @ matrix
        states.backward(gradient.reshape(states.shape))
    rounding: dict[int, float] = {}
    _add_rounding(rounding, gradient, flat, work.blocks)
    work.progress(1)
    assert last.grad is not None
    return flat, last.grad, _Head(log_total, torch.cat(mass), rounding)


def _draw(work: _Pass, states: Tensor) -> tuple[Tensor, Tensor]:
    """For every state (P, D) the log of the sum of the exponentials of its logits, and a token drawn by them.

    A token drawn by softmax is the one with the largest sum of logit and Gumbel noise, and a maximum can be kept while
    the vocabulary goes by.
    """
    generator = torch.Generator().manual_seed(int(work.random.integers(1 << 31)))
    total = torch.full((len(states),), -torch.inf)
    best, drawn = total.clone(), torch.zeros(len(states), dtype=torch.long)
    for start, matrix in _output_slabs(work.decoder):
        logits = states @ matrix.T
        total = torch.logaddexp(total, logits.logsumexp(1))
        noise = torch.rand(logits.shape, generator=generator).clamp_(1e-20, 1 - 1e-7).log_().neg_().log_().neg_()
        top, place = (logits + noise).max(1)
        drawn = torch.where(top > best, place + start, drawn)
        best = torch.maximum(best, top)
    return total, drawn


def _output_slabs(decoder: Decoder) -> Iterator[tuple[int, Tensor]]:
    """The output matrix, some rows at a time: the first one's number, and the rows (slab, D)."""
    rows = decoder.checkpoint.tensors[decoder.head].shape[0]
    for start in range(0, rows, _VOCABULARY_SLAB):
        slab = decoder.checkpoint.rows(decoder.head, start, min(rows, start + _VOCABULARY_SLAB))
        yield start, torch.from_numpy(np.require(slab, requirements=["W", "O"]))
    decoder.checkpoint.advise(decoder.head, soon=False)


# 2. A layer


@dataclass(slots=True)
class Use:
    """How a matrix (O, I) is used, summed over all positions."""

    fisher: Tensor  # (O, I) of g^2 x^2
    squares: Tensor  # (I,) of x^2
    rounding: dict[int, float]  # half of (g W)^2 dx^2, by the length of the blocks that inputs are rounded in
    positions: int = 0


def _through_layer(work: _Pass, number: int, inputs: Tensor, gradient: Tensor) -> Tensor:
    """Price a layer's matrices; the gradient (N, T, D) at its output becomes that at its input."""
    with work.decoder.layer(number) as layer:
        uses, before = uses_of(work.decoder, layer, inputs, gradient, work.blocks)
        for name, linear in layer.linears.items():
            weights, use = linear.weight.detach(), uses.pop(name)
            moments = (use.squares / use.positions).float().numpy()
            mass = use.fisher.sum(1) * (weights * weights).mean(1)
            sample = sample_rows(mass.numpy(), work.rows, work.random)
            work.costs[name] = price(
                weights[sample.rows].numpy(),
                (use.fisher[sample.rows] / work.count).numpy(),
                sample,
                (len(weights), weights.shape[1]),
                work.candidates,
                importance=work.importance.values.get(name) if work.importance else moments,
                second_moments=moments,
                rounding={block: kl / work.count for block, kl in use.rounding.items()},
            )
    return before


def uses_of(
    decoder: Decoder, layer: Layer, inputs: Tensor, gradient: Tensor, blocks: Collection[int] = ()
) -> tuple[dict[str, Use], Tensor]:
    """How a layer uses its matrices, and the gradient at its input.

    `inputs` and `gradient`, that at the layer's output, are (N, T, D).
    """
    uses = {
        name: Use(torch.zeros_like(linear.weight), torch.zeros(linear.in_features, dtype=torch.float64), {})
        for name, linear in layer.linears.items()
    }

    def watch(use: Use) -> Callable[..., None]:
        def forward(linear: nn.Linear, taken: tuple[Tensor, ...], given: Tensor) -> None:
            x = taken[0].detach().reshape(-1, linear.in_features)
            use.squares += x.square().sum(0, dtype=torch.float64)
            use.positions += len(x)

            def backward(gradient: Tensor) -> None:
                g = gradient.reshape(-1, linear.out_features)
                use.fisher.addmm_(g.square().T, x.square())
                _add_rounding(use.rounding, g @ linear.weight, x, blocks)

            given.register_hook(backward)

        return forward

    hooks = [linear.register_forward_hook(watch(uses[name])) for name, linear in layer.linears.items()]
    before = torch.empty_like(inputs)
    for some in batches(inputs):
        texts = inputs[some].detach().requires_grad_()
        decoder.run(layer, texts).backward(gradient[some])
        assert texts.grad is not None
        before[some] = texts.grad
    for hook in hooks:
        hook.remove()
    return uses, before


def _add_rounding(sums: dict[int, float], gradient: Tensor, x: Tensor, blocks: Collection[int]) -> None:
    """Half of the sum of (dL/dx)^2 dx^2: what 8-bit inputs (P, I) cost, for each length of a block that fits."""
    for block in blocks:
        if x.shape[1] % block == 0:
            errors = rounding_errors(x, block)
            sums[block] = sums.get(block, 0.0) + 0.5 * float((gradient * errors).square().sum(dtype=torch.float64))


def rounding_errors(x: Tensor, block: int) -> Tensor:
    """What 8 bits leave out of inputs (P, I), where each `block` of a row has a step of its own: (P, I)."""
    parts = x.reshape(len(x), -1, block)
    step = (parts.abs().amax(-1, keepdim=True) / 127).clamp_(min=1e-30)
    return ((parts / step).round_() * step - parts).reshape(x.shape)


# 3. What is outside of the layers


def _price_outside(work: _Pass, states: Tensor, head: _Head, gradient: Tensor) -> None:
    """Price the embedding and the output matrix, or both uses of the one that is both."""
    embedding = _embedding_fisher(work.chunks, gradient)
    if work.decoder.tied:
        _price_vocabulary(work, EMBEDDING, states, head, embedding)
    else:
        _price_vocabulary(work, work.decoder.head, states, head, {})
        _price_vocabulary(work, EMBEDDING, states, None, embedding)


def _embedding_fisher(chunks: Ids, gradient: Tensor) -> dict[int, Tensor]:
    """Sums of g^2 (D,) over the positions of each token in the texts; its row's input is 1 there, and else 0."""
    tokens, places = np.unique(chunks, return_inverse=True)
    squares = gradient.reshape(-1, gradient.shape[-1]).square()
    sums = torch.zeros(len(tokens), squares.shape[1]).index_add_(0, torch.from_numpy(places.reshape(-1)), squares)
    return dict(zip(tokens.tolist(), sums, strict=True))


def _price_vocabulary(
    work: _Pass, hf_name: str, states: Tensor, head: _Head | None, embedding: dict[int, Tensor]
) -> None:
    checkpoint, name = work.decoder.checkpoint, OUTSIDE[hf_name]
    shape = checkpoint.tensors[hf_name].matrix
    mass = torch.zeros(shape[0]) if head is None else head.mass.clone()
    for token, squares in embedding.items():
        mass[token] += squares.sum()
    sample = sample_rows(mass.numpy(), work.rows * _VOCABULARY_SAMPLE, work.random)
    weights = np.array(checkpoint.rows_at(hf_name, sample.rows))
    fisher = torch.zeros(weights.shape)
    if head is not None:
        fisher += _output_fisher(states, head, torch.from_numpy(weights), work.scored.reshape(-1, 1))
    for place, row in enumerate(sample.rows.tolist()):
        if row in embedding:
            fisher[place] += embedding[row]
    work.costs[name] = price(
        weights,
        (fisher / work.count).numpy(),
        sample,
        shape,
        work.candidates,
        importance=_importance(work, name),
        second_moments=states.square().mean(0).numpy() if head is not None else np.ones(shape[1], np.float32),
        rounding={block: kl / work.count for block, kl in head.rounding.items()} if head is not None else {},
    )


def _output_fisher(states: Tensor, head: _Head, rows: Tensor, scored: Tensor) -> Tensor:
    """Sums over the scored positions of p (1 - p) x^2 for some rows (R, D) of the output matrix: (R, D)."""
    p = (states @ rows.T - head.log_total[:, None]).exp() * scored  # (P, R)
    return (p * (1 - p)).T @ states.square()


def _importance(work: _Pass, name: str) -> Floats | None:
    """llama.cpp's importance matrices know nothing of what is outside of the layers; ours are used if they do."""
    return work.importance.values.get(name) if work.importance else None
