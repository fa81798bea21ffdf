"""How fast, in how much memory, and how safely a checkpoint becomes a GGUF file. CONTRIBUTING.md tells how to run it.

python benchmarks/quantize.py make FOLDER --size 1.5b --tokenizer FOLDER    a random checkpoint of R1's shape
python benchmarks/quantize.py memory FOLDER TYPE                            peak memory beside the page cache
python benchmarks/quantize.py pair FOLDER TYPE --llama-cpp FOLDER --bin FOLDER  against convert + llama-quantize
python benchmarks/quantize.py kill FOLDER TYPE --times 20                   kill -9, --resume, the same SHA-256
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SHAPES = {  # hidden, feed-forward, layers, heads, key-value heads, vocabulary: R1 distills, and a small one
    "0.1b": (512, 2048, 8, 8, 2, 151_936),
    "1.5b": (1536, 8960, 28, 12, 2, 151_936),
    "7b": (3584, 18_944, 28, 28, 4, 152_064),
}
SLAB_ROWS = 64
COMMAND = [sys.executable, "-m", "stillhouse", "quantize"]


def make(folder: Path, size: str, tokenizer: Path) -> None:
    """A Qwen2 with random BF16 weights: each tensor repeats one slab of rows, so that it takes seconds to make."""
    hidden, forward, layers, heads, kv_heads, vocabulary = SHAPES[size]
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder / name)
    config = {
        **{
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_size": hidden,
            "vocab_size": vocabulary,
        },
        **{"intermediate_size": forward, "num_hidden_layers": layers, "num_attention_heads": heads},
        **{"num_key_value_heads": kv_heads, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-6},
        **{"rope_theta": 10_000.0, "tie_word_embeddings": False, "hidden_act": "silu", "torch_dtype": "bfloat16"},
        **{"bos_token_id": 0, "eos_token_id": 0},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    head = hidden // heads
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    shapes["model.norm.weight"] = (hidden,)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for part, rows in (("q", heads * head), ("k", kv_heads * head), ("v", kv_heads * head)):
            shapes[f"{prefix}self_attn.{part}_proj.weight"] = (rows, hidden)
            shapes[f"{prefix}self_attn.{part}_proj.bias"] = (rows,)
        shapes[f"{prefix}self_attn.o_proj.weight"] = (hidden, heads * head)
        shapes[f"{prefix}mlp.gate_proj.weight"] = shapes[f"{prefix}mlp.up_proj.weight"] = (forward, hidden)
        shapes[f"{prefix}mlp.down_proj.weight"] = (hidden, forward)
        shapes[f"{prefix}input_layernorm.weight"] = shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    source = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape in shapes.values():
            slab = source.standard_normal((SLAB_ROWS, shape[-1])).astype(np.float32) * shape[-1] ** -0.5
            raw = (slab.view(np.uint32) >> 16).astype(np.uint16)
            rows = shape[0] if len(shape) > 1 else 1
            for start in range(0, rows, SLAB_ROWS):
                file.write(raw[: rows - start].tobytes())
    print(folder, f"{(folder / 'model.safetensors').stat().st_size / 1e9:.2f} GB")


def watched(command: list[str]) -> tuple[float, int, int]:
    """Run a command: seconds, and its peak resident memory without and with pages of files, in bytes."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    anonymous = everything = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            kept = {
                line.split(":")[0]: line.split() for line in status.splitlines() if line.startswith(("Rss", "VmHWM"))
            }
            anonymous = max(anonymous, 1024 * int(kept["RssAnon"][1]))
            everything = max(everything, 1024 * int(kept["VmHWM"][1]))
        except (OSError, KeyError):
            break
        time.sleep(0.01)
    assert process.wait() == 0, f"{command} ended with {process.returncode}"
    return time.perf_counter() - started, anonymous, everything


def ours(source: Path, type: str, to: Path, *more: str) -> list[str]:
    return [*COMMAND, str(source), type, "--output", str(to), "--force", "--offline", *more]


