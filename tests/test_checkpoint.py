"""What a checkpoint folder must be, and what one gets that is not: a line that says what is wrong and what to do."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillhouse.backends.base import LoadOptions
from stillhouse.backends.checkpoint import Checkpoint, Quantization, read_checkpoint
from stillhouse.r1.errors import BadModelFile, UserError
from stillhouse.r1.safetensors import read_safetensors


@pytest.fixture
def folder(random_checkpoint, tmp_path) -> Path:
    return random_checkpoint.write_checkpoint(tmp_path / "tiny", random_checkpoint.random_model("qwen2"), shards=3)


def read(folder: Path, **options: Any) -> Checkpoint:
    return read_checkpoint(sorted(folder.glob("*.safetensors")), LoadOptions(**options))


def change(path: Path, **entries: Any) -> None:
    told = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({key: value for key, value in told.items() if value is not None}))


def test_what_a_folder_says_of_itself(folder):
    checkpoint = read(folder)
    assert (checkpoint.model_type, checkpoint.dtype, checkpoint.quantization) == ("qwen2", "F32", None)
    assert checkpoint.context_length == 2048
    assert checkpoint.kv_values_per_token == 2 * 2 * 2 * 16  # keys and values, layers, heads, head
    files = sum(path.stat().st_size for path in checkpoint.weights)
    assert files * 0.95 < checkpoint.weights_bytes < files


QUANTIZATIONS = {
    "mlx": ({"quantization": {"group_size": 64, "bits": 4}}, Quantization("mlx", 4)),
    "mlx, as transformers sees it": ({"quantization_config": {"group_size": 64, "bits": 4}}, Quantization("mlx", 4)),
    "bitsandbytes": (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        Quantization("bitsandbytes", 4),
    ),
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, Quantization("gptq", 4)),
    "none": ({}, None),
}


@pytest.mark.parametrize(("entries", "quantization"), QUANTIZATIONS.values(), ids=QUANTIZATIONS)
def test_how_it_is_quantized_is_read_from_its_config(folder, entries, quantization):
    change(folder / "config.json", **entries)
    assert read(folder).quantization == quantization


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def config(**entries: Any) -> Callable[[Path], None]:
    return lambda folder: change(folder / "config.json", **entries)


def write(name: str, data: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(data)


def cut(folder: Path) -> None:
    path = folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def other_index(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    told = json.loads(path.read_text())
    told["weight_map"]["model.layers.1.extra.weight"] = "model-00001-of-00003.safetensors"
    path.write_text(json.dumps(told))


SHARD = "model-00002-of-00003.safetensors"
BAD = {
    "no config": (remove("config.json"), r"has no config\.json .*pull the whole repository"),
    "a config that is no JSON": (
        write("config.json", b"{"),
        r"config\.json of tiny cannot be read: .*download it again",
    ),
    "a config that is no object": (write("config.json", b"[1]"), r"config\.json of tiny holds no JSON object"),
    "a config nested too deep": (write("config.json", b"[" * 100_000), r"config\.json of tiny cannot be read"),
    "an unknown architecture": (
        config(model_type="mamba9"),
        r"architecture 'mamba9'; checkpoints of llama, qwen2, qwen3 can be served",
    ),
    "no architecture": (config(model_type=None), r"architecture 'None'"),
    "no layers said": (config(num_hidden_layers=None), r"does not say its num_hidden_layers"),
    "absurd layers": (config(num_hidden_layers=-1), r"does not say its num_hidden_layers"),
    "more layers than there are": (config(num_hidden_layers=3), r"no weights for layer 2 of 3"),
    "a missing shard": (remove(SHARD), r"has 2 of 3 shards; model-00002-of-00003\.safetensors is missing"),
    "a shard cut short": (cut, r"model-00002-of-00003\.safetensors is cut short: it has [\d,]+ of [\d,]+ bytes"),
    "an empty shard": (write(SHARD, b""), r"is no safetensors file, or cut short: it is empty"),
    "a pointer in place of a shard": (
        write(SHARD, b"version https://git-lfs.github.com/spec/v1\n"),
        r"is a Git LFS pointer",
    ),
    "an index of other weights": (other_index, r"no tensor model\.layers\.1\.extra\.weight"),
    "an index without a map": (write("model.safetensors.index.json", b'{"weight_map": 3}'), r"has no weight_map"),
    "a program of its own": (
        config(model_type="mine", auto_map={"AutoModel": "modeling_mine.Mine"}),
        r"brings its own program \(modeling_mine\.Mine\).*--trust-remote-code",
    ),
    "a program for MLX": (config(model_file="model.py"), r"brings its own program \(model\.py\).*--trust-remote-code"),
}


@pytest.mark.parametrize(("spoil", "message"), BAD.values(), ids=BAD)
def test_a_bad_folder_is_told_in_one_line(folder, spoil, message):
    spoil(folder)
    with pytest.raises(UserError, match=message) as told:
        read(folder)
    assert "\n" not in str(told.value)
    assert told.value.hint


def test_a_program_runs_only_where_it_was_asked_for(folder):
    change(folder / "config.json", model_type="mine", auto_map={"AutoModel": "modeling_mine.Mine"})
    assert read(folder, trust_remote_code=True).model_type == "mine"


def test_a_map_to_programs_is_nothing_where_the_architecture_is_known(folder):
    change(folder / "config.json", auto_map={"AutoModel": "modeling_mine.Mine"})
    assert read(folder).model_type == "qwen2"


def test_a_pickle_is_refused_unless_asked_for(folder):
    pickle = folder / "pytorch_model.bin"
    pickle.write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle.*--allow-pickle"):
        read_checkpoint([pickle], LoadOptions())
    assert read_checkpoint([pickle], LoadOptions(allow_pickle=True)).weights == (pickle,)


# The header of one file


def header(told: Any, data: int = 0, length: int | None = None) -> bytes:
    text = told if isinstance(told, bytes) else json.dumps(told).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + b"\0" * data


def tensor(dtype: Any = "F32", shape: Any = (2, 3), offsets: Any = (0, 24)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_a_header_tells_names_types_shapes_and_places(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(header({"b": tensor("BF16", (4,), (24, 32)), "a": tensor(), "__metadata__": {"format": "pt"}}, 32))
    told = read_safetensors(path)
    start = path.stat().st_size - 32
    assert [(t.name, t.dtype, t.shape, t.offset - start, t.size) for t in told.tensors] == [
        ("a", "F32", (2, 3), 0, 24),
        ("b", "BF16", (4,), 24, 8),
    ]
    assert told.metadata == {"format": "pt"}


HEADERS = {
    "longer than the file": (header({}, length=1000), "less than its header claims"),
    "longer than anything": (struct.pack("<Q", 2**63) + b"{}", "less than its header claims"),
    "no JSON": (header(b"hello"), "its header is no JSON"),
    "bytes that are no text": (header(b"\xff\xfe\x00"), "its header is no JSON"),
    "nested too deep": (header(b'{"a":' + b"[" * 100_000), "its header is no JSON"),
    "a list": (header([1]), "no JSON object"),
    "a name twice": (header(b'{"a":1,"a":2}'), "a key is there twice"),
    "metadata of another kind": (header({"__metadata__": [1]}), "its metadata is not made of texts"),
    "an entry that is a number": (header({"a": 1}), "the entry of `a` is no object"),
    "an unknown type": (header({"a": tensor("Q4_K")}, 24), "the unknown type Q4_K"),
    "a type that is a list": (header({"a": tensor(["F32"])}, 24), "the unknown type"),
    "a negative shape": (header({"a": tensor(shape=(-2, -3))}, 24), "no proper shape or place"),
    "a shape of too many": (header({"a": tensor(shape=(1,) * 100)}, 24), "no proper shape or place"),
    "a shape of fractions": (header({"a": tensor(shape=(2.0, 3))}, 24), "no proper shape or place"),
    "one offset": (header({"a": tensor(offsets=(24,))}, 24), "no proper shape or place"),
    "too few bytes": (header({"a": tensor(offsets=(0, 20))}, 24), "has 20 bytes for 24"),
    "a hole": (header({"a": tensor(offsets=(4, 28))}, 28), "is at"),
    "two in one place": (header({"a": tensor(), "b": tensor()}, 48), "is at"),
    "more than there is": (header({"a": tensor()}, 10), "is cut short"),
    "bytes that nobody owns": (header({"a": tensor()}, 30), "6 bytes at its end belong to no tensor"),
}


@pytest.mark.parametrize(("data", "message"), HEADERS.values(), ids=HEADERS)
def test_a_bad_header_is_told(tmp_path, data, message):
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    with pytest.raises(BadModelFile, match=message):
        read_safetensors(path)


def test_no_cut_of_a_file_is_taken_for_whole(folder):
    path = folder / SHARD
    data = path.read_bytes()
    for length in range(0, len(data), 997):
        path.write_bytes(data[:length])
        with pytest.raises(BadModelFile):
            read_safetensors(path)
