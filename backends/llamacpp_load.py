"""A GGUF file into memory: what fits, the model, its adapters, its context. Knows nothing of requests."""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# llama-cpp-python's stubs make every handle optional and every integer a C type.

from __future__ import annotations

import ctypes
from collections import deque
from pathlib import Path

import llama_cpp as C

from ..r1.errors import BadModelFile, UserError
from ..r1.gguf import Header, kv_bytes_per_token
from . import machine, memory
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
_PADDING = 256


def fit(header: Header, weights: int, options: LoadOptions) -> memory.Fit:
    """Choose the context and the KV cache, or say why what was asked for cannot be had."""
    if options.kv_type not in _KV_TYPES:
        raise UserError(f"there is no KV cache type {options.kv_type!r}", f"choose one of {', '.join(_KV_TYPES)}")
    bits = _KV_TYPES[options.kv_type][1]
    need = memory.Need(
        weights,
        kv_bytes_per_token(header, bits, bits),
        header.context_length,
        less="with --kv-type q8_0 (half as much)" if bits > 8.5 else "",
    )
    # On a GPU the driver says what fits; the RAM is no measure of it.
    return memory.fit(need, 1 << 62 if _offloads(options) else machine.free_memory(), options)


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


def make_context(model: C.llama_model_p, options: LoadOptions, fitted: memory.Fit, sequences: int) -> C.llama_context_p:
    """Allocate the KV cache and the compute buffers. Raises `UserError`."""
    params = C.llama_context_default_params()
    # llama.cpp rounds a part up to 256; told beforehand, the parts are never smaller than a context.
    padded = -(-fitted.context // _PADDING) * _PADDING
    params.n_ctx = options.parallel * padded if fitted.partitioned else fitted.cache_tokens
    params.n_batch = params.n_ubatch = options.batch_tokens
    params.n_seq_max = params.n_outputs_max = sequences
    threads = options.threads or machine.compute_threads()
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
    _load_compute_libraries()


def _load_compute_libraries() -> None:
    """Where llama.cpp was built for every CPU, each kind has a library of its own: have ggml take the best."""
    folder = Path(C.__file__).parent / "lib"
    library = folder / "libggml.so.0"  # the one that libllama is linked to; `libggml.so` beside it is a copy
    if library.is_file():
        ggml = ctypes.CDLL(str(library))
        ggml.ggml_backend_reg_count.restype = ctypes.c_size_t
        if not ggml.ggml_backend_reg_count():
            ggml.ggml_backend_load_all_from_path(str(folder).encode())


def last_words() -> str:
    """The first complaint of a failed call: what follows are its consequences."""
    last = _complaints[-1] if _complaints else "no reason given"
    words = next((line for line in _complaints if "error" in line.lower() or "fail" in line.lower()), last)
    return words.split(": ", 1)[-1] if words.startswith("llama_") else words
