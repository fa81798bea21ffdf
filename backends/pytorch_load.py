"""A checkpoint or a GGUF file into a PyTorch module: device, type, what fits, and errors in words.

The files have been checked before (`checkpoint.py`, `r1/gguf.py`); what is told here is what only the runtime can know.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..r1.errors import BadModelFile, UserError
from ..r1.gguf import Header, kv_bytes_per_token, read_header
from . import machine
from .base import LoadOptions, Vocabulary
from .checkpoint import Checkpoint
from .hf_vocabulary import read_chat_template, read_vocabulary
from .memory import Need, fit
from .pytorch import PyTorch

_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
_LEAST_CONTEXT = 4096  # a context that nobody asked for is not cut below this to have more places


def open_pytorch(source: Checkpoint | tuple[Path, ...], options: LoadOptions) -> tuple[PyTorch, str | None]:
    """A checkpoint that has been read, or a GGUF file, as a backend, with its chat template.

    Raises `UserError` and `BadModelFile`.
    """
    device = choose_device(options)
    _check_options(options)
    if isinstance(source, Checkpoint):
        return _open_checkpoint(source, device, options)
    return _open_gguf(source, device, options)


def choose_device(options: LoadOptions) -> torch.device:
    """The GPU, where there is one and nobody wants to do without."""
    if options.gpu_layers == 0:
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def choose_dtype(stored: str, device: torch.device, options: LoadOptions) -> torch.dtype:
    """What to compute in, for weights that are stored as "BF16", "F16", "F32" or in fewer bits (anything else).

    A GPU computes in 16 bits. A CPU does where it has instructions for bf16; there, f16 is computed in f32, which loses
    nothing.
    """
    if options.dtype != "auto":
        return _DTYPES[options.dtype]
    if stored == "F32":
        return torch.float32
    if device.type != "cpu":
        return torch.float16 if stored == "F16" else torch.bfloat16
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # pyright: ignore[reportPrivateUsage]
    return torch.bfloat16 if fast and stored != "F16" else torch.float32


def _check_options(options: LoadOptions) -> None:
    if options.dtype != "auto" and options.dtype not in _DTYPES:
        raise UserError(f"there is no type {options.dtype!r} to compute in", f"choose one of {', '.join(_DTYPES)}")
    if options.kv_type not in ("f16", "bf16", "f32"):  # f16 is what nobody asked for: 16 bits where it computes in 16
        raise UserError(
            f"the PyTorch backend keeps its KV cache in the type it computes in, not in {options.kv_type}",
            "leave --kv-type out; GGUF files through llama.cpp can have it quantized",
        )
    if options.loras:
        raise UserError(
            "the PyTorch backend serves no adapters apart from their model",
            "merge the adapter into the checkpoint, or serve both as GGUF through llama.cpp",
        )
    if options.gpu_layers is not None and options.gpu_layers > 0:
        raise UserError(
            "PyTorch has a model on the GPU as a whole or not at all",
            "leave --gpu-layers out, or give 0 for the CPU; llama.cpp can split a GGUF file",
        )


def _open_checkpoint(checkpoint: Checkpoint, device: torch.device, options: LoadOptions) -> tuple[PyTorch, str | None]:
    quantization = checkpoint.quantization
    dtype = choose_dtype(checkpoint.dtype, device, options)
    size = checkpoint.weights_bytes
    if not quantization:
        size = size * dtype.itemsize // _DTYPES[checkpoint.dtype.lower()].itemsize
    per_token = checkpoint.kv_values_per_token * dtype.itemsize
    room = _room(Need(size, per_token, checkpoint.context_length), device, options)
    module = _load(
        checkpoint.folder,
        device,
        dtype=dtype,
        trust_remote_code=options.trust_remote_code,
        use_safetensors=None if options.allow_pickle else True,
        is_quantized=bool(quantization),
    )
    rows = module.get_output_embeddings().weight.shape[0] if not quantization else checkpoint.config["vocab_size"]
    vocabulary = read_vocabulary(checkpoint.folder, rows)
    return _start(module, vocabulary, room, options), read_chat_template(checkpoint.folder)


def _open_gguf(paths: tuple[Path, ...], device: torch.device, options: LoadOptions) -> tuple[PyTorch, str | None]:
    path, *others = paths
    header = read_header(path)
    if others:
        raise UserError(
            "the PyTorch backend reads no GGUF file in parts", "join them (llama-gguf-split --merge), or use llama.cpp"
        )
    dtype = choose_dtype("F16" if header.quantization in ("F16", "F32") else "", device, options)
    bits = 8 * dtype.itemsize
    per_token = kv_bytes_per_token(header, bits, bits)
    need = Need(header.parameters * dtype.itemsize, per_token, header.context_length)
    room = _room(need, device, options)
    vocabulary = _gguf_vocabulary(path)
    module = _load(
        path.parent,
        device,
        dtype=dtype,
        config=_gguf_config(path, header),
        gguf_file=path.name,
        is_quantized=False,
    )
    return _start(module, vocabulary, room, options), header.chat_template


def _gguf_config(path: Path, header: Header) -> Any:
    """The module's settings, with the size of a head, which transformers takes for granted. Raises `BadModelFile`."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except Exception as error:
        raise BadModelFile(
            f"transformers cannot read {path.name}: {_words(error)}", "serve it through llama.cpp"
        ) from None
    head = header.metadata.get(f"{header.architecture}.attention.key_length")
    if isinstance(head, int):
        config.head_dim = head
    return config


