"""The ranks of a cluster: they say what one process says, and whatever goes wrong ends in one line, never in silence.

Most tests play one side over a real wire. Those that start ranks as processes are slow.
"""

from __future__ import annotations

import json
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cluster_ranks import KEY, Cluster, open_cluster, start_rank
from stepping import GREEDY, LONG, cached, ids, reply

from stillhouse.backends.base import BackendFailed, GenerationRequest, LoadOptions, Sampling
from stillhouse.backends.checkpoint import read_checkpoint
from stillhouse.backends.cluster_rank import BAD, FAILED, LOST, STOPPED, Rank, Spec
from stillhouse.backends.cluster_ranks import Ranks
from stillhouse.backends.cluster_split import check_split, degrees, strategies
from stillhouse.backends.cluster_wire import Door, Wire, WireBroken, connect
from stillhouse.backends.engine import Engine
from stillhouse.backends.open import open_backend, open_ranks
from stillhouse.r1.errors import UserError

needs_mlx = pytest.mark.skipif(
    find_spec("mlx_lm") is None, reason='MLX is not installed: pip install "stillhouse[mlx]"'
)
READY = {"ready": True, "context": 512, "cache_tokens": 2048, "memory_bytes": 7}
PROMPTS = (LONG, "Once upon a time there was a still. ", "1, 2, 3")


@pytest.fixture
def write(random_checkpoint: Any, tmp_path: Path) -> Callable[..., Path]:
    """Writes a checkpoint whose layers can be divided by 8, plain or in 4 bits."""

    def write(architecture: str = "qwen2", bits: int = 32, **shape: int) -> Path:
        chosen = {"width": 256, "heads": 8, "kv_heads": 8, "head": 32, "forward": 256} | shape
        model = random_checkpoint.random_model(architecture, shape=random_checkpoint.Shape(**chosen))
        folder = random_checkpoint.write_checkpoint(tmp_path / architecture, model)
        return folder if bits == 32 else _quantize(folder, tmp_path / f"{architecture}-{bits}bit", bits)

    return write


def _quantize(folder: Path, to: Path, bits: int) -> Path:
    from mlx_lm.utils import load_config, load_model, quantize_model, save_config, save_model

    model, config = load_model(folder)
    model, config = quantize_model(model, load_config(folder), 32, bits)
    to.mkdir()
    save_model(to, model)
    save_config(config, to / "config.json")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (to / name).write_bytes((folder / name).read_bytes())
    return to


# The same tokens


@pytest.mark.slow
@needs_mlx
@pytest.mark.parametrize(
    ("architecture", "bits", "strategy", "ranks"),
    [
        ("qwen2", 32, "single", 1),
        ("llama", 32, "tensor", 2),
        ("llama", 4, "tensor", 2),
        ("qwen2", 32, "tensor", 2),
        ("qwen2", 4, "tensor", 2),
        ("llama", 4, "pipeline", 2),
        ("qwen2", 32, "pipeline", 2),
        ("llama", 32, "tensor", 4),
        ("qwen2", 4, "tensor", 4),
        ("llama", 4, "tensor", 8),
        ("qwen2", 32, "tensor", 8),
    ],
)
def test_ranks_say_what_one_process_says(write, architecture, bits, strategy, ranks):
    folder = write(architecture, bits)
    few = ranks > 2  # ranks that share two cores wait for one another most of the time
    alone = open_backend([folder / "model.safetensors"], LoadOptions(context=1024, backend="mlx")).backend
    cluster, backend = open_cluster(folder, ranks, strategy)
    try:
        for prompt in PROMPTS[1:2] if few else PROMPTS:
            length = 8 if few else 16
            assert ids(reply(backend, prompt, length)) == ids(reply(alone, prompt, length))
        backend.close()
        assert [process.wait(5) for process in cluster.processes] == [STOPPED] * ranks
    finally:
        cluster.close()


# What can be divided


