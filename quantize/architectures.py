"""The architectures that can be written: what Hugging Face calls a tensor, what GGUF calls it, and how they differ.

Three families cover all R1 distills: Qwen2, Qwen3 and Llama. A new one needs a line in `ARCHITECTURES` and, where its
tensors have other names, lines in the tables. It reads no weights. Source: llama.cpp's converter (conversion/llama.py,
qwen.py, base.py), whose output the tests compare with.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import SourceInvalid

Metadata = dict[str, Any]

OUTSIDE = {  # Hugging Face's name -> GGUF's
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
INSIDE = {  # the same in a block, without `model.layers.N.` and `blk.N.`, and without `.weight` or `.bias`
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
BACK = {gguf: hf for hf, gguf in INSIDE.items()}
_hf = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_gguf = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class Architecture:
    """A family of models."""

    name: str  # GGUF's `general.architecture`
    classes: tuple[str, ...]  # config.json's `architectures`
    permutes: bool  # GGUF wants the two halves of each query and key head interleaved
    block: tuple[str, ...]  # what every block has besides the usual tensors


ARCHITECTURES = (
    Architecture("qwen2", ("Qwen2ForCausalLM",), False, ("attn_q.bias", "attn_k.bias", "attn_v.bias")),
    Architecture("qwen3", ("Qwen3ForCausalLM",), False, ("attn_q_norm.weight", "attn_k_norm.weight")),
    Architecture("llama", ("LlamaForCausalLM",), True, ()),
)
USUAL = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")


def architecture_of(config: dict[str, Any]) -> Architecture:
    """Which family a configuration is of. Raises `SourceInvalid`."""
    classes = config.get("architectures") or [str(config.get("model_type", "none"))]
    for architecture in ARCHITECTURES:
        if any(name in architecture.classes for name in classes):
            return architecture
    known = ", ".join(name for architecture in ARCHITECTURES for name in architecture.classes)
    raise SourceInvalid(
        f"the model is a {classes[0]}; {known} can be quantized",
        "convert others with llama.cpp's convert_hf_to_gguf.py, and quantize the GGUF file it writes",
    )


def gguf_name(hf_name: str) -> str | None:
    """GGUF's name of a tensor; `None` for one that it does not keep.

    >>> gguf_name("model.layers.3.self_attn.q_proj.weight")
    'blk.3.attn_q.weight'
    """
    if hf_name in OUTSIDE:
        return OUTSIDE[hf_name]
    found = _hf.fullmatch(hf_name)
    return f"blk.{found[1]}.{INSIDE[found[2]]}.{found[3]}" if found and found[2] in INSIDE else None


def hf_name(gguf_name: str) -> str | None:
    """Hugging Face's name of a tensor; `None` for one that only GGUF has.

    >>> hf_name("blk.3.attn_q.weight")
    'model.layers.3.self_attn.q_proj.weight'
    """
    for hf, gguf in OUTSIDE.items():
        if gguf == gguf_name:
            return hf
    found = _gguf.fullmatch(gguf_name)
    return f"model.layers.{found[1]}.{BACK[found[2]]}.{found[3]}" if found and found[2] in BACK else None


def gguf_names(config: dict[str, Any], present: Iterable[str]) -> dict[str, str]:
    """GGUF name -> Hugging Face name of all that has to be written. Raises `SourceInvalid` where one is missing."""
    architecture, names = architecture_of(config), {}
    for hf in present:
        name = gguf_name(hf)
        if name is None and not hf.endswith(".rotary_emb.inv_freq"):
            raise SourceInvalid(
                f"the tensor {hf} has no place in a GGUF of {architecture.name}",
                "adapters have to be merged first; other extensions of the model cannot be written",
            )
        if name is not None and not (name == "output.weight" and config.get("tie_word_embeddings")):
            names[name] = hf
    blocks = range(config["num_hidden_layers"])
    needed = ["token_embd.weight", "output_norm.weight"]
    needed += [f"blk.{i}.{part}" for i in blocks for part in (*(f"{p}.weight" for p in USUAL), *architecture.block)]
    for name in needed:
        if name not in names:
            raise SourceInvalid(f"the checkpoint has no {hf_name(name)}", "it is incomplete: download it again")
    extra = [name for name in names if name.startswith("blk.") and int(name.split(".")[1]) not in blocks]
    if extra:
        raise SourceInvalid(
            f"the checkpoint has {hf_name(extra[0])}, and config.json says {len(blocks)} layers",
            "config.json and the weights are of two models",
        )
    return names


def order(name: str) -> tuple[int, str]:
    """llama.cpp's own order of tensors: what is outside of the blocks first, then block by block."""
    found = _gguf.match(name)
    return (int(found[1]) if found else -1, name)


