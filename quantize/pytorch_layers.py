"""The network of a checkpoint with one layer of its weights in memory: what lets a 7B model be analysed in 16 GB.

The modules are transformers' own, made without memory; a layer's weights are read when it is entered, as float32, and
let go of when it is left. Shapes: N texts, T tokens, D the width of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from ..r1.errors import UserError
from .architectures import gguf_name
from .kld import Floats, Ids, scored_from
from .source import Checkpoint

_TOKENS_AT_ONCE = 512  # a layer's own activations are for so many

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def batches(texts: Tensor) -> list[slice]:
    """Which of the texts (N, T, …) are run together: as many as make up about 512 tokens, one at least."""
    step = max(1, _TOKENS_AT_ONCE // texts.shape[1])
    return [slice(start, start + step) for start in range(0, len(texts), step)]


@dataclass(frozen=True, slots=True)
class Layer:
    """A decoder layer that is in memory, and its matrices by GGUF's name."""

    module: nn.Module
    linears: dict[str, nn.Linear]


class Decoder:
    """A checkpoint's network, to be run layer by layer."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        settings = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
        self.config: Any = AutoConfig.for_model(**settings)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(self.config, attn_implementation="sdpa", dtype=torch.float32)
        model.eval().requires_grad_(False)
        self._layers, self._norm = model.model.layers, model.model.norm
        self._turn = type(model.model.rotary_emb)(self.config)  # its angles are computed, not read
        self.count = len(self._layers)
        self.width: int = self.config.hidden_size
        self.tied = HEAD not in checkpoint.tensors or bool(self.config.tie_word_embeddings)

    @property
    def head(self) -> str:
        """The name of the output matrix: the embedding's, where the two are one."""
        return EMBEDDING if self.tied else HEAD

    def embed(self, chunks: Ids) -> Tensor:
        """Token ids (N, T) to the first layer's input (N, T, D)."""
        tokens, places = np.unique(chunks, return_inverse=True)
        rows = torch.from_numpy(np.array(self.checkpoint.rows_at(EMBEDDING, tokens.astype(np.intp))))
        return rows[torch.from_numpy(places.reshape(chunks.shape))]

    @contextmanager
    def layer(self, number: int) -> Iterator[Layer]:
        """Layer `number`, in memory while the block runs."""
        module, prefix = self._layers[number], f"model.layers.{number}."
        self._read(module, prefix)
        try:
            linears = {
                name: part
                for path, part in module.named_modules()
                if isinstance(part, nn.Linear) and (name := gguf_name(f"{prefix}{path}.weight"))
            }
            yield Layer(module, linears)
        finally:
            module.to("meta")

    @contextmanager
    def norm(self) -> Iterator[nn.Module]:
        """The norm behind the last layer, in memory while the block runs."""
        self._read(self._norm, "model.norm.")
        try:
            yield self._norm
        finally:
            self._norm.to("meta")

    def run(self, layer: Layer, hidden: Tensor) -> Tensor:
        """A layer's input (N, T, D) to its output; every text stands for itself and begins at position 0."""
        length = hidden.shape[1]
        window = self.config.sliding_window if getattr(self.config, "use_sliding_window", False) else None
        if window and length > window:
            raise UserError(f"texts of {length} tokens are longer than this model's window of {window}", "cut them")
        positions = torch.arange(length)[None]
        angles = self._turn(hidden, positions)
        # Without a mask, transformers' sdpa attention looks back only.
        return layer.module(hidden, attention_mask=None, position_ids=positions, position_embeddings=angles)

    def _read(self, module: nn.Module, prefix: str) -> None:
        weights = {}
        for name, empty in module.named_parameters():
            rows = self.checkpoint.tensors[prefix + name].matrix[0]
            values = np.require(self.checkpoint.rows(prefix + name, 0, rows), requirements=["W", "O"])
            weights[name] = torch.from_numpy(values).reshape(empty.shape)
            self.checkpoint.advise(prefix + name, soon=False)
        module.load_state_dict(weights, assign=True)
        module.requires_grad_(False)


def read_states(decoder: Decoder, chunks: Ids, progress: Callable[[int], None] = lambda _: None) -> Floats:
    """The last hidden states behind the final norm at every scored position of texts (C, T): (C x scored, D)."""
    hidden = decoder.embed(chunks)
    with torch.inference_mode():
        for number in range(decoder.count):
            with decoder.layer(number) as layer:
                for some in batches(hidden):
                    hidden[some] = decoder.run(layer, hidden[some])
            progress(1)
        with decoder.norm() as norm:
            return norm(hidden[:, scored_from(chunks.shape[1]) : -1]).reshape(-1, decoder.width).numpy()
