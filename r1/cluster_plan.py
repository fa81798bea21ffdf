"""What a cluster of Macs can do for a model: what fits, which ways of sharing it divide, how fast that might be.

Pure arithmetic on a model's shape and the hosts' memory; it asks no host and loads nothing. Speeds are estimates from
memory bandwidth and hops, and are called so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from .catalog import R1_ADVICE, Model
from .errors import UserError

GPU_SHARE = 0.75  # of a Mac's memory, that macOS lets the GPU have unless iogpu.wired_limit_mb says otherwise
_GROUP_BITS = 0.5  # scale and bias of a group of 64 quantized weights, a weight
_BUFFERS = 1_000_000_000  # bytes a host, for what is computed
_SHARED = 0.47  # of a step's time divides among hosts; fitted to 1.3x on 2 and 1.55x on 4 Macs with RDMA, as published
_MESH_MOST = 6  # Macs with six Thunderbolt ports, one cable between each two of them, leaves one port free
_HEADS = {"1.5b": 12, "7b": 28, "8b": 32, "14b": 40, "32b": 40, "70b": 64, "135m": 9}  # of the checkpoints' config.json

_BANDWIDTHS = (  # GB/s, by the end of the chip's name
    ("M1 Ultra", 800),
    ("M1 Max", 400),
    ("M1 Pro", 200),
    ("M1", 68),
    ("M2 Ultra", 800),
    ("M2 Max", 400),
    ("M2 Pro", 200),
    ("M2", 100),
    ("M3 Ultra", 819),
    ("M3 Max", 300),
    ("M3 Pro", 150),
    ("M3", 100),
    ("M4 Max", 410),
    ("M4 Pro", 273),
    ("M4", 120),
    ("M5", 153),
)

Way = Literal["single", "tensor", "pipeline", "replicas"]


@dataclass(frozen=True, slots=True)
class Link:
    """What lies between two hosts."""

    name: str
    hop_s: float  # what one message takes, one way


LINKS = {
    "rdma": Link("RDMA over Thunderbolt 5", 10e-6),
    "thunderbolt": Link("TCP over Thunderbolt", 300e-6),
    "ethernet": Link("TCP over Ethernet", 500e-6),
}
"""Published figures are 3 to 50 microseconds for RDMA and about 300 for TCP over Thunderbolt; Ethernet's is a guess."""


@dataclass(frozen=True, slots=True)
class Shaped(Model):
    """A model that is in no catalogue, by what its checkpoint says."""

    heads: int = 1

    @classmethod
    def of(
        cls,
        *,
        name: str,
        architecture: str,
        heads: int,
        kv_heads: int,
        head_size: int,
        layers: int,
        vocabulary_size: int,
        weights_bytes: int,
        bits: int,
    ) -> Shaped:
        """From its shape; parameters are reckoned from its bytes."""
        return cls(
            name=name,
            title=architecture.capitalize(),
            source=name,
            gguf="",
            parameters=round(weights_bytes / _bytes_of(bits)),
            layers=layers,
            kv_heads=kv_heads,
            head_size=head_size,
            context_length=0,
            vocabulary_size=vocabulary_size,
            licence="",
            advice=R1_ADVICE,
            gb=(),
            heads=heads,
        )


class Option(NamedTuple):
    """One way to use the hosts."""

    way: Way
    hosts: int  # that hold one copy together
    copies: int
    bytes_per_host: int
    reason: str | None  # why it can't be; `None` = it can
    tokens_per_s: float  # of one stream, an estimate
    prefill: float  # how many times as fast as on one host, at best


@dataclass(frozen=True, slots=True)
class Plan:
    """All the ways, and the one to take."""

    options: tuple[Option, ...]
    best: Option
    fits_one: bool
    cabling: str


def plan(model: Model, memory_gb: Sequence[float], *, bits: int, context: int, bandwidth_gb: float, link: Link) -> Plan:
    """Reckon every way to share a model among hosts. Raises `UserError` where none fits."""
    hosts = len(memory_gb)
    room = [int(gb * 1e9 * GPU_SHARE) for gb in memory_gb]
    options = [_single(model, room, bits, context, bandwidth_gb)]
    if hosts > 1:
        options += [
            _tensor(model, room, bits, context, bandwidth_gb, link),
            _pipeline(model, room, bits, context, bandwidth_gb, link),
            _replicas(model, room, bits, context, bandwidth_gb),
        ]
    able = {option.way: option for option in options if option.reason is None}
    if not able:
        least = min(options, key=lambda option: option.bytes_per_host)
        raise UserError(
            f"{model.name} at {bits} bits does not fit: {least.bytes_per_host / 1e9:.1f} GB a host, and the smallest "
            f"lets its GPU have {min(room) / 1e9:.1f} GB ({GPU_SHARE:.0%} of its memory)",
            "fewer --bits, a smaller --context, more memory; or raise iogpu.wired_limit_mb",
        )
    # One copy a host serves most users and has no wire in it; what must be shared is shared in the fastest way.
    best = able.get("replicas") or able.get("single") or max(able.values(), key=lambda option: option.tokens_per_s)
    return Plan(tuple(options), best, "single" in able, cabling(hosts))


