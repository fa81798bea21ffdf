"""Draws the next token of many replies at once, on the device that their logits are on, as `sampling.py` says.

Every request brings its own settings and its own random numbers, so that what is drawn for it depends on nobody else
in the batch. What was said before is looked through on the host, where it is known; whatever is as wide as the
vocabulary stays on the device, and one transfer brings the tokens back.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .base import GenerationRequest, Sampling
from .draft import Told
from .rowsampler import Breakers, dry
from .sampling import seed32

_SHORTLIST = 256  # tokens that a nucleus mostly fits in; where it does not, all are sorted


class Memory:
    """What of one request its next draw depends on: settings, random numbers, and what was said."""

    __slots__ = ("_prompt", "_random", "_said", "biased", "biases", "sampling")

    def __init__(self, request: GenerationRequest, end_ids: frozenset[int]) -> None:
        self.sampling = sampling = request.sampling
        biases = dict(sampling.logit_bias)
        if request.ignore_eos:
            biases.update(dict.fromkeys(end_ids, -math.inf))
        self.biased = np.array(list(biases), np.int64)
        self.biases = np.array(list(biases.values()), np.float32)
        most = max(sampling.penalty_last_n, sampling.dry_penalty_last_n, 1)
        self._prompt = np.array(request.prompt_ids[-most:], np.int64)
        self._said = array("q")
        self._random = np.random.default_rng(seed32(sampling.seed))

    def accept(self, token_id: int) -> None:
        """Remember a token of the reply, drawn or forced."""
        self._said.append(token_id)

    def forget(self) -> None:
        """Have penalties count the prompt only, as at the start."""
        self._said = array("q")

    def random(self) -> float:
        """The request's next random number, from 0 to below 1."""
        return float(self._random.random())

    def said(self, window: int) -> NDArray[np.int64]:
        """The last tokens of the reply."""
        return np.array(self._said[-window:], np.int64)

    def past(self, window: int) -> NDArray[np.int64]:
        """The last tokens of prompt and reply together."""
        return np.concatenate((self._prompt, self.said(window)))[-window:]


class Drawn(NamedTuple):
    """One row's token."""

    token_id: int
    told: Told | None  # where the request wants it


class _Draw(NamedTuple):
    """The random numbers of one row: they stay the same if it has to be drawn again."""

    token: float
    xtc: bool  # does XTC act this time?


