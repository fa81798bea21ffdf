"""Checkpoints with random weights, a few kilobytes each: what the tests of the analysis read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

CONFIG: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 50,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 256,
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 1,
}
FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def write_checkpoint(folder: Path, family: str = "llama", *, tied: bool = False, seed: int = 0, **changes: Any) -> Path:
    """A folder with `config.json` and one file of F32 weights."""
    config = CONFIG | {"model_type": family, "architectures": [FAMILIES[family]], "tie_word_embeddings": tied} | changes
    random = np.random.default_rng(seed)
    width, head = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    weights: dict[str, np.ndarray] = {}

    def matrix(name: str, rows: int, cols: int, size: float = 1.0) -> None:
        weights[f"{name}.weight"] = (random.standard_normal((rows, cols)) * size * cols**-0.5).astype(np.float32)

    def vector(name: str, count: int, kind: str = "weight") -> None:
        around = 1.0 if kind == "weight" else 0.0
        weights[f"{name}.{kind}"] = (around + 0.1 * random.standard_normal(count)).astype(np.float32)

    matrix("model.embed_tokens", config["vocab_size"], width, 2.0)
    vector("model.norm", width)
    if not tied:
        matrix("lm_head", config["vocab_size"], width, 2.0)
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}."
        vector(layer + "input_layernorm", width)
        vector(layer + "post_attention_layernorm", width)
        for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            matrix(f"{layer}self_attn.{name}", rows, width, 1.5)
            if family == "qwen2":
                vector(f"{layer}self_attn.{name}", rows, "bias")
        if family == "qwen3":
            vector(f"{layer}self_attn.q_norm", head)
            vector(f"{layer}self_attn.k_norm", head)
        matrix(f"{layer}self_attn.o_proj", width, queries)
        matrix(f"{layer}mlp.gate_proj", config["intermediate_size"], width, 1.5)
        matrix(f"{layer}mlp.up_proj", config["intermediate_size"], width, 1.5)
        matrix(f"{layer}mlp.down_proj", width, config["intermediate_size"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
