"""Write long-ish thoughts for sums, in R1's format: a cold start for `stillhouse train sft`. No model is asked.

    python examples/chain_sum_traces.py --count 400 > traces.jsonl
    stillhouse train sft --data traces.jsonl --out cold

Every trace adds one number after the other, and the larger ones digit by digit, now and then with a second look;
with --brief only the arithmetic, a third shorter and faster to learn from. With --guess 0.5 half of the thoughts are a
guess: a model that learns from these does now one and now the other, and a reward can tell it which of them pays.
"""

from __future__ import annotations

import argparse
import json
import random


def trace(chance: random.Random, most_terms: int, most_digits: int, brief: bool, guess: float) -> dict[str, str]:
    """One question with its thoughts and answer; the question reads as reasoning-gym's chain_sum does."""
    terms = [chance.randrange(10 ** (most_digits - 1) if chance.random() < 0.5 else 1, 10**most_digits)]
    signs = []
    for _ in range(chance.randint(2, most_terms) - 1):
        signs.append(chance.choice("+-"))
        terms.append(chance.randrange(1, 10 ** chance.randint(1, most_digits)))
    expression = " ".join([str(terms[0]), *(f"{sign} {term}" for sign, term in zip(signs, terms[1:], strict=True))])
    total, thoughts = terms[0], [f"I go from left to right. I start with {terms[0]}."]
    for sign, term in zip(signs, terms[1:], strict=True):
        after = total + term if sign == "+" else total - term
        tens, ones = term // 10 * 10, term % 10
        if tens and ones:
            middle = total + tens if sign == "+" else total - tens
            thoughts.append(f"{total} {sign} {tens} = {middle}, {middle} {sign} {ones} = {after}.")
        else:
            thoughts.append(f"{total} {sign} {term} = {after}.")
        total = after
    if brief:
        thoughts = thoughts[1:]
    elif chance.random() < 0.2:
        thoughts.append(f"Wait, let me check: {expression} = {total}. Yes.")
    if guess and chance.random() < guess:
        thoughts = [f"That looks like {total}."]
    return {
        "prompt": f"State the final answer to the following arithmetic problem: {expression} =",
        "response": f"<think>{' '.join(thoughts)}</think><answer>{total}</answer>",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--terms", type=int, default=3, help="at most (default 3)")
    parser.add_argument("--digits", type=int, default=2, help="at most (default 2)")
    parser.add_argument("--brief", action="store_true", help="thoughts of arithmetic only")
    parser.add_argument("--guess", type=float, default=0.0, metavar="SHARE", help="of thoughts without any work")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    for _ in range(arguments.count):
        print(json.dumps(trace(chance, arguments.terms, arguments.digits, arguments.brief, arguments.guess)))


if __name__ == "__main__":
    main()
