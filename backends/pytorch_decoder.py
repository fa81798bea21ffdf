"""The forward pass of a Llama, Qwen2 or Qwen3, over the weights of a transformers module, for many sequences at once.

One pass carries the next token of every running reply and pieces of prompts side by side: all tokens go through the
matrices together, and only attention looks at each sequence by itself. The module's own projections are called, so
that quantized weights, adapters and a module in training are what they are. Knows nothing of requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..r1.errors import BadModelFile

ARCHITECTURES = ("llama", "qwen2", "qwen3")
_FEW_ROWS = 64  # so few tokens in float32 (in bfloat16 a single one) a CPU multiplies faster from the other side


class Shape(NamedTuple):
    """What the KV cache and the attention need to know of a model."""

    layers: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    trained: int  # tokens that it was trained to read


class Chunk(NamedTuple):
    """A run of tokens of one sequence."""

    place: int  # of its sequence in the cache
    start: int  # position of its first token
    size: int


class Rows(NamedTuple):
    """Neighbours in the cache that decode one token each: places `first` to `first + size`."""

    first: int
    size: int
    longest: int  # cells that attention looks at
    mask: Tensor | None  # (size, 1, 1, longest): which of them are a row's own; `None`: all


class Batch(NamedTuple):
    """One pass: the single tokens come first, in the order of their rows, then the chunks."""

    ids: Tensor  # (N,)
    positions: Tensor  # (N,)
    places: Tensor  # (N,)
    rows: Sequence[Rows]
    chunks: Sequence[Chunk]
    wanted: Tensor | None  # (R,): tokens whose logits are wanted; `None`: all


class Cache(NamedTuple):
    """Keys and values: (layers, places, kv_heads, cells, head) each. A place is one sequence's."""

    keys: Tensor
    values: Tensor


class Decoder:
    """The forward pass of one module. It holds no state of its own but the table of rotations."""

    def __init__(self, module: nn.Module, *, own: bool) -> None:
        """`own`: nobody else uses the module, so that its projections may be joined. Raises `BadModelFile`."""
        inner: Any = _without_wrapper(module)
        config: Any = inner.config
        if getattr(config, "model_type", None) not in ARCHITECTURES:
            raise BadModelFile(
                f"the architecture {getattr(config, 'model_type', None)!r} cannot be run by the PyTorch backend",
                f"it runs {', '.join(ARCHITECTURES)}; llama.cpp runs more, from a GGUF file",
            )
        if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
            raise BadModelFile(
                "a model with a sliding window cannot be run by the PyTorch backend",
                "set use_sliding_window to false in config.json if the checkpoint was trained without one",
            )
        self._model: Any = inner.model
        self._head: Any = inner.lm_head
        heads = config.num_attention_heads
        self.shape = Shape(
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=config.num_key_value_heads,
            head=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocabulary=self._head.weight.shape[0] if _is_plain(self._head) else config.vocab_size,
            trained=config.max_position_embeddings,
        )
        self._layers = [_Layer(layer, self.shape, join=own) for layer in self._model.layers]
        norm = self._model.norm
        self._norm_width, self._eps = (norm.weight.shape[0],), float(norm.variance_epsilon)
        self._rotations: tuple[Tensor, Tensor] | None = None

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        embedding = self._model.embed_tokens
        return embedding.weight.dtype if hasattr(embedding, "weight") else embedding.dtype  # a trainer's own

    def new_cache(self, places: int, cells: int) -> Cache:
        """An empty cache. The memory of a CPU is taken as it is written, a GPU's at once."""
        size = (self.shape.layers, places, self.shape.kv_heads, cells, self.shape.head)
        # Zeros: a masked cell is multiplied by nothing, and nothing times what happens to lie there may be no number.
        keys, values = (torch.zeros(size, dtype=self.dtype, device=self.device) for _ in range(2))
        return Cache(keys, values)

    def prepare(self, cells: int) -> None:
        """Reckon the rotations of all positions, as the module would for each."""
        positions = torch.arange(cells, device=self.device)[None]
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        cos, sin = self._model.rotary_emb(like, positions)
        half = cos.shape[-1] // 2
        # rotate_half folded into the sine: x * cos + (x's halves swapped) * sin, the first half of sin negated
        sin = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
        self._rotations = cos[0, :, None].contiguous(), sin[0, :, None].contiguous()  # (cells, 1, head)

    def __call__(self, batch: Batch, cache: Cache) -> Tensor:
        """Write the batch into the cache and give the logits that are wanted: (R, vocabulary), in its own dtype."""
        assert self._rotations is not None
        cos, sin = self._rotations[0][batch.positions], self._rotations[1][batch.positions]  # (N, 1, head)
        x = self._model.embed_tokens(batch.ids)  # (N, width)
        for layer, keys, values in zip(self._layers, cache.keys, cache.values, strict=True):
            x = layer(x, cos, sin, keys, values, batch)
        if batch.wanted is not None:
            x = x[batch.wanted]
        x = _norm(x, self._norm_width, self._model.norm.weight, self._eps)
        return _project(self._head, x)