def test_the_degrees_are_those_that_divide_heads_columns_and_groups(write):
    def told(**config: Any) -> list[int]:
        folder = write(heads=12, kv_heads=6, head=32, width=384, forward=768)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        return degrees(read_checkpoint([folder / "model.safetensors"], LoadOptions()))

    assert told() == [1, 2, 3, 6]
    assert told(intermediate_size=500) == [1, 2]
    assert told(quantization={"group_size": 64, "bits": 4}) == [1, 2, 3, 6]
    assert told(quantization={"group_size": 128, "bits": 4}) == [1, 3]
    assert told(quantization={"group_size": 32, "bits": 4, "lm_head": {"group_size": 128, "bits": 8}}) == [1, 3]


def test_what_cannot_be_divided_is_told_with_what_can(write):
    checkpoint = read_checkpoint([write() / "model.safetensors"], LoadOptions())
    assert strategies(checkpoint, 2) == {"single": "2 ranks are not a single one", "tensor": None, "pipeline": None}
    with pytest.raises(UserError) as told:
        check_split(checkpoint, "tensor", 3)
    assert str(told.value) == (
        "qwen2: 8 heads, 8 KV heads and 256 columns can't be divided among 3 ranks; they can among 1, 2, 4 and 8 "
        "(take another number of hosts, or --strategy replicas)"
    )
    with pytest.raises(
        UserError, match=r"qwen2: 2 layers can't be divided among 4 ranks \(.*--strategy tensor or repl"
    ):
        check_split(checkpoint, "pipeline", 4)


# A rank that cannot begin


def begin(spec: dict[str, Any] | str) -> tuple[int, str]:
    """The exit code and what it said."""
    process = start_rank(spec, {})
    _, said = process.communicate(timeout=60)
    return process.returncode, said


@pytest.fixture
def door() -> Iterator[Door]:
    door = Door("127.0.0.1", 0, KEY, {"role": "head"})
    yield door
    door.close()


def told_to(door: Door, **fields: Any) -> dict[str, Any]:
    spec = {"head": door.address, "key": KEY.hex(), "epoch": 1, "rank": 0, "size": 1, "strategy": "single"}
    return spec | {"model": "/nowhere", "options": {}, "ready_s": 60} | fields


NO_SPECS = {
    "not JSON": ("tensor", "a rank is started with a line of JSON on its stdin, not with this (JSONDecodeError"),
    "a list": ("[]", "a rank is started with a line of JSON on its stdin, not with this (TypeError"),
    "no key": ({"key": None}, "a rank is started with a line of JSON on its stdin, not with this (TypeError"),
    "an unknown strategy": ({"strategy": "magic"}, "there is no rank 0 of 1 by the strategy 'magic'"),
    "a rank beyond the last": ({"rank": 1}, "there is no rank 1 of 1 by the strategy 'single'"),
}


@pytest.mark.parametrize(("spoiled", "message"), NO_SPECS.values(), ids=NO_SPECS)
def test_a_rank_that_is_not_told_properly_says_so(door, spoiled, message):
    with pytest.raises(UserError) as told:
        Spec.parse(spoiled if isinstance(spoiled, str) else json.dumps(told_to(door) | spoiled))
    assert str(told.value).startswith(message)


def test_a_rank_without_a_head_says_so(door):
    spec = told_to(door)
    door.close()
    code, said = begin(spec)
    assert code == LOST
    assert said.startswith("error: nothing can be reached at 127.0.0.1:")
    assert said.count("\n") == 1


def test_a_rank_with_another_key_says_so(door):
    code, said = begin(told_to(door, key="00" * 32))
    assert (code, said.count("\n")) == (LOST, 1)
    assert "does not take our key" in said


CANNOT_LOAD: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "no folder": (
        {"model": "/nowhere"},
        "there is no model folder /nowhere",
        "copy it to the same place on every host",
    ),
    "heads that do not divide": (
        {"size": 5, "strategy": "tensor"},
        "qwen2: 8 heads, 8 KV heads and 256 columns can't be divided among 5 ranks; they can among 1, 2, 4 and 8",
        "take another number of hosts, or --strategy replicas",
    ),
}


