"""The importance matrix: the same from PyTorch and from llama.cpp, in files that both read, and only for its model."""

from __future__ import annotations

import importlib.util
import os
import shutil
import struct
import subprocess
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from stillhouse.quantize import importance
from stillhouse.quantize.importance import Importance, fit
from stillhouse.r1.errors import UserError


def _beside(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


QUERIES, DOWN = "blk.0.attn_q.weight", "blk.0.ffn_down.weight"
SMALL = Importance(
    {QUERIES: np.array([1, 2, 3], np.float32), DOWN: np.array([0.5, 0], np.float32)},
    {QUERIES: 40, DOWN: 40},
    ("a text", "另一个"),
    chunks=5,
    chunk_size=8,
)


def same(a: Importance, b: Importance) -> bool:
    return a.values.keys() == b.values.keys() and all(np.allclose(a.values[name], b.values[name]) for name in a.values)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_pytorch_and_llama_cpp_see_the_same(family, tmp_path):
    """Less than 2 % apart, median of the matrices; llama.cpp's KV cache has 16 bits, so not nothing."""
    pytest.importorskip("torch", reason='needs PyTorch: pip install "stillhouse[torch]"')
    pytest.importorskip("transformers", reason='needs transformers: pip install "stillhouse[torch]"')
    from stillhouse.quantize import gguf_importance, pytorch_importance
    from stillhouse.quantize.pytorch_layers import Decoder
    from stillhouse.quantize.source import open_checkpoint

    folder = _beside("tiny_checkpoint").write_checkpoint(tmp_path / "checkpoint", family, dtype="F32", blocks=2)
    path = _beside("quantize_fixtures").make(folder, tmp_path, ["F32"])["F32"]
    chunks = np.random.default_rng(0).integers(0, 200, (3, 64), np.int32)

    ours = pytorch_importance.collect(Decoder(open_checkpoint(folder)), chunks, ("random",))
    theirs = gguf_importance.collect(path, chunks, ("random",), threads=1)

    assert len(ours.values) == 2 * 7
    assert ours.values.keys() == theirs.values.keys(), "the last layer's too: nothing is skipped"
    assert set(ours.counts.values()) == set(theirs.counts.values()) == {3 * 64}
    apart = [np.abs(ours.values[n] - theirs.values[n]).sum() / ours.values[n].sum() for n in ours.values]
    assert np.median(apart) < 0.02
    assert max(apart) < 0.05


def test_a_matrix_is_read_as_it_was_written(tmp_path):
    importance.write(tmp_path / "imatrix.gguf", SMALL)
    found = importance.read(tmp_path / "imatrix.gguf")
    assert same(found, SMALL)
    assert (found.counts, found.datasets, found.chunks, found.chunk_size) == (SMALL.counts, SMALL.datasets, 5, 8)
    assert [path.name for path in tmp_path.iterdir()] == ["imatrix.gguf"]


def test_the_keys_are_those_that_llama_cpp_asks_for(tmp_path):
    import gguf

    importance.write(tmp_path / "imatrix.gguf", SMALL)
    reader = gguf.GGUFReader(tmp_path / "imatrix.gguf")
    assert reader.fields["general.type"].contents() == "imatrix"
    assert {"imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"} <= reader.fields.keys()
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert tensors[QUERIES + ".in_sum2"].data.tolist() == [[40, 80, 120]]
    assert tensors[QUERIES + ".counts"].data.tolist() == [[40]]


@pytest.mark.slow
def test_llama_quantize_makes_the_same_of_it(tmp_path):
    """Its own program, given our imatrix.gguf, writes the tensors that we write."""
    import gguf

    build = Path(os.environ.get("STILLHOUSE_LLAMA_CPP", "/nowhere")) / "build" / "bin" / "llama-quantize"
    tool = str(build) if build.is_file() else shutil.which("llama-quantize")
    if tool is None:
        pytest.skip("llama-quantize is not on PATH, and STILLHOUSE_LLAMA_CPP names no build")
    fixtures = _beside("quantize_fixtures")
    folder = _beside("tiny_checkpoint").write_checkpoint(tmp_path / "checkpoint", "qwen2", dtype="F32", blocks=2)
    full = fixtures.make(folder, tmp_path, ["F32"])["F32"]
    columns = {
        t.name: int(t.shape[0]) for t in gguf.GGUFReader(full).tensors if t.name.startswith("blk.") and len(t.shape) > 1
    }
    random = np.random.default_rng(0)
    values = {name: random.exponential(1, count).astype(np.float32) for name, count in columns.items()}
    importance.write(tmp_path / "i.gguf", Importance(values, dict.fromkeys(columns, 512), ("a text",), 1, 512))

    words = [tool, "--imatrix", tmp_path / "i.gguf", full, tmp_path / "theirs.gguf", "Q4_K_M", "1"]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    ours = fixtures.make(folder, tmp_path, ["Q4_K_M"], importance.read(tmp_path / "i.gguf").values)["Q4_K_M"]
    plain = fixtures.make(folder, tmp_path / "checkpoint", ["Q4_K_M"])["Q4_K_M"]

    a, b, c = (
        {t.name: t.data.tobytes() for t in gguf.GGUFReader(p).tensors} for p in (ours, tmp_path / "theirs.gguf", plain)
    )
    assert a == b
    assert a != c, "the matrix makes a difference"


def dat(entries: list[tuple[str, int, list[float]]], tail: bytes = b"") -> bytes:
    data = struct.pack("<i", len(entries))
    for name, calls, values in entries:
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(values))
        data += struct.pack(f"<{len(values)}f", *values)
    return data + tail


