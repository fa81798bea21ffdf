"""`stillhouse calibrate` and `stillhouse measure`: their flags, and what they print."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..backends.machine import compute_threads
from ..r1.errors import UserError
from ..r1.flags import Flags, flags_of

if TYPE_CHECKING:
    from .comparison import Request
    from .kld import Quality

_CALIBRATE = """examples:
  stillhouse calibrate deepseek-r1:1.5b -n 64 -o traces.jsonl            the pack's questions, answered by the model
  stillhouse calibrate ./model.gguf --prompts p.jsonl -n 256 -o traces.jsonl
  stillhouse quantize ./checkpoint Q4_K_M --calibration traces.jsonl     what they are for

A prompt is a line of JSON: {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}.
The same command again goes on where it stopped. Exit codes: 0 done, 2 usage or bad input, 130 interrupted."""

_MEASURE = """examples:
  stillhouse measure model-Q4_K_M.gguf --against ./checkpoint            KL divergence, agreement, perplexity
  stillhouse measure a.gguf --against base-BF16.gguf --json              a GGUF file as the base
  stillhouse measure a.gguf --against ./checkpoint --states base.npz     the base reads once, for many files
  stillhouse measure base-F16.gguf --write-kld base.kld --text wiki.txt  as llama-perplexity --kl-divergence-base
  stillhouse measure a.gguf --kld base.kld                               as llama-perplexity --kl-divergence

