"""Reading with a checkpoint through transformers: safetensors in any format that it can load, nf4 too."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from ..r1.errors import BadModelFile
from .base import LoadOptions
from .scorer import Floats, slab_rows


class TorchScorer:
    """A checkpoint folder in memory; plain weights as float32, so that what is measured is theirs alone."""

    runtime = "PyTorch"

    def __init__(self, folder: Path, options: LoadOptions) -> None:
        if options.threads:
            torch.set_num_threads(options.threads)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if "quantization" in config:  # only MLX writes it
            message = f"{folder.name} is in MLX's format, which transformers cannot read"
            raise BadModelFile(message, "measure a GGUF file, or a folder in a format of transformers")
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        except (OSError, ValueError, ImportError) as error:
            reason = str(error).splitlines()[0]
            raise BadModelFile(
                f"transformers cannot load {folder.name}: {reason}", "is it a whole checkpoint?"
            ) from None
        self._body: Any = model.eval().model
        self._head: Any = model.lm_head
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.vocabulary_size: int = model.config.vocab_size
        begin = self._tokenizer.encode("a", add_special_tokens=True).ids[:1]
        self.bos_id = begin[0] if begin != self.encode("a")[:1] else None
        self._slab = slab_rows(self.vocabulary_size)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, in which control tokens count as such; nothing is put in front."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def logits(self, ids: Sequence[int], first: int) -> Iterator[Floats]:
        """What follows each of the positions from `first` on, in slabs (rows, V)."""
        with torch.inference_mode():
            for states in self._states(ids, first).split(self._slab):
                yield self._head(states).float().numpy()

    def states(self, ids: Sequence[int], first: int) -> Floats:
        """The last hidden states behind the final norm, from position `first` on: (T - first, D)."""
        with torch.inference_mode():
            return self._states(ids, first).float().numpy()

    def close(self) -> None:
        """Let go of the weights."""
        self._body = self._head = None

    def _states(self, ids: Sequence[int], first: int) -> torch.Tensor:
        read = self._body(input_ids=torch.tensor(ids)[None], use_cache=False)
        return read.last_hidden_state[0, first:]
