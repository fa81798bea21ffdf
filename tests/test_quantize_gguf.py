"""The GGUF writer: the bytes of llama.cpp's own quantizer, in one pass; whole or not at all; the same when resumed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


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
