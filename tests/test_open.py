"""Which backend a file gets, and what is told where none can be had."""

from __future__ import annotations

import re

import pytest

from stillhouse.backends import memory
from stillhouse.backends import open as opening
from stillhouse.backends.base import LoadOptions
from stillhouse.backends.memory import Fit, Need
from stillhouse.backends.open import choose, open_backend
from stillhouse.r1.errors import UserError

ALL = {"llama.cpp", "pytorch", "mlx"}
CHOICES = {  # kind, asked for, installed, on an Apple chip -> backend, and why
    "a GGUF": ("gguf", "auto", ALL, False, "llama.cpp", "the file is a GGUF"),
    "a GGUF on a Mac": ("gguf", "auto", ALL, True, "llama.cpp", "the file is a GGUF"),
    "a GGUF without llama.cpp": (
        "gguf",
        "auto",
        {"pytorch"},
        False,
        "pytorch",
        "the file is a GGUF; llama.cpp is not installed",
    ),
    "a GGUF by PyTorch": ("gguf", "pytorch", ALL, False, "pytorch", "asked for"),
    "MLX's own": ("mlx", "auto", ALL, False, "mlx", "the weights are in MLX's own format"),
    "a checkpoint": ("16-bit", "auto", ALL, False, "pytorch", "it is a checkpoint folder"),
    "a checkpoint on a Mac": (
        "16-bit",
        "auto",
        ALL,
        True,
        "mlx",
        "it is a checkpoint folder, and this is an Apple chip",
    ),
    "a checkpoint on a Mac without MLX": (
        "16-bit",
        "auto",
        {"pytorch"},
        True,
        "pytorch",
        "it is a checkpoint folder, and this is an Apple chip; mlx is not installed",
    ),
    "a checkpoint without PyTorch": (
        "16-bit",
        "auto",
        {"mlx"},
        False,
        "mlx",
        "it is a checkpoint folder; pytorch is not installed",
    ),
    "a checkpoint by MLX anywhere": ("16-bit", "mlx", ALL, False, "mlx", "asked for"),
    "quantized for PyTorch": ("gptq", "auto", ALL, True, "pytorch", "the weights are quantized by gptq"),
}


@pytest.mark.parametrize(("kind", "asked", "installed", "apple", "backend", "reason"), CHOICES.values(), ids=CHOICES)
def test_a_backend_is_chosen_with_a_reason(kind, asked, installed, apple, backend, reason):
    chosen = choose(kind, asked, is_installed=installed.__contains__, is_apple_chip=lambda: apple)
    assert chosen == (backend, reason)


REFUSALS = {
    "nothing for a GGUF": ("gguf", "auto", set(), "llama.cpp is not installed, and the file is a GGUF", "llama-cpp"),
    "nothing for a checkpoint": ("16-bit", "auto", {"llama.cpp"}, "pytorch is not installed, and it is a", r"\[torch"),
    "nothing for MLX's own": ("mlx", "auto", {"pytorch"}, "mlx is not installed, and the weights are in", r"\[mlx\]"),
    "asked for and not there": ("16-bit", "mlx", {"pytorch"}, "mlx is not installed", r'pip install "stillhouse\[mlx'),
    "a GGUF by MLX": ("gguf", "mlx", ALL, "mlx cannot serve this: the file is a GGUF", "llama.cpp or pytorch"),
    "a checkpoint by llama.cpp": ("16-bit", "llama.cpp", ALL, "llama.cpp cannot serve this", "pytorch or mlx"),
    "MLX's own by PyTorch": ("mlx", "pytorch", ALL, "pytorch cannot serve this: the weights are in MLX's", "mlx"),
    "bitsandbytes by MLX": ("bitsandbytes", "mlx", ALL, "mlx cannot serve this: .* bitsandbytes", "pytorch"),
    "a pickle by MLX": ("pickle", "mlx", ALL, "mlx cannot serve this: the weights are a pickle", "pytorch"),
}


@pytest.mark.parametrize(("kind", "asked", "installed", "message", "hint"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_served_is_told_with_what_to_install(kind, asked, installed, message, hint):
    with pytest.raises(UserError, match=message) as told:
        choose(kind, asked, is_installed=installed.__contains__, is_apple_chip=lambda: False)
    assert told.value.hint and re.search(hint, told.value.hint)


def test_a_quantizer_that_is_missing_is_named(random_checkpoint, tmp_path, monkeypatch):
    model = random_checkpoint.random_model("qwen2")
    folder = random_checkpoint.write_checkpoint(tmp_path / "tiny", model)
    config = folder / "config.json"
    config.write_text(config.read_text().replace("{", '{"quantization_config": {"quant_method": "gptq"},', 1))
    monkeypatch.setattr(opening, "find_spec", lambda name: None if name == "gptqmodel" else object())
    with pytest.raises(UserError, match=r"quantized by gptq, and gptqmodel is not installed .*pip install gptqmodel"):
        open_backend([folder / "model.safetensors"], LoadOptions())


def test_a_file_of_another_kind_is_told(tmp_path):
    with pytest.raises(UserError, match=r"notes\.txt is neither a GGUF file nor a checkpoint's weights"):
        open_backend([tmp_path / "notes.txt"], LoadOptions())


# Memory

GB = 1_000_000_000


def test_a_context_is_halved_until_it_fits():
    need = Need(2 * GB, 100_000, 32_768)
    assert memory.fit(need, 100 * GB, LoadOptions(parallel=1)) == Fit(32_768, 32_768, True)
    assert memory.fit(need, 4 * GB, LoadOptions(parallel=1)).context == 16_384
    assert memory.fit(need, 3 * GB, LoadOptions(parallel=1)).context == 8_192


def test_streams_share_the_cache_where_memory_is_short():
    need = Need(2 * GB, 100_000, 32_768)
    assert memory.fit(need, 100 * GB, LoadOptions(context=2048, parallel=8)) == Fit(2048, 16_384, True)
    assert memory.fit(need, 3 * GB, LoadOptions(context=2048, parallel=8)) == Fit(2048, 2250, False)


NO_ROOM = {
    "the weights": (Need(9 * GB, 1), 8 * GB, {}, r"the model needs 9\.0 GB of VRAM and 8\.0 GB are free"),
    "the context": (
        Need(7 * GB, 100_000, 65_536),
        8 * GB,
        {"context": 32_768},
        r"a KV cache for 32768 tokens needs 3\.3 GB of VRAM and 0\.7 GB are free .*--context 6400 or less",
    ),
    "the cache": (
        Need(7 * GB, 100_000, 65_536, less="close a window"),
        8 * GB,
        {"cache_tokens": 20_000},
        r"--cache-tokens 6400 or less, or close a window",
    ),
    "more than trained for": (Need(GB, 1, 4096), 8 * GB, {"context": 5000}, r"more than the 4096 tokens"),
}


@pytest.mark.parametrize(("need", "free", "options", "message"), NO_ROOM.values(), ids=NO_ROOM)
def test_what_does_not_fit_is_told_with_what_to_lower(need, free, options, message):
    with pytest.raises(UserError, match=message):
        memory.fit(need, free, LoadOptions(**options), where="VRAM")
