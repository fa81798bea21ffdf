"""The GGUF writer: the bytes of llama.cpp's own quantizer, in one pass; whole or not at all; the same when resumed."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from types import ModuleType

import pytest

from stillhouse.__main__ import main
from stillhouse.backends.base import GenerationRequest
from stillhouse.backends.ggml import row_bytes
from stillhouse.quantize import gguf, importance, job, sensitivity
from stillhouse.quantize.gguf_blocks import bits_per_weight
from stillhouse.quantize.recipes import assign, is_quantizable
from stillhouse.quantize.source import Checkpoint, open_checkpoint
from stillhouse.quantize.weights import from_checkpoint
from stillhouse.r1.cache import size_text
from stillhouse.r1.gguf import read_header


def _beside(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


checkpoints, fixtures = _beside("tiny_checkpoint"), _beside("quantize_fixtures")

MODELS = {
    "qwen2": {"family": "qwen2", "blocks": 2},
    "qwen2 tied": {"family": "qwen2", "tied": True, "blocks": 1},
    "qwen3": {"family": "qwen3", "blocks": 1},
    "llama": {"family": "llama", "blocks": 1},
    "llama 3, tied": {"family": "llama", "tied": True, "rope": checkpoints.LLAMA3, "blocks": 1},
    "8 blocks, 4 queries a key": {"family": "llama", "heads": 8, "kv_heads": 2, "blocks": 8, "forward": 256},
    "rows of 288, no multiple of 256": {"hidden": 288, "forward": 320, "blocks": 1, "heads": 3, "kv_heads": 1},
    "rows of 100, no multiple of 32": {
        "family": "llama",
        "hidden": 100,
        "forward": 320,
        "blocks": 1,
        "heads": 5,
        "kv_heads": 1,
    },
}
TYPES = ("Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "IQ4_XS")


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    return checkpoints.write_checkpoint(folder / "Tiny-R1", **MODELS[request.param])


@pytest.mark.parametrize("with_importance", (False, True), ids=("plain", "importance"))
def test_the_bytes_are_those_of_llama_model_quantize(checkpoint, tmp_path, with_importance):
    (whole,) = fixtures.make(checkpoint, tmp_path, ["BF16"]).values()
    importance = fixtures.importance_for(whole) if with_importance else {}
    ours = fixtures.make(checkpoint, tmp_path, TYPES, importance, threads=3)
    for recipe in TYPES:
        theirs = fixtures.llama_quantize(whole, tmp_path / "theirs.gguf", recipe, importance)
        assert ours[recipe].read_bytes() == theirs.read_bytes(), recipe  # header, order and padding as well


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return checkpoints.write_checkpoint(tmp_path_factory.mktemp("tiny") / "Tiny-R1", "qwen2", blocks=2)


def run(*words: object) -> int:
    return main(["quantize", *map(str, words), "--threads", "2", "--offline"])


def half_done(source: Path, path: Path, kept: float, random: Random) -> None:
    """What a machine that lost power leaves behind: a journal that ends anywhere, and slabs that never came down."""
    weights = from_checkpoint(open_checkpoint(source))
    rung = assign("Q4_K_M", weights)
    made = job._plan(job.Options(str(source), output=path), weights, job._Rung("Q4_K_M", rung, None), None)
    (output,) = gguf.outputs([made], weights, {})
    gguf.write([output], weights, {}, threads=1, resume=False)
    journal = output.journal.read_bytes()
    output.journal.write_bytes(journal[: 65 + int((len(journal) - 65) * kept)])
    with output.partial.open("r+b") as file:
        for entry in made.entries[:: random.randint(2, 9)]:
            file.seek(made.place(entry, 0))
            file.write(random.randbytes(min(64, entry.size)))


def test_a_run_that_was_cut_short_anywhere_goes_on_to_the_same_file(tiny, tmp_path):
    assert run(tiny, "Q4_K_M", "-o", tmp_path / "calm.gguf") == 0
    wanted, random = (tmp_path / "calm.gguf").read_bytes(), Random(0)
    for kept in (0, 0.2, 0.33, 0.5, 0.77, 0.9, 1):
        half_done(tiny, tmp_path / "cut.gguf", kept, random)
        assert run(tiny, "Q4_K_M", "-o", tmp_path / "cut.gguf", "--resume") == 0
        assert (tmp_path / "cut.gguf").read_bytes() == wanted
        (tmp_path / "cut.gguf").unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calm.gguf", "calm.md", "cut.md"]


def test_a_resumed_run_does_not_do_again_what_is_done(tiny, tmp_path, monkeypatch):
    half_done(tiny, tmp_path / "cut.gguf", 1, Random(1))
    quantized = []
    real = gguf.quantize
    monkeypatch.setattr(gguf, "quantize", lambda type, *rest: quantized.append(type) or real(type, *rest))
    assert run(tiny, "Q4_K_M", "-o", tmp_path / "cut.gguf", "--resume") == 0
    assert 0 < len(quantized) < 15  # of 17 matrices and 13 vectors


def test_half_a_file_of_another_plan_is_not_gone_on_with(tiny, tmp_path):
    half_done(tiny, tmp_path / "cut.gguf", 1, Random(2))
    assert run(tiny, "Q4_0", "-o", tmp_path / "cut.gguf", "--resume") == 0
    assert run(tiny, "Q4_0", "-o", tmp_path / "calm.gguf") == 0
    assert (tmp_path / "cut.gguf").read_bytes() == (tmp_path / "calm.gguf").read_bytes()


def test_a_ladder_gives_the_files_that_single_runs_give(tiny, tmp_path):
    assert run(tiny, "Q4_K_M,IQ4_XS,Q4_0,BF16", "-o", tmp_path / "ladder") == 0
    for type in ("Q4_K_M", "IQ4_XS", "Q4_0", "BF16"):
        (rung,) = (tmp_path / "ladder").glob(f"*-{type}.gguf")
        assert run(tiny, type, "-o", tmp_path / f"{type}.gguf") == 0
        assert (tmp_path / f"{type}.gguf").read_bytes() == rung.read_bytes()


def test_a_ladder_reads_each_row_once(tiny, tmp_path, monkeypatch):
    rows: list[tuple[str, int]] = []
    real = Checkpoint.rows

    def counted(self: Checkpoint, name: str, start: int, stop: int):
        rows.append((name, start))
        return real(self, name, start, stop)

    monkeypatch.setattr(Checkpoint, "rows", counted)
    assert run(tiny, "Q4_K_M,Q8_0,Q4_0", "-o", tmp_path) == 0
    assert len(rows) == len(set(rows)) > 20


def test_a_gguf_file_is_a_source_like_any_other(tiny, tmp_path):
    assert run(tiny, "BF16,Q4_K_M", "-o", tmp_path / "first") == 0
    (whole,) = (tmp_path / "first").glob("*-BF16.gguf")
    (direct,) = (tmp_path / "first").glob("*-Q4_K_M.gguf")
    assert run(whole, "Q4_K_M", "-o", tmp_path / "second.gguf") == 0
    assert fixtures.tensors(tmp_path / "second.gguf") == fixtures.tensors(direct)


def test_overrides_are_those_of_llama_quantize(tiny, tmp_path):
    overrides = [("ffn_up", "Q6_K"), (r"blk\.1\..*_output", "Q8_0")]
    (whole,) = fixtures.make(tiny, tmp_path, ["BF16"]).values()
    flags = [word for pattern, type in overrides for word in ("--tensor-type", f"{pattern}={type}")]
    assert run(tiny, "Q4_K_M", "-o", tmp_path / "ours.gguf", *flags) == 0
    theirs = fixtures.llama_quantize(whole, tmp_path / "theirs.gguf", "Q4_K_M", overrides=overrides)
    assert fixtures.tensors(tmp_path / "ours.gguf") == fixtures.tensors(theirs)


def test_a_dry_run_writes_nothing_and_tells_the_size_to_the_byte(tmp_path, capsys):
    source = checkpoints.write_checkpoint(tmp_path / "Odd-R1", "llama", hidden=288, forward=320, heads=3, kv_heads=1)
    assert run(source, "Q4_K_M", "-o", tmp_path / "x.gguf", "--dry-run") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["Odd-R1"]
    said = capsys.readouterr().out
    assert "Q4_K -> Q5_0 in" in said and "rows of 288" in said and "bits per weight" in said and "memory" in said
    assert run(source, "Q4_K_M", "-o", tmp_path / "x.gguf") == 0
    assert size_text((tmp_path / "x.gguf").stat().st_size) in said


def test_llama_cpp_reads_the_file_and_goes_on_with_a_text(tiny, tmp_path, open_llama):
    assert run(tiny, "Q4_K_M", "-o", tmp_path / "served.gguf") == 0
    backend = open_llama(tmp_path / "served.gguf", context=64)
    ids = backend.vocabulary.encode("<｜User｜>hello")
    assert len(ids) == 2 and backend.vocabulary.bos_id == 264
    backend.add(GenerationRequest("a", tuple(ids), max_tokens=3))
    assert sum(len(backend.step()) for _ in range(5)) >= 1


def price_list(source: Path, path: Path) -> Path:
    """What each matrix costs, made up: a bit halves the loss, and values are worth ten times as much."""
    weights = from_checkpoint(open_checkpoint(source))
    costs = {
        tensor.name: {
            type: sensitivity.Cost(
                tensor.size * 2.0 ** -bits_per_weight(type) * (10 if "attn_v" in tensor.name else 1) * 1e-6,
                2.0 ** -bits_per_weight(type),
                tensor.matrix[0] * row_bytes(type, tensor.matrix[1]),
            )
            for type in ("IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
        }
        for tensor in weights.tensors
        if is_quantizable(tensor)
    }
    sensitivity.write(path, sensitivity.Sensitivity(costs, source.name, "made up", 1))
    return path


def test_a_mix_keeps_to_its_size_and_spends_it_where_it_is_worth_most(tiny, tmp_path, capsys):
    prices = price_list(tiny, tmp_path / "prices.json")
    assert run(tiny, "--target-bpw", "5.2", "--sensitivity", prices, "-o", tmp_path / "mix.gguf") == 0
    header = read_header(tmp_path / "mix.gguf")
    assert 5.0 < header.weights_bytes * 8 / header.parameters <= 5.2
    types = {tensor.name: tensor.type for tensor in header.tensors}
    bits = {part: bits_per_weight(types[f"blk.0.{part}.weight"]) for part in ("attn_v", "ffn_up")}
    assert bits["attn_v"] > bits["ffn_up"]
    assert "predicted" in capsys.readouterr().err
    assert run(tiny, "--target-size", "1.2M", "--sensitivity", prices, "-o", tmp_path / "size.gguf") == 0
    assert 1_150_000 < (tmp_path / "size.gguf").stat().st_size <= 1_200_000


def test_the_price_list_of_another_model_is_refused(tiny, tmp_path, capsys):
    other = checkpoints.write_checkpoint(tmp_path / "Other", "qwen2", blocks=1)
    prices = price_list(other, tmp_path / "prices.json")
    assert run(tiny, "--target-bpw", "5", "--sensitivity", prices, "-o", tmp_path / "mix.gguf") == 2
    assert "made for another model" in capsys.readouterr().err and not (tmp_path / "mix.gguf").exists()


def test_the_file_tells_what_it_was_made_from_and_how(tiny, tmp_path):
    (whole,) = fixtures.make(tiny, tmp_path, ["BF16"]).values()
    values = fixtures.importance_for(whole)
    importance.write(tmp_path / "i.gguf", importance.Importance(values, dict.fromkeys(values, 512), ("text",), 3, 512))
    flags = ("--imatrix", tmp_path / "i.gguf", "--tensor-type", "ffn_up=Q6_K")
    assert run(tiny, "Q4_0", "-o", tmp_path / "out.gguf", *flags) == 0
    said = read_header(tmp_path / "out.gguf").metadata
    sha256 = hashlib.sha256((tiny / "model.safetensors").read_bytes()).hexdigest()
    assert said["stillhouse.source.sha256"] == (sha256,) and said["stillhouse.source.name"] == "Tiny-R1"
    assert json.loads(str(said["stillhouse.recipe"]))["overrides"] == [["ffn_up", "Q6_K"]]
    assert said["quantize.imatrix.file"] == "i.gguf" and said["quantize.imatrix.chunks_count"] == 3
    assert json.loads(str(said["stillhouse.quality"])) == {}
    assert sha256 in (tmp_path / "out.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_file_that_is_worse_than_asked_for_is_not_delivered(tiny, tmp_path, capsys):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    assert run(tiny, "Q4_0,Q8_0", "-o", tmp_path, "--max-kld", "0.01") == 5
    (good,) = tmp_path.glob("*.gguf")
    assert good.name.endswith("-Q8_0.gguf") and not list(tmp_path.glob("*.partial"))
    quality = json.loads(str(read_header(good).metadata["stillhouse.quality"]))
    assert all(0 < found["kld_mean"] < 0.01 for found in quality.values()) and len(quality) == 2
    assert "more than 0.01" in capsys.readouterr().err


@pytest.mark.slow
def test_kill_9_at_random_points_and_resume_give_the_same_file(tmp_path):
    source = checkpoints.write_checkpoint(tmp_path / "Killed-R1", blocks=8, hidden=512, forward=2048)
    command = [sys.executable, "-m", "stillhouse", "quantize", str(source), "Q4_K_M", "--threads", "1", "-o"]
    started = time.monotonic()
    subprocess.run([*command, str(tmp_path / "calm.gguf")], check=True, capture_output=True)
    whole, random, killed = time.monotonic() - started, Random(0), 0
    while killed < 20:
        with subprocess.Popen(
            [*command, str(tmp_path / "hurt.gguf"), "--resume"], stderr=subprocess.DEVNULL
        ) as process:
            try:
                process.wait(random.uniform(0.2, 1) * whole)
            except subprocess.TimeoutExpired:
                process.kill()
                killed += 1
                if not (tmp_path / "hurt.gguf").exists():
                    continue
        assert (tmp_path / "hurt.gguf").read_bytes() == (tmp_path / "calm.gguf").read_bytes()
        (tmp_path / "hurt.gguf").unlink()