@pytest.mark.parametrize(("fields", "message", "hint"), CANNOT_LOAD.values(), ids=CANNOT_LOAD)
def test_a_rank_that_cannot_load_tells_its_head_and_its_starter(write, door, fields, message, hint):
    process = start_rank(told_to(door, **{"model": str(write())} | fields), {})
    wire = door.accept(30)
    assert wire.hello.items() >= {"role": "rank", "rank": 0, "epoch": 1, "pid": process.pid}.items()
    while "error" not in (told := wire.receive(30)[0]):
        assert "beat" in told
    assert told == {"error": message, "user": True, "hint": hint}
    assert process.communicate(timeout=30)[1] == f"error: rank 0: {message}\n"
    assert process.returncode == BAD
    wire.close()


def test_a_checkpoint_with_a_program_is_refused_by_every_rank(write, door):
    folder = write()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_file": "model.py"}))
    (folder / "model.py").write_text("raise SystemExit('it ran')")
    code, said = begin(told_to(door, model=str(folder), options={"trust_remote_code": True}))
    assert code == BAD
    assert "qwen2 brings its own program (model.py)" in said


# A rank and its messages


class Noted:
    """An executor that notes what it is asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> np.ndarray | None:
            self.calls.append((name, *arguments))
            return np.arange(6, dtype=np.float32).reshape(2, 3) if name == "step" else None

        return call

    def memory_bytes(self) -> int:
        return 7


@pytest.fixture
def pair(door: Door) -> Iterator[tuple[Wire, Wire]]:
    rank = connect(*door.address, KEY, {}, 5)
    head = door.accept(5)
    yield head, rank
    head.close()
    rank.close()


def serve(door: Door, pair: tuple[Wire, Wire], *messages: dict[str, Any]) -> tuple[Noted, int | str]:
    """What was executed, and how it ended."""
    noted = Noted()
    spec = Spec.parse(json.dumps(told_to(door)))
    for message in messages:
        pair[0].send(message)
    try:
        return noted, Rank(spec, pair[1]).serve(noted, lambda: None)  # pyright: ignore[reportArgumentType]
    except WireBroken as error:
        return noted, error.message


def message(step: int, *ops: Any, epoch: int = 1) -> dict[str, Any]:
    return {"epoch": epoch, "step": step, "ops": list(ops)}


def test_a_rank_does_what_a_message_says_in_order_and_answers_with_logits(door, pair):
    ops = (["begin", 3], ["read", 3, [1, 2]], ["copy", 4, 3, 1], ["join", [3, 4]], ["step", [5, 6]])
    noted, end = serve(door, pair, message(1, *ops), message(2, ["beat"]), message(3, ["stop"]))
    assert (noted.calls, end) == ([tuple(op) for op in ops], STOPPED)
    told, data = pair[0].receive(1)
    assert told == {"epoch": 1, "step": 1, "memory_bytes": 7, "shape": [2, 3]}
    assert np.frombuffer(data, np.float32).tolist() == [0, 1, 2, 3, 4, 5]
    assert pair[0].receive(1)[0] == {"epoch": 1, "step": 2, "memory_bytes": 7}


ROGUE = {
    "another epoch": (message(1, epoch=2), "a message of epoch 2, step 1 came where epoch 1, step 1 was next"),
    "a step too far": (message(2), "a message of epoch 1, step 2 came where epoch 1, step 1 was next"),
    "no step": ({}, "a message of epoch None, step None came where epoch 1, step 1 was next"),
    "no list": (
        {"epoch": 1, "step": 1, "ops": "stop"},
        "a message of epoch 1, step 1 came where epoch 1, step 1 was next",
    ),
    "an unknown operation": (message(1, ["close"]), 'a message asks for ["close"], which no rank does'),
    "no operation": (message(1, 7), "a message asks for 7, which no rank does"),
    "an empty operation": (message(1, []), "a message asks for [], which no rank does"),
}


@pytest.mark.parametrize(("rogue", "words"), ROGUE.values(), ids=ROGUE)
def test_a_message_that_does_not_fit_ends_a_rank_and_changes_nothing(door, pair, rogue, words):
    noted, end = serve(door, pair, rogue)
    assert (noted.calls, end) == ([], words)


# The head and its ranks


class Played:
    """Ranks that this test plays, over real wires."""

    def __init__(self, door: Door, count: int, **options: Any) -> None:
        self.wires: list[Wire] = []
        heads: list[Wire] = []
        for rank in range(count):
            self.wires.append(connect(*door.address, KEY, {"rank": rank, "pid": 40 + rank}, 5))
            heads.append(door.accept(5))
        self.ranks = Ranks(heads, epoch=1, ready=[READY] * count, **options)
        self.heard: list[dict[str, Any]] = []

    def behave(self, rank: int, answer: Callable[[Wire, dict[str, Any]], None]) -> None:
        """Have a rank answer every message so."""

        def run() -> None:
            with suppress(WireBroken):
                while True:
                    message, _ = self.wires[rank].receive(None)
                    if not rank:
                        self.heard.append(message)
                    answer(self.wires[rank], message)

        threading.Thread(target=run, daemon=True).start()

    def close(self) -> None:
        for wire in self.wires:
            wire.close()


def well(wire: Wire, message: dict[str, Any]) -> None:
    answer = {name: message[name] for name in ("epoch", "step")} | {"memory_bytes": 9}
    wire.send(answer | {"shape": [1, 2]}, np.array([1, 2], np.float32).data)


def never(wire: Wire, message: dict[str, Any]) -> None:
    pass


@pytest.fixture
def play(door: Door) -> Iterator[Callable[..., Played]]:
    played: list[Played] = []

    def play(*behaviours: Callable[[Wire, dict[str, Any]], None], **options: Any) -> Played:
        played.append(Played(door, len(behaviours), **options))
        for rank, behaviour in enumerate(behaviours):
            played[-1].behave(rank, behaviour)
        return played[-1]

    yield play
    for one in played:
        one.close()


def test_what_changes_states_goes_along_with_the_next_call_of_the_model(play):
    played = play(well, well)
    ranks = played.ranks
    ranks.begin(1)
    ranks.read(1, [5, 6])
    ranks.copy(2, 1, 1)
    ranks.join([1, 2])
    assert ranks.step([7, 8]).tolist() == [[1, 2]]
    ranks.part([2])
    ranks.drop([1])
    ranks.beat()
    ranks.begin(3)
    ranks.clear()
    ranks.beat()
    assert [told["ops"] for told in played.heard] == [
        [["begin", 1], ["read", 1, [5, 6]]],
        [["copy", 2, 1, 1], ["join", [1, 2]], ["step", [7, 8]]],
        [["part", [2]], ["drop", [1]], ["beat"]],
        [["clear"], ["beat"]],
    ]
    assert [(told["epoch"], told["step"]) for told in played.heard] == [(1, 1), (1, 2), (1, 3), (1, 4)]
    assert (ranks.context_length, ranks.cache_tokens) == (512, 2048)
    for number, row in enumerate(ranks.table()):
        assert (
            row.items() >= {"rank": number, "pid": 40 + number, "step": 4, "memory_bytes": 9, "trouble": None}.items()
        )
        assert row["heard_s"] < 5


def _ends(wire: Wire, message: dict[str, Any]) -> None:
    wire.close()


def _tells(wire: Wire, message: dict[str, Any]) -> None:
    wire.send({"error": "[ring] connection to a peer was lost"})


def _acknowledges_another(wire: Wire, message: dict[str, Any]) -> None:
    well(wire, message | {"step": message["step"] + 1})


def _is_short(wire: Wire, message: dict[str, Any]) -> None:
    wire.send({"epoch": 1, "step": message["step"], "shape": [1, 2]}, b"1234")


FAILURES: dict[str, tuple[tuple[Callable[[Wire, dict[str, Any]], None], ...], str]] = {
    "one ends": ((well, _ends), r"rank 1 of 2 ended: 127\.0\.0\.1:\d+ has hung up"),
    "one ends, the other sees it": ((_tells, _ends), r"rank 1 of 2 ended: 127\.0\.0\.1:\d+ has hung up"),
    "one tells": ((well, _tells), r"rank 1 of 2 failed: \[ring\] connection to a peer was lost"),
    "another step": (
        (well, _acknowledges_another),
        r"rank 1 of 2 failed: it acknowledged step 2 where step 1 was asked",
    ),
    "no logits": ((_is_short, well), r"rank 0 answered step 1 with 4 bytes that are no logits"),
    "late": ((well, never), r"rank 1 of 2 did not come to the end of a step"),
}


@pytest.mark.parametrize(("behaviours", "words"), FAILURES.values(), ids=FAILURES)
def test_a_failure_names_the_rank_and_is_the_end_of_all(play, behaviours, words):
    played = play(*behaviours, first_s=0.5)
    with pytest.raises(BackendFailed, match=words) as told:
        played.ranks.step([1])
    assert "\n" not in str(told.value)
    assert played.ranks.failed.is_set()
    assert played.ranks.trouble == str(told.value)
    played.ranks.begin(1)  # the scheduler goes on for a moment
    with pytest.raises(BackendFailed, match=words):
        played.ranks.read(1, [2])
    for wire in played.wires:  # all are hung up on
        with pytest.raises(WireBroken):
            wire.receive(5)


def test_a_rank_that_is_silent_is_named_long_before_a_step_is_late(play, monkeypatch):
    monkeypatch.setattr("stillhouse.backends.cluster_ranks.SILENT_S", 0.4)
    played = play(never, never)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.05):
            played.wires[0].send({"beat": 0})

    threading.Thread(target=beat, daemon=True).start()
    started = time.monotonic()
    with pytest.raises(BackendFailed, match=r"rank 1 of 2 said nothing for 0\.4 s"):
        played.ranks.step([1])
    stop.set()
    assert time.monotonic() - started < 5


def test_a_rank_that_ends_while_nothing_is_asked_is_noticed(play):
    played = play(well, well)
    played.wires[1].close()
    assert played.ranks.failed.wait(5)
    assert played.ranks.trouble and played.ranks.trouble.startswith("rank 1 of 2 ended")


def test_who_waits_for_ranks_hears_why_they_were_given_up(play):
    played = play(never, never)
    threading.Timer(0.1, played.ranks.fail, ["node b says that rank 1 exited with -9"]).start()
    with pytest.raises(BackendFailed, match="node b says that rank 1 exited with -9"):
        played.ranks.step([1])


def test_a_beat_does_not_wait_for_a_step_in_progress(play):
    going = threading.Event()
    release = threading.Event()

    def slowly(wire: Wire, message: dict[str, Any]) -> None:
        going.set()
        release.wait(10)
        well(wire, message)

    played = play(slowly)
    thread = threading.Thread(target=played.ranks.step, args=([1],))
    thread.start()
    assert going.wait(5)
    played.ranks.beat()  # comes back though nobody answers
    assert not release.is_set()
    release.set()
    thread.join(5)
    assert len(played.heard) == 1


def test_a_message_that_is_too_long_hurts_its_requests_only(play):
    played = play(well, well)
    with pytest.raises(BackendFailed, match=r"a message of \d+ \+ 0 bytes is too long for the cluster's wire"):
        played.ranks.read(1, [10**9] * 500_000)
    assert played.ranks.trouble is None
    assert played.ranks.step([1]).shape == (1, 2)


def test_a_step_may_take_four_times_as_long_as_one_before_it(play):
    pauses = iter([0.2, 0.5, 30.0])

    def pausing(wire: Wire, message: dict[str, Any]) -> None:
        threading.Event().wait(next(pauses))
        well(wire, message)

    played = play(pausing, stall_s=0.1, first_s=5)
    for _ in range(2):
        played.ranks.step([1])
    with pytest.raises(BackendFailed, match="rank 0 of 1 did not come to the end of a step"):
        played.ranks.step([1])


# Processes


@pytest.mark.slow
@needs_mlx
def test_a_rank_that_falls_is_told_within_five_seconds_and_new_ones_go_on(checkpoint_path):
    first, backend = open_cluster(checkpoint_path, 2)
    second = None
    try:
        said = ids(reply(backend, LONG, 8))
        engine = Engine(backend)
        fell = _fall(engine, first, signal.SIGKILL)
        assert fell.startswith("rank 1 of 2 ended")
        second = Cluster(checkpoint_path, 2, "tensor", context=1024)
        ranks = Ranks(second.wires, epoch=1, ready=second.said)
        engine.between_steps(lambda backend: backend.renew(ranks))  # pyright: ignore[reportAttributeAccessIssue]
        prompt = backend.vocabulary.encode(LONG)
        again = list(engine.generate([GenerationRequest("2", prompt, 8, GREEDY, ignore_eos=True)]))
        assert (ids(again), cached(again)) == (said, 0)
        assert _fall(engine, second, signal.SIGSTOP) == "rank 1 of 2 said nothing for 2.5 s"
        engine.close()
    finally:
        for one in (first, second):
            if one is not None:
                one.close()


def _fall(engine: Engine, cluster: Cluster, sign: signal.Signals) -> str:
    """Send rank 1 a signal while a reply is written; what that reply's caller hears, and the other rank ends."""
    stream = engine.generate([GenerationRequest("1", [1, 2, 3], 900, GREEDY, ignore_eos=True)])
    next(stream)
    cluster.processes[1].send_signal(sign)
    started = time.monotonic()
    with pytest.raises(BackendFailed) as told:
        for _ in stream:
            pass
    assert time.monotonic() - started < 5
    assert cluster.processes[0].wait(5) in (FAILED, LOST)
    return told.value.message


