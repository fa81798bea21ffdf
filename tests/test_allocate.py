"""The best mix of types at a size: against every possible mix, and within the budget always."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from stillhouse.quantize.allocate import allocate, best, frontier, plan_of
from stillhouse.quantize.sensitivity import Cost, Costs
from stillhouse.r1.errors import UserError

TYPES = {"Q3": 3, "Q4": 4, "Q5": 5, "Q6": 6, "Q8": 8}


def price_list(seed: int, tensors: int) -> Costs:
    """Losses fall about fourfold a bit, with luck; sizes differ."""
    random = np.random.default_rng(seed)
    costs = {}
    for number in range(tensors):
        size, weight = int(random.integers(100, 400)), float(np.exp(random.normal(0, 1.5)))
        costs[f"t{number}"] = {
            name: Cost(weight * 4.0**-bits * random.uniform(0.7, 1.3), 4.0**-bits, size * bits)
            for name, bits in TYPES.items()
        }
    return costs


def by_trying_all(costs: Costs, budget: int) -> float:
    """The least KL of all mixes that fit."""
    mixes = (dict(zip(costs, types, strict=True)) for types in itertools.product(TYPES, repeat=len(costs)))
    plans = (plan_of(costs, mix) for mix in mixes)
    return min(plan.kl for plan in plans if plan.bytes <= budget)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("bits", [3.6, 4.5, 6.1])
def test_the_mix_is_as_good_as_the_best_of_all(seed, bits):
    """The best of 3125, but for what one step of one tensor is worth: the last one may be too big for what is left."""
    costs = price_list(seed, 5)
    budget = int(bits * sum(types["Q3"].bytes for types in costs.values()) / 3)

    plan = allocate(costs, budget)

    assert plan.bytes <= budget
    least = by_trying_all(costs, budget)
    wider = budget + max(types["Q8"].bytes - types["Q6"].bytes for types in costs.values())
    assert least * 0.999999 <= plan.kl
    assert plan.kl <= max(least * 1.25, by_trying_all(costs, 2 * budget - wider) if 2 * budget > wider else 0)


def test_at_the_bytes_of_a_mix_that_a_price_gives_the_best_of_all_is_found():
    """Where the budget is spent to the last byte by one price for a byte, no mix is better (Everett 1963)."""
    costs = price_list(11, 6)
    for price in (1e-6, 1e-5, 1e-4):
        mix = {name: min(t, key=lambda type: t[type].kl + price * t[type].bytes) for name, t in costs.items()}
        bytes_ = plan_of(costs, mix).bytes
        assert allocate(costs, bytes_).kl == pytest.approx(by_trying_all(costs, bytes_))


def test_a_larger_budget_is_never_worse_by_the_prediction():
    costs = price_list(5, 40)
    most = sum(types["Q8"].bytes for types in costs.values())
    losses = [allocate(costs, budget).kl for budget in range(most * 3 // 8 + 1, most + 1, most // 20)]
    assert all(b <= a * 1.001 for a, b in itertools.pairwise(losses))
    assert allocate(costs, most).assignment == dict.fromkeys(costs, "Q8")


def test_sensitive_tensors_get_the_bits():
    costs = {
        "calm": {"Q4": Cost(1e-6, 1, 400), "Q8": Cost(1e-8, 0, 800)},
        "tender": {"Q4": Cost(1e-2, 1, 400), "Q8": Cost(1e-4, 0, 800)},
    }
    assert allocate(costs, 1200).assignment == {"calm": "Q4", "tender": "Q8"}


def test_a_type_that_is_larger_and_worse_is_never_taken():
    costs = {"t": {"good": Cost(1.0, 1, 100), "bad": Cost(2.0, 2, 120)}}
    assert allocate(costs, 1000).assignment == {"t": "good"}


def test_a_budget_below_the_smallest_mix_is_refused():
    with pytest.raises(UserError, match="the smallest mix takes"):
        allocate(price_list(0, 3), 10)


def test_the_best_of_the_frontier_is_the_one_that_measures_best():
    costs = price_list(2, 30)
    budget = int(4.4 / 8 * sum(types["Q8"].bytes for types in costs.values()))
    plans = frontier(costs, budget)
    assert 3 <= len(plans) <= 5
    assert all(plan.bytes <= budget for plan in plans)
    assert plans[0].kl == min(plan.kl for plan in plans)

    kept, loss = best(plans, lambda plan: abs(plan.trust - 0.7))

    assert (kept.trust, loss) == (0.7, 0.0)
