"""`stillhouse quantize` and `verify`, their flags; `calibrate` and `measure` have a file of their own."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from ..backends.machine import compute_threads
from ..r1.errors import UserError
from ..r1.flags import Flags, flags_of

CODES = """exit codes:
  0 done   2 usage or bad input   3 the source is invalid   4 no space or memory   5 worse than --max-kld
  6 verification failed   130 interrupted (--resume goes on)"""

_QUANTIZE = f"""examples:
  stillhouse quantize deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B Q4_K_M    one file, in one pass
  stillhouse quantize ./checkpoint Q4_K_M,IQ4_XS,Q8_0                     several from one read of the source
  stillhouse quantize ./checkpoint Q4_K_M --calibration builtin           weighed by an importance matrix
  stillhouse quantize ./checkpoint --target-bpw 4.8 --calibration traces.jsonl
  stillhouse quantize ./checkpoint BF16 --output model-bf16.gguf          conversion alone
  stillhouse quantize ./checkpoint Q4_K_M --dry-run                       size, fallbacks, memory, time
  stillhouse quantize ./checkpoint mlx-4bit,nf4 --output ./result         for MLX, for PyTorch

{CODES}"""

_VERIFY = f"""examples:
  stillhouse verify model-Q4_K_M.gguf                        its structure, its template, one BOS, </think>
  stillhouse verify model-Q4_K_M.gguf --source ./checkpoint  also its tokenizer, and the error of every tensor

{CODES}"""


def run(command: str, argv: list[str]) -> int:
    """Run one of the four commands; the exit code."""
    if command in ("calibrate", "measure"):
        from .cli_measure import run as run_measure

        return run_measure(command, argv)
    return {"quantize": _quantize, "verify": _verify}[command](argv)


def quantize_parser() -> Flags:
    """The flags of `stillhouse quantize`."""
    parser = flags_of("quantize", "Turn a 16-bit checkpoint into 4-bit files, in one pass.", _QUANTIZE)
    add = parser.add_argument
    add("source", help="a folder with safetensors, a hub id, or a GGUF file in 16 or 32 bits")
    add("types", nargs="?", default="", help="Q4_K_M, or several: Q4_K_M,IQ4_XS,Q8_0; also BF16, F16, mlx-4bit, nf4")
    add(
        "-o",
        "--output",
        type=Path,
        metavar="PATH",
        help="a file NAME.gguf, or a folder (default: here, by GGUF's names)",
    )
    add("--imatrix", type=Path, metavar="FILE", help="an importance matrix: imatrix.gguf or .dat")
    add(
        "--calibration",
        default="",
        metavar="FILE",
        help="a text to collect one from: JSONL of conversations, or builtin",
    )
    add(
        "--target-bpw", type=float, default=0.0, metavar="BITS", help="the best mix of types at so many bits per weight"
    )
    add("--target-size", type=_size, default=0, metavar="SIZE", help="the best mix for a file of this size: 4.5G, 800M")
    add("--sensitivity", type=Path, metavar="FILE", help="the price list for a mix, read if it is there, else written")
    add(
        "--tensor-type",
        action="append",
        default=[],
        metavar="REGEX=TYPE",
        help="another type for tensors whose GGUF name matches; may be given again, the first match counts",
    )
    add(
        "--tokenizer-pre", default="", metavar="NAME", help="llama.cpp's pre-tokenizer, where it is not found by itself"
    )
    add("--measure", action="store_true", help="measure what the file lost, and write it into it")
    add("--max-kld", type=float, default=0.0, metavar="X", help="measure, and do not deliver a file that is worse")
    add("--dry-run", action="store_true", help="say size, bits per weight, fallbacks, memory and time; write nothing")
    add("--resume", action="store_true", help="go on where an interrupted run stopped")
    add("--force", action="store_true", help="replace files that are there")
    add("--allow-requantize", action="store_true", help="quantize what is quantized already; it loses twice")
    add("--threads", type=int, default=0, metavar="N", help="(default: OMP_NUM_THREADS, or one a core)")
    add("--offline", action="store_true", help="do not ask the hub")
    return parser


def verify_parser() -> Flags:
    """The flags of `stillhouse verify`."""
    parser = flags_of("verify", "Check a quantized file.", _VERIFY)
    parser.add_argument("file", type=Path, help="a GGUF file")
    parser.add_argument("--source", default="", metavar="SRC", help="what it was made from: a folder or a hub id")
    parser.add_argument("--strings", type=int, default=10_000, metavar="N", help="tokenized by both (default: 10000)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="(default: OMP_NUM_THREADS, or one a core)")
    parser.add_argument("--offline", action="store_true", help="do not ask the hub")
    return parser


def _quantize(argv: list[str]) -> int:
    given = quantize_parser().parse_args(argv)
    types = tuple(type for type in given.types.split(",") if type)
    has_target = bool(given.target_bpw or given.target_size)
    if given.target_bpw and given.target_size:
        raise UserError("--target-bpw and --target-size say the same twice", "give one of them")
    if not types and not has_target:
        raise UserError("no type was asked for", "such as Q4_K_M, or --target-bpw 4.8 --calibration builtin")
    if len(types) + has_target > 1 and given.output and given.output.suffix == ".gguf":
        raise UserError(
            f"{given.output} can be one file only, and {len(types) + has_target} were asked for", "name a folder"
        )
    if min(given.target_bpw, given.max_kld, given.threads) < 0:
        raise UserError("a number below 0 makes no sense here", "see --help")
    from .recipes import parse_override

    overrides = tuple(parse_override(text) for text in given.tensor_type)
    from .job import Options
    from .job import run as run_job

    return run_job(
        Options(
            source=given.source,
            types=types,
            output=given.output,
            imatrix=given.imatrix,
            calibration=given.calibration,
            sensitivity=given.sensitivity,
            target_bits=given.target_bpw,
            target_bytes=given.target_size,
            overrides=overrides,
            tokenizer_pre=given.tokenizer_pre,
            measures=given.measure,
            max_kld=given.max_kld,
            dry_run=given.dry_run,
            resume=given.resume,
            force=given.force,
            allow_requantize=given.allow_requantize,
            threads=given.threads or compute_threads(),
            offline=given.offline,
        )
    )


def _verify(argv: list[str]) -> int:
    given = verify_parser().parse_args(argv)
    from .verify import run as run_verify

    return run_verify(
        given.file,
        given.source,
        strings=given.strings,
        threads=given.threads or compute_threads(),
        offline=given.offline,
    )


def _size(text: str) -> int:
    """Bytes as people write them.

    >>> _size("4.5G"), _size("800MB")
    (4500000000, 800000000)
    """
    found = re.fullmatch(r"([\d.]+)\s*([kMGT]?)B?", text.strip(), re.IGNORECASE)
    try:
        step = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[found[2].upper()] if found else 0
        return int(float(found[1]) * step)  # type: ignore[index]
    except (ValueError, TypeError):
        raise argparse.ArgumentTypeError(f"{text!r} is no size, such as 4.5G or 800M") from None
