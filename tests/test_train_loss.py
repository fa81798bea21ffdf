"""The loss is what the papers say: golden vectors, finite differences, exact expectations, bandits that converge."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="training needs torch: pip install 'stillhouse[train]'")

from stillhouse.train.loss import (  # noqa: E402 - only where torch is
    LossSettings,
    Totals,
    advantages,
    correction,
    kl_terms,
    policy_loss,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "grpo_golden.json").read_text(encoding="utf-8"))
INPUTS = {name: torch.tensor(values, dtype=torch.float64) for name, values in GOLDEN["inputs"].items()}
MOST_TOKENS = 8  # that a reply could have when the vectors were made
CLIPPED = ("grpo", "dr_grpo", "dapo", "bnpo", "gspo", "luspo")
LOSSES = (*CLIPPED, "cispo", "sapo", "vespo", "rloo", "reinforce")
NORMALISATION = {"grpo": "group", "dapo": "group", "bnpo": "batch", "gspo": "group", "rloo": "rloo"}


def _name(case: dict[str, Any]) -> str:
    return ",".join(f"{key}={value}" for key, value in case["config"].items())


def _settings(config: dict[str, Any]) -> LossSettings:
    return LossSettings(
        name=config["loss_type"],
        level=config.get("level", "token"),
        epsilon_low=config.get("eps_low", 0.2),
        epsilon_high=config.get("eps_high", 0.2),
        dual_clip=config.get("delta"),
        beta=config.get("beta", 0.0),
        kl="k3_corrected" if config.get("kl_bias") else "k3",
        off_policy_limit=config.get("off_policy_mask_threshold"),
    )


# The golden numbers


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=_name)
def test_loss_gradient_and_metrics_are_the_golden_ones(case):
    config = case["config"]
    mask = INPUTS["mask"]
    logp = INPUTS["logp"].clone().requires_grad_()
    weights = INPUTS[f"is_{config['is_mode']}"] if config.get("is_corr") else None
    loss = policy_loss(
        logp,
        INPUTS["old"],
        INPUTS["adv"],
        mask,
        _settings(config),
        ref=INPUTS["ref"],
        weights=weights,
        totals=Totals(mask.shape[0], int(mask.sum()), MOST_TOKENS),
    )
    loss.value.backward()
    assert abs(loss.value.item() - case["loss"]) < 1e-12
    assert (logp.grad - torch.tensor(case["grad"], dtype=torch.float64)).abs().max() < 1e-9
    names = {"clip_ratio/low_mean": "clipped_low", "clip_ratio/high_mean": "clipped_high", "kl": "kl"}
    names |= {"cispo_clip_ratio": "clipped_high", "vespo/phi_seq_mean": "weight"}
    for theirs, ours in names.items():
        if theirs in case["metrics"]:
            assert loss.metrics[ours] == pytest.approx(case["metrics"][theirs], abs=1e-12), theirs


def test_there_are_27_golden_cases():
    assert len(GOLDEN["cases"]) == 27


@pytest.mark.parametrize("normalisation, golden", [("group", "adv"), ("batch", "adv_batch"), ("none", "adv_none")])
def test_advantages_are_the_golden_ones(normalisation, golden):
    rewards = INPUTS["rewards"].view(-1, GOLDEN["G"])
    assert torch.allclose(advantages(rewards, normalisation).flatten(), INPUTS[golden], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "mode, cap, floor",
    [
        ("token_truncate", 1.05, 0.0),
        ("token_mask", 1.2, 0.9),
        ("sequence_truncate", 1.05, 0.0),
        ("sequence_mask", 1.2, 0.8),
    ],
)
def test_the_correction_is_the_golden_one(mode, cap, floor):
    got = correction(INPUTS["old"], INPUTS["samp"], INPUTS["mask"], mode, cap, floor)
    assert torch.allclose(got.weights, INPUTS[f"is_{mode}"], rtol=0, atol=1e-12)
    assert got.applied.kl < got.raw.kl if mode.endswith("mask") else got.applied.kl == got.raw.kl
    if mode == "sequence_truncate":
        assert got.applied.ess > got.raw.ess  # what is dropped by a mask counts against it


def test_engines_that_agree_have_no_mismatch():
    got = correction(INPUTS["old"], INPUTS["old"], INPUTS["mask"], "sequence_mask")
    assert got.raw == got.applied == (0.0, 1.0, 1.0)
    assert bool((got.weights == 1).all())


# Finite differences


@pytest.mark.parametrize("beta", [0.0, 0.1], ids=["no KL", "with a KL"])
@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("cispo", "vespo")])
def test_the_gradient_through_a_policy_is_the_finite_difference(name, beta):
    """cispo and vespo stop gradients on purpose: for them the golden gradients speak."""
    torch.manual_seed(0)
    states, actions, width = 5, 7, 6
    shape, replies, length = (states, width), 4, 3
    first = torch.randn(shape, dtype=torch.float64)
    second = torch.randn((width, actions), dtype=torch.float64)
    state = torch.randint(states, (replies, length))
    action = torch.randint(actions, (replies, length))
    mask = torch.ones(replies, length, dtype=torch.float64)
    mask[1, 2] = 0
    advantage = torch.tensor([1.0, -0.5, 0.3, -0.8], dtype=torch.float64)
    noise = torch.randn((3, replies, length), dtype=torch.float64) * 0.1
    settings = LossSettings(name, beta=beta, kl="k2", epsilon_low=0.11, epsilon_high=0.13, dual_clip=1.4)

    def logp(weights):
        hidden = torch.tanh(weights)[state]  # (B, T, width): two layers
        return torch.log_softmax(hidden @ second, -1).gather(-1, action[..., None])[..., 0]

    old, ref = logp(first).detach() + noise[0], logp(first).detach() + noise[1]

    def value(weights):
        return policy_loss(logp(weights), old, advantage, mask, settings, ref=ref).value

    weights = first.clone().requires_grad_()
    value(weights).backward()
    step = 1e-6
    for index in itertools.product(range(states), range(width)):
        more, less = first.clone(), first.clone()
        more[index] += step
        less[index] -= step
        expected = (value(more) - value(less)) / (2 * step)
        assert weights.grad[index].item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-9)


# Expectations, by enumeration


def test_the_expected_gradient_is_that_of_the_reward():
    """A bandit of 4 arms, groups of 4: without deviation (1 - 1/G) of it, with rloo exactly it."""
    arms = group = 4
    theta = torch.randn(arms, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    prizes = torch.tensor([1.0, 0.0, 0.3, 0.0], dtype=torch.float64)
    p = torch.softmax(theta, -1)
    true = p * (prizes - p @ prizes)
    for normalisation, share in (("none", 1 - 1 / group), ("rloo", 1.0)):
        expected = torch.zeros(arms, dtype=torch.float64)
        for drawn in itertools.product(range(arms), repeat=group):
            picked = torch.tensor(drawn)
            weights = theta.clone().requires_grad_()
            logp = torch.log_softmax(weights, -1)[picked][:, None]
            advantage = advantages(prizes[picked][None], normalisation)[0]
            settings = LossSettings("rloo")
            policy_loss(logp, logp.detach(), advantage, torch.ones_like(logp), settings).value.backward()
            expected -= p[picked].prod() * weights.grad
        assert (expected - share * true).abs().max() < 1e-12, normalisation


def test_kl_estimates_and_their_gradients_are_what_is_said_of_them():
    generator = torch.Generator().manual_seed(1)
    theta = torch.randn(5, dtype=torch.float64, generator=generator)
    other = torch.softmax(theta + torch.randn(5, dtype=torch.float64, generator=generator) / 2, -1)
    p = torch.softmax(theta, -1)
    kl = (p * (p / other).log()).sum()
    true = p * ((p / other).log() - kl)  # its gradient
    backwards = p - other  # that of KL(reference || policy)
    expected = {"k1": torch.zeros(5, dtype=torch.float64), "k2": true, "k3": backwards, "k3_corrected": true}
    for name, gradient in expected.items():
        weights = theta.clone().requires_grad_()
        logp = torch.log_softmax(weights, -1)
        terms = kl_terms(logp, other.log(), name, torch.exp(logp - logp.detach()))
        (p * terms).sum().backward()
        assert (weights.grad - gradient).abs().max() < 1e-12, name
        if name != "k2":
            assert (p * terms).sum().item() == pytest.approx(kl.item(), abs=1e-12)


def test_sequence_weights_make_another_policys_rollouts_unbiased():
    """Two tokens of three: enumerated, sequence weights give the gradient exactly, token weights do not."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(3, generator=generator).double(), torch.randn(3, 3, generator=generator).double()
    theirs = first + 0.3, second - torch.randn(3, 3, generator=generator).double() * 0.2
    theirs = theirs[0] * 1.1, theirs[1]
    prizes = torch.rand(9, generator=generator).double()
    a, b = torch.tensor(list(itertools.product(range(3), range(3)))).T

    def logps(one, two):
        return torch.stack([torch.log_softmax(one, -1)[a], torch.log_softmax(two, -1)[a, b]], 1)  # (9, 2)

    def gradient(mode):
        one, two = first.clone().requires_grad_(), second.clone().requires_grad_()
        logp, sampled = logps(one, two), logps(*theirs)
        weights = correction(logp.detach(), sampled, torch.ones_like(logp), mode, cap=1e9).weights
        settings = LossSettings("reinforce")
        chance = torch.exp(sampled.sum(1))
        value = policy_loss(logp, logp.detach(), prizes * chance, torch.ones_like(logp), settings, weights=weights)
        (value.value * 9).backward()
        return torch.cat([one.grad, two.grad.flatten()])

    one, two = first.clone().requires_grad_(), second.clone().requires_grad_()
    (-(torch.exp(logps(one, two).sum(1)) * prizes).sum()).backward()
    true = torch.cat([one.grad, two.grad.flatten()])
    assert (gradient("sequence_truncate") - true).abs().max() < 1e-12
    assert (gradient("token_truncate") - true).abs().max() > 1e-3


