"""What the MLX backend does beyond what it shares: quantized weights, adapters, what it refuses, and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillhouse.backends.base import Backend, BackendFailed, GenerationRequest, LoadOptions, Sampling, Token
from stillhouse.backends.open import open_backend
from stillhouse.r1.errors import BadModelFile, UserError

if find_spec("mlx_lm") is None:
    pytest.skip('MLX is not installed: pip install "stillhouse[mlx]"', allow_module_level=True)

GREEDY = Sampling(temperature=0)
PROMPT = "It was the best of times, it was the worst of times"


@pytest.fixture
def open_mlx(open_checkpoint: Callable[..., Backend], checkpoint_path: Path) -> Callable[..., Any]:
    return lambda folder=checkpoint_path, **options: open_checkpoint("mlx", folder, **options)


def reply(backend: Backend, prompt: str = PROMPT, max_tokens: int = 12, **fields: Any) -> list[Token]:
    fields = {"sampling": GREEDY, "ignore_eos": True} | fields
    backend.add(GenerationRequest("1", backend.vocabulary.encode(prompt), max_tokens, **fields))
    tokens: list[Token] = []
    while not tokens or not tokens[-1].finish:
        tokens += backend.step()
    return tokens


def ids(tokens: list[Token]) -> list[int]:
    return [token.token_id for token in tokens]


# Weights


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
def test_it_says_what_mlx_lm_itself_says(open_mlx, random_checkpoint, tmp_path, architecture):
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    model = random_checkpoint.random_model(architecture)
    folder = random_checkpoint.write_checkpoint(tmp_path / architecture, model)
    backend = open_mlx(folder)
    told, _ = load_model(folder)
    prompt = mx.array(backend.vocabulary.encode(PROMPT))
    theirs = list(generate_step(prompt, told, max_tokens=12))
    ours = reply(backend, ignore_eos=False, top_logprobs=0)
    assert ids(ours) == [token for token, _ in theirs][: len(ours)]
    logprobs = [float(row[token]) for token, row in theirs][: len(ours)]
    np.testing.assert_allclose([token.logprob for token in ours], logprobs, atol=1e-4)


@pytest.fixture
def four_bit(random_checkpoint: Any, tmp_path: Path) -> Path:
    """A checkpoint as mlx-lm quantizes it."""
    from mlx_lm.utils import load_config, load_model, quantize_model, save_config, save_model

    folder = random_checkpoint.write_checkpoint(tmp_path / "plain", random_checkpoint.random_model("qwen2"))
    model, config = load_model(folder)
    model, config = quantize_model(model, load_config(folder), 64, 4)
    quantized = tmp_path / "tiny-4bit"
    quantized.mkdir()
    save_model(quantized, model)
    save_config(config, quantized / "config.json")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (quantized / name).write_bytes((folder / name).read_bytes())
    return quantized


def test_four_bit_weights_are_served(open_mlx, four_bit):
    from mlx_lm.utils import load_model

    opened = open_backend([four_bit / "model.safetensors"], LoadOptions(context=1024))
    assert (opened.backend.name, opened.reason) == ("mlx", "the weights are in MLX's own format")
    (token,) = reply(opened.backend, max_tokens=1, top_logprobs=5)
    told, _ = load_model(four_bit)
    import mlx.core as mx

    row = told(mx.array([opened.backend.vocabulary.encode(PROMPT)]))[0, -1]
    row = np.array(row - mx.logsumexp(row))
    np.testing.assert_allclose([row[i] for i, _ in token.top_logprobs], [p for _, p in token.top_logprobs], atol=1e-3)


# Adapters


@pytest.fixture
def adapter(checkpoint_path: Path, tmp_path: Path) -> Path:
    """An adapter of rank 4 as mlx-lm writes one, with weights that change what is said."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    model, _ = load_model(checkpoint_path)
    model.freeze()
    told = {"rank": 4, "scale": 8.0, "dropout": 0.0}
    linear_to_lora_layers(model, 2, told)
    mx.random.seed(0)
    weights = {name: mx.random.normal(w.shape) * 0.2 for name, w in tree_flatten(model.trainable_parameters())}
    folder = tmp_path / "adapter"
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": told}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_an_adapter_changes_the_replies_by_its_scale(open_mlx, adapter):
    plain, none, half, whole = (
        ids(reply(open_mlx(loras=loras), max_tokens=20))
        for loras in ((), ((adapter, 0.0),), ((adapter, 0.5),), ((adapter, 1.0),))
    )
    assert plain == none
    assert len({tuple(said) for said in (plain, half, whole)}) == 3


