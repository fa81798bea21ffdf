"""`stillhouse verify` finds what is wrong, and nothing where nothing is."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from stillhouse.__main__ import main
from stillhouse.quantize import verify
from stillhouse.quantize.samples import conversations, strings
from stillhouse.quantize.source import open_checkpoint
from stillhouse.r1.gguf import read_header


def _beside(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


checkpoints, fixtures = _beside("tiny_checkpoint"), _beside("quantize_fixtures")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return checkpoints.write_checkpoint(tmp_path_factory.mktemp("source") / "Tiny-R1", "llama", blocks=1)


@pytest.fixture(scope="module")
def made(checkpoint, tmp_path_factory) -> Path:
    return fixtures.make(checkpoint, tmp_path_factory.mktemp("made"), ["Q4_K_M"])["Q4_K_M"]


@pytest.fixture
def damaged(made, tmp_path) -> Path:
    """A copy, to be damaged."""
    (tmp_path / "damaged.gguf").write_bytes(made.read_bytes())
    return tmp_path / "damaged.gguf"


def failed(file: Path, source: Path | None = None, count: int = 200) -> dict[str, str]:
    checkpoint = open_checkpoint(source) if source else None
    return {f.what: f.words for f in verify.findings(file, checkpoint, count=count, threads=1) if not f.is_good}


def put(file: Path, tensor: str, data: bytes) -> None:
    header = read_header(file)
    place = next(t.offset for t in header.tensors if t.name == tensor)
    with file.open("r+b") as stream:
        stream.seek(header.data_offset + place)
        stream.write(data)


def test_a_good_file_passes_beside_its_source(made, checkpoint, capsys):
    assert main(["verify", str(made), "--source", str(checkpoint), "--strings", "2000", "--threads", "1"]) == 0
    said = capsys.readouterr().out
    assert "FAIL" not in said and "2000 texts give the same tokens" in said and "1 BOS" in said
    assert "<think> and </think> are one token each" in said and "20 conversations are written alike" in said


def test_a_file_that_is_cut_short_fails(damaged, capsys):
    damaged.write_bytes(damaged.read_bytes()[:-1000])
    assert main(["verify", str(damaged), "--threads", "1"]) == 6
    assert "is cut short" in capsys.readouterr().out


def test_a_block_that_is_no_number_is_found(damaged):
    put(damaged, "blk.0.ffn_up.weight", np.array([np.nan], np.float16).tobytes())
    assert failed(damaged) == {"blocks": "blk.0.ffn_up.weight has a NaN or an infinity"}


def test_a_tensor_of_other_numbers_is_found(damaged, checkpoint):
    size = next(t.size for t in read_header(damaged).tensors if t.name == "blk.0.attn_k.weight")
    original = fixtures.tensors(damaged)["blk.0.attn_k.weight"][2]
    put(damaged, "blk.0.attn_k.weight", original[size // 2 :] + original[: size // 2])
    assert "blk.0.attn_k.weight" in failed(damaged, checkpoint)["errors"]


def test_queries_that_were_not_interleaved_are_found(checkpoint, tmp_path, monkeypatch):
    """The commonest fault of converters: the file loads, and speaks nonsense."""
    monkeypatch.setattr("stillhouse.quantize.weights.permutation", lambda *_: None)
    wrong = fixtures.make(checkpoint, tmp_path, ["Q8_0"])["Q8_0"]
    monkeypatch.undo()
    assert "attn_" in failed(wrong, checkpoint)["errors"]


def test_a_wrong_pre_tokenizer_is_found(checkpoint, made, tmp_path):
    wrong = made.read_bytes().replace(b"\x05\0\0\0\0\0\0\0qwen2", b"\x05\0\0\0\0\0\0\0gpt-2")
    (tmp_path / "wrong.gguf").write_bytes(wrong)
    assert "texts give others, such as" in failed(tmp_path / "wrong.gguf", checkpoint)["tokenizer"]


def test_another_template_is_found(made, checkpoint, tmp_path):
    wrong = made.read_bytes().replace("<｜Assistant｜>{% endif %}".encode(), "<｜Asistant｜> {% endif %}".encode())
    (tmp_path / "wrong.gguf").write_bytes(wrong)
    assert "differs" in failed(tmp_path / "wrong.gguf", checkpoint)["prompts"]


def test_the_source_of_another_model_is_found(made, tmp_path):
    other = checkpoints.write_checkpoint(tmp_path / "Other-R1", "llama", blocks=1, seed=5)
    assert "at worst" in failed(made, other)["errors"]


def test_the_texts_are_many_and_always_the_same():
    texts = strings(10_000)
    assert len(set(texts)) == 10_000 and texts == strings(10_000)
    assert len(conversations()) == 20
    everything = "".join(texts)
    assert all(
        part in everything for part in ("привет", "你好", "😀", "return x**2"[:6], "<|im_start", "</think>", "\r\n")
    )


@pytest.mark.slow
def test_r1s_own_tokenizer_cuts_10_000_texts_alike(r1_vocabulary_path, tmp_path, capsys):
    """The real vocabulary: 152,064 tokens, `</think>` among the user-defined ones."""
    source = checkpoints.write_checkpoint(tmp_path / "Tiny-R1", "qwen2", blocks=1)
    tokens = checkpoints.write_r1_tokenizer(r1_vocabulary_path, source)
    config = json.loads((source / "config.json").read_text()) | {"vocab_size": tokens, "tie_word_embeddings": True}
    config |= {"bos_token_id": 151_646, "eos_token_id": 151_643}
    (source / "config.json").write_text(json.dumps(config))
    path = source / "model.safetensors"
    checkpoints.resize_vocabulary(path, tokens)
    assert main(["quantize", str(source), "Q4_K_M", "-o", str(tmp_path / "out.gguf"), "--threads", "1"]) == 0
    assert fixtures.metadata(tmp_path / "out.gguf")["tokenizer.ggml.pre"].endswith(b"deepseek-r1-qwen")
    kinds = np.frombuffer(fixtures.metadata(tmp_path / "out.gguf")["tokenizer.ggml.token_type"], "<i4")[-tokens:]
    assert list(kinds[151_648:151_650]) == [4, 4]
    assert main(["verify", str(tmp_path / "out.gguf"), "--source", str(source), "--threads", "1"]) == 0
    said = capsys.readouterr().out
    assert "10000 texts give the same tokens" in said and "are one token each" in said and "1 BOS" in said


@pytest.mark.slow
def test_templates_write_what_transformers_writes(r1_vocabulary_path, tmp_path):
    """Twenty conversations through the file's template, and through `apply_chat_template` of the folder."""
    transformers = pytest.importorskip("transformers")
    checkpoints.write_r1_tokenizer(r1_vocabulary_path, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", "vocab_size": 152_064}))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    from stillhouse.quantize.readers import gguf_reader

    ours = gguf_reader([r1_vocabulary_path]).template
    for messages in conversations():
        said = [{"role": message.role, "content": message.content} for message in messages]
        expected = theirs.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        text = ours.render(messages).text
        # Ours ends in `<think>`, as DeepSeek advises; this template is of January 2025 and does not.
        assert text.removesuffix("<think>\n") == expected
