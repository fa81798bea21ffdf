"""The loop detector hears thoughts that go in circles and lets those that only look alike go on."""

from __future__ import annotations

import itertools
import random
import re
import time
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.r1.loops import LoopDetector, has_period


def tokens(text: str) -> list[tuple[int, str]]:
    """A text in pieces as a vocabulary has them: a word with the space before it, a digit, a sign, a newline."""
    return [(hash(piece) % 50_000, piece) for piece in re.findall(r" ?[^\W\d]+| ?\d| ?[^\w\s]|\s", text)]


def heard_after(text: str) -> int | None:
    """How many tokens of a text it takes until a loop is heard."""
    detector = LoopDetector()
    return next((n for n, token in enumerate(tokens(text), 1) if detector.add(*token)), None)


# Periods


@pytest.mark.parametrize("period", [1, 2, 3, 7, 16, 47, 48, 49, 100, 255, 256])
def test_a_period_is_heard_with_its_third_time_over(period):
    before, turn = list(range(1000, 1300)), list(range(period))
    detector, due = LoopDetector(), len(before) + max(3 * period, 48)
    heard = [detector.add(token_id, "x") for token_id in before + turn * (48 // period + 4)]
    assert not any(heard[: due - 1])
    assert any(heard[due - 1 : due + 15])  # it looks every 16 tokens


def test_every_period_up_to_256_is_heard_and_none_above():
    turns = {period: array("i", list(range(period)) * max(3, 48 // period + 1)) for period in range(1, 300)}
    assert [period for period, ids in turns.items() if has_period(ids)] == list(range(1, 257))


@given(st.lists(st.integers(0, 3), max_size=120))
def test_a_period_is_told_as_by_its_definition(ids):
    def periodic(period: int) -> bool:
        span = max(3 * period, 48)
        tail = ids[-span:]
        return len(tail) == span and all(a == b for a, b in zip(tail, tail[period:], strict=False))

    assert has_period(array("i", [9, *ids])) == any(periodic(period) for period in range(1, 257))


SHORT_REPEATS = {
    "twice over": [*range(200), *range(200)],
    "a ruler of dashes": [1, 2] + [7] * 40 + [3, 4],
    "a row of zeros": [*range(50), *[5] * 47],
}


@pytest.mark.parametrize("ids", SHORT_REPEATS.values(), ids=SHORT_REPEATS)
def test_a_short_repetition_is_no_loop(ids):
    detector = LoopDetector()
    assert not any(detector.add(token_id, "x") for token_id in ids)


# Sentences

NEXT = ("next", "second", "third", "other", "last", "same", "small", "large", "even", "odd")
FILLER = [f"Step {n} has the value {n * 17 % 101} and we go on to the {word} one. " for n, word in enumerate(NEXT)]
CIRCLES = {
    "the same sentence": ["Wait, maybe I should check the sum again. "] * 5,
    "with other punctuation": [
        f"Wait{mark} maybe I should check the sum again{end}"
        for mark, end in zip(",…;: ", ["\n", ". ", "!\n", "? ", ".\n"], strict=True)
    ],
    "in another order": [
        "Maybe the first number is even, and the second odd. ",
        "The second number is odd maybe, and the first even. ",
    ]
    * 3,
    "in Chinese": ["等一下，我应该再检查一遍这个结果。"] * 5,
    "in Russian": ["Подождите, надо проверить ещё раз этот ответ. "] * 5,
}


@pytest.mark.parametrize("circle", CIRCLES.values(), ids=CIRCLES)
def test_thoughts_that_say_the_same_five_times_are_heard(circle):
    """Only a newline ended a sentence: its full stop and the space after it come in two tokens."""
    text = "".join(filler + said for filler, said in zip(FILLER, circle, strict=False)) + "\n\nSo."
    assert heard_after(text) is not None
    assert heard_after("".join(FILLER)) is None


@given(st.lists(st.integers(1, 400), max_size=20))
def test_however_it_is_cut_the_same_loop_is_heard(cuts):
    text = "".join(filler + "Wait, maybe I should check the sum again. " for filler in FILLER)
    places = [0, *sorted(cut for cut in set(cuts) if cut < len(text)), len(text)]
    detector = LoopDetector()
    heard = [detector.add(n, text[a:b]) for n, (a, b) in enumerate(itertools.pairwise(places))]
    assert any(heard)


def test_five_times_in_a_long_thought_are_no_loop():
    others = [f"Then number {n} times {n + 1} gives {n * (n + 1)} and nothing else. " for n in range(250)]
    others[::50] = ["Let me check that once more from the start. "] * 5
    assert heard_after("".join(others)) is None


ORDINARY = {
    "sums that are checked": "".join(
        f"Let's check {a} + {b}: that is {a + b}, which is {'more' if a + b > 24 else 'less'} than 24. Not it.\n"
        for a, b in itertools.product(range(3, 13), range(4, 12))
    ),
    "orders that are tried": "".join(
        f"What if they sit in the order {', '.join(order)}? Then {order[0]} is first.\n"
        for order in itertools.permutations(["Anna", "Ben", "Cleo", "Dan"])
    ),
    "signs that are tried": "".join(
        f"Try {a} {s} {b} {t} {c} {u} {d} with this order and these signs. "
        for (a, b, c, d), s, t, u in itertools.product(itertools.permutations((3, 5, 7, 9)), "+-", "+*", "-*")
    ),
    "a table of squares": "".join(f"| {n} | {n * n} | {n**3} |\n" for n in range(300)),
    "a list of primes": ", ".join(str(n) for n in range(2, 3000) if all(n % d for d in range(2, int(n**0.5) + 1))),
    "code": "".join(
        f"    if isinstance(value, {kind}):\n        result.append(('{kind}', value))\n        return result\n"
        for kind in ("int", "float", "str", "bytes", "list", "dict", "tuple", "set", "complex", "bool", "range")
    ),
    "a matrix": "\n".join(" ".join(str((i * j) % 41) for j in range(12)) for i in range(40)),
    "a thought about thoughts": """Okay, so I need to find the probability that two dice show a sum of 8.
First, let me list the pairs: (2,6), (3,5), (4,4), (5,3), (6,2). That makes five pairs. There are 36 in all.
So the probability should be 5/36. Wait, is (4,4) counted once or twice? The dice are distinct, but (4,4) is only one
outcome. So it's once. Hmm, let me double-check by another way. For a sum s from 2 to 7 there are s-1 pairs, and for s
from 7 to 12 there are 13-s. With s = 8 that's 13-8 = 5. Good, so 5/36 is right. But wait, does the problem say "at
least 8"? Let me read it again. It says "a sum of 8". Okay. So the answer is 5/36, about 0.139.
""",
}


@pytest.mark.parametrize("text", ORDINARY.values(), ids=ORDINARY)
def test_ordinary_thoughts_are_left_alone(text):
    """Trying one order of the same names after the other was taken for going in circles."""
    assert heard_after(text) is None


def test_32k_tokens_take_under_a_second():
    words = random.Random(1).choices([word for text in ORDINARY.values() for word in tokens(text)], k=32_768)
    detector = LoopDetector()
    started = time.perf_counter()
    for token in words:
        detector.add(*token)
    assert time.perf_counter() - started < 1


def test_32k_tokens_without_the_end_of_a_sentence_take_under_a_second():
    """A sentence that never ended was copied whole with every token."""
    detector, chance = LoopDetector(), random.Random(1)
    started = time.perf_counter()
    for _ in range(32_768):
        detector.add(chance.randrange(10), "word ")
    assert time.perf_counter() - started < 1
