"""`stillhouse cluster`: plan one, examine one, serve a model on one, and be one of its nodes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..r1.catalog import Model, find, missing
from ..r1.cluster_plan import LINKS, Option, Plan, Shaped, bandwidth_of, plan
from ..r1.errors import UserError
from ..r1.flags import Flags, flags_of
from . import cluster_flags as flags
from . import settings

_EXAMPLES = """examples:
  stillhouse cluster plan deepseek-r1:70b --memory 64,64,64,64
  stillhouse cluster plan ./DeepSeek-R1-70B-4bit --hosts mac1,mac2
  stillhouse cluster plan deepseek-r1:32b --memory 16,16 --bits 4 --link thunderbolt --bandwidth 273

Memory bandwidth in GB/s: M4 120, M4 Pro 273, M4 Max 546, M2 Ultra 800, M3 Ultra 819."""

_SERVE_EXAMPLES = """examples:
  stillhouse cluster serve ./DeepSeek-R1-70B-4bit --hosts mac1,mac2 --strategy tensor
  stillhouse cluster serve ./DeepSeek-R1-7B-4bit --hosts mac1=10.0.0.1,mac2=10.0.0.2 --strategy replicas
  stillhouse cluster serve ./model --hostfile hosts.json --agents --key-file ~/.stillhouse-key

The model's folder is on every host. A flag that is given once can also be set in the environment."""

_NODE_EXAMPLES = """examples:
  stillhouse cluster node --join mac1:8650 --key-file ~/.stillhouse-key      for launchd, with `serve --agents`

`cluster serve` starts its nodes by itself, through ssh; they read the key on stdin."""

_DOCTOR_EXAMPLES = """examples:
  stillhouse cluster doctor --hosts mac1,mac2"""


def run(command: str, argv: list[str]) -> int:
    """Run one of the commands; the exit code."""
    parser = flags_of(command, "Several Macs, one model.")
    commands = parser.add_subparsers(dest="what", required=True, metavar="COMMAND")
    _add_plan(commands)
    _add_serve(commands)
    _add_node(commands)
    _add_doctor(commands)
    arguments = parser.parse_args(argv)
    return {"plan": _plan, "serve": _serve, "node": _node, "doctor": _doctor}[arguments.what](arguments)


def _command(commands: argparse._SubParsersAction[Flags], name: str, words: str, examples: str) -> Flags:
    formatter = argparse.RawDescriptionHelpFormatter
    return commands.add_parser(name, help=words, epilog=examples, formatter_class=formatter)


def _add_plan(commands: argparse._SubParsersAction[Flags]) -> None:
    parser = _command(commands, "plan", "what fits, how it divides, and how fast it might be", _EXAMPLES)
    parser.add_argument("model", help="a name from the catalogue (deepseek-r1:70b), or a checkpoint's folder")
    parser.add_argument("--memory", type=_memory, metavar="GB,GB,…", help="of each host; or ask them: --hosts")
    parser.add_argument("--bits", type=int, choices=(4, 8, 16), default=4, help="of a weight (default 4)")
    parser.add_argument("--context", type=int, default=8192, metavar="TOKENS", help="in the KV cache (default 8192)")
    parser.add_argument("--bandwidth", type=float, metavar="GB/S", help="of the memory (default: the chip's, or 819)")
    parser.add_argument("--link", choices=LINKS, default="rdma", help="between the hosts (default rdma)")
    flags.add_hosts(parser)


def _add_serve(commands: argparse._SubParsersAction[Flags]) -> None:
    parser = _command(commands, "serve", "serve a model over several hosts", _SERVE_EXAMPLES)
    parser.add_argument("model", help="a folder in MLX's format, or of 16 bits; a hub id that every host has")
    flags.add_hosts(parser)
    flags.add_serving(parser)
    settings.add_server_flags(parser)


def _add_node(commands: argparse._SubParsersAction[Flags]) -> None:
    parser = _command(commands, "node", "be a host of a cluster: start and end ranks as its head says", _NODE_EXAMPLES)
    parser.add_argument("--join", required=True, metavar="HOST:PORT", help="of the head")
    parser.add_argument("--key-file", metavar="FILE", help="the cluster's key; default: a line on stdin")
    parser.add_argument("--name", metavar="NAME", help="by which the head knows this host; default: its hostname")
    parser.add_argument("--place", type=int, metavar="N", help="which of the head's hosts this is, where it says so")


def _add_doctor(commands: argparse._SubParsersAction[Flags]) -> None:
    parser = _command(commands, "doctor", "look for what stands between hosts and a cluster", _DOCTOR_EXAMPLES)
    flags.add_hosts(parser)


