"""`stillhouse cluster doctor`: what stands between some hosts and a cluster, found by asking each of them.

Nothing is changed on any host. Each trouble is a line with its way out; notes are what may be better.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from ..backends.cluster_host import EQUAL
from ..backends.cluster_nodes import Node, Nodes
from ..r1.errors import UserError
from .cluster_flags import Reach

_CLOCK_S = 2.0  # apart: logs of two hosts no longer tell what came first
_ASK_S = 10.0
_MEASURE_S = 20.0
_ALL_PAIRS = 8  # hosts; of more, each is measured to the next
_SLOW_S = 1e-3  # a round trip: two sums a layer wait for one
_MB = 1e6


class Finding(NamedTuple):
    """Something that a user should know, and what to do about it."""

    words: str
    way_out: str
    stands_in_the_way: bool = True


class Link(NamedTuple):
    """One direction between two hosts."""

    start: str
    end: str
    round_trip_s: float
    bytes_per_s: float


def examine(reach: Reach) -> tuple[list[str], bool]:
    """The report in lines, and whether nothing stands in the way."""
    nodes = reach.open()
    try:
        with suppress(UserError):  # who is missing is told with all the rest
            nodes.wait(reach.nodes_s)
        findings = [*_absent(nodes), *_differences(nodes), *_on_hosts(nodes)]
        clocks = {node.place: _clock(nodes, node) for node in nodes.nodes if node.wire}
        findings += _apart(nodes, clocks)
        links, failures = _links(nodes)
        findings += failures
        findings += [
            Finding(
                f"a round trip from {link.start} to {link.end} takes {link.round_trip_s * 1e3:.1f} ms",
                "a cable between them; over this link take --strategy replicas or pipeline",
                stands_in_the_way=False,
            )
            for link in links
            if link.round_trip_s > _SLOW_S
        ]
        lines = [*_table(nodes, clocks), "", *_link_table(links), ""] if links else [*_table(nodes, clocks), ""]
    finally:
        nodes.close()
    for finding in sorted(findings, key=lambda it: not it.stands_in_the_way):
        lines.append(f"{'trouble' if finding.stands_in_the_way else 'note'}: {finding.words}")
        lines.append(f"  {finding.way_out}")
    is_well = not any(finding.stands_in_the_way for finding in findings)
    if is_well:
        lines.append("nothing stands in the way")
    return lines, is_well


def _absent(nodes: Nodes) -> list[Finding]:
    return [Finding(node.trouble, nodes.way_in(node)) for node in nodes.nodes if node.trouble]


def _differences(nodes: Nodes) -> list[Finding]:
    found: list[Finding] = []
    try:
        nodes.check_versions()
    except UserError as error:
        found.append(Finding(error.message, error.hint or ""))
    for node in nodes.nodes:
        for package in EQUAL[1:]:
            if node.wire and not node.hello.get("versions", {}).get(package):
                found.append(Finding(f"{package} is not installed on {node.name}", 'pip install "stillhouse[mlx]"'))
    return found


def _on_hosts(nodes: Nodes) -> list[Finding]:
    found: list[Finding] = []
    for node in nodes.nodes:
        hello = node.hello
        if not hello:
            continue
        if node.host.rdma and hello.get("rdma") != "enabled":
            found.append(
                Finding(
                    f"RDMA is not enabled on {node.name}",
                    "start it in Recovery (hold the power button), and in its Terminal: rdma_ctl enable",
                )
            )
        if hello.get("wired_limit_bytes") == 0:
            found.append(
                Finding(
                    f"macOS on {node.name} lets its GPU have about three quarters of its memory",
                    "more: sudo sysctl iogpu.wired_limit_mb=N, 8 GB less than there is",
                    stands_in_the_way=False,
                )
            )
    return found


def _clock(nodes: Nodes, node: Node) -> float | None:
    """Seconds that a host's clock is ahead of this one's."""
    began = time.time()
    try:
        told = nodes.ask(node, {"echo": None}, _ASK_S)
    except UserError:
        return None
    return float(told["time"]) - (began + time.time()) / 2


def _apart(nodes: Nodes, clocks: dict[int, float | None]) -> list[Finding]:
    return [
        Finding(
            f"the clock of {nodes.nodes[place].name} is {abs(ahead):.0f} s {'ahead' if ahead > 0 else 'behind'}",
            "set it by the network: sudo sntp -sS time.apple.com",
            stands_in_the_way=False,
        )
        for place, ahead in clocks.items()
        if ahead is not None and abs(ahead) > _CLOCK_S
    ]


def _links(nodes: Nodes) -> tuple[list[Link], list[Finding]]:
    links: list[Link] = []
    failures: list[Finding] = []
    for start, end in _pairs([node for node in nodes.nodes if node.wire]):
        try:
            links.append(_measure(nodes, start, end))
        except UserError as error:
            failures.append(
                Finding(
                    f"{start.name} does not reach {end.name} ({end.host.address}): {error.message}",
                    "is a firewall between them, or is it another network's address? name it: --hosts NAME=ADDRESS",
                )
            )
    return links, failures


def _pairs(nodes: Sequence[Node]) -> list[tuple[Node, Node]]:
    if len(nodes) > _ALL_PAIRS:
        return list(zip(nodes, [*nodes[1:], nodes[0]], strict=True))
    return [(start, end) for start in nodes for end in nodes if start is not end]


def _measure(nodes: Nodes, start: Node, end: Node) -> Link:
    key = secrets.token_hex(32)
    port = nodes.ask(end, {"listen": end.host.address, "key": key}, _ASK_S)["port"]
    told = nodes.ask(start, {"measure": [end.host.address, port], "key": key}, _MEASURE_S)
    return Link(start.name, end.name, told["round_trip_s"], told["bytes_per_s"])


def _table(nodes: Nodes, clocks: dict[int, float | None]) -> list[str]:
    rows = [("HOST", "ADDRESS", "CHIP", "MEMORY", "GPU MAY HAVE", "RDMA", "STILLHOUSE", "MLX", "MLX-LM", "CLOCK")]
    rows += [_row(node, clocks.get(node.place)) for node in nodes.nodes]
    return _aligned(rows)


def _row(node: Node, clock: float | None) -> tuple[str, ...]:
    hello = node.hello
    if not hello:
        return (node.name, node.host.address, "does not answer", *("-" for _ in range(7)))
    limit = hello.get("wired_limit_bytes")
    may = "-" if limit is None else _gb(limit) if limit else "default"
    versions: dict[str, Any] = hello.get("versions", {})
    return (
        node.name,
        node.host.address,
        str(hello.get("chip"))[:40],
        _gb(hello["memory_bytes"]),
        may,
        str(hello.get("rdma")),
        *(versions.get(package) or "none" for package in EQUAL),
        "-" if clock is None else f"{clock:+.2f} s",
    )


def _link_table(links: Sequence[Link]) -> list[str]:
    rows = [("FROM", "TO", "ROUND TRIP", "BANDWIDTH")]
    rows += [
        (link.start, link.end, f"{link.round_trip_s * 1e6:.0f} µs", f"{link.bytes_per_s / _MB:.0f} MB/s")
        for link in links
    ]
    return _aligned(rows)


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _gb(size: float) -> str:
    return f"{size / 1e9:.0f} GB"
