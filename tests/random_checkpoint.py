"""Checkpoints with random weights, as a hub has them: config.json, safetensors, tokenizer.json; the same as GGUF too.

The weights are large, as in `random_model.py`, so that replies are lively and greedy choices clear.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gguf
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from stillhouse.r1.gguf import read_header

Architecture = Literal["llama", "qwen2", "qwen3"]
CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
CONTROL = ("<|begin|>", "<|end|>", "<｜User｜>", "<｜Assistant｜>")
TAGS = ("<think>", "</think>")  # user-defined, as in R1's vocabularies
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'user' %}{{ '<｜User｜>' + message.content }}"
    "{% elif message.role == 'assistant' %}{{ '<｜Assistant｜>' + message.content + eos_token }}"
    "{% else %}{{ message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)


class Shape(NamedTuple):
    """How large a random model is; the head size of Qwen3 need not be width / heads."""

    width: int = 64
    blocks: int = 2
    heads: int = 4
    kv_heads: int = 2
    head: int = 16
    forward: int = 128


class Words(NamedTuple):
    """A vocabulary: what `tokenizer.json` says, and the same in GGUF's terms."""

    tokens: Sequence[str]
    kinds: Sequence[int]  # of GGUF's token types
    merges: Sequence[str]
    pre: str  # GGUF's name of the way that text is split
    pattern: str | None  # the same as a regular expression
    begin: str
    end: str

    @property
    def json(self) -> dict[str, Any]:
        """As `tokenizer.json`."""
        plain = {t: i for i, t in enumerate(self.tokens) if self.kinds[i] == gguf.TokenType.NORMAL}
        added = [
            {"id": i, "content": self.tokens[i], "special": kind == gguf.TokenType.CONTROL, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            for i, kind in enumerate(self.kinds)
            if kind in (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED)
        ]
        bytes_of = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
        split: dict[str, Any] = bytes_of | {"use_regex": True}
        if self.pattern:
            cut = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
            split = {"type": "Sequence", "pretokenizers": [cut, bytes_of | {"use_regex": False}]}
        front = {"SpecialToken": {"id": self.begin, "type_id": 0}}
        processor = {
            "type": "TemplateProcessing",
            "single": [front, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [front, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {
                self.begin: {"id": self.begin, "ids": [self.tokens.index(self.begin)], "tokens": [self.begin]}
            },
        }
        model = {"type": "BPE", "vocab": plain, "merges": [merge.split(" ") for merge in self.merges]}
        model |= {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
        model |= {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": split,
            "post_processor": processor,
            "decoder": bytes_of | {"use_regex": True},
            "model": model,
        }


def byte_words() -> Words:
    """256 bytes and R1's control tokens."""
    tokens = [*_byte_names(), *CONTROL, *TAGS]
    kinds = [gguf.TokenType.NORMAL] * 256
    kinds += [gguf.TokenType.CONTROL] * len(CONTROL) + [gguf.TokenType.USER_DEFINED] * len(TAGS)
    merges = ["Ā ā"]  # one at least; of two bytes that no text has
    return Words([*tokens, "Āā"], [*kinds, gguf.TokenType.NORMAL], merges, "gpt-2", None, "<|begin|>", "<|end|>")


def r1_words(path: Path) -> Words:
    """The vocabulary of an R1 distill of Qwen, read from a GGUF file."""
    header = read_header(path)
    read = {name: header.metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type", "merges")}
    tokens, merges = (_strings(path, read[name]) for name in ("tokens", "merges"))
    place: Any = read["token_type"]
    kinds = np.fromfile(path, np.int32, place.length, offset=place.end - 4 * place.length).tolist()
    begin, end = (tokens[header.metadata[f"tokenizer.ggml.{name}_token_id"]] for name in ("bos", "eos"))  # pyright: ignore
    qwen2 = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        r"\s+(?!\S)|\s+"
    )
    return Words(tokens, kinds, merges, "deepseek-r1-qwen", qwen2, begin, end)


def _strings(path: Path, place: Any) -> list[str]:
    """An array of strings that a header skips: each has its length in front. (gguf's own reader takes 20 s.)"""
    with path.open("rb") as file:
        file.seek(place.offset)
        data = file.read(place.end - place.offset)
    strings: list[str] = []
    start = 0
    while start < len(data):
        (length,) = struct.unpack_from("<Q", data, start)
        strings.append(data[start + 8 : start + 8 + length].decode())
        start += 8 + length
    return strings


class Model(NamedTuple):
    """Random weights, and what has to be said of them."""

    architecture: Architecture
    shape: Shape
    words: Words
    weights: dict[str, NDArray[np.float32]]  # by the names that checkpoints use
    context: int

    @property
    def config(self) -> dict[str, Any]:
        """As `config.json`."""
        shape = self.shape
        config = {
            "architectures": [CLASSES[self.architecture]],
            "model_type": self.architecture,
            "vocab_size": len(self.words.tokens),
            "hidden_size": shape.width,
            "num_hidden_layers": shape.blocks,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head,
            "intermediate_size": shape.forward,
            "max_position_embeddings": self.context,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "bos_token_id": self.words.tokens.index(self.words.begin),
            "eos_token_id": self.words.tokens.index(self.words.end),
            "torch_dtype": "float32",
        }
        return config | ({"attention_bias": False, "mlp_bias": False} if self.architecture != "qwen2" else {})


def random_model(
    architecture: Architecture = "qwen2",
    *,
    words: Words | None = None,
    shape: Shape = Shape(),  # noqa: B008 - a tuple
    context: int = 2048,
    seed: int = 0,
    norm: float = 1.0,
    scale: float = 2.0,
) -> Model:
    """Weights for one of the architectures, the same for the same seed; with a smaller scale, less wild ones."""
    random = np.random.default_rng(seed)
    words = words or byte_words()
    weights: dict[str, NDArray[np.float32]] = {}

    def matrix(name: str, rows: int, columns: int, scale: float = 1.0) -> None:
        values = random.standard_normal((rows, columns), np.float32) * np.float32(scale * columns**-0.5)
        weights[f"{name}.weight"] = values

    def ones(name: str, width: int, value: float = 1.0) -> None:
        weights[f"{name}.weight"] = np.full(width, value, np.float32)

    matrix("model.embed_tokens", len(words.tokens), shape.width, 8.0)
    ones("model.norm", shape.width, norm)
    matrix("lm_head", len(words.tokens), shape.width, 3.0)
    for block in range(shape.blocks):
        prefix = f"model.layers.{block}"
        ones(f"{prefix}.input_layernorm", shape.width)
        ones(f"{prefix}.post_attention_layernorm", shape.width)
        for part, heads in (("q", shape.heads), ("k", shape.kv_heads), ("v", shape.kv_heads)):
            matrix(f"{prefix}.self_attn.{part}_proj", heads * shape.head, shape.width, scale)
            if architecture == "qwen2":
                bias = random.standard_normal(heads * shape.head, np.float32) * np.float32(0.5)
                weights[f"{prefix}.self_attn.{part}_proj.bias"] = bias
        if architecture == "qwen3":
            ones(f"{prefix}.self_attn.q_norm", shape.head, 1.5)
            ones(f"{prefix}.self_attn.k_norm", shape.head, 1.5)
        matrix(f"{prefix}.self_attn.o_proj", shape.width, shape.heads * shape.head, scale)
        matrix(f"{prefix}.mlp.gate_proj", shape.forward, shape.width, scale)
        matrix(f"{prefix}.mlp.up_proj", shape.forward, shape.width, scale)
        matrix(f"{prefix}.mlp.down_proj", shape.width, shape.forward, scale)
    return Model(architecture, shape, words, weights, context)


def write_checkpoint(folder: Path, model: Model | None = None, *, shards: int = 1) -> Path:
    """A folder as a hub has it; with more than one shard, an index too."""
    model = model or random_model()
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(model.weights)
    parts = [names[i::shards] for i in range(shards)]
    files = [
        f"model-{i + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors" for i in range(shards)
    ]
    for file, part in zip(files, parts, strict=True):
        save_file({name: model.weights[name] for name in part}, folder / file, metadata={"format": "pt"})
    if shards > 1:
        placed = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        _write(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": placed})
    _write(folder / "config.json", model.config)
    _write(folder / "tokenizer.json", model.words.json)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, "chat_template": TEMPLATE}
    settings |= {"bos_token": model.words.begin, "eos_token": model.words.end}
    _write(folder / "tokenizer_config.json", settings)
    return folder


def write_gguf(path: Path, model: Model, *, half: bool = False) -> Path:
    """The same model as a GGUF file, its matrices in F16 or F32."""
    shape, words = model.shape, model.words
    writer = gguf.GGUFWriter(path, model.architecture)
    writer.add_block_count(shape.blocks)
    writer.add_context_length(model.context)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head)
    writer.add_value_length(shape.head)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(list(words.tokens))
    writer.add_token_types(list(words.kinds))
    writer.add_token_merges(list(words.merges))
    writer.add_bos_token_id(words.tokens.index(words.begin))
    writer.add_eos_token_id(words.tokens.index(words.end))
    writer.add_add_bos_token(True)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[model.architecture.upper()], shape.blocks)
    for name, values in model.weights.items():
        stem, _, kind = name.rpartition(".")
        if model.architecture == "llama" and stem.endswith(("q_proj", "k_proj")):
            # llama.cpp turns neighbouring pairs, the checkpoints the two halves of a head.
            heads = values.shape[0] // shape.head
            values = values.reshape(heads, 2, shape.head // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        place = names.get_name(stem)
        assert place, name
        writer.add_tensor(f"{place}.{kind}", values.astype(np.float16) if half and values.ndim > 1 else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")


def _byte_names() -> list[str]:
    """GPT-2's names for the 256 bytes: printable ones are themselves, the others come from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