def memory(source: Path, type: str, folder: Path) -> None:
    seconds, anonymous, everything = watched(ours(source, type, folder / "ours.gguf"))
    print(f"{seconds:.1f} s, peak {anonymous / 1e6:.0f} MB beside the page cache ({everything / 1e6:.0f} MB with it)")


def pair(source: Path, type: str, folder: Path, llama_cpp: Path, binaries: Path, rounds: int, threads: str) -> None:
    """Our one pass and llama.cpp's two programs, in turn."""
    whole, theirs = folder / "whole.gguf", folder / "theirs.gguf"
    convert = [sys.executable, str(llama_cpp / "convert_hf_to_gguf.py"), str(source), "--outfile", str(whole)]
    quantize = [str(binaries / "llama-quantize"), str(whole), str(theirs), type, threads]
    ratios = []
    for number in range(rounds):
        one, peak, _ = watched(ours(source, type, folder / "ours.gguf", "--threads", threads))
        converting, convert_peak, _ = watched([*convert, "--outtype", "bf16"])
        quantizing, quantize_peak, _ = watched(quantize)
        ratios.append(one / (converting + quantizing))
        print(
            f"round {number + 1}: ours {one:.1f} s, {peak / 1e6:.0f} MB; theirs {converting:.1f} + {quantizing:.1f} s, "
            f"{max(convert_peak, quantize_peak) / 1e6:.0f} MB and {whole.stat().st_size / 1e9:.2f} GB between; "
            f"{ratios[-1]:.2f}x",
            flush=True,
        )
        whole.unlink()
        theirs.unlink()
    print(f"median {statistics.median(ratios):.2f}x of their time")


def kill(source: Path, type: str, folder: Path, times: int, seed: int) -> None:
    """A run that nobody disturbs; then one that is killed at random points and resumed until it is done."""
    chance = random.Random(seed)
    calm, hurt = folder / "calm.gguf", folder / "hurt.gguf"
    started = time.perf_counter()
    subprocess.run(ours(source, type, calm), check=True, capture_output=True)
    whole = time.perf_counter() - started
    wanted = hashlib.sha256(calm.read_bytes()).hexdigest()
    killed = runs = 0
    while killed < times:
        hurt.unlink(missing_ok=True)
        while killed < times:
            process = subprocess.Popen([*ours(source, type, hurt), "--resume"], stderr=subprocess.DEVNULL, stdout=-3)
            try:
                process.wait(chance.uniform(0.1, 1.0) * whole)
                break
            except subprocess.TimeoutExpired:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
                killed += 1
                assert not hurt.exists(), "a file has its name before it is whole"
        subprocess.run([*ours(source, type, hurt), "--resume"], check=True, capture_output=True)
        runs += 1
        found = hashlib.sha256(hurt.read_bytes()).hexdigest()
        assert found == wanted, f"another file after {killed} kills"
    print(f"{killed} kills in {runs} runs of {whole:.1f} s: {wanted[:16]}… every time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "memory", "pair", "kill"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("type", nargs="?", default="Q4_K_M")
    parser.add_argument("--size", default="1.5b", choices=SHAPES)
    parser.add_argument("--tokenizer", type=Path, help="a folder with a tokenizer.json that llama.cpp knows")
    parser.add_argument("--llama-cpp", type=Path, help="where convert_hf_to_gguf.py is")
    parser.add_argument("--bin", type=Path, help="where llama-quantize is")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", default=str(os.cpu_count()))
    given = parser.parse_args()
    if given.what == "make":
        make(given.folder, given.size, given.tokenizer)
        return
    with tempfile.TemporaryDirectory(dir=given.folder.resolve().parent) as scratch:
        to = Path(scratch)
        if given.what == "memory":
            memory(given.folder, given.type, to)
        elif given.what == "pair":
            pair(given.folder, given.type, to, given.llama_cpp, given.bin, given.rounds, given.threads)
        else:
            kill(given.folder, given.type, to, given.times, given.seed)


if __name__ == "__main__":
    main()