class _Layer:
    """One block of a decoder."""

    def __init__(self, layer: Any, shape: Shape, *, join: bool) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._attention, self._mlp = attention, mlp
        self._before, self._after = layer.input_layernorm, layer.post_attention_layernorm
        self._width, self._eps = (self._before.weight.shape[0],), float(self._before.variance_epsilon)
        self._head_norms = hasattr(attention, "q_norm")
        self._shape = shape
        self._scale = float(attention.scaling)
        self._q, self._kv = shape.heads * shape.head, shape.kv_heads * shape.head
        self._qkv = _joined(attention.q_proj, attention.k_proj, attention.v_proj) if join else None
        self._gate_up = _joined(mlp.gate_proj, mlp.up_proj) if join else None

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, batch: Batch) -> Tensor:
        """(N, width) -> (N, width). `keys` and `values` are this layer's: (places, kv_heads, cells, head)."""
        shape, attention = self._shape, self._attention
        normed = _norm(x, self._width, self._before.weight, self._eps)
        count = x.shape[0]
        if self._qkv is not None:
            qkv = _multiply(normed, *self._qkv)
            qk, v = qkv.split((self._q + self._kv, self._kv), dim=-1)
        else:
            qk = torch.cat((attention.q_proj(normed), attention.k_proj(normed)), dim=-1)
            v = attention.v_proj(normed)
        qk = qk.view(count, shape.heads + shape.kv_heads, shape.head)
        if self._head_norms:
            q, k = qk.split((shape.heads, shape.kv_heads), dim=1)
            qk = torch.cat((attention.q_norm(q), attention.k_norm(k)), dim=1)
        qk = torch.addcmul(qk * cos, qk.roll(shape.head // 2, dims=-1), sin)
        q, k = qk.split((shape.heads, shape.kv_heads), dim=1)
        keys[batch.places, :, batch.positions] = k
        values[batch.places, :, batch.positions] = v.view(count, shape.kv_heads, shape.head)
        x = x + _project(attention.o_proj, self._attend(q, keys, values, batch))
        normed = _norm(x, self._width, self._after.weight, self._eps)
        if self._gate_up is not None:
            gate, up = _multiply(normed, *self._gate_up).chunk(2, dim=-1)
        else:
            gate, up = self._mlp.gate_proj(normed), self._mlp.up_proj(normed)
        return x + _project(self._mlp.down_proj, F.silu(gate) * up)

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, batch: Batch) -> Tensor:
        """Every token over the cells of its own sequence up to itself: (N, heads, head) -> (N, heads * head)."""
        shape = self._shape
        group = shape.heads // shape.kv_heads
        parts: list[Tensor] = []
        done = 0
        for rows in batch.rows:
            # The heads that share keys stand where a sequence's tokens would: none of the keys is copied.
            mine = q[done : done + rows.size].view(rows.size, shape.kv_heads, group, shape.head)
            places = slice(rows.first, rows.first + rows.size)
            k, v = (cells[places, :, : rows.longest] for cells in (keys, values))
            attend = _attend_by_products if q.is_cuda else F.scaled_dot_product_attention
            parts.append(attend(mine, k, v, attn_mask=rows.mask, scale=self._scale).reshape(rows.size, self._q))
            done += rows.size
        for chunk in batch.chunks:
            mine = q[done : done + chunk.size].transpose(0, 1)[None]  # (1, heads, size, head)
            end = chunk.start + chunk.size
            k, v = (cells[chunk.place : chunk.place + 1, :, :end] for cells in (keys, values))
            mask = None if chunk.start == 0 else _causal(chunk, q.device)
            if mask is not None and q.is_cuda:  # its kernels take shared keys or a mask, not both
                k, v = (heads.repeat_interleave(group, dim=1) for heads in (k, v))
            out = F.scaled_dot_product_attention(
                mine,
                k,
                v,
                attn_mask=mask,
                is_causal=mask is None,
                scale=self._scale,
                enable_gqa=k.shape[1] < shape.heads,
            )
            parts.append(out[0].transpose(0, 1).reshape(chunk.size, self._q))
            done += chunk.size
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attend_by_products(q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor | None, scale: float) -> Tensor:
    """Attention of a few queries a sequence, as two products: (R, kv_heads, G, head) over (R, kv_heads, cells, head).

    A GPU's attention kernels give each head of each sequence to one core, which reads its keys alone; products are
    spread over all cores.
    """
    scores = (q * scale) @ k.transpose(-1, -2)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    return scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype) @ v


