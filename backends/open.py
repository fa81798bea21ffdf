"""Files in, a loaded backend out: the only place that chooses one, and the only one that imports runtimes."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..r1.errors import BadModelFile, UserError
from ..r1.gguf import read_header
from .base import Backend, LoadOptions, Vocabulary
from .checkpoint import PICKLES, Checkpoint, read_checkpoint
from .scorer import Scorer

if TYPE_CHECKING:
    from .executor import Executor
    from .hf_vocabulary import HfVocabulary

BACKENDS = ("llama.cpp", "pytorch", "mlx")
_MODULES = {"llama.cpp": ("llama_cpp",), "pytorch": ("torch", "transformers"), "mlx": ("mlx", "mlx_lm")}
INSTALL = {
    "llama.cpp": "pip install llama-cpp-python",
    "pytorch": 'pip install "stillhouse[torch]"',
    "mlx": 'pip install "stillhouse[mlx]"',
}
_QUANTIZERS = {  # transformers' name -> (module, package) that it needs
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"),
    "torchao": ("torchao", "torchao"),
    "gptq": ("gptqmodel", "gptqmodel"),
    "awq": ("gptqmodel", "gptqmodel"),
    "compressed-tensors": ("compressed_tensors", "compressed-tensors"),
}


class Opened(NamedTuple):
    """A model that is ready, and what else its files say about it."""

    backend: Backend
    chat_template: str | None
    begin_text: str  # the begin- and end-of-sequence tokens as templates write them
    end_text: str
    reason: str = ""  # why this backend


class Choice(NamedTuple):
    """A backend, and why this one."""

    backend: str
    reason: str


def open_backend(paths: Sequence[Path], options: LoadOptions) -> Opened:
    """Load a model. Raises `BadModelFile` or `UserError` in words that name the file and the way out."""
    if not paths:
        raise BadModelFile("there is no model file", "name a file, a catalogue entry or a hub repository")
    if paths[0].suffix.lower() == ".gguf":
        choice = choose("gguf", options.backend)
        if choice.backend == "pytorch":
            for path in paths:
                read_header(path)
            return _open_pytorch(tuple(paths), options, choice)
        return _open_llamacpp(tuple(paths), options, choice)
    if paths[0].suffix != ".safetensors" and paths[0].suffix not in PICKLES:
        raise UserError(
            f"{paths[0].name} is neither a GGUF file nor a checkpoint's weights",
            "name a .gguf file, or a folder with config.json and safetensors",
        )
    checkpoint = read_checkpoint(paths, options)
    choice = choose(kind_of(checkpoint), options.backend)
    if choice.backend == "pytorch":
        _check_quantizer(checkpoint)
        return _open_pytorch(checkpoint, options, choice)
    return _open_mlx(checkpoint, options, choice)


def open_echo(parallel: int = 4, context: int | None = None) -> Opened:
    """The backend without a model, for trying clients."""
    from .echo import Echo

    return Opened(Echo(parallel=parallel, context_length=context or 4096), None, "<|begin|>", "<|end|>")


class Words(NamedTuple):
    """How a model reads text."""

    vocabulary: Vocabulary
    chat_template: str | None
    begin_text: str
    end_text: str


def open_vocabulary(paths: Sequence[Path]) -> Words:
    """The vocabulary of a GGUF model without its weights; it stays in memory."""
    header = read_header(paths[0])
    from .llamacpp_vocabulary import load_vocabulary

    vocabulary = load_vocabulary(paths[0])
    return Words(vocabulary, header.chat_template, *vocabulary.boundary_texts())


def open_module(module: Any, words: Words, *, context: int, parallel: int) -> Opened:
    """A PyTorch module that stays the caller's, who may train it between requests; the same bits every time."""
    try:
        from .pytorch import PyTorch
    except ImportError as error:
        raise UserError(f"PyTorch cannot be loaded: {error}", INSTALL["pytorch"]) from None
    backend = PyTorch(module, words.vocabulary, context=context, parallel=parallel, steady=True)
    return Opened(backend, words.chat_template, words.begin_text, words.end_text, "the module is in memory")


def open_scorer(paths: Sequence[Path], options: LoadOptions, *, context: int) -> Scorer:
    """Load a model to read texts of at most `context` tokens with: a GGUF file, or a checkpoint's safetensors."""
    if not paths:
        raise BadModelFile("there is no model file", "name a file, a catalogue entry or a hub repository")
    if paths[0].suffix != ".safetensors":
        for path in paths:
            read_header(path)  # every byte count is checked before any C code reads the file
        from .llamacpp_scorer import LlamaScorer

        return LlamaScorer(tuple(paths), options, context=context)
    try:
        from .pytorch_scorer import TorchScorer
    except ImportError as error:
        raise UserError(f"PyTorch or transformers is not installed: {error}", INSTALL["pytorch"]) from None
    return TorchScorer(paths[0].parent, options)


def open_watched(path: Path, callback: Any, *, threads: int, context: int) -> Scorer:
    """A GGUF model whose operations are shown to one of ggml's evaluation callbacks; in memory, not on a GPU."""
    read_header(path)
    from .llamacpp_scorer import LlamaScorer

    options = LoadOptions(threads=threads, gpu_layers=0)
    return LlamaScorer((path,), options, context=context, watch=callback)


