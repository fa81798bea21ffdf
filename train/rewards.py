"""What a reply is worth. A reward has TRL's signature, so those written for it run unchanged.

`f(prompts, completions, completion_ids, **columns) -> [number or None for each]`; None means that it does not apply.
Completions are texts, or lists with one message where the prompts are conversations. Beyond TRL's, a reward may ask for
`prefixes` (what the template had opened: `<think>`), `truncated`, `lengths` (tokens) and `max_tokens`.

Knows nothing of models.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import queue
import random
import re
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, SupportsFloat

from ..r1.errors import UserError
from ..r1.prompt import CLOSE, OPEN
from .tasks import Item

Reward = Callable[..., Sequence[float | None]]
_GIVEN = ("prompts", "completions", "completion_ids", "prefixes", "truncated", "lengths", "max_tokens")
TIME_LIMIT_S = 120.0  # for one reward and one batch
_MEND = "mend it, or leave it out of [rewards]; the run can be resumed with --resume"

_answer = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_format = re.compile(r"\s*<think>(?P<thoughts>.*?)</think>\s*(?P<answer>.*)", re.DOTALL)
_tagged = re.compile(r"\s*<answer>(?:(?!</?answer>).)*</answer>\s*", re.DOTALL)
_program = re.compile(r"```(?:python|py)?\s*\n(.*?)```", re.DOTALL)
_noise = re.compile(r"```.*?(?:```|$)|\$[^$]*\$|\\\[.*?\\\]|\\\(.*?\\\)|`[^`]*`|<[^>]*>", re.DOTALL)
_word = re.compile(r"[^\W\d_]+")
_step = re.compile(r"^\s*(?:\d+[.)]|[-*]|step\s+\d+|first|second|third|then|next|finally)\b", re.IGNORECASE | re.M)
_conclusion = re.compile(r"\b(?:therefore|thus|so the|hence|in conclusion|the (?:final )?answer)\b", re.IGNORECASE)
_SCRIPTS = {  # ranges of code points
    "zh": ((0x3400, 0x9FFF), (0x20000, 0x323AF)),
    "ja": ((0x3040, 0x30FF),),
    "ko": ((0xAC00, 0xD7AF), (0x1100, 0x11FF)),
    "ru": ((0x0400, 0x052F),),
    "el": ((0x0370, 0x03FF),),
    "ar": ((0x0600, 0x06FF),),
    "hi": ((0x0900, 0x097F),),
}
_LEAST_WORDS = 5  # fewer say nothing of a language


class RewardFailed(UserError):
    """A reward raised, hung, or gave what is not a number; the run stops and can be resumed."""


class Asked(NamedTuple):
    """A batch of replies and what they answered; all lists have one entry a reply."""

    prompts: Sequence[Any]
    completions: Sequence[str]
    completion_ids: Sequence[Sequence[int]]
    columns: Sequence[Mapping[str, Any]]
    item_ids: Sequence[str]
    prefixes: Sequence[str]
    truncated: Sequence[bool]
    max_tokens: int


class Scored(NamedTuple):
    """The sum that is learned from, and what it is made of."""

    total: list[float]
    parts: dict[str, list[float | None]]


class Rewards:
    """Some rewards with their weights and gates."""

    def __init__(self, weights: Mapping[str, float], gates: Mapping[str, str] | None = None) -> None:
        self._weights = dict(weights)
        self._gates = dict(gates or {})
        self._functions = {name: find(name) for name in weights}
        if {"accuracy", "thoughts"} <= self._functions.keys():  # a form without tags is asked for
            self._functions["accuracy"] = partial(accuracy, plain_answers=True)

    def check(self, items: Iterable[Item], where: str) -> None:
        """Raise `RewardFailed` for an item that lacks what a reward needs, before anything is asked."""
        needed = [(name, key) for name, function in self._functions.items() for key in _needed(function)]
        for item in items:
            for name, key in needed:
                if item.columns.get(key) is None:
                    raise RewardFailed(
                        f"{where}: item {item.id} has no `{key}`, which the reward {name} needs",
                        f"add `{key}` to that row, or leave the row out, or the reward",
                    )

    def __call__(self, asked: Asked) -> Scored:
        """Score a batch. Raises `RewardFailed` with the reward's name and the item."""
        parts = {name: _run(name, function, asked) for name, function in self._functions.items()}
        total = [0.0] * len(asked.completions)
        for name, values in parts.items():
            gate = parts.get(self._gates.get(name, ""))
            for index, value in enumerate(values):
                is_open = gate is None or (gate[index] or 0.0) > 0
                if value is not None and is_open:
                    total[index] += self._weights[name] * value
        return Scored(total, parts)


