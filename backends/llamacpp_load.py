"""A GGUF file into memory: what fits, the model, its adapters, its context. Knows nothing of requests."""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# llama-cpp-python's stubs make every handle optional and every integer a C type.

from __future__ import annotations

import ctypes
from collections import deque
from pathlib import Path
from typing import NamedTuple

import llama_cpp as C

from ..r1.errors import BadModelFile, UserError
from ..r1.gguf import Header, kv_bytes_per_token
from . import machine
from .base import LoadOptions

_KV_TYPES = {  # name -> (ggml type, bits a value)
    "f32": (0, 32),
    "f16": (1, 16),
    "bf16": (30, 16),
    "q8_0": (8, 8.5),
    "q5_1": (7, 6),
    "q5_0": (6, 5.5),
    "q4_1": (3, 5),
    "q4_0": (2, 4.5),
    "iq4_nl": (20, 4.5),
}
_MOST_DEFAULT_CONTEXT = 32_768  # DeepSeek's longest reply; a model's own 131,072 would cost gigabytes that few use
_PADDING = 256
_COMPUTE_RESERVE = 0.05  # of the weights, for activations and scratch buffers: an allowance, not a measurement


class Fit(NamedTuple):
    """The context and the KV cache that a model gets."""

    context: int  # tokens a request may have
    cache_tokens: int  # tokens of all requests together
    partitioned: bool  # every place in the batch has a context of its own; else all share one pool


def fit(header: Header, weights: int, options: LoadOptions) -> Fit:
    """Choose the context and the KV cache, or say why what was asked for cannot be had."""
    trained = header.context_length or _MOST_DEFAULT_CONTEXT
    if options.context and options.context > trained:
        raise UserError(
            f"--context {options.context} is more than the {trained} tokens this model was trained to read",
            f"serve with --context {trained} or less",
        )
    if options.kv_type not in _KV_TYPES:
        raise UserError(f"there is no KV cache type {options.kv_type!r}", f"choose one of {', '.join(_KV_TYPES)}")
    bits = _KV_TYPES[options.kv_type][1]
    per_token = max(1, kv_bytes_per_token(header, bits, bits))
    # On a GPU the driver says what fits; the RAM is no measure of it.
    free = 1 << 62 if _offloads(options) else machine.free_memory()
    budget = int(free - weights * (1 + _COMPUTE_RESERVE))
    if budget < 512 * per_token:
        raise UserError(
            f"the model needs {_gb(weights)} of memory and {_gb(free)} are free",
            "close other programs, or choose a smaller model or quantization",
        )
    most = budget // per_token
    asked = max(options.context or 0, options.cache_tokens or 0)
    if asked > most:
        raise UserError(
            f"a KV cache for {asked} tokens needs {_gb(asked * per_token)} of memory and {_gb(budget)} are free beside "
            "the weights",
            f"serve with --{'context' if options.context == asked else 'cache-tokens'} {most // 256 * 256} or less"
            + (", or with --kv-type q8_0 (half as much)" if bits > 8.5 else ""),
        )
    context = options.context or min(trained, _MOST_DEFAULT_CONTEXT)
    while context > max(512, most):
        context //= 2
    shared = max(context, min(options.parallel * context, _MOST_DEFAULT_CONTEXT, most // 4))
    cells = max(context, options.cache_tokens or shared)
    return Fit(context, cells, partitioned=cells >= options.parallel * context)


def _offloads(options: LoadOptions) -> bool:
    return options.gpu_layers != 0 and bool(C.llama_supports_gpu_offload())


def load_model(paths: tuple[Path, ...], options: LoadOptions) -> C.llama_model_p:
    """Read the weights. Raises `BadModelFile` in llama.cpp's words."""
    params = C.llama_model_default_params()
    params.n_gpu_layers = (-1 if options.gpu_layers is None else options.gpu_layers) if _offloads(options) else 0
    params.load_mode = C.LLAMA_LOAD_MODE_MMAP if options.mmap else C.LLAMA_LOAD_MODE_NONE
    names = (ctypes.c_char_p * len(paths))(*(str(path).encode() for path in paths))
    model = C.llama_model_load_from_splits(names, len(paths), params)
    if not model:
        raise BadModelFile(
            f"llama.cpp cannot load {paths[0].name}: {last_words()}", "stillhouse show tells what is in it"
        )
    return model


def load_adapter(model: C.llama_model_p, path: Path) -> C.llama_adapter_lora_p:
    """Read a LoRA adapter for this model. Raises `BadModelFile`."""
    if path.is_dir():  # of a training run
        path /= "adapter.gguf"
    if not path.is_file():
        raise BadModelFile(f"there is no LoRA adapter {path}", "--lora takes a GGUF file and, after =, its scale")
    adapter = C.llama_adapter_lora_init(model, str(path).encode())
    if not adapter:
        raise BadModelFile(
            f"llama.cpp cannot load the LoRA adapter {path.name}: {last_words()}",
            "it must be made for this very model",
        )
    return adapter


def make_context(model: C.llama_model_p, options: LoadOptions, fitted: Fit, sequences: int) -> C.llama_context_p:
    """Allocate the KV cache and the compute buffers. Raises `UserError`."""
    params = C.llama_context_default_params()
    # llama.cpp rounds a part up to 256; told beforehand, the parts are never smaller than a context.
    padded = -(-fitted.context // _PADDING) * _PADDING
    params.n_ctx = options.parallel * padded if fitted.partitioned else fitted.cache_tokens
    params.n_batch = params.n_ubatch = options.batch_tokens
    params.n_seq_max = params.n_outputs_max = sequences
    threads = options.threads or machine.physical_cores()
    params.n_threads = params.n_threads_batch = threads
    params.type_k = params.type_v = _KV_TYPES[options.kv_type][0]
    params.flash_attn_type = -1 if options.flash_attention is None else int(options.flash_attention)
    params.kv_unified = not fitted.partitioned
    params.swa_full = True  # a sliding window would forget the prefixes that are to be shared
    context = C.llama_init_from_model(model, params)
    if not context:
        raise UserError(
            f"llama.cpp cannot make a context of {fitted.cache_tokens} tokens: {last_words()}",
            "try a smaller --context, --kv-type f16, or --flash-attention on",
        )
    return context


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


# llama.cpp reports through a log callback only: keep what it complained about, print nothing.
_complaints: deque[str] = deque(maxlen=8)


@C.llama_log_callback
def _listen(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    if level in (3, 4) and text.strip():  # GGML_LOG_LEVEL_WARN, GGML_LOG_LEVEL_ERROR
        _complaints.append(text.decode(errors="replace").strip())


def silence() -> None:
    """Have llama.cpp print nothing, and forget what it complained about before."""
    _complaints.clear()
    C.llama_log_set(_listen, ctypes.c_void_p(0))
    C.llama_backend_init()


def last_words() -> str:
    """The first complaint of a failed call: what follows are its consequences."""
    last = _complaints[-1] if _complaints else "no reason given"
    words = next((line for line in _complaints if "error" in line.lower() or "fail" in line.lower()), last)
    return words.split(": ", 1)[-1] if words.startswith("llama_") else words
