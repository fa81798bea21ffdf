"""Our conversion equals llama.cpp's own converter, key by key and tensor by tensor, where that is at hand.

STILLHOUSE_LLAMA_CPP names a checkout of llama.cpp (it lies in llama-cpp-python's source distribution, in
`vendor/llama.cpp`); the converter needs transformers.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

LLAMA_CPP = Path(os.environ.get("STILLHOUSE_LLAMA_CPP", "nowhere"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (LLAMA_CPP / "convert_hf_to_gguf.py").is_file(), reason="STILLHOUSE_LLAMA_CPP names no llama.cpp"
    ),
    pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed"),
]


def _beside(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


checkpoints, fixtures = _beside("tiny_checkpoint"), _beside("quantize_fixtures")

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 512}
MODELS = {
    "qwen2": {"family": "qwen2", "blocks": 2},
    "qwen2, yarn": {"family": "qwen2", "blocks": 1, "rope": YARN},
    "qwen2 tied, in shards": {"family": "qwen2", "tied": True, "blocks": 1, "shards": 3},
    "qwen3": {"family": "qwen3", "blocks": 1},
    "llama": {"family": "llama", "blocks": 1, "heads": 8, "kv_heads": 2},
    "llama 3, tied": {"family": "llama", "tied": True, "rope": checkpoints.LLAMA3, "blocks": 1},
    "llama in F16": {"family": "llama", "dtype": "F16", "blocks": 1},
}
# The converter knows pre-tokenizers by hash, and a tiny tokenizer has none that it knows.
CONVERT = """
import runpy, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
import conversion.base
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
sys.argv = ["convert_hf_to_gguf.py", *sys.argv[2:]]
runpy.run_path(sys.path[0] + "/convert_hf_to_gguf.py", run_name="__main__")
"""


def convert(folder: Path, to: Path, type: str) -> Path:
    command = [sys.executable, "-c", CONVERT, str(LLAMA_CPP), str(folder), "--outfile", str(to), "--outtype", type]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return to


@pytest.mark.parametrize("model", MODELS)
def test_metadata_and_tensors_equal_those_of_llama_cpps_converter(model, tmp_path):
    folder = checkpoints.write_checkpoint(tmp_path / "Tiny-R1-0.1B-Chat", **MODELS[model])
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.95, "do_sample": true}')
    (folder / "README.md").write_text(
        "---\nlicense: mit\nbase_model: org/base-1B\nlanguage: [en, zh]\ntags: [a]\n---\nHi"
    )
    (ours,) = fixtures.make(folder, tmp_path, ["BF16"]).values()
    theirs = convert(folder, tmp_path / "theirs.gguf", "bf16")
    mine, golden = fixtures.metadata(ours), fixtures.metadata(theirs)
    assert {k: (mine.get(k), golden.get(k)) for k in mine | golden if mine.get(k) != golden.get(k)} == {}
    mine, golden = fixtures.tensors(ours), fixtures.tensors(theirs)
    assert {name: value[:2] for name, value in mine.items()} == {name: value[:2] for name, value in golden.items()}
    for name, (_, _, data) in mine.items():
        if name == "rope_freqs.weight":  # powers, by another library: equal but for the last bit
            ours_, theirs_ = np.frombuffer(data, np.float32), np.frombuffer(golden[name][2], np.float32)
            assert np.allclose(ours_, theirs_, rtol=1e-6, atol=0)
        else:
            assert data == golden[name][2], name