@pytest.mark.parametrize("tail", [b"", struct.pack("<ii", 7, 4) + b"text"], ids=["without a tail", "with a tail"])
def test_the_older_format_is_read(tail, tmp_path):
    (tmp_path / "old.dat").write_bytes(dat([(QUERIES, 4, [8.0, 2.0]), (DOWN, 2, [1.0])], tail))
    found = importance.read(tmp_path / "old.dat")
    assert {name: values.tolist() for name, values in found.values.items()} == {QUERIES: [2.0, 0.5], DOWN: [0.5]}
    assert (found.chunks, found.datasets) == ((7, ("text",)) if tail else (0, ()))


def test_entries_that_never_saw_a_token_are_left_out(tmp_path):
    """llama.cpp's tools take 1 for every column of them, as if they knew; here the tensor counts as missing."""
    (tmp_path / "old.dat").write_bytes(dat([(QUERIES, 4, [8.0, 2.0]), (DOWN, 0, [0.0])]))
    assert set(importance.read(tmp_path / "old.dat").values) == {QUERIES}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not an importance matrix"),
        (struct.pack("<i", -3), "not an importance matrix"),
        (dat([(QUERIES, 4, [8.0, 2.0])])[:-3], "not an importance matrix"),
        (b"GGUF" + b"\0" * 40, "not an importance matrix"),
        (dat([(QUERIES, 4, [8.0, float("nan")])]), "impossible numbers"),
        (dat([(QUERIES, 4, [8.0, -1.0])]), "impossible numbers"),
    ],
    ids=["empty", "a negative count", "cut short", "a broken GGUF", "not a number", "a negative square"],
)
def test_what_is_no_matrix_is_refused(data, words, tmp_path):
    (tmp_path / "bad").write_bytes(data)
    with pytest.raises(UserError, match=words):
        importance.read(tmp_path / "bad")


def test_tensors_without_data_are_told():
    columns = {QUERIES: 3, DOWN: 2, "blk.0.attn_k.weight": 3}
    found = fit(SMALL, columns)
    assert found.missing == ("blk.0.attn_k.weight",)
    assert found.dead == (DOWN,)
    assert not found.unknown
    assert found


def test_a_matrix_that_fits_has_nothing_to_tell():
    assert not fit(Importance({QUERIES: np.ones(3, np.float32)}, {QUERIES: 1}), {QUERIES: 3})


@pytest.mark.parametrize(
    "columns",
    [{QUERIES: 4, DOWN: 2}, {"blk.0.other.weight": 3}, {QUERIES: 3} | {f"blk.{n}.attn_v.weight": 3 for n in range(9)}],
    ids=["other widths", "other names", "many more layers"],
)
def test_another_models_matrix_is_refused(columns):
    with pytest.raises(UserError, match="importance matrix"):
        fit(SMALL, columns)