BAD_ADAPTERS = {
    "not there": (lambda folder: Path("nowhere"), r"nowhere is no MLX adapter: a folder with adapter_config\.json"),
    "for another model": (
        lambda folder: _rewrite(folder / "adapter_config.json", '"rank": 4', '"rank": 3'),
        r"MLX cannot load the adapter adapter: .*it must be made for this very model",
    ),
    "a config that is no JSON": (
        lambda folder: _rewrite(folder / "adapter_config.json", "{", "", 1),
        r"MLX cannot load the adapter adapter",
    ),
}


def _rewrite(path: Path, old: str, new: str, count: int = -1) -> Path:
    path.write_text(path.read_text().replace(old, new, count))
    return path.parent


@pytest.mark.parametrize(("spoil", "message"), BAD_ADAPTERS.values(), ids=BAD_ADAPTERS)
def test_a_bad_adapter_is_told_in_one_line(open_mlx, adapter, spoil, message):
    with pytest.raises(BadModelFile, match=message) as told:
        open_mlx(loras=((spoil(adapter), 1.0),))
    assert "\n" not in str(told.value)


def test_two_adapters_are_refused(open_mlx, adapter):
    with pytest.raises(UserError, match="MLX takes one LoRA adapter"):
        open_mlx(loras=((adapter, 1.0), (adapter, 1.0)))


# What it refuses


def test_a_quantized_cache_is_refused(open_mlx):
    with pytest.raises(UserError, match=r"as the model computes them \(f32\); --kv-type q8_0 is llama\.cpp's"):
        open_mlx(kv_type="q8_0")
    assert open_mlx(kv_type="f32").context_length == 1024


def test_weights_of_another_shape_are_told_in_one_line(random_checkpoint, tmp_path, open_mlx):
    folder = random_checkpoint.write_checkpoint(tmp_path / "tiny", random_checkpoint.random_model("qwen2"))
    config = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 96}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadModelFile, match=r"MLX cannot load tiny: .*mlp") as told:
        open_mlx(folder)
    assert "\n" not in str(told.value)


def test_layers_that_forget_are_refused(random_checkpoint, tmp_path, open_mlx):
    """Their caches cannot be cut to a prefix."""
    folder = random_checkpoint.write_checkpoint(tmp_path / "tiny", random_checkpoint.random_model("llama"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadModelFile, match="tiny has layers that look back over a window only"):
        open_mlx(folder)


# What goes wrong later, and how it ends


def test_a_step_that_fails_loses_its_batch_and_nothing_else(open_mlx, monkeypatch):
    backend = open_mlx()
    before = ids(reply(backend))
    backend.add(GenerationRequest("2", backend.vocabulary.encode("something else"), 5))
    with monkeypatch.context() as patched:

        class Fails:
            layers = backend._executor._model.layers

            def __call__(self, *_: Any, **__: Any) -> None:
                raise RuntimeError("[malloc] Unable to allocate 99 bytes.")

        patched.setattr(backend._executor, "_model", Fails())
        with pytest.raises(BackendFailed, match=r"MLX failed: \[malloc\] Unable to allocate"):
            backend.step()
    assert backend.load()[:3] == (0, 0, 0)
    assert ids(reply(backend)) == before


def test_the_limit_of_open_files_stays_what_it_was():
    """mlx-lm's import lowers it to 4,096 for good."""
    words = (
        "import resource; calls = []; resource.setrlimit = lambda *told: calls.append(told)\n"
        "import stillhouse.backends.mlxlm_executor; assert not calls"
    )
    subprocess.run([sys.executable, "-c", words], check=True, timeout=60)


def test_a_process_that_served_ends_in_order(checkpoint_path):
    """MLX aborted it at its end, over the streams of a thread that was gone."""
    words = (
        "import sys; from pathlib import Path; from stillhouse.backends.engine import Engine\n"
        "from stillhouse.backends.open import open_backend; from stillhouse.backends.base import *\n"
        "options = LoadOptions(context=512, backend='mlx')\n"
        "engine = Engine(open_backend([Path(sys.argv[1]) / 'model.safetensors'], options).backend)\n"
        "print(len(list(engine.generate([GenerationRequest('1', [1, 2, 3], 30, ignore_eos=True)]))))\n"
        "engine.close()"
    )
    done = subprocess.run(
        [sys.executable, "-c", words, str(checkpoint_path)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "30\n", "")