# Learning


@pytest.mark.parametrize("name", LOSSES)
def test_a_bandit_finds_its_best_arm_with_every_loss(name):
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        theta = torch.zeros(5, requires_grad=True)
        prizes = torch.tensor([0.1, 0.0, 1.0, 0.2, 0.0])
        optimizer = torch.optim.Adam([theta], lr=0.1)
        cap = 5.0 if name == "cispo" else 0.28
        settings = LossSettings(name, epsilon_high=cap)
        for _ in range(300):
            drawn = torch.multinomial(torch.softmax(theta.detach(), -1), 64, replacement=True, generator=generator)
            advantage = advantages(prizes[drawn].view(8, 8), NORMALISATION.get(name, "none")).flatten()
            logp = torch.log_softmax(theta, -1)[drawn][:, None]
            optimizer.zero_grad()
            policy_loss(logp, logp.detach(), advantage, torch.ones_like(logp), settings).value.backward()
            optimizer.step()
            if torch.softmax(theta, -1)[2] > 0.99:
                break
        assert torch.softmax(theta, -1)[2] > 0.99


# A step in pieces


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "bnpo"])
@pytest.mark.parametrize("cuts", [[8], [1] * 8, [3, 5], [1, 6, 1]], ids=str)
def test_a_step_does_not_depend_on_how_it_is_cut_into_micro_batches(name, cuts):
    mask = INPUTS["mask"]
    totals = Totals(8, int(mask.sum()), MOST_TOKENS)
    whole = INPUTS["logp"].clone().requires_grad_()
    settings = LossSettings(name, beta=0.04)
    policy_loss(whole, INPUTS["old"], INPUTS["adv"], mask, settings, ref=INPUTS["ref"], totals=totals).value.backward()
    pieces = INPUTS["logp"].clone().requires_grad_()
    start = 0
    for count in cuts:
        at = slice(start, start + count)
        start += count
        width = int(mask[at].sum(1).max())  # a micro-batch is as wide as its longest reply
        policy_loss(
            pieces[at, :width],
            INPUTS["old"][at, :width],
            INPUTS["adv"][at],
            mask[at, :width],
            settings,
            ref=INPUTS["ref"][at, :width],
            totals=totals,
        ).value.backward()
    assert (whole.grad - pieces.grad).abs().max() < 1e-15