def kind_of(checkpoint: Checkpoint) -> str:
    """What decides about the backend of a checkpoint: "16-bit", "pickle", "mlx", or how it is quantized."""
    if checkpoint.weights[0].suffix in PICKLES:
        return "pickle"
    return checkpoint.quantization.method if checkpoint.quantization else "16-bit"


def _is_installed(backend: str) -> bool:
    return all(find_spec(module) for module in _MODULES[backend])


def _is_apple_chip() -> bool:
    return platform.system() == "Darwin" and platform.machine() == "arm64"


def choose(
    kind: str,
    asked: str = "auto",
    *,
    is_installed: Callable[[str], bool] = _is_installed,
    is_apple_chip: Callable[[], bool] = _is_apple_chip,
) -> Choice:
    """The backend for a kind of file, by what was asked for, what is installed, and the machine. Raises `UserError`."""
    apple = is_apple_chip()
    able, reason = {
        "gguf": (("llama.cpp", "pytorch"), "the file is a GGUF"),
        "mlx": (("mlx",), "the weights are in MLX's own format"),
        "pickle": (("pytorch",), "the weights are a pickle"),
        "16-bit": (("mlx", "pytorch") if apple else ("pytorch", "mlx"), "it is a checkpoint folder"),
    }.get(kind, (("pytorch",), f"the weights are quantized by {kind}"))
    if kind == "16-bit" and apple:
        reason += ", and this is an Apple chip"
    if asked != "auto":
        if asked not in able:
            raise UserError(
                f"{asked} cannot serve this: {reason}",
                f"leave --backend out, or choose {' or '.join(able)}",
            )
        if not is_installed(asked):
            raise UserError(f"{asked} is not installed", INSTALL[asked])
        return Choice(asked, "asked for")
    for backend in able:
        if is_installed(backend):
            missing = "" if backend == able[0] else f"; {able[0]} is not installed"
            return Choice(backend, reason + missing)
    raise UserError(f"{able[0]} is not installed, and {reason}", INSTALL[able[0]])


def _check_quantizer(checkpoint: Checkpoint) -> None:
    method = checkpoint.quantization.method if checkpoint.quantization else ""
    module, package = _QUANTIZERS.get(method, ("", ""))
    if module and find_spec(module) is None:
        raise UserError(
            f"{checkpoint.folder.name} is quantized by {method}, and {package} is not installed",
            f"pip install {package}",
        )


def _open_llamacpp(paths: tuple[Path, ...], options: LoadOptions, choice: Choice) -> Opened:
    headers = [read_header(path) for path in paths]  # every byte count is checked before any C code reads the file
    header = headers[0]
    if not any(part.tensors for part in headers):
        raise BadModelFile(f"{paths[0].name} holds a vocabulary and no weights", "pull the whole model")
    try:
        from .llamacpp import LlamaCpp
    except ImportError as error:
        raise UserError(f"llama.cpp cannot be loaded: {error}", INSTALL["llama.cpp"]) from None
    backend = LlamaCpp(paths, header, options)
    return Opened(backend, header.chat_template, *backend.vocabulary.boundary_texts(), choice.reason)


def open_ranks(paths: Sequence[Path], options: LoadOptions, ranks: Executor) -> Opened:
    """The head's part of a model whose weights the ranks of a cluster have: words and a scheduler. Loads no runtime."""
    checkpoint = read_checkpoint(paths, options)
    return _schedule(checkpoint, _vocabulary_of(checkpoint), ranks, options, "a cluster has the weights")


def _open_mlx(checkpoint: Checkpoint, options: LoadOptions, choice: Choice) -> Opened:
    try:
        from . import mlxlm_load
        from .mlxlm_executor import LocalExecutor
    except ImportError as error:
        raise UserError(f"MLX cannot be loaded: {error}", INSTALL["mlx"]) from None
    mlxlm_load.choose_device(options)
    fitted = mlxlm_load.fit(checkpoint, options)
    vocabulary = _vocabulary_of(checkpoint)  # what it may complain of is told before the weights are read
    executor = LocalExecutor(mlxlm_load.load(checkpoint, options), fitted)
    return _schedule(checkpoint, vocabulary, executor, options, choice.reason)


def _vocabulary_of(checkpoint: Checkpoint) -> HfVocabulary:
    from .hf_vocabulary import read_vocabulary

    return read_vocabulary(checkpoint.folder, checkpoint.config.get("vocab_size"))


def _schedule(
    checkpoint: Checkpoint, vocabulary: HfVocabulary, executor: Executor, options: LoadOptions, reason: str
) -> Opened:
    from .hf_vocabulary import read_chat_template
    from .mlxlm import MlxLm

    backend = MlxLm(executor, vocabulary, options)
    return Opened(backend, read_chat_template(checkpoint.folder), *vocabulary.boundary_texts(), reason)


def _open_pytorch(source: Checkpoint | tuple[Path, ...], options: LoadOptions, choice: Choice) -> Opened:
    try:
        from .pytorch_load import open_pytorch
    except ImportError as error:
        raise UserError(f"PyTorch cannot be loaded: {error}", INSTALL["pytorch"]) from None
    backend, template = open_pytorch(source, options)
    vocabulary: Any = backend.vocabulary  # of one of two kinds, both of which know them
    begin_text, end_text = vocabulary.boundary_texts()
    return Opened(backend, template, begin_text, end_text, choice.reason)
