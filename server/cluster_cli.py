"""`stillhouse cluster plan`: what a cluster can do for a model, before anybody buys a cable."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..r1.catalog import find, missing
from ..r1.cluster_plan import LINKS, Option, Plan, plan
from ..r1.errors import UserError
from ..r1.flags import Flags, flags_of

_EXAMPLES = """examples:
  stillhouse cluster plan deepseek-r1:70b --memory 64,64,64,64
  stillhouse cluster plan deepseek-r1:32b --memory 16,16 --bits 4 --link thunderbolt --bandwidth 273

Memory bandwidth in GB/s: M4 120, M4 Pro 273, M4 Max 546, M2 Ultra 800, M3 Ultra 819."""


def run(command: str, argv: list[str]) -> int:
    """Run one of the commands; the exit code."""
    parser = flags_of(command, "Several Macs, one model.")
    commands = parser.add_subparsers(dest="what", required=True, metavar="COMMAND")
    _add_plan(commands)
    arguments = parser.parse_args(argv)
    return _plan(arguments)


def _add_plan(commands: argparse._SubParsersAction[Flags]) -> None:
    parser = commands.add_parser(
        "plan",
        help="what fits, how it divides, and how fast it might be",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="a name from the catalogue: deepseek-r1:70b")
    parser.add_argument("--memory", type=_memory, required=True, metavar="GB,GB,…", help="of each host")
    parser.add_argument("--bits", type=int, choices=(4, 8, 16), default=4, help="of a weight (default 4)")
    parser.add_argument("--context", type=int, default=8192, metavar="TOKENS", help="in the KV cache (default 8192)")
    parser.add_argument("--bandwidth", type=float, default=819, metavar="GB/S", help="of the memory (default 819)")
    parser.add_argument("--link", choices=LINKS, default="rdma", help="between the hosts (default rdma)")


def _plan(arguments: argparse.Namespace) -> int:
    choice = find(arguments.model)
    if choice is None:
        raise missing(arguments.model)
    if arguments.context < 1 or arguments.bandwidth <= 0:
        raise UserError("--context and --bandwidth are more than 0", "leave them out for their defaults")
    found = plan(
        choice.model,
        arguments.memory,
        bits=arguments.bits,
        context=arguments.context,
        bandwidth_gb=arguments.bandwidth,
        link=LINKS[arguments.link],
    )
    print("\n".join(_words(choice.model.name, found, arguments.memory, arguments.link)))
    return 0


def _words(name: str, found: Plan, memory: Sequence[float], link: str) -> list[str]:
    lines = [f"{name} on {len(memory)} host{'s' * (len(memory) > 1)}; speeds are estimates, of one stream:"]
    lines += [f"  {_option(option)}" for option in found.options]
    lines.append(f"take: {found.best.way}")
    if len(memory) > 1:
        if found.fits_one:
            lines.append(
                "It fits one of them: several pay in prompts that are read sooner (tensor) and in users (replicas), "
                "not in fit."
            )
        if link == "rdma":
            lines.append(f"cables: {found.cabling}")
    return lines


def _option(option: Option) -> str:
    head = f"{option.way:<9} {option.bytes_per_host / 1e9:6.1f} GB a host"
    if option.reason:
        return f"{head}  no: {option.reason}"
    users = f", {option.copies} copies" if option.copies > 1 else ""
    return f"{head}  {option.tokens_per_s:5.1f} tokens/s, prompts up to {option.prefill:g}x{users}"


def _memory(text: str) -> list[float]:
    try:
        sizes = [float(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or len(sizes) > 64 or not all(1 <= size <= 4096 for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of 1 to 64 sizes in GB, such as 64,64,96")
    return sizes