def permutation(config: dict[str, Any], gguf_name: str, rows: int) -> NDArray[np.intp] | None:
    """For each row of a GGUF tensor the row of Hugging Face's that it is; `None` = the same one.

    Llama's rotary positions turn neighbours in GGUF, and a head's first half with its second in Hugging Face's.
    """
    part = gguf_name.rpartition(".")[0].rpartition(".")[2]
    if not architecture_of(config).permutes or part not in ("attn_q", "attn_k"):
        return None
    heads = config["num_attention_heads"]
    if part == "attn_k":
        heads = config.get("num_key_value_heads") or heads
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)


def model_metadata(config: dict[str, Any]) -> Metadata:
    """The keys that describe the network. Raises `SourceInvalid` where one is missing or cannot be written."""
    architecture = architecture_of(config)
    a = architecture.name
    try:
        found: Metadata = {
            f"{a}.block_count": config["num_hidden_layers"],
            f"{a}.context_length": config["max_position_embeddings"],
            f"{a}.embedding_length": config["hidden_size"],
            f"{a}.feed_forward_length": config["intermediate_size"],
            f"{a}.attention.head_count": config["num_attention_heads"],
            f"{a}.attention.head_count_kv": config.get("num_key_value_heads") or config["num_attention_heads"],
            f"{a}.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        }
        if a != "qwen2" or config.get("head_dim"):
            found |= {f"{a}.attention.key_length": head_size(config), f"{a}.attention.value_length": head_size(config)}
        if a == "llama":
            found |= {"llama.vocab_size": config["vocab_size"], "llama.rope.dimension_count": head_size(config)}
    except KeyError as error:
        raise SourceInvalid(f"config.json does not say {error}", "take the config.json of the original model") from None
    return found | _rope_metadata(a, rope_parameters(config))


def head_size(config: dict[str, Any]) -> int:
    """How wide one attention head is."""
    if config.get("head_dim"):
        return config["head_dim"]
    if architecture_of(config).name == "qwen3":
        return 128  # transformers' default, which the smallest of them rely on
    return config["hidden_size"] // config["num_attention_heads"]


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """How positions are turned into angles, as transformers 5 writes it and as version 4 did."""
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    found.setdefault("rope_type", found.pop("type", "default"))
    found.setdefault("rope_theta", config.get("rope_theta") or 10_000.0)
    found.setdefault("original_max_position_embeddings", config.get("original_max_position_embeddings"))
    return {key: value for key, value in found.items() if value is not None}


def _rope_metadata(a: str, rope: dict[str, Any]) -> Metadata:
    found: Metadata = {}
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        found[f"{a}.rope.scaling.type"] = kind
        found[f"{a}.rope.scaling.factor"] = float(rope["factor"])
    if kind == "yarn":
        found[f"{a}.rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        for ours, theirs in (
            *(("ext_factor", "extrapolation_factor"), ("attn_factor", "attention_factor")),
            *(("beta_fast", "beta_fast"), ("beta_slow", "beta_slow")),
        ):
            if theirs in rope:
                found[f"{a}.rope.scaling.yarn_{ours}"] = float(rope[theirs])
    if kind not in ("default", "none", "linear", "yarn", "llama3") or (kind == "llama3" and a != "llama"):
        raise SourceInvalid(
            f"the model scales its positions by {kind!r}, which is not written for {a}",
            "llama.cpp's convert_hf_to_gguf.py may know it; quantize the GGUF file it writes",
        )
    found[f"{a}.rope.freq_base"] = float(rope["rope_theta"])
    return found


def rope_factors(config: dict[str, Any]) -> NDArray[np.float32] | None:
    """By how much Llama 3 slows each frequency: (head / 2,), in a tensor of its own; `None` for all others."""
    rope = rope_parameters(config)
    if rope["rope_type"] != "llama3":
        return None
    f = np.float32
    head = head_size(config)
    exponents = np.arange(0, head, 2, dtype=f) / f(head)
    wavelengths = f(2 * np.pi) * f(rope["rope_theta"]) ** exponents
    factor, low, high = (
        rope.get(key, default) for key, default in (("factor", 8), ("low_freq_factor", 1), ("high_freq_factor", 4))
    )
    context = rope.get("original_max_position_embeddings", 8192)
    smooth = (context / wavelengths - low) / f(high - low)
    between = 1 / ((1 - smooth) / f(factor) + smooth)
    slow, fast = wavelengths > context / low, wavelengths < context / high
    return np.where(fast, f(1), np.where(slow, f(factor), between)).astype(f)
