"""`stillhouse conformance`: the cases as a table, or as JSON."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys

from ... import __version__
from ...r1.errors import UserError
from ...r1.flags import flags_of
from . import cases_answer, cases_budget, cases_split, cases_turns  # noqa: F401 - they put themselves on the list
from .client import Client
from .suite import CASES, Result, run_cases, score
from .target import Target

_EXAMPLES = """examples:
  stillhouse conformance http://127.0.0.1:8000/v1
  stillhouse conformance http://127.0.0.1:8000/v1 --only 5,32 --json

The exit code is 0 where no case fails, and 1 where one does. docs/conformance.md tells what each case is about."""


def run(command: str, argv: list[str]) -> int:
    """Run the suite; the exit code."""
    parser = flags_of(command, "Try a server's handling of a reasoning model's thoughts, case by case.", _EXAMPLES)
    parser.add_argument("url", help="base URL of an OpenAI-compatible server, up to /v1")
    parser.add_argument("--model", metavar="NAME", help="default: the first that the server lists")
    parser.add_argument("--api-key", metavar="KEY", default=os.environ.get("OPENAI_API_KEY"), help="or OPENAI_API_KEY")
    parser.add_argument("--only", metavar="N,N,…", type=_numbers, help="these cases only")
    parser.add_argument("--json", action="store_true", help="results as one JSON object")
    parser.add_argument(
        "--timeout", metavar="SECONDS", type=_seconds, default=120.0, help="for a silent server (default 120)"
    )
    arguments = parser.parse_args(argv)
    if unknown := sorted(set(arguments.only or ()) - set(CASES)):
        raise UserError(f"there is no case {unknown[0]}", f"they are numbered from 1 to {max(CASES)}")
    client = Client(arguments.url, api_key=arguments.api_key, timeout_s=arguments.timeout)
    target = Target(client, arguments.model)
    if not arguments.json:
        way = "scripted" if target.is_scripted else "as it comes"
        print(f"{target.model or 'the model'} on {target.backend} ({way}), by stillhouse {__version__}", flush=True)
    results = []
    for result in run_cases(target, arguments.only):
        results.append(result)
        if not arguments.json:
            _show(result)
    total = score(results)
    if arguments.json:
        about = {"url": arguments.url, "model": target.model, "backend": target.backend, "scripted": target.is_scripted}
        print(json.dumps(about | {"score": total, "cases": [result.json() for result in results]}, ensure_ascii=False))
    else:
        print(f"{_of(total)}, {total['not_applicable']} not applicable")
    return 1 if total["failed"] else 0


def _show(result: Result) -> None:
    start = f"{result.number:>3}  {result.verdict:<4}  {result.name:<34} "
    room = max(30, shutil.get_terminal_size((140, 24)).columns - len(start))
    seen = " ".join(result.seen.split())
    print(start + (seen if len(seen) <= room or not sys.stdout.isatty() else seen[: room - 1] + "…"), flush=True)


def _of(total: dict[str, int]) -> str:
    return f"{total['passed']} of {total['passed'] + total['failed']} pass"


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 5,32") from None


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return seconds
