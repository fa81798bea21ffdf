"""PyTorch's 4-bit folders, made by their own libraries and read by stock transformers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from stillhouse.quantize import folders
from stillhouse.quantize.job import Options
from stillhouse.quantize.source import open_checkpoint
from stillhouse.r1.errors import UserError

torch = pytest.importorskip("torch", reason='PyTorch is not installed: pip install "stillhouse[torch]"')
LIBRARIES = {"nf4": "bitsandbytes", "int4": "torchao"}


@pytest.fixture(scope="module")
def tiny() -> ModuleType:
    """`tiny_checkpoint.py`."""
    spec = importlib.util.spec_from_file_location("tiny_checkpoint", Path(__file__).with_name("tiny_checkpoint.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def source(tiny: ModuleType, tmp_path: Path) -> Path:
    return tiny.write_checkpoint(tmp_path / "Tiny")


def make(source: Path, to: Path, type: str, **options: Any) -> Path:
    folders.make_folders(open_checkpoint(source), [type], Options(str(source), (type,), output=to, **options))
    return to


@pytest.mark.slow
@pytest.mark.parametrize("type", LIBRARIES)
def test_stock_transformers_loads_it_and_says_nearly_the_same(source, tmp_path, type):
    pytest.importorskip(LIBRARIES[type], reason=f"{LIBRARIES[type]} is not installed")
    if type == "int4" and not torch.cuda.is_available():
        pytest.skip("torchao lays int4 out for NVIDIA GPUs, and there is none here")
    from transformers import AutoModelForCausalLM

    made = make(source, tmp_path / "made", type)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        plain, quantized = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)(ids).logits.float().numpy()
            for folder in (source, made)
        )
    assert np.isfinite(quantized).all()
    assert np.corrcoef(plain.ravel(), quantized.ravel())[0, 1] > 0.9
    assert not np.array_equal(plain, quantized)
    sizes = [sum(path.stat().st_size for path in folder.glob("*.safetensors")) for folder in (source, made)]
    assert sizes[1] < 0.6 * sizes[0]
    assert (made / "tokenizer.json").is_file()


def test_int4_without_a_gpu_is_told_before_the_start(source, tmp_path, monkeypatch):
    from stillhouse.quantize import pytorch

    monkeypatch.setattr(pytorch, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"int4 is made by torchao for NVIDIA GPUs, and there is none here"):
        make(source, tmp_path / "made", "int4")


def test_a_library_that_is_missing_is_named(source, tmp_path, monkeypatch):
    from stillhouse.quantize import pytorch

    monkeypatch.setattr(pytorch, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"nf4 is made by bitsandbytes, which is not installed .*pip install bits"):
        make(source, tmp_path / "made", "nf4")
    assert not (tmp_path / "made.partial").exists()