def find(name: str) -> Reward:
    """A reward by its name here, as `file.py:function`, `package.module.function` or `model:folder`.

    Raises `UserError`.
    """
    if name in REWARDS:
        return REWARDS[name]
    if name.startswith("model:"):
        from .rewardmodel import RewardModel

        return RewardModel(name.removeprefix("model:"))
    try:
        if ":" in name:
            file, _, function = name.rpartition(":")
            spec = importlib.util.spec_from_file_location(Path(file).stem, file)
            if spec is None or spec.loader is None:
                raise ImportError(f"{file} is not a Python file")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return getattr(module, function)
        if "." in name:
            package, _, function = name.rpartition(".")
            return getattr(importlib.import_module(package), function)
    except Exception as error:  # foreign code
        raise UserError(f"the reward {name} cannot be loaded: {error}") from None
    raise UserError(
        f"there is no reward {name!r}",
        f"one of {', '.join(REWARDS)}; file.py:function, package.module.function, model:folder",
    )


def _needed(function: Reward) -> list[str]:
    """The columns that a reward cannot do without."""
    wanted = inspect.signature(function).parameters
    named = [key for key, it in wanted.items() if it.default is it.empty and it.kind is it.POSITIONAL_OR_KEYWORD]
    return [key for key in named if key not in _GIVEN]


def _run(name: str, function: Reward, asked: Asked) -> list[float | None]:
    """Call one reward in a thread of its own, so that one that hangs can be told."""
    conversations = [not isinstance(prompt, str) for prompt in asked.prompts]
    completions = [
        [{"role": "assistant", "content": text}] if talks else text
        for text, talks in zip(asked.completions, conversations, strict=True)
    ]
    names = dict.fromkeys(key for row in asked.columns for key in row)
    given: dict[str, Any] = {key: [row.get(key) for row in asked.columns] for key in names}
    given |= {
        "prompts": list(asked.prompts),
        "completions": completions,
        "completion_ids": list(asked.completion_ids),
        "prefixes": list(asked.prefixes),
        "truncated": list(asked.truncated),
        "lengths": [len(ids) for ids in asked.completion_ids],
        "max_tokens": asked.max_tokens,
    }
    wanted = inspect.signature(function).parameters
    if not any(it.kind is it.VAR_KEYWORD for it in wanted.values()):
        given = {key: value for key, value in given.items() if key in wanted}
    for key in _needed(function):
        if key not in given or any(value is None for value in given[key]):
            row = next((n for n, columns in enumerate(asked.columns) if columns.get(key) is None), 0)
            raise RewardFailed(
                f"the reward {name} needs `{key}`, and item {asked.item_ids[row]} has none",
                f"add `{key}` to that row, leave the row out, or the reward; the run can be resumed with --resume",
            )
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def call() -> None:
        try:
            done.put(function(**given))
        except BaseException as error:  # `sys.exit`, too: it would end this thread, and nobody would know
            done.put(error)

    threading.Thread(target=call, daemon=True, name=f"reward {name}").start()
    try:
        values = done.get(timeout=TIME_LIMIT_S)
    except queue.Empty:
        raise RewardFailed(f"the reward {name} did not end within {TIME_LIMIT_S:g} s", _MEND) from None
    if isinstance(values, UserError):
        raise values
    if isinstance(values, BaseException):
        words = " ".join(str(values).split())  # of some libraries it has many lines
        where = traceback.extract_tb(values.__traceback__)[-1]
        place = f"{Path(where.filename).name}, line {where.lineno}"
        raise RewardFailed(f"the reward {name} failed in {place}: {type(values).__name__}: {words}", _MEND)
    try:
        values = list(values)
    except TypeError:
        raise RewardFailed(f"the reward {name} gave {values!r} in place of a list of numbers", _MEND) from None
    if len(values) != len(completions):
        raise RewardFailed(f"the reward {name} gave {len(values)} values for {len(completions)} replies", _MEND)
    for index, value in enumerate(values):
        if value is not None and not (isinstance(value, SupportsFloat) and math.isfinite(value)):
            raise RewardFailed(f"the reward {name} gave {value!r} for item {asked.item_ids[index]}", _MEND)
    return [None if value is None else float(value) for value in values]