class Sampler:
    """Draws for the requests of one model."""

    def __init__(self, breakers: Breakers) -> None:
        self._breakers = breakers

    def draw(
        self,
        logits: Tensor,
        memories: Sequence[Memory],
        masks: Sequence[NDArray[np.uint32] | None],
        wanted: Sequence[int | None],
    ) -> list[Drawn] | None:
        """The next token of each row of (R, vocabulary) float32 logits, which stay as they are.

        `masks` are the bits of what is allowed; `wanted` is how many log-probabilities are told with a token, `None`
        for none at all. Gives `None` where logits are no numbers; raises `ValueError` where a mask allows nothing.
        """
        scores = self._adjusted(logits, memories, masks)
        draws = [_Draw(m.random(), _xtc_acts(m)) if m.sampling.temperature > 0 else _Draw(0, False) for m in memories]
        ids, enough = self._pick(scores, memories, draws, full=False)
        most = max((count for count in wanted if count is not None), default=None)
        fetched = _fetch(logits, ids, enough, most)
        again = np.flatnonzero(fetched[:, 1] == 0)
        if again.size:
            index = torch.from_numpy(again).to(logits.device)
            rows = again.tolist()
            ids[index], _ = self._pick(
                scores[index], [memories[row] for row in rows], [draws[row] for row in rows], full=True
            )
            fetched = _fetch(logits, ids, enough, most)
        if not np.isfinite(fetched[:, 2]).all():
            return None
        return [_drawn(row, count, most) for row, count in zip(fetched, wanted, strict=True)]

    # What the model said, changed by what was asked for

    def _adjusted(
        self, logits: Tensor, memories: Sequence[Memory], masks: Sequence[NDArray[np.uint32] | None]
    ) -> Tensor:
        scores = logits
        masked = [row for row, bits in enumerate(masks) if bits is not None]
        if masked:
            allowed = _allowed([bits for bits in masks if bits is not None], logits)
            scores = logits.clone()
            scores[masked] = scores[masked].masked_fill(~allowed, -math.inf)
        for entries, change in (
            (map(_bias, memories), torch.add),
            (map(_repetition, memories), _repeated),
            (map(_occurrence, memories), torch.sub),
            (map(self._dry, memories), torch.sub),
        ):
            found = [(row, *entry) for row, entry in enumerate(entries) if entry is not None and entry[0].size]
            if not found:
                continue
            if scores is logits:
                scores = logits.clone()
            rows = np.concatenate([np.full(ids.size, row) for row, ids, _ in found])
            ids = np.concatenate([ids for _, ids, _ in found])
            amounts = np.concatenate([amounts for _, _, amounts in found]).astype(np.float32)
            place = torch.from_numpy(np.stack((rows, ids))).to(logits.device)
            there = place[0], place[1]
            scores[there] = change(scores[there], torch.from_numpy(amounts).to(logits.device))
        return scores

    def _dry(self, memory: Memory) -> _Entry | None:
        sampling = memory.sampling
        if not sampling.dry_multiplier or sampling.dry_penalty_last_n <= 0:
            return None
        return dry(memory.past(sampling.dry_penalty_last_n), sampling, self._breakers.is_breaker)

    # What is drawn from

    def _pick(
        self, scores: Tensor, memories: Sequence[Memory], draws: Sequence[_Draw], *, full: bool
    ) -> tuple[Tensor, Tensor]:
        """Tokens, (R,), and whether the shortlist was long enough for them."""
        kinds = [_kind(memory.sampling) for memory in memories]
        ids = torch.empty(len(kinds), dtype=torch.int64, device=scores.device)
        enough = torch.ones(len(kinds), dtype=torch.bool, device=scores.device)
        for kind in sorted(set(kinds)):
            index = [row for row, other in enumerate(kinds) if other == kind]
            alike = scores if len(index) == len(kinds) else scores[index]
            if kind == "greedy":
                ids[index] = alike.argmax(dim=-1)
                continue
            samplings = [memories[row].sampling for row in index]
            mine = [draws[row] for row in index]
            token = _column([draw.token for draw in mine], scores.device)
            if kind == "plain":
                ids[index] = _place(plain_chances(alike, samplings), token)
                continue
            chances, candidates, sufficed = truncated_chances(alike, samplings, [draw.xtc for draw in mine], full=full)
            ids[index] = candidates.gather(1, _place(chances, token)[:, None])[:, 0]
            enough[index] = sufficed
        return ids, enough


_Entry = tuple[NDArray[np.int64], NDArray[np.float32]]


def _bias(memory: Memory) -> _Entry | None:
    return memory.biased, memory.biases


def _repetition(memory: Memory) -> _Entry | None:
    sampling = memory.sampling
    if sampling.repetition_penalty == 1 or sampling.penalty_last_n <= 0:
        return None
    ids = np.unique(memory.past(sampling.penalty_last_n))
    return ids, np.full(ids.size, sampling.repetition_penalty, np.float32)


def _occurrence(memory: Memory) -> _Entry | None:
    sampling = memory.sampling
    if not (sampling.presence_penalty or sampling.frequency_penalty) or sampling.penalty_last_n <= 0:
        return None
    ids, counts = np.unique(memory.said(sampling.penalty_last_n), return_counts=True)
    return ids, (counts * sampling.frequency_penalty + sampling.presence_penalty).astype(np.float32)


def _repeated(scores: Tensor, factors: Tensor) -> Tensor:
    return torch.where(scores <= 0, scores * factors, scores / factors)


def _xtc_acts(memory: Memory) -> bool:
    sampling = memory.sampling
    return sampling.xtc_probability > 0 and memory.random() < sampling.xtc_probability


