"""What is minimised: advantages, ratios, clipping, KL, the correction between rollout and trainer. Pure functions.

Shapes: P prompts, G replies each, B = P * G replies, T tokens of the longest. A mask is 1.0 where a token of a reply is
learned from (the end token counts), 0.0 elsewhere; padding may hold any finite number. Log-probabilities are natural
and of the distribution that was sampled from. Knows nothing of models, texts or files.

`docs/training.md` has the formulas beside these names. Sources, by arXiv number: grpo 2402.03300, dr_grpo 2503.20783,
dapo 2503.14476, gspo 2507.18071, cispo 2506.13585, sapo 2511.20347, rloo 2402.14740; bnpo, luspo and vespo as TRL's
GRPOTrainer defines them; the three estimates of the KL: joschu.net/blog/kl-approx.html.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

LossName = Literal["grpo", "dr_grpo", "dapo", "bnpo", "gspo", "cispo", "sapo", "luspo", "vespo", "rloo", "reinforce"]
Normalisation = Literal["group", "batch", "none", "rloo"]
KLName = Literal["k1", "k2", "k3", "k3_corrected"]
CorrectionName = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]

DEVIATION_FLOOR = 1e-4  # added to a standard deviation before dividing by it
_SUM_LIMIT = 20.0  # vespo: a sequence's log ratio is held within this
_LEAST_WEIGHT = 1e-8  # vespo: weights below count as this


@dataclass(frozen=True, slots=True)
class LossSettings:
    """Which loss, and its numbers. Not every loss reads every field."""

    name: LossName = "dr_grpo"
    level: Literal["token", "sequence"] = "token"  # of the ratio; gspo and luspo want "sequence"
    epsilon_low: float = 0.2  # a ratio is clipped to 1 - this
    epsilon_high: float = 0.28  # and to 1 + this; for cispo the largest weight itself
    dual_clip: float | None = None  # a ratio counts as no more than this, also where the advantage is negative
    beta: float = 0.0  # weight of the KL towards the reference
    kl: KLName = "k3"
    correction: CorrectionName = "none"
    correction_cap: float = 2.0
    correction_floor: float = 0.5  # the masks drop what is below
    off_policy_limit: float | None = None  # bad replies this far from the rollout policy are left out
    temperature_positive: float = 1.0  # sapo
    temperature_negative: float = 1.05
    shape_positive: tuple[float, float] = (2.0, 3.0)  # vespo: power and decay, for replies better than their group
    shape_negative: tuple[float, float] = (3.0, 2.0)


class Totals(NamedTuple):
    """What a whole optimizer step has, over all its micro-batches."""

    replies: int
    tokens: int
    max_tokens: int  # that a reply may have; dr_grpo divides by it


class Loss(NamedTuple):
    """A micro-batch's share of the step's loss, and what is worth logging of it (sums over `Totals` give the step)."""

    value: Tensor  # scalar; backward of every micro-batch adds up to the step's gradient
    metrics: dict[str, float]


class Mismatch(NamedTuple):
    """How far the rollout engine's distribution is from the trainer's."""

    kl: float  # of the trainer's from the engine's, a token (k3)
    ess: float  # effective share of the replies, 1 = all count alike
    largest: float  # weight of a reply


class Correction(NamedTuple):
    """Importance weights from the rollout engine to the trainer, before and after they are held in bounds."""

    weights: Tensor  # (B, T) or (B, 1)
    raw: Mismatch
    applied: Mismatch
    raw_replies: Tensor  # (B, 1): how much each reply counts, to have the ESS of several batches
    applied_replies: Tensor  # (B, 1)


# Advantages


def advantages(rewards: Tensor, normalisation: Normalisation = "none") -> Tensor:
    """How much better than its group each reply was: (P, G) -> (P, G), mean 0 in every row.

    A row of equal rewards teaches nothing and gives zeros. `group` divides by the group's deviation (DeepSeekMath,
    arXiv 2402.03300), `batch` by that of all rewards, `none` by nothing (Dr. GRPO, 2503.20783), `rloo` compares with
    the others only, which makes it unbiased.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    group = rewards.shape[1]
    if group < 2 or normalisation == "none":
        return centred
    if normalisation == "rloo":
        return centred * (group / (group - 1))
    deviation = rewards.std(dim=1, keepdim=True) if normalisation == "group" else rewards.std()
    return centred / (deviation + DEVIATION_FLOOR)


# Kullback-Leibler


def kl_terms(logp: Tensor, ref: Tensor, kl: KLName = "k3", ratio: Tensor | None = None) -> Tensor:
    """Estimates of KL(policy || reference) at sampled tokens: (B, T) -> (B, T).

    The gradient of k1 is 0 in expectation; that of k2 and of k3 times the ratio is the KL's own; that of k3 alone is
    the gradient of KL(reference || policy). `ratio` is for `k3_corrected` only.
    """
    difference = logp - ref
    if kl == "k1":
        return difference
    if kl == "k2":
        return difference.square() / 2
    k3 = torch.exp(-difference) + difference - 1
    if kl == "k3_corrected":
        assert ratio is not None
        return k3 * ratio
    return k3


