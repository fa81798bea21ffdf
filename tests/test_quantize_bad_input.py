"""What is wrong is told in one line before anything is written, with the exit code that the help names."""

from __future__ import annotations

import importlib.util
import json
import shutil
import struct
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from stillhouse.__main__ import main
from stillhouse.quantize import gguf, importance


def _beside(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


checkpoints, fixtures = _beside("tiny_checkpoint"), _beside("quantize_fixtures")


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return checkpoints.write_checkpoint(tmp_path_factory.mktemp("original") / "Tiny-R1", blocks=1, shards=2)


@pytest.fixture
def checkpoint(original, tmp_path) -> Path:
    shutil.copytree(original, tmp_path / "Tiny-R1")
    return tmp_path / "Tiny-R1"


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def shard(folder: Path) -> Path:
    return folder / "model-00001-of-00002.safetensors"


def rewrite_header(path: Path, edit: object) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    edit(header)  # type: ignore[operator]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def wrong_hash(folder: Path) -> None:
    note = folder / ".cache" / "huggingface" / "download" / f"{shard(folder).name}.metadata"
    note.parent.mkdir(parents=True)
    note.write_text(f"{'0' * 40}\n{'1' * 64}\n1700000000.0\n")


def not_a_number(folder: Path) -> None:
    path = shard(folder)
    data = bytearray(path.read_bytes())
    data[-2:] = b"\xc0\x7f"
    path.write_bytes(data)


def first(header: dict) -> dict:
    return next(value for name, value in header.items() if name != "__metadata__")


BAD_SOURCES = {  # what happened to the folder: (how, words of the message)
    "unknown architecture": (
        lambda f: change(f / "config.json", architectures=["GPT2LMHeadModel"]),
        "the model is a GPT2LMHeadModel; Qwen2ForCausalLM",
    ),
    "no config.json": (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
    "missing shard": (lambda f: shard(f).unlink(), "model-00001-of-00002.safetensors is missing"),
    "shard cut short": (lambda f: cut(shard(f), 5000), "is cut short: it has 5,000 of"),
    "empty shard": (lambda f: cut(shard(f), 0), "cut short: it is empty"),
    "header is no JSON": (
        lambda f: shard(f).write_bytes(struct.pack("<Q", 16) + b"{" * 16 + bytes(100)),
        "is damaged: its header is no JSON",
    ),
    "header longer than the file": (
        lambda f: shard(f).write_bytes(struct.pack("<Q", 1 << 40) + bytes(100)),
        "has 108 bytes, less than its header claims",
    ),
    "offsets that overlap": (
        lambda f: rewrite_header(shard(f), lambda h: first(h).update(data_offsets=[2, 4])),
        "has 2 bytes for ",
    ),
    "a Git LFS pointer": (
        lambda f: shard(f).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n"),
        "is a Git LFS pointer",
    ),
    "already quantized": (
        lambda f: rewrite_header(shard(f), lambda h: first(h).update(dtype="I16")),
        "is of the type I16; BF16, F16 and F32 can be read",
    ),
    "wrong checksum": (wrong_hash, "where the hub says 111111111111…"),
    "a weight that is no number": (not_a_number, "has a NaN or an infinity"),
    "config of another size": (
        lambda f: change(f / "config.json", intermediate_size=1024),
        "has the shape [256, 512] where config.json asks for [256, 1024]",
    ),
    "fewer layers than weights": (
        lambda f: change(f / "config.json", num_hidden_layers=0),
        "config.json says 0 layers",
    ),
    "more layers than weights": (
        lambda f: change(f / "config.json", num_hidden_layers=2),
        "the checkpoint has no model",
    ),
    "a key is missing": (
        lambda f: (f / "config.json").write_text(
            json.dumps({k: v for k, v in json.loads((f / "config.json").read_text()).items() if k != "rms_norm_eps"})
        ),
        "does not say 'rms_norm_eps'",
    ),
    "unknown rope scaling": (
        lambda f: change(f / "config.json", rope_parameters={"rope_type": "longrope", "factor": 2}),
        "scales its positions by 'longrope'",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "not a BPE": (
        lambda f: change(f / "tokenizer.json", model={"type": "Unigram"}),
        "is not a byte-level BPE (Unigram)",
    ),
    "words cut in an unknown way": (
        lambda f: change(f / "tokenizer.json", pre_tokenizer={"type": "Whitespace"}),
        "no pre-tokenizer of llama.cpp is known",
    ),
    "a tokenizer that is too large": (
        lambda f: change(f / "tokenizer_config.json", added_tokens_decoder={"5000": {"content": "<new>"}}),
        "has the token '<new>' with id 5000, and the model has",
    ),
}


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_a_bad_source_is_told_in_one_line_and_leaves_nothing(case, checkpoint, tmp_path, capsys):
    damage, words = BAD_SOURCES[case]
    damage(checkpoint)
    code = main(["quantize", str(checkpoint), "Q4_K_M", "-o", str(tmp_path / "out.gguf"), "--threads", "1"])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert code == 3 and len(errors) == 1 and words in errors[0]
    assert [path.name for path in tmp_path.iterdir()] == ["Tiny-R1"]


def test_a_pre_tokenizer_that_is_named_is_taken(checkpoint, tmp_path):
    change(checkpoint / "tokenizer.json", pre_tokenizer={"type": "Whitespace"})
    arguments = ["quantize", str(checkpoint), "Q4_0", "-o", str(tmp_path / "out.gguf"), "--threads", "1"]
    assert main([*arguments, "--tokenizer-pre", "qwen2"]) == 0
    assert b"qwen2" in fixtures.metadata(tmp_path / "out.gguf")["tokenizer.ggml.pre"]


def wrong_imatrix(path: Path, cols: int) -> str:
    values = {"blk.0.attn_q.weight": np.ones(cols, np.float32), "blk.7.attn_q.weight": np.ones(cols, np.float32)}
    importance.write(path, importance.Importance(values, dict.fromkeys(values, 1), ("test",), 1, 512))
    return str(path)


BAD_REQUESTS = {  # (flags, exit code, words)
    "unknown type": (("Q4_X",), 2, "there is no type 'Q4_X'"),
    "no type": ((), 2, "no type was asked for"),
    "bad pattern": (("Q4_0", "--tensor-type", "([=Q4_0"), 2, "is not a regular expression"),
    "bad override": (("Q4_0", "--tensor-type", "ffn=Q9"), 2, "is not REGEX=TYPE"),
    "a type that needs an importance matrix": (("IQ2_XXS",), 2, "is garbage without an importance matrix"),
    "a mix without a price list": (("--target-bpw", "4.5"), 2, "needs to know what each matrix is worth"),
    "both targets": (("--target-bpw", "4.5", "--target-size", "1M"), 2, "say the same twice"),
    "several files, one name": (("Q4_0,Q8_0",), 2, "can be one file only, and 2 were asked for"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_bad_request_is_told_in_one_line_and_leaves_nothing(case, original, tmp_path, capsys):
    flags, expected, words = BAD_REQUESTS[case]
    code = main(["quantize", str(original), *flags, "-o", str(tmp_path / "out.gguf"), "--threads", "1"])
    assert (code, list(tmp_path.iterdir())) == (expected, [])
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(("cols", "words"), [(64, "has 64 columns for"), (256, "knows 1 of the model's")])
def test_the_importance_matrix_of_another_model_is_refused(cols, words, original, tmp_path, capsys):
    path = wrong_imatrix(tmp_path / "other.gguf", cols)
    code = main(["quantize", str(original), "Q4_0", "-o", str(tmp_path / "out.gguf"), "--imatrix", path])
    assert code == 2 and words in capsys.readouterr().err
    assert not (tmp_path / "out.gguf").exists()


def test_a_disk_that_is_too_small_is_told_before_the_first_byte(original, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(gguf.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    code = main(["quantize", str(original), "Q4_0", "-o", str(tmp_path / "out.gguf"), "--threads", "1"])
    assert (code, list(tmp_path.iterdir())) == (4, [])
    assert "has 1.00 kB free" in capsys.readouterr().err


def test_too_little_memory_is_told_before_the_first_byte(original, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gguf, "free_memory", lambda: 1_000_000)
    code = main(["quantize", str(original), "Q4_0", "-o", str(tmp_path / "out.gguf"), "--threads", "1"])
    assert (code, list(tmp_path.iterdir())) == (4, [])
    assert "1.00 MB are free" in capsys.readouterr().err


def test_a_file_that_is_there_is_not_written_over(original, tmp_path, capsys):
    (tmp_path / "out.gguf").write_text("mine")
    arguments = ["quantize", str(original), "Q4_0", "-o", str(tmp_path / "out.gguf"), "--threads", "1"]
    assert main(arguments) == 2
    assert (tmp_path / "out.gguf").read_text() == "mine" and "is there already" in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 0
    assert (tmp_path / "out.gguf").read_bytes()[:4] == b"GGUF"


def test_what_is_quantized_already_is_refused_unless_asked_for(original, tmp_path, capsys):
    first, second = str(tmp_path / "first.gguf"), str(tmp_path / "second.gguf")
    assert main(["quantize", str(original), "Q8_0", "-o", first, "--threads", "1"]) == 0
    assert main(["quantize", first, "Q4_0", "-o", second, "--threads", "1"]) == 3
    assert "is quantized already" in capsys.readouterr().err and not Path(second).exists()
    assert main(["quantize", first, "Q4_0", "-o", second, "--threads", "1", "--allow-requantize"]) == 0


def test_a_hub_id_that_is_not_there_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert main(["quantize", "org/model", "Q4_0", "--offline"]) == 2
    assert "is not on this disk" in capsys.readouterr().err