def degrees(model: Model) -> list[int]:
    """The numbers of hosts among which its heads can be divided."""
    kv_heads, heads = model.kv_heads, _heads(model)
    return [n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and heads % n == 0]


def cabling(hosts: int) -> str:
    """How so many Macs are to be wired for RDMA."""
    if hosts < 2:
        return "no cable"
    if hosts <= _MESH_MOST:
        cables = hosts * (hosts - 1) // 2
        return f"jaccl: a Thunderbolt 5 cable between each two, {cables} in all, {hosts - 1} ports a host"
    return f"jaccl-ring: a ring of {hosts} Thunderbolt 5 cables, 2 ports a host; a mesh would need {hosts - 1} ports"


def bandwidth_of(chip: str) -> float | None:
    """A chip's memory bandwidth in GB/s, the least of its variants'; `None` where it is none of Apple's."""
    return next((gb for name, gb in _BANDWIDTHS if chip.endswith(name)), None)


def _heads(model: Model) -> int:
    if isinstance(model, Shaped):
        return model.heads
    return _HEADS[model.name.partition(":")[2]]


def _bytes_of(bits: int) -> float:
    """A weight takes, with its part of its group's scales."""
    return (bits + (_GROUP_BITS if bits < 16 else 0)) / 8


def _weights(model: Model, bits: int) -> tuple[int, int]:
    """Bytes of the layers, and of what every host keeps whole: the embeddings and the head."""
    per_weight = _bytes_of(bits)
    hidden = _heads(model) * model.head_size
    ends = min(model.parameters // 2, 2 * model.vocabulary_size * hidden)
    return round((model.parameters - ends) * per_weight), round(ends * per_weight)


def _fits(needed: int, room: Sequence[int]) -> str | None:
    small = [it for it in room if it < needed]
    if not small:
        return None
    which = "no host has" if len(small) == len(room) else f"{len(small)} of {len(room)} hosts have not"
    return f"{which} {needed / 1e9:.1f} GB for it"


def _decode(read: int, bandwidth_gb: float, waiting_s: float = 0.0) -> float:
    return 1 / (read / (bandwidth_gb * 1e9) + waiting_s)


def _single(model: Model, room: Sequence[int], bits: int, context: int, bandwidth_gb: float) -> Option:
    layers, ends = _weights(model, bits)
    needed = layers + ends + context * model.kv_bytes_per_token() + _BUFFERS
    reason = None if max(room) >= needed else f"no host has {needed / 1e9:.1f} GB for it"
    return Option("single", 1, 1, needed, reason, _decode(layers + ends // 2, bandwidth_gb), 1.0)


def _replicas(model: Model, room: Sequence[int], bits: int, context: int, bandwidth_gb: float) -> Option:
    single = _single(model, room, bits, context, bandwidth_gb)
    return single._replace(way="replicas", copies=len(room), reason=_fits(single.bytes_per_host, room))


def _tensor(model: Model, room: Sequence[int], bits: int, context: int, bandwidth_gb: float, link: Link) -> Option:
    hosts, (layers, ends) = len(room), _weights(model, bits)
    needed = layers // hosts + ends + context * model.kv_bytes_per_token() // hosts + _BUFFERS
    reason = _fits(needed, room)
    if hosts not in degrees(model):
        known = ", ".join(map(str, degrees(model)))
        reason = f"{model.kv_heads} KV heads can't be divided among {hosts}; they can among {known}"
    alone = _decode(layers + ends // 2, bandwidth_gb)
    at_best = alone / (1 - _SHARED + _SHARED / hosts)
    waiting_s = 2 * model.layers * (hosts - 1) * (link.hop_s - LINKS["rdma"].hop_s)  # two sums a layer, round the ring
    speed = 1 / (1 / at_best + waiting_s)
    return Option("tensor", hosts, 1, needed, reason, speed, float(hosts))


def _pipeline(model: Model, room: Sequence[int], bits: int, context: int, bandwidth_gb: float, link: Link) -> Option:
    hosts, (layers, ends) = len(room), _weights(model, bits)
    share = -(-model.layers // hosts) / model.layers
    needed = round(layers * share) + ends + round(context * model.kv_bytes_per_token() * share) + _BUFFERS
    reason = _fits(needed, room)
    if hosts > model.layers:
        reason = f"it has {model.layers} layers"
    return Option(
        "pipeline", hosts, 1, needed, reason, _decode(layers + ends // 2, bandwidth_gb, hosts * link.hop_s), 1.0
    )