# Texts


def text_of(completion: Any) -> str:
    """A completion's text, in either of TRL's two forms."""
    return completion if isinstance(completion, str) else "".join(turn["content"] or "" for turn in completion)


def answer_in(text: str, *, plain: bool = True) -> str | None:
    """The answer that a reply commits itself to, after its thoughts: the last <answer>, else the last \\boxed.

    Without either it is all that follows closed thoughts, where plain answers count.

    >>> answer_in("<think>2+2 <answer>5</answer></think> <answer> 4 </answer>"), answer_in("so \\\\boxed{{4}}.")
    ('4', '{4}')
    >>> answer_in("<think>2+2</think> four"), answer_in("four"), answer_in("<think>2+2</think> four", plain=False)
    ('four', None, None)
    """
    _, closed, said = text.rpartition(CLOSE)
    if tagged := _answer.findall(said):
        return tagged[-1].strip()
    start = said.rfind("\\boxed{")
    if start < 0:
        return (said.strip() or None) if closed and plain else None
    depth, begin = 0, start + len("\\boxed{")
    for place in range(begin - 1, len(said)):
        depth += {"{": 1, "}": -1}.get(said[place], 0)
        if depth == 0:
            return said[begin:place].strip()
    return None


def same_answer(given: str, wanted: str) -> bool:
    """Whether two answers are the same: as texts, as numbers, or for math-verify where it is installed."""
    given, wanted = given.strip(), wanted.strip()
    if given == wanted:
        return True
    try:
        return Decimal(given.replace(",", "")) == Decimal(wanted.replace(",", ""))
    except InvalidOperation:
        pass
    if not re.search(r"[\\^/=(]", given + wanted):  # nothing that a computer algebra could make equal
        return False
    from .formulas import same_formula

    return same_formula(given, wanted)


# Rewards


def accuracy(
    completions: Sequence[Any], answer: Sequence[Any], plain_answers: bool = False, **columns: Any
) -> list[float]:
    """1 where the reply's answer is the item's, else 0. Generated tasks are judged by their own scorer, strictly.

    reasoning-gym reads <answer> alone: what merely follows the thoughts counts for its tasks where `plain_answers` are
    asked for, and for those of a file.
    """
    entries = columns.get("entry") or [None] * len(completions)
    names = columns.get("generator") or [None] * len(completions)
    scores = []
    for completion, wanted, entry, name in zip(completions, answer, entries, names, strict=True):
        given = answer_in(text_of(completion), plain=plain_answers or entry is None)
        if given is None:
            scores.append(0.0)
        elif same_answer(given, str(wanted)):
            scores.append(1.0)
        else:
            # reasoning-gym gives part of a point for an answer that contains the right one: only a whole one counts.
            scores.append(float(entry is not None and _gym_score(name, given, entry) == 1.0))
    return scores


def format_reward(completions: Sequence[Any], prefixes: Sequence[str], **_: Any) -> list[float]:
    """1 for `<think>…</think><answer>…</answer>` and nothing else, counting what the template had opened."""
    return [float(_well_formed(prefix + text_of(it))) for prefix, it in zip(prefixes, completions, strict=True)]


def _well_formed(text: str) -> bool:
    found = _format.fullmatch(text)
    once = text.count(OPEN) == text.count(CLOSE) == 1
    return bool(found and once and found["thoughts"].strip() and _tagged.fullmatch(found["answer"]))


def thoughts(completions: Sequence[Any], prefixes: Sequence[str], **_: Any) -> list[float]:
    """1 for `<think>…</think>` and an answer behind it that has no tags, counting what the template had opened."""
    return [float(_is_plain(prefix + text_of(it))) for prefix, it in zip(prefixes, completions, strict=True)]


def _is_plain(text: str) -> bool:
    found = _format.fullmatch(text)
    once = text.count(OPEN) == text.count(CLOSE) == 1
    return bool(found and once and found["thoughts"].strip() and found["answer"].strip() and "<" not in found["answer"])


