"""Checkpoints of two or three blocks with random weights, as Hugging Face's folders have them: Qwen2, Qwen3, Llama.

Rows are multiples of 256, so that every type of ggml fits; `hidden=` makes others. Written by hand: no torch.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<|endoftext|>")
TAGS = ("<think>", "</think>")
MERGES = (("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "t"), ("Ġt", "he"), ("i", "n"), ("1", "2"))
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% else %}<｜Assistant｜>{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)
CLASSES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0},
    **{"high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
}


def write_checkpoint(
    folder: Path,
    family: str = "qwen2",
    *,
    tied: bool = False,
    rope: dict[str, Any] | None = None,
    hidden: int = 256,
    forward: int = 512,
    blocks: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    spare: int = 10,
    dtype: str = "BF16",
    shards: int = 1,
    seed: int = 0,
) -> Path:
    """A folder with a configuration, a tokenizer and weights; `spare` rows of the embedding are no token's."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = write_tokenizer(folder) + spare
    head = hidden // heads
    config: dict[str, Any] = {
        "architectures": [CLASSES[family]],
        "model_type": family,
        "hidden_size": hidden,
        "intermediate_size": forward,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_parameters": rope or {"rope_type": "default", "rope_theta": 10000.0},
        "vocab_size": tokens,
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 264,
        "eos_token_id": 265,
    }
    if family == "qwen3":
        config["head_dim"] = head
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (tokens, hidden), "model.norm.weight": (hidden,)}
    for block in range(blocks):
        prefix = f"model.layers.{block}."
        for part, rows, cols in (
            ("self_attn.q_proj", heads * head, hidden),
            ("self_attn.k_proj", kv_heads * head, hidden),
            ("self_attn.v_proj", kv_heads * head, hidden),
            ("self_attn.o_proj", hidden, heads * head),
            ("mlp.gate_proj", forward, hidden),
            ("mlp.up_proj", forward, hidden),
            ("mlp.down_proj", hidden, forward),
        ):
            shapes[f"{prefix}{part}.weight"] = (rows, cols)
            if family == "qwen2" and part[10:] in ("q_proj", "k_proj", "v_proj"):
                shapes[f"{prefix}{part}.bias"] = (rows,)
        shapes[f"{prefix}input_layernorm.weight"] = shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
        if family == "qwen3":
            shapes[f"{prefix}self_attn.q_norm.weight"] = shapes[f"{prefix}self_attn.k_norm.weight"] = (head,)
    if not tied:
        shapes["lm_head.weight"] = (tokens, hidden)
    random = np.random.default_rng(seed)
    tensors = {name: _weights(random, name, shape) for name, shape in shapes.items()}
    names = list(tensors)
    groups = [names[i::shards] for i in range(shards)]
    for number, group in enumerate(groups, 1):
        file = "model.safetensors" if shards == 1 else f"model-{number:05}-of-{shards:05}.safetensors"
        write_safetensors(folder / file, {name: tensors[name] for name in group}, dtype)
    if shards > 1:
        where = {n: f"model-{i:05}-of-{shards:05}.safetensors" for i, group in enumerate(groups, 1) for n in group}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def _weights(random: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if "norm" in name:
        return (1 + 0.1 * random.standard_normal(shape)).astype(np.float32)
    if "embed" in name:
        return random.standard_normal(shape).astype(np.float32)
    return (random.standard_t(4, shape) * shape[-1] ** -0.5).astype(np.float32)


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], dtype: str = "BF16") -> None:
    header, data, offset = {}, [], 0
    for name, values in tensors.items():
        raw = to_bytes(values, dtype)
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [offset, offset + len(raw)]}
        data.append(raw)
        offset += len(raw)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data))


def to_bytes(values: np.ndarray, dtype: str) -> bytes:
    if dtype == "BF16":  # cut off, not rounded: nobody compares with what was before
        return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return values.astype({"F16": np.float16, "F32": np.float32}[dtype]).tobytes()


