"""Models that only read: llama.cpp and PyTorch say the same of a text, and their states are worth their logits."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from stillhouse.backends.base import LoadOptions
from stillhouse.backends.open import open_scorer
from stillhouse.quantize import card, cli_measure
from stillhouse.quantize.kld import KldFile, log_softmax
from stillhouse.quantize.weights import from_gguf
from stillhouse.r1.errors import UserError

ONE = LoadOptions(threads=1, gpu_layers=0)


def _beside(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random checkpoint, and files made of it."""
    folder = tmp_path_factory.mktemp("scorers")
    checkpoint = _beside("tiny_checkpoint").write_checkpoint(folder / "checkpoint", "llama", dtype="F32", blocks=2)
    made = _beside("quantize_fixtures").make(checkpoint, folder, ["F32", "Q8_0", "Q4_0"])
    return {"checkpoint": checkpoint / "model.safetensors", **made}


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return np.random.default_rng(0).integers(0, 200, 700).tolist()


@pytest.fixture
def scorer(models: dict[str, Path]) -> Iterator[object]:
    opened = open_scorer([models["F32"]], ONE, context=1024)
    yield opened
    opened.close()


def test_states_times_the_output_matrix_are_the_logits(scorer, models, ids):
    logits = np.concatenate(list(scorer.logits(ids, 350)))
    head = from_gguf(models["F32"])["output.weight"]
    assert logits.shape == (350, scorer.vocabulary_size)
    assert np.allclose(scorer.states(ids, 350) @ head.read(0, head.matrix[0]).T, logits, atol=1e-3)


def test_every_text_starts_from_an_empty_cache(scorer, ids):
    first = np.concatenate(list(scorer.logits(ids[:40], 10)))
    list(scorer.logits(ids[40:80], 0))
    assert np.array_equal(first, np.concatenate(list(scorer.logits(ids[:40], 10))))


def test_pytorch_says_what_llama_cpp_says(scorer, models, ids):
    pytest.importorskip("torch", reason='needs PyTorch: pip install "stillhouse[torch]"')
    pytest.importorskip("transformers", reason='needs transformers: pip install "stillhouse[torch]"')
    other = open_scorer([models["checkpoint"]], ONE, context=1024)
    a = log_softmax(np.concatenate(list(scorer.logits(ids[:100], 50))))
    b = log_softmax(np.concatenate(list(other.logits(ids[:100], 50))))
    assert other.vocabulary_size == scorer.vocabulary_size
    assert other.encode("hello the 12</think>") == scorer.encode("hello the 12</think>")
    assert other.bos_id == scorer.bos_id
    assert (np.exp(b) * (b - a)).sum(-1).mean() < 1e-4  # llama.cpp's cache has 16 bits
    assert np.allclose(other.states(ids[:100], 50), scorer.states(ids[:100], 50), atol=0.05)


def run(*arguments: object) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert cli_measure.run("measure", [str(a) for a in (*arguments, "--threads", 1, "--offline")]) == 0
    return out.getvalue()


SHORT = ("--context", 64, "--chunks", 4)


def test_the_command_compares_a_file_with_what_it_was_made_from(models, tmp_path):
    pytest.importorskip("torch", reason='needs PyTorch: pip install "stillhouse[torch]"')
    pytest.importorskip("transformers", reason='needs transformers: pip install "stillhouse[torch]"')
    states = ("--states", tmp_path / "base.npz")
    by_checkpoint = json.loads(run(models["Q4_0"], "--against", models["checkpoint"].parent, *SHORT, *states, "--json"))
    again = json.loads(run(models["Q4_0"], "--against", models["checkpoint"].parent, *SHORT, *states, "--json"))
    by_file = json.loads(run(models["Q4_0"], "--against", models["F32"], *SHORT, "--json"))
    better = json.loads(run(models["Q8_0"], "--against", models["F32"], *SHORT, "--json"))

    assert set(by_file["texts"]) == {"reasoning", "general"}
    assert again == by_checkpoint
    for name in by_file["texts"]:
        q4, other, q8 = (found["texts"][name] for found in (by_file, by_checkpoint, better))
        assert q4["tokens"] == 4 * 31
        assert q4["kl"]["value"] == pytest.approx(other["kl"]["value"], rel=0.02)
        assert 0 < q8["kl"]["value"] < q4["kl"]["value"] / 5
    text = run(models["Q4_0"], "--against", models["F32"], *SHORT)
    assert re.search(r"KL divergence, mean +\d", text)
    assert [line.split()[-2:] for line in text.splitlines() if line.startswith("  ")] == [["reasoning", "general"]]


def test_states_of_another_base_are_refused(models, tmp_path):
    run(models["Q8_0"], "--against", models["F32"], *SHORT, "--states", tmp_path / "s.npz")
    with pytest.raises(UserError, match="was made from"):
        run(models["Q8_0"], "--against", models["Q8_0"], *SHORT, "--states", tmp_path / "s.npz")