# Between the rollout engine and the trainer


def correction(
    old: Tensor, sampled: Tensor, mask: Tensor, mode: CorrectionName, cap: float = 2.0, floor: float = 0.5
) -> Correction:
    """Weights that undo the difference of trainer (`old`) and rollout engine (`sampled`), and how large it was.

    (B, T), (B, T), (B, T) -> weights (B, T) for the token modes, (B, 1) for the sequence modes. `truncate` holds a
    weight under `cap`, `mask` drops what is not within `floor` and `cap`. Sequence weights are unbiased and wear out
    with length; token weights are neither.
    """
    difference = (old - sampled) * mask  # (B, T)
    of_tokens = torch.exp(difference)
    of_replies = torch.exp(difference.sum(dim=1, keepdim=True))  # (B, 1)
    weights = of_tokens if mode.startswith("token") else of_replies
    if mode == "none":
        weights = torch.ones_like(of_replies)
    elif mode.endswith("truncate"):
        weights = weights.clamp(max=cap)
    else:
        weights = torch.where((weights >= floor) & (weights <= cap), weights, torch.zeros_like(weights))
    raw = _mismatch(difference, of_replies, mask)
    kept = mask * (weights > 0)
    counted = (weights * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    applied = raw if mode == "none" else _mismatch(difference, counted, kept)
    return Correction(weights, raw, applied, of_replies, of_replies if mode == "none" else counted)


def effective_share(weights: Tensor) -> float:
    """How many of the replies are left of them by their weights' unevenness: (sum w)² / sum w² / B, 1 = all."""
    return float(weights.sum().square() / weights.square().sum().clamp(min=1e-30) / weights.shape[0])


def _mismatch(difference: Tensor, weights: Tensor, mask: Tensor) -> Mismatch:
    tokens = mask.sum().clamp(min=1)
    kl = ((torch.exp(difference) - 1 - difference) * mask).sum() / tokens
    return Mismatch(float(kl), effective_share(weights), float(weights.max()))


# The loss


def policy_loss(
    logp: Tensor,
    old: Tensor,
    advantage: Tensor,
    mask: Tensor,
    settings: LossSettings,
    *,
    ref: Tensor | None = None,
    sampled: Tensor | None = None,
    weights: Tensor | None = None,
    totals: Totals | None = None,
) -> Loss:
    """One micro-batch's share of the loss of a step.

    `logp` (B, T) is the policy's, with gradient; `old` (B, T) the policy's at the start of the step; `advantage` (B,),
    or (B, T) where tokens have their own; `ref` (B, T) the reference's, wanted where beta is not 0; `sampled` (B, T)
    the rollout engine's; `weights` (B, T) or (B, 1) those of `correction`. Without `totals` the micro-batch is the
    whole step and T the most tokens of a reply.
    """
    totals = totals or Totals(mask.shape[0], int(mask.sum()), mask.shape[1])
    given = _Given(logp, old, advantage if advantage.dim() > 1 else advantage[:, None], mask, settings, weights)
    per_token, metrics = _TERMS[settings.name](given)  # (B, T) or (B, 1)
    if settings.off_policy_limit is not None:
        per_token = per_token * _close_enough(given, sampled if sampled is not None else old)
    if weights is not None and settings.name != "vespo":  # there they are part of the weight already
        per_token = per_token * weights
    if settings.beta:
        assert ref is not None, "a KL needs the reference's log-probabilities"
        kl = kl_terms(logp, ref, settings.kl, given.ratio)
        per_token = per_token + settings.beta * kl
        metrics["kl"] = _mean(kl.detach(), mask)
    value = _gather(per_token, mask, settings.name, totals)
    return Loss(value, {name: float(it) for name, it in metrics.items()})


@dataclass(frozen=True, slots=True)
class _Given:
    """A micro-batch, and the ratios that all losses are made of."""

    logp: Tensor  # (B, T)
    old: Tensor  # (B, T)
    advantage: Tensor  # (B, 1), or (B, T)
    mask: Tensor  # (B, T)
    settings: LossSettings
    weights: Tensor | None
    log_ratio: Tensor = field(init=False)  # (B, T)
    ratio: Tensor = field(init=False)  # (B, T), or (B, 1) at the level of the sequence

    def __post_init__(self) -> None:
        log_ratio = torch.where(self.mask > 0, self.logp - self.old, torch.zeros_like(self.logp))
        object.__setattr__(self, "log_ratio", log_ratio)
        if self.settings.level == "sequence" or self.settings.name in ("gspo", "luspo"):
            lengths = self.mask.sum(dim=1, keepdim=True).clamp(min=1)
            object.__setattr__(self, "ratio", torch.exp((log_ratio * self.mask).sum(dim=1, keepdim=True) / lengths))
        else:
            object.__setattr__(self, "ratio", torch.exp(log_ratio))


_Terms = tuple[Tensor, dict[str, Tensor]]


def _clipped(given: _Given) -> _Terms:
    """PPO's pessimistic minimum; at most `dual_clip` times the advantage, however bad a reply has become."""
    settings, advantage, ratio = given.settings, given.advantage, given.ratio
    low, high = 1 - settings.epsilon_low, 1 + settings.epsilon_high
    free = ratio if settings.dual_clip is None else ratio.clamp(max=settings.dual_clip)
    terms = -torch.minimum(free * advantage, ratio.clamp(low, high) * advantage)
    with torch.no_grad():
        too_low = ((ratio < low) & (advantage < 0)).to(ratio)
        too_high = ((ratio > high) & (advantage > 0)).to(ratio)
        metrics = {"clipped_low": _mean(too_low, given.mask), "clipped_high": _mean(too_high, given.mask)}
    return terms, metrics


def _weighted(given: _Given) -> _Terms:
    """CISPO (MiniMax-M1, 2506.13585): every token is learned from, by a weight that carries no gradient."""
    ratio, most = given.ratio.detach(), given.settings.epsilon_high
    clipped = ((ratio > most) & (given.advantage > 0)).to(ratio)
    return -ratio.clamp(max=most) * given.advantage * given.logp, {"clipped_high": _mean(clipped, given.mask)}


def _soft(given: _Given) -> _Terms:
    """SAPO: a sigmoid around 1 in place of the clip."""
    settings, ratio = given.settings, given.ratio
    up = torch.full_like(ratio, settings.temperature_positive)
    temperature = torch.where(given.advantage > 0, up, torch.full_like(ratio, settings.temperature_negative))
    return -torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature * given.advantage, {}


def _shaped(given: _Given) -> _Terms:
    """VESPO: the weight of a whole reply, shaped so that neither small nor large ones count much."""
    with torch.no_grad():
        log_weight = (given.log_ratio.clamp(-_SUM_LIMIT, _SUM_LIMIT) * given.mask).sum(dim=1, keepdim=True)
        if given.weights is not None:
            logs = torch.log(given.weights.clamp(min=_LEAST_WEIGHT)) * given.mask
            log_weight = log_weight + logs.sum(dim=1, keepdim=True)
        log_weight = log_weight.clamp(math.log(_LEAST_WEIGHT), _SUM_LIMIT)
        weight = torch.exp(log_weight)
        (power, decay), (power_bad, decay_bad) = given.settings.shape_positive, given.settings.shape_negative
        good = torch.exp(decay + power * log_weight - decay * weight)
        bad = torch.exp(decay_bad + power_bad * log_weight - decay_bad * weight)
        phi = torch.where(given.advantage >= 0, good, bad)  # (B, 1)
    return -phi * given.advantage * given.logp, {"weight": phi.mean()}


def _plain(given: _Given) -> _Terms:
    """The policy gradient as it is; for one update a rollout."""
    return -given.advantage * given.logp, {}


_TERMS: dict[str, Callable[[_Given], _Terms]] = {
    "grpo": _clipped,
    "dr_grpo": _clipped,
    "dapo": _clipped,
    "bnpo": _clipped,
    "gspo": _clipped,
    "luspo": _clipped,
    "cispo": _weighted,
    "sapo": _soft,
    "vespo": _shaped,
    "rloo": _plain,
    "reinforce": _plain,
}


def _gather(per_token: Tensor, mask: Tensor, name: LossName, totals: Totals) -> Tensor:
    """(B, T) or (B, 1) -> the micro-batch's share of the step, a scalar."""
    spread = per_token * mask  # (B, T)
    lengths = mask.sum(dim=1)  # (B,)
    if name in ("grpo", "gspo", "sapo"):
        return (spread.sum(dim=1) / lengths.clamp(min=1)).sum() / totals.replies
    if name == "dr_grpo":
        return spread.sum() / (totals.replies * totals.max_tokens)
    if name in ("rloo", "reinforce", "luspo"):
        return spread.sum() / totals.replies
    if name == "bnpo":  # by this micro-batch's tokens: the one loss that depends on the split
        return spread.sum() / mask.sum().clamp(min=1) * (mask.shape[0] / totals.replies)
    return spread.sum() / max(1, totals.tokens)


def _close_enough(given: _Given, sampled: Tensor) -> Tensor:
    """1 for good replies and for those near the policy that sampled them, (B, 1) (DeepSeek-V3.2)."""
    lengths = given.mask.sum(dim=1, keepdim=True).clamp(min=1)
    distance = ((sampled - given.logp.detach()) * given.mask).sum(dim=1, keepdim=True) / lengths
    near = distance <= (given.settings.off_policy_limit or 0.0)
    return ((given.advantage >= 0) | near).to(given.logp)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Over the tokens, or over the replies where there is one value for each."""
    if values.shape[1] == 1 < mask.shape[1]:
        return values.mean()
    return (values * mask).sum() / mask.sum().clamp(min=1)
