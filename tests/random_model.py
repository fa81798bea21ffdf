"""A llama of two blocks with random weights and a vocabulary of bytes: real llama.cpp in a millisecond a step."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

CONTROL = ("<|begin|>", "<|end|>", "<｜User｜>", "<｜Assistant｜>")
TAGS = ("<think>", "</think>")  # user-defined, as in R1's vocabularies
WIDTH, BLOCKS, HEADS, FORWARD = 64, 2, 2, 128


def write_model(
    path: Path,
    *,
    context: int = 2048,
    norm: float = 1.0,
    seed: int = 0,
    architecture: str = "llama",
    kv_heads: int = HEADS,
    forward: int = FORWARD,
) -> Path:
    """A GGUF file of half a megabyte. The weights are large, so that replies are lively and greedy choices clear."""
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(BLOCKS)
    writer.add_context_length(context)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(forward)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = [*_byte_names(), *CONTROL, *TAGS]
    kinds = [gguf.TokenType.NORMAL] * 256
    kinds += [gguf.TokenType.CONTROL] * len(CONTROL) + [gguf.TokenType.USER_DEFINED] * len(TAGS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["Ā ā"])  # one at least; of two bytes that no text has
    writer.add_bos_token_id(tokens.index("<|begin|>"))
    writer.add_eos_token_id(tokens.index("<|end|>"))
    writer.add_add_bos_token(True)

    def matrix(name: str, rows: int, columns: int, scale: float = 1.0) -> None:
        weights = random.standard_normal((rows, columns)) * scale * columns**-0.5
        writer.add_tensor(name, weights.astype(np.float32))

    def ones(name: str) -> None:
        writer.add_tensor(name, np.full(WIDTH, norm, np.float32))

    matrix("token_embd.weight", len(tokens), WIDTH, 8.0)
    ones("output_norm.weight")
    matrix("output.weight", len(tokens), WIDTH, 3.0)
    for block in range(BLOCKS):
        prefix = f"blk.{block}."
        ones(prefix + "attn_norm.weight")
        ones(prefix + "ffn_norm.weight")
        for part in ("q", "k", "v", "output"):
            rows = WIDTH * kv_heads // HEADS if part in "kv" else WIDTH
            matrix(f"{prefix}attn_{part}.weight", rows, WIDTH, 2.0)
            if architecture == "qwen2" and part != "output":
                writer.add_tensor(f"{prefix}attn_{part}.bias", random.standard_normal(rows).astype(np.float32))
        matrix(prefix + "ffn_gate.weight", forward, WIDTH, 2.0)
        matrix(prefix + "ffn_up.weight", forward, WIDTH, 2.0)
        matrix(prefix + "ffn_down.weight", WIDTH, forward, 2.0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_adapter(path: Path, *, seed: int = 1) -> Path:
    """A LoRA adapter for such a model, of rank 4, on the queries of its first block."""
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    writer.add_tensor("blk.0.attn_q.weight.lora_a", random.standard_normal((4, WIDTH)).astype(np.float32))
    writer.add_tensor("blk.0.attn_q.weight.lora_b", random.standard_normal((WIDTH, 4)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _byte_names() -> list[str]:
    """GPT-2's names for the 256 bytes: printable ones are themselves, the others come from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