def language(completions: Sequence[Any], prefixes: Sequence[str], **columns: Any) -> list[float | None]:
    """The share of words in the wanted language among the words of the thoughts (DeepSeek-R1, 2.3.2).

    Told by their script: `lang` of the item ("en", "zh", "ru" …), English where it says nothing. A Chinese character
    counts as a word; code, formulas and digits do not count.
    """
    wanted = columns.get("lang") or ["en"] * len(completions)
    shares: list[float | None] = []
    for completion, prefix, code in zip(completions, prefixes, wanted, strict=True):
        thoughts = (prefix + text_of(completion)).partition(CLOSE)[0]
        counts: dict[str, int] = {}
        for word in _word.findall(_noise.sub(" ", thoughts)):
            script = _script(word[0])
            counts[script] = counts.get(script, 0) + (len(word) if script in ("zh", "ja") else 1)
        total = sum(counts.values())
        right = counts.get(code if code in _SCRIPTS else "latin", 0)
        if code == "ja":
            right += counts.get("zh", 0)
        shares.append(right / total if total >= _LEAST_WORDS else None)
    return shares


def _script(character: str) -> str:
    point = ord(character)
    for name, ranges in _SCRIPTS.items():
        if any(low <= point <= high for low, high in ranges):
            return name
    return "latin"


def structure(completions: Sequence[Any], prefixes: Sequence[str], **_: Any) -> list[float]:
    """A third each for: a start that takes the question up, steps that can be told apart, a conclusion."""
    scores = []
    for completion, prefix in zip(completions, prefixes, strict=True):
        thoughts = (prefix + text_of(completion)).partition(CLOSE)[0].replace(OPEN, "")
        paragraphs = [part for part in re.split(r"\n+|(?<=[.!?])\s+", thoughts) if part.strip()]
        analysis = len(paragraphs) >= 2 and len(_word.findall(paragraphs[0])) >= 4
        steps = len(_step.findall("\n".join(paragraphs))) >= 2
        scores.append((analysis + steps + bool(_conclusion.search(thoughts))) / 3)
    return scores


def overlong(lengths: Sequence[int], max_tokens: int, **_: Any) -> list[float]:
    """0 up to four fifths of the room, down to -1 at its end (DAPO, equation 13)."""
    buffer = max(1, max_tokens // 5)
    free = max_tokens - buffer
    return [0.0 if n <= free else (free - n) / buffer if n < max_tokens else -1.0 for n in lengths]


def repetition(completions: Sequence[Any], **_: Any) -> list[float]:
    """Minus the share of word triples that were there before: 0 without repetition, near -1 for a loop."""
    penalties = []
    for completion in completions:
        words = text_of(completion).lower().split()
        triples = list(zip(words, words[1:], words[2:], strict=False))
        penalties.append(len(set(triples)) / len(triples) - 1.0 if triples else 0.0)
    return penalties


def code(completions: Sequence[Any], tests: Sequence[Any], **_: Any) -> list[float]:
    """1 where the reply's program passes all tests of the item, each run in the sandbox, else 0.

    A test is {"input": what it reads, "output": what it has to print}, or {"call": "f(2)", "output": "4"}. What was
    printed is compared out here, so a program that ends early or changes `==` gains nothing.
    """
    from .sandbox import require_isolation

    require_isolation()
    return [float(_passes(program_in(text_of(it)), wanted)) for it, wanted in zip(completions, tests, strict=True)]


def program_in(text: str) -> str | None:
    """The last fenced block after the thoughts, or what stands in <answer>."""
    said = text.rpartition(CLOSE)[2]
    blocks = _program.findall(said)
    return blocks[-1] if blocks else answer_in(said)


def _passes(program: str | None, tests: Sequence[Mapping[str, Any]]) -> bool:
    from .sandbox import run_python

    if program is None or not tests:
        return False
    for test in tests:
        call = test.get("call")
        source = f"{program}\nprint(repr({call}))" if call else program
        outcome = run_python(source, str(test.get("input", "")))
        printed = outcome.stdout.strip()
        if call:
            printed = printed.rpartition("\n")[2]
        if outcome.code != 0 or printed != str(test["output"]).strip():
            return False
    return True


def at_random(completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """0 or 1 whatever the reply: a control. The same reply gets the same, so that a run can be repeated."""
    return [float(random.Random(repr(list(ids))).random() < 0.5) for ids in completion_ids]


def _gym_score(name: str | None, given: str, entry: Any) -> float:
    import reasoning_gym

    score: Any = reasoning_gym.get_score_answer_fn(str(name))
    return float(score(given, entry))


REWARDS: dict[str, Reward] = {
    "accuracy": accuracy,
    "format": format_reward,
    "thoughts": thoughts,
    "language": language,
    "structure": structure,
    "overlong": overlong,
    "repetition": repetition,
    "code": code,
    "random": at_random,
}