def test_what_lies_in_the_padding_changes_nothing():
    mask = INPUTS["mask"]
    for name in LOSSES:
        given = []
        for padding in (0.0, 50.0):
            logp = torch.where(mask > 0, INPUTS["logp"], torch.tensor(-padding, dtype=torch.float64)).requires_grad_()
            old = torch.where(mask > 0, INPUTS["old"], torch.tensor(padding, dtype=torch.float64))
            loss = policy_loss(logp, old, INPUTS["adv"], mask, LossSettings(name)).value
            loss.backward()
            given.append((loss.item(), logp.grad))
        assert given[0][0] == given[1][0] and torch.equal(given[0][1], given[1][1]), name


def test_a_dual_clip_bounds_what_one_bad_token_can_do():
    """For a negative advantage verl's min(max(ratio, clipped) |A|, c |A|), written down once more."""
    ratio = torch.linspace(0.1, 9, 200, dtype=torch.float64)
    advantage = torch.full((200,), -0.7, dtype=torch.float64)
    logp = ratio.log()[:, None]
    settings = LossSettings("grpo", epsilon_low=0.2, epsilon_high=0.2, dual_clip=3.0)
    one = torch.ones_like(logp)
    got = torch.stack(
        [policy_loss(logp[i : i + 1], one[:1] * 0, advantage[:1], one[:1], settings).value for i in range(200)]
    )
    expected = torch.minimum(torch.maximum(ratio, ratio.clamp(0.8, 1.2)) * 0.7, torch.full_like(ratio, 3 * 0.7))
    assert torch.allclose(got, expected, rtol=0, atol=1e-12)
