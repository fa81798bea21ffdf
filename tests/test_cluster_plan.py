"""What a plan promises: it says what fits and what divides, and never sells a cluster for what one host can do."""

from __future__ import annotations

import pytest

from stillhouse.__main__ import main
from stillhouse.r1.catalog import MODELS, find
from stillhouse.r1.cluster_plan import LINKS, cabling, degrees, plan
from stillhouse.r1.errors import UserError

MODEL = {model.name.partition(":")[2]: model for model in MODELS}


def planned(size: str, *memory: float, bits: int = 4, context: int = 8192, link: str = "rdma"):
    return plan(MODEL[size], memory, bits=bits, context=context, bandwidth_gb=819, link=LINKS[link])


DEGREES = {
    "1.5b": [1, 2],
    "7b": [1, 2, 4],
    "8b": [1, 2, 4, 8],
    "14b": [1, 2, 4, 8],
    "32b": [1, 2, 4, 8],
    "70b": [1, 2, 4, 8],
}


@pytest.mark.parametrize(("size", "expected"), DEGREES.items(), ids=DEGREES)
def test_heads_divide_as_the_checkpoints_say(size, expected):
    assert degrees(MODEL[size]) == expected


def test_a_70b_at_4_bits_fits_one_mac_of_64_gb_and_eight_are_for_its_users():
    found = planned("70b", *[64.0] * 8)
    assert (found.fits_one, found.best.way, found.best.copies) == (True, "replicas", 8)


CASES = {  # size, memory, link -> the way to take, and what is said of the others
    "one host": ("7b", [32], "single", {}),
    "too big for one": ("32b", [24, 24], "tensor", {"single": "no host has", "replicas": "no host has"}),
    "three hosts": (
        "7b",
        [32] * 3,
        "replicas",
        {"tensor": "divided among 3; they can among 1, 2, 4"},
    ),
    "a Llama": ("70b", [36] * 4, "tensor", {"single": "no host has", "pipeline": ""}),
    "more hosts than layers": ("1.5b", [16] * 30, "replicas", {"pipeline": "it has 28 layers"}),
    "three that must share": ("32b", [16] * 3, "pipeline", {"tensor": "8 KV heads can't be divided among 3"}),
    "one of them is small": ("7b", [32, 4], "single", {"replicas": "1 of 2 hosts have not"}),
}


@pytest.mark.parametrize(("size", "memory", "way", "reasons"), CASES.values(), ids=CASES)
def test_the_way_to_take_and_why_not_the_others(size, memory, way, reasons):
    found = planned(size, *memory)
    assert found.best.way == way
    told = {option.way: option.reason or "" for option in found.options}
    assert all(words in told[other] for other, words in reasons.items()), told


def test_sharing_makes_a_stream_faster_by_what_was_published_and_slower_over_ethernet():
    alone, *shared = planned("70b", *[64.0] * 4).options
    over = {link: planned("70b", *[64.0] * 4, link=link).options[1].tokens_per_s for link in LINKS}
    assert 1.4 < shared[0].tokens_per_s / alone.tokens_per_s < 1.7
    assert over["ethernet"] < over["thunderbolt"] < alone.tokens_per_s < over["rdma"]


def test_what_fits_nowhere_is_told_with_both_numbers():
    with pytest.raises(UserError, match=r"70b at 16 bits does not fit: .* GB a host, and the smallest lets .* 6\.0 GB"):
        planned("70b", 8, 8, bits=16)


def test_eight_macs_are_a_ring_and_six_may_be_a_mesh():
    assert cabling(6).startswith("jaccl: a Thunderbolt 5 cable between each two, 15 in all, 5 ports a host")
    assert cabling(8).startswith("jaccl-ring: a ring of 8 Thunderbolt 5 cables")


def test_the_command_says_the_honest_sentence(capsys):
    assert main(["cluster", "plan", "deepseek-r1:70b", "--memory", "64,64,96"]) == 0
    assert "It fits one of them: several pay in prompts that are read sooner" in capsys.readouterr().out
    assert main(["cluster", "plan", "deepseek-r2", "--memory", "64"]) == 2
    assert find("deepseek-r1:70b") is not None