def _causal(chunk: Chunk, device: torch.device) -> Tensor:
    """Which cells each token of a chunk sees: those before it and its own, (size, start + size)."""
    size = (chunk.size, chunk.start + chunk.size)
    return torch.ones(size, dtype=torch.bool, device=device).tril(chunk.start)


def _norm(x: Tensor, width: tuple[int, ...], weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm in x's type; weights that a trainer keeps wider are computed with as they are."""
    if weight.dtype == x.dtype:
        return F.rms_norm(x, width, weight, epsilon)
    return F.rms_norm(x.to(weight.dtype), width, weight, epsilon).to(x.dtype)


def _project(projection: nn.Module, x: Tensor) -> Tensor:
    """A projection of the module; a plain one by whichever way is fastest here."""
    return _multiply(x, projection.weight, projection.bias) if _is_plain(projection) else projection(x)  # pyright: ignore[reportArgumentType]


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Tokens times weights; on a CPU, where that is faster, the other way round."""
    few = x.shape[0] == 1 if weight.dtype == torch.bfloat16 else 1 < x.shape[0] <= _FEW_ROWS
    if few and x.device.type == "cpu" and weight.dtype in (torch.bfloat16, torch.float32):
        y = torch.mm(weight, x.t()).t()
        return (y if bias is None else y + bias).contiguous()
    return F.linear(x, weight, bias)


def _joined(*projections: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Several projections of the same input as one matrix, and its bias; `None` where they are not plain ones.

    The projections keep views on their parts: nothing is held twice.
    """
    if not all(map(_is_plain, projections)):
        return None
    plain: Any = projections
    with torch.no_grad():
        weight = torch.cat([projection.weight for projection in plain])
        start = 0
        for projection in plain:
            end = start + projection.weight.shape[0]
            projection.weight.data = weight[start:end]
            start = end
        bias = torch.cat([projection.bias for projection in plain]) if plain[0].bias is not None else None
    return weight, bias


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is a linear layer and nothing more: no adapter, no hook, no weight of a quantized type."""
    return (
        type(module) is nn.Linear and type(module.weight.data) is Tensor and not module._forward_hooks  # pyright: ignore[reportPrivateUsage]
    )


def _without_wrapper(module: Any) -> Any:
    """The causal language model inside of what adapters wrap around it."""
    while not (hasattr(module, "lm_head") and hasattr(module, "model") and hasattr(module.model, "layers")):
        inner = getattr(module, "base_model", None) or getattr(module, "model", None)
        if inner is None or inner is module:
            raise BadModelFile("this module is no causal language model", "hand in a transformers *ForCausalLM")
        module = inner
    return module