def test_a_file_that_lost_too_much_ends_with_5(models):
    with pytest.raises(UserError, match="more than 1e-06") as caught:
        run(models["Q4_0"], "--against", models["F32"], *SHORT, "--max-kld", 1e-6)
    assert caught.value.exit_code == 5


def test_the_calibration_text_is_refused(models, tmp_path):
    pack = Path(card.__file__).with_name("texts") / "calibration.jsonl"
    with pytest.raises(UserError, match="used for calibration"):
        run(models["Q4_0"], "--against", models["F32"], "--reasoning", pack)
    mine = tmp_path / "mine.jsonl"
    mine.write_text('{"text": "all mine"}')
    with pytest.raises(UserError, match="used for calibration"):
        run(models["Q4_0"], "--against", models["F32"], "--text", mine, "--calibration", mine)


@pytest.mark.parametrize(
    "parser", [cli_measure.calibrate_parser, cli_measure.measure_parser], ids=["calibrate", "measure"]
)
def test_the_page_names_every_flag(parser):
    page = (Path(__file__).parents[1] / "docs" / "measuring.md").read_text(encoding="utf-8")
    for action in parser()._actions:
        assert action.dest == "help" or all(f"`{flag}" in page for flag in action.option_strings), action.dest


@pytest.mark.parametrize("flags", [(), ("--against", "a", "--kld", "b")], ids=["nothing", "two things"])
def test_one_thing_to_compare_with(flags):
    with pytest.raises(UserError, match="compared with"):
        run("file.gguf", *flags)


def tool(name: str) -> str:
    build = Path(os.environ.get("STILLHOUSE_LLAMA_CPP", "/nowhere")) / "build" / "bin" / name
    found = str(build) if build.is_file() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not on PATH, and STILLHOUSE_LLAMA_CPP names no build")
    return found


def perplexity(*arguments: object, until: str) -> str:
    """What llama-perplexity prints; again where its log ended before its last lines, as it does now and then."""
    words = [tool("llama-perplexity"), *map(str, arguments), "-t", "1", "-c", "64", "-b", "64", "-ub", "64"]
    for _ in range(5):
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr[-2000:]
        if until in done.stdout + done.stderr:
            break
    return done.stdout + done.stderr


@pytest.mark.slow
def test_llama_perplexity_and_we_measure_the_same(models, tmp_path):
    """Both ways: our numbers from its file, and its numbers from ours.

    The two builds may multiply with other kernels, so single positions differ by a hundredth or two, means by less.
    """

    def base(name: str) -> tuple[object, ...]:
        return ("--kl-divergence-base", tmp_path / f"{name}.kld", "--kl-divergence")

    text = tmp_path / "text.txt"
    text.write_text("hello the hello in the 12 all the tin hellos. " * 30)
    perplexity("-m", models["F32"], "-f", text, "--kl-divergence-base", tmp_path / "theirs.kld", until="")
    printed = perplexity("-m", models["Q4_0"], *base("theirs"), until="Same top p:")
    ours = json.loads(run(models["Q4_0"], "--kld", tmp_path / "theirs.kld", "--json"))["texts"]["theirs"]

    def shown(words: str) -> float:
        found = re.search(re.escape(words) + r"\s*:\s*(-?[\d.]+)", printed)
        assert found, printed
        return float(found[1])

    assert ours["tokens"] >= 100
    assert ours["kl"]["value"] == pytest.approx(shown("Mean    KLD"), rel=1e-3)
    assert ours["kl_max"] == pytest.approx(shown("Maximum KLD"), rel=0.05)
    assert ours["kl_percentiles"]["99"] == pytest.approx(shown("99.0%   KLD"), rel=0.05)
    assert ours["kl_percentiles"]["50"] == pytest.approx(shown("Median  KLD"), rel=0.05)
    assert ours["ppl"]["value"] == pytest.approx(shown("Mean PPL(Q)"), rel=1e-3)
    assert ours["ppl_base"]["value"] == pytest.approx(shown("Mean PPL(base)"), rel=1e-4)
    assert ours["ln_ppl_ratio"]["value"] == pytest.approx(shown("Mean ln(PPL(Q)/PPL(base))"), abs=2e-3)
    assert 100 * ours["dp_rms"]["value"] == pytest.approx(shown("RMS Δp"), abs=0.02)
    assert 100 * ours["same_top"]["value"] == pytest.approx(shown("Same top p"), abs=1.5)

    run(models["F32"], "--write-kld", tmp_path / "ours.kld", "--text", text, "--context", 64, "--chunks", 99)
    a, b = KldFile(tmp_path / "ours.kld"), KldFile(tmp_path / "theirs.kld")
    assert a.vocabulary == b.vocabulary
    assert np.array_equal(a.chunks, b.chunks)
    printed = perplexity("-m", models["Q4_0"], *base("ours"), until="Same top p:")
    again = json.loads(run(models["Q4_0"], "--kld", tmp_path / "ours.kld", "--json"))["texts"]["ours"]
    assert again["kl"]["value"] == pytest.approx(shown("Mean    KLD"), rel=1e-3)