@pytest.mark.slow
@needs_mlx
def test_a_real_rank_ends_in_one_line_over_a_rogue_message(checkpoint_path):
    cluster = Cluster(checkpoint_path, 1, "single")
    try:
        cluster.wires[0].send(message(1, ["begin", 1], ["read", 1, [1, 2]], epoch=2))
        process = cluster.processes[0]
        assert process.wait(5) == LOST
        assert process.stderr
        assert process.stderr.read() == (
            "error: rank 0: a message of epoch 2, step 1 came where epoch 1, step 1 was next\n"
        )
    finally:
        cluster.close()


@pytest.mark.slow
@needs_mlx
def test_a_thousand_random_requests_leave_two_ranks_at_work(checkpoint_path):
    """Seeded and not, cancelled at any moment, malformed, long, forced: none of them may wedge the ranks."""
    cluster, backend = open_cluster(checkpoint_path, 2, context=256)
    draw = random.Random(8)
    engine = Engine(backend)

    def request(number: int) -> GenerationRequest:
        length = draw.choice([1, 3, 20, 20, 100, 200, 400])  # the longest fits no context
        sampling = Sampling(temperature=draw.choice([0, 1]), seed=draw.choice([None, number]), top_p=0.95)
        prompt = [draw.randrange(256) for _ in range(length)] if draw.random() < 0.7 else list(range(length))
        return GenerationRequest(
            str(number),
            prompt if draw.random() < 0.98 else [10**7],  # MLX itself would look beyond the table's end
            draw.choice([0, 1, 2, 5, 10]),
            sampling,
            draw.choice([None, 0, 3]),
            ignore_eos=draw.random() < 0.5,
        )

    ended = {"told": 0, "left": 0, "refused": 0}
    lock = threading.Lock()

    def ask(asked: Sequence[GenerationRequest]) -> None:
        for one in asked:
            end = "told"
            leave_after = draw.choice([None, None, 0, 1, 3])
            try:
                for heard, _ in enumerate(engine.generate([one])):
                    if heard == leave_after:
                        end = "left"
                        break
            except UserError:
                end = "refused"
            with lock:
                ended[end] += 1

    try:
        requests = [request(number) for number in range(1000)]
        clients = [threading.Thread(target=ask, args=(requests[first::8],)) for first in range(8)]
        for client in clients:
            client.start()
        for client in clients:
            client.join(150)
        assert not any(client.is_alive() for client in clients)
        assert sum(ended.values()) == 1000
        assert min(ended.values()) > 20
        started = time.monotonic()
        assert len(list(engine.generate([GenerationRequest("last", [1, 2, 3], 4, GREEDY, ignore_eos=True)]))) == 4
        assert time.monotonic() - started < 2
        assert [process.poll() for process in cluster.processes] == [None, None]
        engine.close()
    finally:
        cluster.close()


def test_who_opens_ranks_gets_the_words_of_the_folder(checkpoint_path, play):
    ranks = play(well).ranks
    opened = open_ranks([checkpoint_path / "model.safetensors"], LoadOptions(), ranks)
    assert opened.backend.context_length == 512
    assert opened.chat_template