Numbers are llama-perplexity's: chunks of --context tokens, of which the second half is scored; KL of base against file
in nats. Without --reasoning and --text the texts are those that come with Stillhouse and tune nothing.
Exit codes: 0 done, 2 usage or bad input, 3 the source is invalid, 5 worse than --max-kld, 130 interrupted."""


def run(command: str, argv: list[str]) -> int:
    """Run one of the two commands; the exit code."""
    return {"calibrate": _calibrate, "measure": _measure}[command](argv)


def calibrate_parser() -> Flags:
    """The flags of `stillhouse calibrate`."""
    parser = flags_of("calibrate", "Have a model write reasoning traces, to calibrate it with.", _CALIBRATE)
    add = parser.add_argument
    add("model", help="a catalogue name, a GGUF file or a hub id: whatever `stillhouse serve` can load")
    add("--prompts", type=Path, metavar="FILE", help="questions, one JSON object a line (default: the pack's)")
    add("-n", "--count", type=int, default=64, metavar="N", help="traces (default: 64)")
    add("-o", "--output", type=Path, default=Path("traces.jsonl"), metavar="FILE", help="(default: traces.jsonl)")
    add("--max-tokens", type=int, default=4096, metavar="N", help="of a reply with its thoughts (default: 4096)")
    add("--temperature", type=float, default=0.6, metavar="T", help="(default: 0.6)")
    add("--top-p", type=float, default=0.95, metavar="P", help="(default: 0.95)")
    add("--seed", type=int, default=0, metavar="N", help="of the first trace; each next one has the next (default: 0)")
    add("--parallel", type=int, default=4, metavar="N", help="replies in progress at once (default: 4)")
    add("--context", type=int, default=0, metavar="TOKENS", help="prompt and reply together (default: what fits)")
    add("--threads", type=int, default=0, metavar="N", help="(default: OMP_NUM_THREADS, or one a core)")
    return parser


def measure_parser() -> Flags:
    """The flags of `stillhouse measure`."""
    parser = flags_of("measure", "Measure what a quantized model lost.", _MEASURE)
    add = parser.add_argument
    add("file", help="the quantized model: a GGUF file, or a folder that transformers can load")
    add("--against", default="", metavar="SOURCE", help="what it was made from: a folder, a hub id, or a GGUF file")
    add("--kld", type=Path, metavar="FILE", help="compare with a .kld file instead, on the text that it was made from")
    add("--write-kld", type=Path, metavar="FILE", help="have FILE read --text, and keep its log-probabilities")
    add("--states", type=Path, metavar="FILE", help="the base's hidden states: read if it is there, else written")
    add("--reasoning", type=Path, metavar="FILE", help="held-out traces, JSONL (default: the pack's)")
    add("--text", type=Path, metavar="FILE", help="general text, JSONL or plain (default: the pack's)")
    add("--calibration", default="", metavar="FILE", help="what the file was tuned on; refused as a text to measure on")
    add("--chunks", type=int, default=32, metavar="N", help="of each text at most (default: 32)")
    add("--context", type=int, default=512, metavar="TOKENS", help="a chunk (default: 512)")
    add("--max-kld", type=float, default=0.0, metavar="X", help="exit with 5 where the mean KL divergence is more")
    add("--json", action="store_true", help="print JSON")
    add("--threads", type=int, default=0, metavar="N", help="(default: OMP_NUM_THREADS, or one a core)")
    add("--offline", action="store_true", help="do not ask the hub")
    return parser


def _calibrate(argv: list[str]) -> int:
    given = calibrate_parser().parse_args(argv)
    if given.count < 1 or given.max_tokens < 1:
        raise UserError("nothing was asked for", "-n and --max-tokens are 1 at least")
    from ..backends.base import LoadOptions
    from ..backends.open import open_backend
    from ..r1.hub import resolve
    from .calibration import pack, read_texts
    from .progress import meter
    from .traces import Wish, finished, write_traces

    prompts = read_texts(given.prompts) if given.prompts else pack("calibration")
    have = len([number for number in finished(given.output) if number < given.count])
    if have < given.count:
        files = resolve(given.model)
        options = LoadOptions(
            context=given.context or None, parallel=given.parallel, threads=given.threads or compute_threads()
        )
        wish = Wish(given.count, given.max_tokens, given.temperature, given.top_p, given.seed)
        opened = open_backend(files.paths, options)
        with meter(f"{files.name} writes {given.output}", given.count, "trace", done=have) as show:
            write_traces(opened, prompts, wish, given.output, show)
    print(given.output)
    return 0


def _measure(argv: list[str]) -> int:
    given = measure_parser().parse_args(argv)
    if sum(map(bool, (given.against, given.kld, given.write_kld))) != 1:
        raise UserError("what shall it be compared with?", "give one of --against SOURCE, --kld FILE, --write-kld FILE")
    if given.context < 4 or given.chunks < 1:
        raise UserError("--context is 4 at least, and --chunks 1", "the defaults are 512 and 32")
    from . import comparison
    from .errors import QualityTooLow

    request = _request(given)
    if given.write_kld:
        comparison.write_kld_file(request, given.write_kld)
        print(given.write_kld)
        return 0
    found = (
        comparison.against_kld(request, given.kld) if given.kld else comparison.against_source(request, given.against)
    )
    print(json.dumps(_as_json(given, found), indent=2) if given.json else _as_text(given, found))
    worst = max(quality.kl.value for quality in found.values())
    if given.max_kld and worst > given.max_kld:
        raise QualityTooLow(f"the KL divergence is {worst:.4f}, more than {given.max_kld:g}", "take a larger type")
    return 0


def _request(given: argparse.Namespace) -> Request:
    from .comparison import Request

    return Request(
        file=given.file,
        reasoning=given.reasoning,
        general=given.text,
        calibration=given.calibration,
        states=given.states,
        chunks=given.chunks,
        context=given.context,
        threads=given.threads or compute_threads(),
        offline=given.offline,
    )


def _as_json(given: argparse.Namespace, found: Mapping[str, Quality]) -> dict[str, Any]:
    base = given.against or str(given.kld)
    return {"file": given.file, "base": base, "texts": {name: quality.as_json() for name, quality in found.items()}}


def _as_text(given: argparse.Namespace, found: Mapping[str, Quality]) -> str:
    from .card import quality_rows

    rows = quality_rows(found)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([f"{given.file} against {given.against or given.kld}", "", *lines])