def resize_vocabulary(path: Path, tokens: int) -> None:
    """Give a checkpoint of one file an embedding for so many tokens, and tie the output to it."""
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header, tensors = json.loads(data[8 : 8 + length]), {}
    for name, entry in header.items():
        raw = np.frombuffer(
            data,
            np.uint16,
            (entry["data_offsets"][1] - entry["data_offsets"][0]) // 2,
            8 + length + entry["data_offsets"][0],
        )
        tensors[name] = (raw.astype(np.uint32) << 16).view(np.float32).reshape(entry["shape"])
    tensors.pop("lm_head.weight", None)
    wide = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = np.resize(wide, (tokens, wide.shape[1]))
    write_safetensors(path, tensors)


def write_tokenizer(folder: Path, words: str = WORDS) -> int:
    """A byte-level BPE with a few merges and R1's special tokens; returns how many tokens."""
    texts = [*_byte_names(), *("".join(merge) for merge in MERGES)]
    vocabulary = {text: number for number, text in enumerate(texts)}
    first = len(texts)
    special = [*CONTROL, *TAGS]
    added = [
        {
            **{"id": first + number, "content": text, "single_word": False, "lstrip": False, "rstrip": False},
            **{"normalized": False, "special": text in CONTROL[:2] + CONTROL[4:]},
        }
        for number, text in enumerate(special)
    ]
    begin = {"SpecialToken": {"id": CONTROL[0], "type_id": 0}}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [begin, {"Sequence": {"id": "A", "type_id": 0}}, begin, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {CONTROL[0]: {"id": CONTROL[0], "ids": [first], "tokens": [CONTROL[0]]}},
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            **{"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": ""},
            **{"end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False},
            **{"vocab": vocabulary, "merges": [list(merge) for merge in MERGES]},
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    options = {
        **{"bos_token": CONTROL[0], "eos_token": CONTROL[1], "pad_token": CONTROL[1], "chat_template": TEMPLATE},
        **{"add_bos_token": True, "add_eos_token": False, "tokenizer_class": "PreTrainedTokenizerFast"},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(options, ensure_ascii=False), encoding="utf-8")
    return first + len(special)


def write_r1_tokenizer(vocabulary: Path, folder: Path) -> int:
    """R1's real tokenizer as DeepSeek's folder has it, from the metadata of a GGUF file; returns how many tokens."""
    import gguf

    fields = gguf.GGUFReader(vocabulary).fields

    def value(key: str) -> Any:
        return fields[f"tokenizer.{key}"].contents()

    tokens, kinds = value("ggml.tokens"), value("ggml.token_type")
    texts = {number: text for number, (text, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != 5}
    write_tokenizer(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"]["vocab"] = {text: n for n, text in texts.items() if kinds[n] == 1}
    tokenizer["model"]["merges"] = [merge.split(" ") for merge in value("ggml.merges")]
    first = tokenizer["added_tokens"][0]
    tokenizer["added_tokens"] = [
        first | {"id": n, "content": text, "special": kinds[n] == 3} for n, text in texts.items() if kinds[n] != 1
    ]
    bos, eos = tokens[value("ggml.bos_token_id")], tokens[value("ggml.eos_token_id")]
    special = {bos: {"id": bos, "ids": [value("ggml.bos_token_id")], "tokens": [bos]}}
    text = json.dumps(tokenizer["post_processor"], ensure_ascii=False).replace(CONTROL[0], bos)
    tokenizer["post_processor"] = json.loads(text) | {"special_tokens": special}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    options = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    options |= {"bos_token": bos, "eos_token": eos, "pad_token": eos, "chat_template": value("chat_template")}
    (folder / "tokenizer_config.json").write_text(json.dumps(options, ensure_ascii=False), encoding="utf-8")
    return len(tokens)


def _byte_names() -> list[str]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
