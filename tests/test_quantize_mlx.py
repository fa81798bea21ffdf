"""MLX's 4-bit folders: less error in the same bytes, and stock mlx-lm reads them as we do."""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from stillhouse.__main__ import main
from stillhouse.quantize import affine, folders, mlxlm
from stillhouse.quantize.affine import Grid
from stillhouse.quantize.errors import NoRoom, SourceInvalid
from stillhouse.quantize.job import Options
from stillhouse.quantize.source import open_checkpoint
from stillhouse.r1.errors import UserError

needs_mlx = pytest.mark.skipif(
    find_spec("mlx_lm") is None, reason='MLX is not installed: pip install "stillhouse[mlx]"'
)


@pytest.fixture(scope="module")
def tiny() -> ModuleType:
    """`tiny_checkpoint.py`."""
    spec = importlib.util.spec_from_file_location("tiny_checkpoint", Path(__file__).with_name("tiny_checkpoint.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault("tiny_checkpoint", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def source(tiny: ModuleType, tmp_path: Path) -> Path:
    return tiny.write_checkpoint(tmp_path / "Tiny", shards=2)


def make(source: Path, to: Path, type: str = "mlx-4bit", **options: Any) -> Path:
    folders.make_folders(open_checkpoint(source), [type], Options(str(source), (type,), output=to, **options))
    return to


# Blocks


ROWS = (np.random.default_rng(0).standard_normal((40, 384)) * 0.02).astype(np.float32)
GRIDS = [Grid(bits, group) for bits in affine.BITS for group in (32, 64, 128)]


@needs_mlx
@pytest.mark.parametrize("grid", GRIDS, ids=[grid.name for grid in GRIDS])
def test_mlx_reads_what_we_read_and_we_lose_less_than_mlx(grid):
    import mlx.core as mx

    told = {"group_size": grid.group, "bits": grid.bits}
    blocks = affine.quantize(ROWS, grid)
    ours = affine.dequantize(blocks, grid)
    arrays = [mx.array(blocks.packed), *(mx.array(half).view(mx.bfloat16) for half in blocks[1:])]
    assert sum(array.nbytes for array in arrays) == grid.size(*ROWS.shape)

    def read(arrays: Any) -> Any:  # in 32 bits: in 16, MLX rounds every value that it reads
        packed, *halves = arrays
        return np.array(mx.dequantize(packed, *(half.astype(mx.float32) for half in halves), **told))

    np.testing.assert_allclose(read(arrays), ours, atol=1e-6)
    stock = read(mx.quantize(mx.array(ROWS).astype(mx.bfloat16), **told))
    gained = 1 - ((ours - ROWS) ** 2).sum() / ((stock - ROWS) ** 2).sum()
    assert gained > (0.15 if grid.bits <= 4 and grid.group <= 64 else 0.05)


EXTREMES = {
    "zeros": np.zeros((2, 64)),
    "all the same": np.full((2, 64), 3.7),
    "one that is large": np.eye(2, 64) * 1e4,
    "tiny": np.random.default_rng(1).standard_normal((2, 64)) * 1e-30,
    "huge": np.random.default_rng(1).standard_normal((2, 64)) * 1e30,
    "two values": np.sign(np.random.default_rng(1).standard_normal((2, 64))),
    "far from zero": 1000 + np.random.default_rng(1).standard_normal((2, 64)),
}


@pytest.mark.parametrize("rows", EXTREMES.values(), ids=EXTREMES)
def test_extreme_groups_come_back_as_near_as_the_grid_allows(rows):
    rows = rows.astype(np.float32)
    for grid in (Grid(4, 64), Grid(8, 32)):
        read = affine.dequantize(affine.quantize(rows, grid), grid)
        assert np.isfinite(read).all()
        groups = rows.reshape(-1, grid.group)
        step = (groups.max(1) - groups.min(1)) / (2**grid.bits - 1)
        allowed = np.repeat(step * 2 + np.abs(groups).max(1) * 2**-7, grid.group).reshape(rows.shape)
        assert (np.abs(read - rows) <= allowed).all()


def test_what_is_important_loses_less():
    importance = np.ones(384, np.float32)
    importance[::8] = 100
    grid = Grid(3, 64)
    plain, weighed = (affine.dequantize(affine.quantize(ROWS, grid, weights), grid) for weights in (None, importance))
    errors = [(((read - ROWS) ** 2) * importance).sum() for read in (plain, weighed)]
    assert errors[1] < 0.8 * errors[0]
    same = affine.dequantize(affine.quantize(ROWS, grid, np.zeros(384, np.float32)), grid)
    np.testing.assert_allclose(same, plain, atol=1e-3)


def test_bfloat16_is_rounded_to_the_nearest():
    values = np.array([1.0, 1.00390625, 1.01171875, -3.1415927, 1e-40, 65504.0], np.float32)
    assert affine.widen(affine.narrow(values)).tolist()[:4] == [1.0, 1.0, 1.015625, -3.140625]


# Folders


@needs_mlx
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_stock_mlx_lm_gives_the_logits_of_our_own_reading(tiny, tmp_path, family, tied):
    import mlx.core as mx
    from mlx_lm.utils import load_model

    source = tiny.write_checkpoint(tmp_path / "Tiny", family, tied=tied)
    made = make(source, tmp_path / "made")
    stock, config = load_model(made)
    assert config["quantization"]["bits"] == 4
    plain, _ = load_model(source)
    weights = dict(mx.load(str(made / "model.safetensors")))
    read = {}
    for name, array in weights.items():
        if name.endswith((".scales", ".biases")):
            continue
        stem = name.removesuffix(".weight")
        if f"{stem}.scales" in weights:
            halves = [np.array(weights[f"{stem}.{kind}"].view(mx.uint16)) for kind in ("scales", "biases")]
            array = mx.array(affine.dequantize(affine.Blocks(np.array(array), *halves), Grid(4, 64)))
        read[name] = array.astype(mx.float32)
    plain.load_weights(list(read.items()))
    ids = mx.array([list(range(20))])
    ours = np.array(plain(ids))
    stock.set_dtype(mx.float32)
    np.testing.assert_allclose(np.array(stock(ids)), ours, atol=2e-3 * np.abs(ours).max())


@needs_mlx
def test_a_folder_loses_less_than_mlx_lms_own_at_equal_bytes(source, tmp_path):
    import mlx.core as mx
    from mlx_lm.convert import convert

    convert(str(source), str(tmp_path / "stock"), quantize=True, q_bits=4, q_group_size=64)
    make(source, tmp_path / "ours")
    errors, sizes = {}, {}
    original = {}
    for path in source.glob("*.safetensors"):
        original |= dict(mx.load(str(path)))
    for name in ("stock", "ours"):
        weights = dict(mx.load(str(tmp_path / name / "model.safetensors")))
        sizes[name] = sum(array.nbytes for array in weights.values())
        errors[name] = 0.0
        for key in weights:
            if key.endswith(".scales"):
                stem = key.removesuffix(".scales")
                told = (weights[f"{stem}.weight"], weights[key], weights[f"{stem}.biases"])
                apart = mx.dequantize(*told, group_size=64, bits=4).astype(mx.float32) - original[f"{stem}.weight"]
                errors[name] += float((apart * apart).sum())
    assert sizes["ours"] == sizes["stock"]
    assert errors["ours"] < 0.85 * errors["stock"]


@needs_mlx
def test_rows_that_no_group_of_64_fits_get_32_or_stay(tiny, tmp_path):
    from mlx_lm.utils import load_model

    odd = make(tiny.write_checkpoint(tmp_path / "Odd", hidden=96, forward=176), tmp_path / "odd")
    told = json.loads((odd / "config.json").read_text())["quantization"]
    assert (told["group_size"], told["bits"]) == (64, 4)
    assert told["model.layers.0.self_attn.q_proj"] == {"group_size": 32, "bits": 4}
    assert told["model.layers.0.mlp.down_proj"] is False
    model, _ = load_model(odd)
    import mlx.core as mx

    assert np.isfinite(np.array(model(mx.array([[1, 2, 3]])).astype(mx.float32))).all()


def test_a_folder_has_all_that_a_server_needs(source, tmp_path):
    made = make(source, tmp_path / "made")
    assert {path.name for path in made.iterdir()} == {
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        *(path.name for path in source.iterdir() if path.suffix == ".json" and "model." not in path.name),
    }
    assert not (tmp_path / "made.partial").exists()


def test_large_models_are_written_in_shards(source, tmp_path, monkeypatch):
    whole = make(source, tmp_path / "whole", threads=2)
    monkeypatch.setattr(mlxlm, "_SHARD_BYTES", 200_000)
    monkeypatch.setattr(mlxlm, "_SLAB_WEIGHTS", 1000)
    parts = make(source, tmp_path / "parts", threads=2)
    index = json.loads((parts / "model.safetensors.index.json").read_text())["weight_map"]
    files = sorted(path.name for path in parts.glob("*.safetensors"))
    assert len(files) > 1 and set(index.values()) == set(files)
    assert tensors_of(parts) == tensors_of(whole)


def tensors_of(folder: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        assert header.pop("__metadata__") == {"format": "mlx"}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            found[name] = data[8 + length + begin : 8 + length + end]
    return found


@needs_mlx
def test_a_mix_gives_every_layer_its_own_grid(source, tmp_path):
    from mlx_lm.utils import load_model

    checkpoint = open_checkpoint(source)
    names = [name for name, t in checkpoint.tensors.items() if mlxlm.is_quantizable(name, t.shape)]
    grids = {name: Grid((3, 4, 5, 6, 8)[n % 5], (32, 64)[n % 2]) for n, name in enumerate(sorted(names))}
    plan = mlxlm.plan_of(checkpoint, grids, Grid(4, 64))
    folder = tmp_path / "mix"
    folder.mkdir()
    mlxlm.write(checkpoint, plan, folder, Options(str(source)))
    model, _ = load_model(folder)
    layers = {name: (layer.bits, layer.group_size) for name, layer in model.named_modules() if hasattr(layer, "bits")}
    assert layers == {name.removesuffix(".weight"): (grid.bits, grid.group) for name, grid in grids.items()}


@pytest.mark.slow
def test_a_mix_at_a_budget_keeps_to_it(source, tmp_path):
    pytest.importorskip("torch")
    made = make(source, tmp_path / "mix", "mlx", target_bits=5.0, calibration="builtin")
    told = json.loads((made / "config.json").read_text())["quantization"]
    assert len({str(grid) for grid in told.values()}) > 3
    checkpoint = open_checkpoint(source)
    weights = sum(t.size // 2 for t in checkpoint.tensors.values())
    assert 4.8 <= 8 * sum(map(len, tensors_of(made).values())) / weights <= 5.0


# What goes wrong

REFUSALS = {
    "a type that does not exist": (["mlx-7bit"], {}, "there is no type 'mlx-7bit'"),
    "a mix without a size": (["mlx"], {}, "the type mlx is a mix for a size"),
    "a mix without prices": (["mlx"], {"target_bits": 5.0}, "needs to know what each matrix is worth"),
}


@pytest.mark.parametrize(("types", "options", "message"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_made_is_told(source, tmp_path, types, options, message):
    with pytest.raises(UserError, match=message):
        folders.make_folders(open_checkpoint(source), types, Options(str(source), output=tmp_path / "made", **options))
    assert not (tmp_path / "made").exists()


def test_a_folder_that_is_there_is_left_alone_unless_forced(source, tmp_path):
    made = make(source, tmp_path / "made")
    (made / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        make(source, made)
    assert (made / "mine.txt").exists()
    make(source, made, force=True)
    assert not (made / "mine.txt").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"Tiny", "made"}


def test_values_that_are_no_numbers_leave_nothing_behind(source, tmp_path):
    path = next(source.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-2:] = b"\xc0\x7f"  # a NaN in BF16
    path.write_bytes(data)
    with pytest.raises(SourceInvalid, match="values that are no finite numbers"):
        make(source, tmp_path / "made")
    assert {path.name for path in tmp_path.iterdir()} == {"Tiny"}


def test_too_little_room_is_told_before_the_start(source, tmp_path, monkeypatch):
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(NoRoom, match=r"needs .*, and 1.00 kB are free"):
        make(source, tmp_path / "made")
    assert not (tmp_path / "made.partial").exists()


def test_the_command_makes_a_folder_and_prints_it(source, tmp_path, capsys):
    made = tmp_path / "made"
    assert main(["quantize", str(source), "mlx-4bit", "--output", str(made), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{made}: ") and "bits per weight" in said and not made.exists()
    assert main(["quantize", str(source), "mlx-4bit", "--output", str(made), "--threads", "1"]) == 0
    assert capsys.readouterr().out == f"{made}\n"
    assert (made / "model.safetensors").is_file()