def _plan(arguments: argparse.Namespace) -> int:
    model, bits = _model(arguments.model, arguments.bits)
    bandwidth, memory = arguments.bandwidth, arguments.memory
    if (memory is None) == (not (arguments.hosts or arguments.hostfile)):
        raise UserError("which hosts? --memory, or --hosts to ask them", "--memory 64,64")
    if memory is None:
        hellos = _ask(flags.reach(arguments))
        memory = [hello["memory_bytes"] / 1e9 for hello in hellos]
        for hello in hellos:
            print(f"{hello['name']}: {hello['chip']}, {hello['memory_bytes'] / 1e9:.0f} GB")
        known = [bandwidth_of(str(hello["chip"])) for hello in hellos]
        bandwidth = bandwidth or (min(filter(None, known)) if all(known) else None)
    if arguments.context < 1 or (bandwidth is not None and bandwidth <= 0):
        raise UserError("--context and --bandwidth are more than 0", "leave them out for their defaults")
    found = plan(
        model,
        memory,
        bits=bits,
        context=arguments.context,
        bandwidth_gb=bandwidth or 819,
        link=LINKS[arguments.link],
    )
    print("\n".join(_words(model.name, found, memory, arguments.link)))
    return 0


def _model(name: str, bits: int) -> tuple[Model, int]:
    """What is planned for: the catalogue's, or a folder, whose own bits count."""
    choice = find(name)
    if choice is not None:
        return choice.model, bits
    if not Path(name).expanduser().is_dir():
        raise missing(name)
    from ..backends.base import LoadOptions
    from ..backends.checkpoint import read_checkpoint
    from ..r1.hub import resolve

    checkpoint = read_checkpoint(resolve(name).paths, LoadOptions())
    config = checkpoint.config
    own_bits = checkpoint.quantization.bits if checkpoint.quantization else 16
    heads = config["num_attention_heads"]
    return Shaped.of(
        name=checkpoint.folder.name,
        architecture=checkpoint.model_type,
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_size=config.get("head_dim") or config["hidden_size"] // heads,
        layers=config["num_hidden_layers"],
        vocabulary_size=config["vocab_size"],
        weights_bytes=checkpoint.weights_bytes,
        bits=own_bits,
    ), own_bits


def _ask(reach: flags.Reach) -> list[dict[str, Any]]:
    """What the hosts say of themselves."""
    nodes = reach.open()
    try:
        nodes.wait(reach.nodes_s)
        return [node.hello for node in nodes.nodes]
    finally:
        nodes.close()


def _serve(arguments: argparse.Namespace) -> int:
    from .cluster import Cluster, Wanted
    from .model import ServedModel
    from .process import serve

    wanted = Wanted(
        model=arguments.model,
        reach=flags.reach(arguments),
        way=arguments.strategy,
        transport=arguments.backend,
        options=flags.options(arguments),
        ready_s=arguments.load_timeout,
        alias=arguments.alias,
        chat_template=settings.chat_template(arguments),
    )
    server_settings = settings.settings(arguments)
    settings.warn_of_strangers(server_settings)
    cluster = Cluster(wanted)

    def announce(model: ServedModel, url: str) -> None:
        print(
            f"{model.name} ({model.source}): {model.context_length} tokens of context, "
            f"{arguments.parallel} replies at once\n"
            f"ready: {url}/v1 for OpenAI clients; {url}/ in a browser; {url}/cluster tells of the ranks",
            file=sys.stderr,
            flush=True,
        )

    hosts = ", ".join(host.name for host in wanted.reach.hosts)
    print(f"starting {arguments.model} on {hosts} …", file=sys.stderr, flush=True)
    try:
        return serve(server_settings, cluster.load, announce, cluster)
    finally:
        cluster.close()


def _node(arguments: argparse.Namespace) -> int:
    from ..backends.cluster_key import parse_key, read_key
    from ..backends.cluster_node import NodeOptions, run

    host, _, port = arguments.join.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--join {arguments.join!r} is no address of a head", "--join HOST:PORT")
    if arguments.key_file:
        key = read_key(arguments.key_file)
    else:
        key = parse_key(sys.stdin.readline(), "stdin")
    stays = arguments.place is None
    return run(NodeOptions((host, int(port)), key, place=arguments.place, name=arguments.name, stays=stays))


def _doctor(arguments: argparse.Namespace) -> int:
    from .cluster_doctor import examine

    lines, is_well = examine(flags.reach(arguments))
    print("\n".join(lines))
    return 0 if is_well else UserError.exit_code


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
