"""The list of cases, and how they are run and scored."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from .client import Broken, Refused
from .target import Fail, NotApplicable, Target

Verdict = Literal["pass", "fail", "n/a"]
Check = Callable[[Target], str]


@dataclass(frozen=True, slots=True)
class Case:
    """One question about a server. `check` gives what was seen, or raises `Fail` or `NotApplicable`."""

    number: int
    name: str
    question: str
    check: Check


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one case."""

    number: int
    name: str
    verdict: Verdict
    seen: str  # what came back, or why the case does not apply
    seconds: float

    def json(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)


CASES: dict[int, Case] = {}


def case(number: int, name: str) -> Callable[[Check], Check]:
    """Put a function on the list; its docstring is the question that it answers."""

    def add(check: Check) -> Check:
        assert number not in CASES, f"there are two cases {number}"
        CASES[number] = Case(number, name, (check.__doc__ or "").strip(), check)
        return check

    return add


def run_cases(target: Target, only: Collection[int] | None = None) -> Iterator[Result]:
    """Judge the cases in order."""
    for number in sorted(CASES):
        if only is None or number in only:
            yield judge(CASES[number], target)


def judge(one: Case, target: Target) -> Result:
    """Judge one case. An error of the server's fails it; an error of ours is raised."""
    began = time.monotonic()
    verdict: Verdict
    try:
        seen, verdict = one.check(target), "pass"
    except NotApplicable as reason:
        seen, verdict = str(reason), "n/a"
    except Fail as found:
        seen, verdict = str(found), "fail"
    except Refused as refused:
        seen, verdict = f"refused, {refused}", "fail"
    except Broken as broken:
        seen, verdict = str(broken), "fail"
    return Result(one.number, one.name, verdict, seen, round(time.monotonic() - began, 3))


def score(results: Collection[Result]) -> dict[str, int]:
    """Passed, failed and not applicable."""
    verdicts = [result.verdict for result in results]
    return {"passed": verdicts.count("pass"), "failed": verdicts.count("fail"), "not_applicable": verdicts.count("n/a")}