def _kind(sampling: Sampling) -> str:
    if sampling.temperature <= 0:
        return "greedy"
    sorts = sampling.top_k > 0 or sampling.top_p < 1 or sampling.typical_p < 1 or sampling.xtc_probability > 0
    return "truncated" if sorts else "plain"


def plain_chances(scores: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Chances of all tokens, (R, vocabulary), where nothing has to be sorted; not divided by their sum."""
    chances = (scores / _numbers(samplings, scores, lambda s: s.temperature)).softmax(dim=-1, dtype=_exact(scores))
    if any(sampling.min_p > 0 for sampling in samplings):
        least = _numbers(samplings, chances, lambda s: s.min_p) * chances.amax(dim=-1, keepdim=True)
        chances = chances * (chances >= least)
    return chances


def truncated_chances(
    scores: Tensor, samplings: Sequence[Sampling], xtc: Sequence[bool], *, full: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Chances of the likeliest tokens, (R, K), not divided by their sum; their ids; and whether K was enough, (R,).

    `xtc`: does it act on this row? `full`: K is the vocabulary, and enough.
    """
    size = scores.shape[-1]
    count = size if full else min(size, _SHORTLIST)
    scores = scores / _numbers(samplings, scores, lambda s: s.temperature)
    # Descending, and ties in the order of their ids, where all are sorted.
    top, ids = scores.sort(dim=-1, descending=True, stable=True) if full else scores.topk(count)
    top = top.to(_exact(scores))
    enough = _flags(samplings, scores, lambda s: 0 < s.top_k < count and s.typical_p >= 1)
    total = scores.to(top.dtype).logsumexp(dim=-1, keepdim=True)
    if any(0 < sampling.top_k < size for sampling in samplings):
        last = torch.tensor([[min(s.top_k, count) - 1 if s.top_k > 0 else count - 1] for s in samplings])
        limited = _flags(samplings, scores, lambda s: 0 < s.top_k < size)[:, None]
        cut = limited & (top < top.gather(1, last.to(scores.device)))
        top = top.masked_fill(cut, -math.inf)
        total = torch.where(limited, top.logsumexp(dim=-1, keepdim=True), total)
    if any(sampling.typical_p < 1 for sampling in samplings):
        top = top.masked_fill(_atypical(top, total, _numbers(samplings, top, lambda s: s.typical_p)), -math.inf)
        some = _flags(samplings, scores, lambda s: s.typical_p < 1)[:, None]
        total = torch.where(some, top.logsumexp(dim=-1, keepdim=True), total)
    chances = (top - total).exp()
    reached = chances.cumsum(dim=-1)
    # The likeliest up to and with the one that reaches the mass: what those before it have is below.
    mass = _numbers(samplings, top, lambda s: s.top_p if s.top_p < 1 else math.inf)
    enough |= (reached[:, -1:] >= mass)[:, 0] & _flags(samplings, scores, lambda s: s.typical_p >= 1)
    chances = chances * (reached - chances < mass)
    if any(sampling.min_p > 0 for sampling in samplings):
        least = _numbers(samplings, chances, lambda s: s.min_p) * chances.amax(dim=-1, keepdim=True)
        chances = chances * (chances >= least)
    if any(xtc):
        chances = chances * ~_top_choices(chances, samplings, xtc)
    return chances, ids, enough | (count == size)


def _atypical(top: Tensor, total: Tensor, mass: Tensor) -> Tensor:
    """Those farther from the entropy in surprise than is needed for the mass, (R, K)."""
    chances = (top - total).exp()
    surprise = (total - top).masked_fill(chances == 0, 0)
    distance = (surprise - (chances * surprise).sum(dim=-1, keepdim=True)).abs().masked_fill(chances == 0, math.inf)
    order = distance.argsort(dim=-1, stable=True)
    sorted_chances = chances.gather(1, order)
    beyond = sorted_chances.cumsum(dim=-1) - sorted_chances >= mass
    return torch.zeros_like(beyond).scatter(1, order, beyond) & (mass < 1)


def _top_choices(chances: Tensor, samplings: Sequence[Sampling], xtc: Sequence[bool]) -> Tensor:
    """Where XTC acts: the good choices but for the least likely of them, (R, K); chances fall from left to right."""
    least = _numbers(samplings, chances, lambda s: s.xtc_threshold) * chances.sum(dim=-1, keepdim=True)
    good = (chances >= least) & (chances > 0)
    later = good.flip(-1).cumsum(dim=-1).flip(-1)  # good ones from here on
    acts = torch.tensor([on and s.xtc_threshold <= 0.5 for on, s in zip(xtc, samplings, strict=True)])
    return good & (later > 1) & acts.to(chances.device)[:, None]


def _place(chances: Tensor, token: Tensor) -> Tensor:
    """Where in its row a random number falls, (R,): never on a chance of nothing."""
    reached = chances.cumsum(dim=-1)
    place = (reached <= token.to(chances.dtype) * reached[:, -1:]).sum(dim=-1)
    last = (chances > 0).to(torch.int32).cumsum(dim=-1).argmax(dim=-1)  # rounding may carry it past the end
    return torch.minimum(place, last)


def _allowed(masks: Sequence[NDArray[np.uint32]], logits: Tensor) -> Tensor:
    """Bits to booleans, (R, vocabulary)."""
    size = logits.shape[-1]
    words = np.stack(masks)[:, : -(-size // 32)]
    tail = size % 32
    own = words.copy()
    if tail:
        own[:, -1] &= np.uint32((1 << tail) - 1)
    if not own.any(axis=1).all():
        raise ValueError("no token is allowed next")
    bits = torch.from_numpy(own.view(np.int32)).to(logits.device)
    shifts = torch.arange(32, dtype=torch.int32, device=logits.device)
    return ((bits[:, :, None] >> shifts) & 1).flatten(1)[:, :size].bool()


def _fetch(logits: Tensor, ids: Tensor, enough: Tensor, most: int | None) -> NDArray[np.float32]:
    """Everything that the host has to know, in one transfer: (R, 3 or 4 + 2 * most).

    Token, whether its shortlist was enough, the first logit, its log-probability; the likeliest, their
    log-probabilities. float32 holds every id exactly.
    """
    columns = [ids[:, None].float(), enough[:, None].float(), logits[:, :1]]
    if most is not None:
        total = logits.logsumexp(dim=-1, keepdim=True)
        columns.append(logits.gather(1, ids[:, None]) - total)
        if most:
            values, likeliest = logits.topk(min(most, logits.shape[-1]))
            columns += [likeliest.float(), values - total]
    return torch.cat(columns, dim=1).cpu().numpy()


def _drawn(row: NDArray[np.float32], count: int | None, most: int | None) -> Drawn:
    if count is None or most is None:
        return Drawn(int(row[0]), None)
    width = (row.size - 4) // 2
    ids, logprobs = row[4 : 4 + min(count, width)], row[4 + width : 4 + width + count]
    return Drawn(int(row[0]), Told(float(row[3]), tuple(zip(ids.astype(int).tolist(), logprobs.tolist(), strict=True))))


def _exact(scores: Tensor) -> torch.dtype:
    """What chances are added up in: a hundred thousand of them; Metal has no float64."""
    return torch.float32 if scores.device.type == "mps" else torch.float64


def _column(values: Sequence[float], device: torch.device) -> Tensor:
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.tensor(values, dtype=dtype)[:, None].to(device)


def _numbers(samplings: Sequence[Sampling], like: Tensor, value: Callable[[Sampling], float]) -> Tensor:
    """One setting of every row, (R, 1)."""
    return torch.tensor([[value(sampling)] for sampling in samplings], dtype=like.dtype).to(like.device)


def _flags(samplings: Sequence[Sampling], like: Tensor, value: Callable[[Sampling], bool]) -> Tensor:
    return torch.tensor([value(sampling) for sampling in samplings]).to(like.device)
