"""The best mix of types at a size: a price list in, one type for each tensor out.

A multiple-choice knapsack: of every tensor's types one has to be taken, the bytes together have a limit, the predicted
KL divergence is to be least. A price for a byte is found by bisection at which the cheapest choice of each tensor just
fits (Everett 1963); what room is left then goes to the steps that gain most a byte. It knows no format: GGUF's types
and MLX's are names to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from ..r1.errors import UserError
from .sensitivity import Cost, Costs

Assignment = dict[str, str]  # tensor -> type

HEDGES = (1.0, 0.85, 0.7, 0.5, 0.0)  # how far the candidates of `frontier` trust the Fisher information


@dataclass(frozen=True, slots=True)
class Plan:
    """One way to spend a budget."""

    assignment: Assignment
    bytes: int
    kl: float  # predicted, nats a token
    trust: float = 1.0  # 1 = by predicted KL alone, 0 = by the squared error of the outputs alone


def plan_of(costs: Costs, assignment: Assignment, trust: float = 1.0) -> Plan:
    """What an assignment costs; tensors that are not in the price list are left out."""
    chosen = [costs[name][type] for name, type in assignment.items() if name in costs]
    return Plan(assignment, sum(cost.bytes for cost in chosen), sum(cost.kl for cost in chosen), trust)


def allocate(costs: Costs, budget: int, *, trust: float = 1.0) -> Plan:
    """Spend at most `budget` bytes on the tensors in the price list. Raises `UserError` where the least is more.

    `trust` below 1 hedges: a type is judged by KL^trust x error^(1 - trust), each relative to its sum.
    """
    harm = _harm(costs, trust)
    least = sum(min(cost.bytes for cost in types.values()) for types in costs.values())
    if least > budget:
        raise UserError(
            f"the smallest mix takes {least:,} bytes, and the budget is {budget:,}",
            "raise --target-bpw or --target-size",
        )
    options = {name: list(_pareto(types, harm[name])) for name, types in costs.items()}

    def cheapest(price: float) -> Assignment:
        return {
            name: min(types, key=lambda type, name=name: harm[name][type] + price * costs[name][type].bytes)
            for name, types in options.items()
        }

    low, high = 0.0, 1.0
    while _bytes(costs, cheapest(high)) > budget:
        low, high = high, high * 16
    for _ in range(100):
        middle = (low + high) / 2 if low else high / 16
        if _bytes(costs, cheapest(middle)) > budget:
            low = middle
        elif middle < 1e-30:
            break
        else:
            high = middle
    assignment = cheapest(high)
    _fill(costs, harm, assignment, budget)
    return plan_of(costs, assignment, trust)


def frontier(costs: Costs, budget: int) -> list[Plan]:
    """Different mixes for one budget, to be measured: the prediction is near the truth, and the best of five nearer."""
    plans: list[Plan] = []
    for trust in HEDGES:
        plan = allocate(costs, budget, trust=trust)
        if all(plan.assignment != other.assignment for other in plans):
            plans.append(plan)
    return plans


def best(plans: list[Plan], measured_kl: Callable[[Plan], float]) -> tuple[Plan, float]:
    """Measure plans, and keep the one that really loses least."""
    losses = [measured_kl(plan) for plan in plans]
    loss = min(losses)
    return plans[losses.index(loss)], loss


def _harm(costs: Costs, trust: float) -> dict[str, dict[str, float]]:
    """What is to be least, by tensor and type."""
    totals = [
        sum(min(getattr(cost, what) for cost in types.values()) for types in costs.values()) or 1.0
        for what in ("kl", "error")
    ]

    def of(cost: Cost) -> float:
        kl, error = cost.kl / totals[0], cost.error / totals[1]
        return kl if trust == 1 else error if trust == 0 else kl**trust * error ** (1 - trust)

    return {name: {type: of(cost) for type, cost in types.items()} for name, types in costs.items()}


def _pareto(types: Mapping[str, Cost], harm: dict[str, float]) -> Iterator[str]:
    """The types for which no other is both smaller and no worse, from the smallest on."""
    found = float("inf")
    for type in sorted(types, key=lambda type: (types[type].bytes, harm[type])):
        if harm[type] < found:
            found = harm[type]
            yield type


def _bytes(costs: Costs, assignment: Assignment) -> int:
    return sum(costs[name][type].bytes for name, type in assignment.items())


def _fill(costs: Costs, harm: dict[str, dict[str, float]], assignment: Assignment, budget: int) -> None:
    """Spend what is left, step by step, where a byte helps most."""
    left = budget - _bytes(costs, assignment)
    while True:
        steps = [
            ((harm[name][now] - harm[name][type]) / (cost.bytes - costs[name][now].bytes), name, type)
            for name, now in assignment.items()
            for type, cost in costs[name].items()
            if 0 < cost.bytes - costs[name][now].bytes <= left and harm[name][type] < harm[name][now]
        ]
        if not steps:
            return
        _, name, type = max(steps)
        left -= costs[name][type].bytes - costs[name][assignment[name]].bytes
        assignment[name] = type
