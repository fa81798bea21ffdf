"""The same weights say the same, whichever backend reads them: F32 and F16 GGUF, safetensors, MLX.

Greedy replies part where two tokens are nearly as likely and the last bits differ. So where two part, the test asks how
far apart the two tokens were: a gap within rounding is told in the table, a wider one fails. The table is printed
(`pytest -s`), and what it says is in docs/backends.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import pytest

from stillhouse.backends.base import Backend, GenerationRequest, LoadOptions, Sampling, Token
from stillhouse.backends.engine import Engine
from stillhouse.backends.llamacpp import LlamaCpp
from stillhouse.backends.open import open_backend
from stillhouse.r1.gguf import read_header

PROMPTS = [
    "The sea is",
    "Once upon a time",
    "One, two, three, four",
    "My favourite food is",
    "The capital of France is",
    "Water boils at",
    "A good night's sleep",
    "To make bread you need",
    "The first law of thermodynamics",
    "In the year 1969",
    "def fibonacci(n):",
    "Dear Sir or Madam,",
    "Il était une fois",
    "The opposite of hot is",
    "If it rains tomorrow",
    "She opened the door and",
    "The three primary colours are",
    "A triangle has",
    "Music is",
    "The end of the story",
]
LOGPROBS = 0.02  # natural log: how far the same token's log-probability may be from one backend to another, in F16
# Two tokens whose log-probabilities differ by less than twice that may change places.
TIE = 2 * LOGPROBS
# llama.cpp's flash attention rounds to 16 bits on a CPU, whatever the type of the cache: F32 is compared without it.
LLAMA: dict[str, Any] = {"context": 256, "threads": 1, "gpu_layers": 0, "kv_type": "f32"}
MORE = 0.05  # what F16 through llama.cpp may make of an unlikely token; 0.0324 was seen
CALM = 0.7  # random weights that make as much of a rounding error as trained ones do; the tests' usual ones make more


class Said(NamedTuple):
    """One reply: its tokens, and what else was likely at each."""

    ids: list[int]
    top: list[dict[int, float]]


@dataclass(slots=True)
class Comparison:
    """How two backends' replies to the same prompts compare, as far as both go the same way."""

    name: str
    same: int = 0  # replies
    worst: float = 0.0  # difference of a log-probability, of the ten likeliest tokens
    worst_said: float = 0.0  # the same, of the tokens that were said
    partings: list[str] | None = None

    def __str__(self) -> str:
        told = (
            f"{self.name:<28} {self.same:>3} the same, within {self.worst_said:.4f}, the ten likeliest {self.worst:.4f}"
        )
        return "\n".join([told, *(f"    {parting}" for parting in self.partings or [])])


def replies(backend: Backend, prompts: Sequence[Sequence[int]], tokens: int) -> list[Said]:
    """Greedy replies, four at a time."""
    requests = [
        GenerationRequest(str(n), prompt, tokens, Sampling(temperature=0), top_logprobs=10, ignore_eos=True)
        for n, prompt in enumerate(prompts)
    ]
    engine = Engine(backend)
    heard: dict[str, list[Token]] = {request.id: [] for request in requests}
    for token in engine.generate(requests):
        heard[token.request_id].append(token)
    engine.close()
    return [Said([t.token_id for t in said], [dict(t.top_logprobs) for t in said]) for said in heard.values()]


def compare(name: str, reference: Sequence[Said], other: Sequence[Said], *, tie: float) -> Comparison:
    """Compare token by token, up to where replies part; fails where they part for no good reason."""
    found = Comparison(name, partings=[])
    for number, (one, two) in enumerate(zip(reference, other, strict=True)):
        for place, (left, right) in enumerate(zip(one.ids, two.ids, strict=True)):
            both = one.top[place].keys() & two.top[place].keys()
            likely = [token_id for token_id in both if one.top[place][token_id] > -7]
            found.worst = max([found.worst, *(abs(one.top[place][i] - two.top[place][i]) for i in likely)])
            if left in both:
                found.worst_said = max(found.worst_said, abs(one.top[place][left] - two.top[place][left]))
            if left != right:
                gap = one.top[place][left] - one.top[place].get(right, -np.inf)
                assert found.partings is not None
                found.partings.append(f"prompt {number}, token {place}: {left} or {right}, {gap:.4f} apart")
                assert gap < tie, f"{name}: {found.partings[-1]}"
                break
        else:
            found.same += 1
    return found


def open_all(folder: Path, files: dict[str, Path], *, dtype: str = "f32") -> Iterator[tuple[str, Backend]]:
    """One after the other: the GGUF files through llama.cpp, then PyTorch and MLX."""
    for name, path in files.items():
        options = LoadOptions(**LLAMA, flash_attention=None if "F16" in name else False)
        yield name, LlamaCpp((path,), read_header(path), options)
    options = LoadOptions(context=256, threads=1, gpu_layers=0, backend="pytorch", dtype=dtype)
    yield "safetensors, PyTorch", open_backend([folder / "model.safetensors"], options).backend
    options = LoadOptions(context=256, threads=1, gpu_layers=0, backend="pytorch", dtype=dtype)
    yield "F32 GGUF, PyTorch", open_backend([files["F32 GGUF, llama.cpp"]], options).backend


