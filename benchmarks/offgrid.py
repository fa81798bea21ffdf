"""Make a copy of a Llama checkpoint that computes the same with other weights.

    python benchmarks/offgrid.py CHECKPOINT OUT

A checkpoint that was read back from a 4-bit file lies on that file's grid, which flatters every type with a like grid.
Here each norm's scale moves into the matrices behind it, and channels between v and o, and between up and down, are
scaled by random factors and back: the function stays, the grid goes. That it stays is checked by the logits.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from stillhouse.backends.base import LoadOptions
from stillhouse.backends.pytorch_scorer import TorchScorer
from stillhouse.quantize.source import open_checkpoint

SPREAD = 0.15  # deviation of the natural log of a channel's factor


def rescale(weights: dict[str, torch.Tensor], config: dict, seed: int = 0) -> None:
    """Change the weights in place, and what they compute not at all."""
    random = torch.Generator().manual_seed(seed)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}."
        for norm, behind in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            scale = weights[f"{layer}{norm}.weight"]
            for name in behind:
                weights[f"{layer}{name}.weight"] *= scale
            weights[f"{layer}{norm}.weight"] = torch.ones_like(scale)
        v, o = weights[f"{layer}self_attn.v_proj.weight"], weights[f"{layer}self_attn.o_proj.weight"]
        factors = torch.exp(SPREAD * torch.randn(len(v), generator=random))
        v *= factors[:, None]
        o /= factors.view(kv_heads, 1, -1).expand(-1, heads // kv_heads, -1).reshape(1, -1)
        up, down = weights[f"{layer}mlp.up_proj.weight"], weights[f"{layer}mlp.down_proj.weight"]
        factors = torch.exp(SPREAD * torch.randn(len(up), generator=random))
        up *= factors[:, None]
        down /= factors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    checkpoint = open_checkpoint(arguments.checkpoint)
    weights = {name: part for file in checkpoint.files for name, part in load_file(file.path).items()}
    weights = {name: part.float().clone() for name, part in weights.items()}
    rescale(weights, checkpoint.config)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for file in arguments.checkpoint.iterdir():
        if file.suffix in (".json", ".jinja") and not file.name.endswith(".index.json"):
            shutil.copy(file, arguments.out)
    save_file(weights, arguments.out / "model.safetensors", metadata={"format": "pt"})

    ids = np.random.default_rng(0).integers(0, checkpoint.config["vocab_size"], 64).tolist()
    logits = [
        np.concatenate(list(TorchScorer(folder, LoadOptions()).logits(ids, 0)))
        for folder in (arguments.checkpoint, arguments.out)
    ]
    difference, largest = np.abs(logits[0] - logits[1]).max(), np.abs(logits[0]).max()
    print(f"largest difference of a logit: {difference:.1e}, where the largest logit is {largest:.1f}")
    assert difference < 1e-3, "the copy computes something else"


if __name__ == "__main__":
    main()