def _gguf_vocabulary(path: Path) -> Vocabulary:
    """The vocabulary as llama.cpp reads it: transformers would have to guess how a GGUF file splits text."""
    import llama_cpp as C

    from .llamacpp_load import silence
    from .llamacpp_vocabulary import LlamaVocabulary

    silence()
    params = C.llama_model_default_params()
    params.vocab_only = True
    model = C.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise BadModelFile(f"the vocabulary of {path.name} cannot be read", "stillhouse show tells what is in it")
    return LlamaVocabulary(model)


class _Room(NamedTuple):
    context: int
    places: int  # replies at once


def _room(need: Need, device: torch.device, options: LoadOptions) -> _Room:
    """The context, and how many of them there is memory for: every reply has a whole one of its own.

    Where nobody asked for a context, a shorter one is taken before replies have to wait for each other.
    """
    free, where = _free(device)
    context = fit(need, free, options, where=where).context
    most = int((free - need.weights * (1 + need.allowance)) // max(1, need.per_token))
    if options.cache_tokens:
        most = min(most, max(context, options.cache_tokens))
    while options.context is None and options.parallel * context > most and context // 2 >= _LEAST_CONTEXT:
        context //= 2
    return _Room(context, max(1, min(options.parallel, most // context)))


def _free(device: torch.device) -> tuple[int, str]:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0], "GPU memory"
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory(), "memory for the GPU"
    return machine.free_memory(), "memory"


def _load(folder: Path, device: torch.device, *, is_quantized: bool, **options: Any) -> Any:
    """The module, from files on this disk. Raises `BadModelFile` in transformers' words."""
    import transformers

    name = options.get("gguf_file", folder.name)
    if "gguf_file" in options:
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = transformers.AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, device_map={"": device}, attn_implementation="sdpa", **options
            )
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the weights of {name} do not fit into the GPU's memory: {_words(error)}",
            "choose a smaller model or quantization, or --gpu-layers 0 for the CPU",
        ) from None
    except Exception as error:  # transformers, safetensors and the quantizers raise whatever comes to their mind
        hint = "its quantization may not run on this machine" if is_quantized else "pull it again"
        raise BadModelFile(f"transformers cannot load {name}: {_words(error)}", hint) from None
    return module.eval().requires_grad_(False)


def _start(module: nn.Module, vocabulary: Vocabulary, room: _Room, options: LoadOptions) -> PyTorch:
    torch.set_num_threads(options.threads or machine.compute_threads())
    try:
        return PyTorch(
            module,
            vocabulary,
            context=room.context,
            parallel=room.places,
            batch_tokens=options.batch_tokens,
            own=True,
        )
    except (torch.OutOfMemoryError, RuntimeError) as error:
        raise UserError(
            f"there is no memory for {room.places} contexts of {room.context} tokens: {_words(error)}",
            "lower --context or --parallel",
        ) from None


def _words(error: BaseException) -> str:
    """The first line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]