# Tiny models, R1's vocabulary


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["qwen2", "llama", "qwen3"])
def test_a_small_model_with_r1s_vocabulary_says_the_same_on_all_backends(
    random_checkpoint, r1_vocabulary_path, tmp_path, architecture
):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    words = random_checkpoint.r1_words(r1_vocabulary_path)
    shape = random_checkpoint.Shape(width=32, head=16, heads=2, kv_heads=1, forward=64)
    model = random_checkpoint.random_model(architecture, words=words, shape=shape, scale=CALM)
    folder = random_checkpoint.write_checkpoint(tmp_path / "m", model)
    files = {
        "F32 GGUF, llama.cpp": random_checkpoint.write_gguf(tmp_path / "f32.gguf", model),
        "F16 GGUF, llama.cpp": random_checkpoint.write_gguf(tmp_path / "f16.gguf", model, half=True),
    }
    said: dict[str, list[Said]] = {}
    for name, backend in open_all(folder, files):
        prompts = [backend.vocabulary.encode(text) for text in PROMPTS]
        said[name] = replies(backend, prompts, 64)
    table = [compare(name, said["F32 GGUF, llama.cpp"], other, tie=TIE) for name, other in list(said.items())[1:]]
    print(f"\n{architecture}, R1's vocabulary, 20 prompts of 64 tokens, next to F32 GGUF through llama.cpp:")
    print(*table, sep="\n")
    assert all(one.worst < LOGPROBS for one in table)


@pytest.mark.slow
def test_a_small_model_says_the_same_through_mlx(random_checkpoint, tmp_path):
    """MLX takes a second for a token of a real model on a CPU: bytes, and 16 tokens instead of 64."""
    pytest.importorskip("mlx_lm", reason="MLX is not installed")
    model = random_checkpoint.random_model("qwen2", scale=CALM)
    folder = random_checkpoint.write_checkpoint(tmp_path / "m", model)
    file = random_checkpoint.write_gguf(tmp_path / "f32.gguf", model)
    llama = LlamaCpp((file,), read_header(file), LoadOptions(**LLAMA, flash_attention=False))
    prompts = [llama.vocabulary.encode(text) for text in PROMPTS]
    reference = replies(llama, prompts, 16)
    chosen = LoadOptions(context=256, threads=1, backend="mlx", dtype="f32")
    mlx = open_backend([folder / "model.safetensors"], chosen).backend
    table = compare("safetensors, MLX", reference, replies(mlx, prompts, 16), tie=TIE)
    print(f"\nqwen2, bytes, 20 prompts of 16 tokens, next to F32 GGUF through llama.cpp:\n{table}")
    assert table.worst < LOGPROBS


# A real model


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """SmolLM2 dequantized, as safetensors and as F32 and F16 GGUF: (folder, files)."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder = tmp_path_factory.mktemp("smollm2")
    module = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_path.parent,
        gguf_file=smollm2_path.name,
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    # To F16's numbers first: then all three files hold the very same weights.
    for parameter in module.parameters():
        parameter.data = parameter.data.half().float()
    module.save_pretrained(folder)
    files = {f"{kind} GGUF, llama.cpp": folder / f"{kind}.gguf" for kind in ("F32", "F16")}
    for name, path in files.items():
        rewrite(smollm2_path, path, half=name.startswith("F16"))
    return folder, files


def rewrite(source: Path, target: Path, *, half: bool) -> None:
    """A GGUF file with its matrices in F16 or F32 instead."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        inner = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float16)
        writer.add_tensor(tensor.name, values if half and values.ndim > 1 else values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.slow
def test_smollm2_says_the_same_on_all_backends(smollm2):
    """The safetensors have no tokenizer of their own here: ids are llama.cpp's, which is what a backend is given."""
    from stillhouse.backends.pytorch import PyTorch
    from stillhouse.backends.pytorch_load import open_pytorch

    transformers = pytest.importorskip("transformers")
    folder, files = smollm2
    said: dict[str, list[Said]] = {}
    for name, path in files.items():
        options = LoadOptions(**LLAMA, flash_attention=None if "F16" in name else False)
        llama = LlamaCpp((path,), read_header(path), options)
        prompts = [llama.vocabulary.encode(text) for text in PROMPTS]
        said[name] = replies(llama, prompts, 64)
    options = LoadOptions(context=256, threads=1, gpu_layers=0, dtype="f32")
    through_gguf, _ = open_pytorch((files["F16 GGUF, llama.cpp"],), options)
    vocabulary = through_gguf.vocabulary
    said["F16 GGUF, PyTorch"] = replies(through_gguf, prompts, 64)
    module = transformers.AutoModelForCausalLM.from_pretrained(folder)
    said["safetensors, PyTorch"] = replies(PyTorch(module, vocabulary, context=256, own=True), prompts, 64)
    reference = said.pop("safetensors, PyTorch")
    table = [compare(name, reference, other, tie=TIE) for name, other in said.items()]
    print("\nSmolLM2-135M, 20 prompts of 64 tokens, next to safetensors through PyTorch in float32:")
    print(*table, sep="\n")
    # llama.cpp rounds tokens to F16 too, where weights are: that is more than the weights' own rounding.
    assert all(one.worst < (MORE if "F16 GGUF, llama" in one.name else LOGPROBS) for one in table)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
