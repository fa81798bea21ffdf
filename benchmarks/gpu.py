"""PyTorch on this machine: what share of the memory's speed a stream gets, what many streams get, and the peer.

usage: python benchmarks/gpu.py [--shape r1-7b] [--streams 1,4,32] [--tokens 128] [--no-peer]

Makes a checkpoint with random bf16 weights in the shape of an R1 distill (speed does not depend on what weights say)
and measures the engine itself, without HTTP; then the server beside `transformers serve`, through `serve.py`, both in
one run. Runs on a CPU too, where `--shape tiny` or `smollm2` is what you want.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch
import transformers
from safetensors.torch import save_file

from stillhouse.backends.base import Backend, GenerationRequest, LoadOptions, Sampling
from stillhouse.backends.open import open_backend


class Shape(NamedTuple):
    """Of a Qwen2; its rows of logits may be more than its tokenizer has."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    forward: int
    vocabulary: int


SHAPES = {
    "r1-7b": Shape(3584, 28, 28, 4, 18944, 152064),
    "r1-1.5b": Shape(1536, 28, 12, 2, 8960, 151936),
    "smollm2": Shape(576, 30, 9, 3, 1536, 49152),
    "tiny": Shape(256, 4, 4, 2, 512, 4096),
}
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


# 1. A checkpoint.


def write_checkpoint(folder: Path, shape: Shape) -> int:
    """Random bf16 weights, a tokenizer of bytes, a template; gives the bytes of the weights that a token reads."""
    head = shape.width // shape.heads
    weights: dict[str, torch.Tensor] = {}

    def matrix(name: str, rows: int, columns: int) -> None:
        weights[f"{name}.weight"] = (torch.randn(rows, columns) * columns**-0.5).to(torch.bfloat16)

    matrix("model.embed_tokens", shape.vocabulary, shape.width)
    matrix("lm_head", shape.vocabulary, shape.width)
    weights["model.norm.weight"] = torch.ones(shape.width, dtype=torch.bfloat16)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}.{norm}.weight"] = torch.ones(shape.width, dtype=torch.bfloat16)
        for part, heads in (("q", shape.heads), ("k", shape.kv_heads), ("v", shape.kv_heads)):
            matrix(f"{prefix}.self_attn.{part}_proj", heads * head, shape.width)
            weights[f"{prefix}.self_attn.{part}_proj.bias"] = torch.zeros(heads * head, dtype=torch.bfloat16)
        matrix(f"{prefix}.self_attn.o_proj", shape.width, shape.heads * head)
        matrix(f"{prefix}.mlp.gate_proj", shape.forward, shape.width)
        matrix(f"{prefix}.mlp.up_proj", shape.forward, shape.width)
        matrix(f"{prefix}.mlp.down_proj", shape.width, shape.forward)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.forward,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "eos_token_id": shape.vocabulary - 1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder, shape.vocabulary)
    read = sum(tensor.nbytes for name, tensor in weights.items() if "embed_tokens" not in name)
    return read


def write_tokenizer(folder: Path, size: int) -> None:
    """A byte a token, the two marks of a turn, and words for all other rows: whatever is drawn has a text."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = [f"\u0120w{i}" for i in range(size - len(letters) - 2)]  # U+0120 is a space in names of bytes
    vocabulary = {token: i for i, token in enumerate(letters + words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": False}))


# 2. The engine itself.


@dataclass(frozen=True, slots=True)
class Run:
    """Replies of equal length that were asked for at once."""

    tokens_per_s: float  # while all were being written
    first_token_s: float  # of the first


def generate(backend: Backend, prompts: Sequence[list[int]], tokens: int) -> Run:
    started = time.perf_counter()
    for number, prompt in enumerate(prompts):
        request = GenerationRequest(f"{started}-{number}", prompt, tokens, Sampling(seed=number), ignore_eos=True)
        backend.add(request)
    first, begun, counted = 0.0, 0.0, 0
    writing: set[str] = set()
    while sum(backend.load()[:2]):
        for token in backend.step():
            now = time.perf_counter()
            first = first or now - started
            writing.add(token.request_id)
            counted += 1 if begun else 0
            if len(writing) == len(prompts) and not begun:
                begun, counted = now, 0
    return Run(counted / max(1e-9, time.perf_counter() - begun), first)


def prompt_of(length: int, seed: int) -> list[int]:
    """Random bytes: no two prompts have a beginning in common."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (length,), generator=generator).tolist()


def bandwidth(device: str) -> float:
    """Bytes a second that a plain copy reads and writes here."""
    size = 1 << (30 if device != "cpu" else 28)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times: list[float] = []
    for _ in range(8):
        synchronize(device)
        started = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        times.append(time.perf_counter() - started)
    return 2 * size / min(times)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()


def measure_engine(folder: Path, read: int, arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """The rows of the table that need no server."""
    levels = [int(level) for level in arguments.streams.split(",")]
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    speed = bandwidth(device)
    options = LoadOptions(
        backend="pytorch",
        context=2048,
        parallel=max(levels),
        batch_tokens=1024,
        threads=arguments.threads,
        dtype="bf16",
    )
    backend = open_backend([folder / "model.safetensors"], options).backend
    for count in {1, *levels}:  # what is done once is done before: graphs, workspaces, the pace of prompts
        generate(backend, [prompt_of(64, 10_000 + n) for n in range(count)], 16)
        generate(backend, [prompt_of(1000, 20_000 + count)], 2)
    rows = [("memory, a plain copy", f"{speed / 1e9:.0f} GB/s"), ("weights read for a token", f"{read / 1e9:.2f} GB")]
    one = 0.0
    for count in sorted({1, *levels}):
        runs = [
            generate(backend, [prompt_of(64, 1000 * turn + n) for n in range(count)], arguments.tokens)
            for turn in range(arguments.rounds)
        ]
        rate = statistics.median(run.tokens_per_s for run in runs)
        one = one or rate
        told = f"{rate:.1f} tokens/s"
        told += (
            f", {rate * read / speed:.0%} of the memory's speed" if count == 1 else f", {rate / one:.1f}x one stream"
        )
        rows.append((f"{count} stream{'s' if count > 1 else ''}", told))
    firsts = [generate(backend, [prompt_of(1000, 500 + turn)], 1).first_token_s for turn in range(arguments.rounds)]
    rows.append(("first token after 1,000", f"{statistics.median(firsts) * 1000:.0f} ms"))
    backend.close()
    return rows


# 3. The server beside its peer.


@contextmanager
def server(command: Sequence[str], url: str, log: Path) -> Iterator[None]:
    """A server process, from when it answers until it is asked to stop."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        for _ in range(600):
            if process.poll() is not None:
                sys.exit(f"error: {command[0]} ended: {log.read_text(errors='replace')[-500:]}")
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=5):
                    break
            except OSError:
                time.sleep(1)
        yield
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def free_port() -> int:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return door.getsockname()[1]


def measure_peer(folder: Path, arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """Both servers at 4 streams, the same prompts, in alternating rounds; `serve.py` prints its own table."""
    ours, theirs = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
    scripts = Path(sys.executable).parent
    port = ["--port", ours.rsplit(":", 1)[1]]
    threads = ["--threads", str(arguments.threads)] if arguments.threads else []
    us = [
        str(scripts / "stillhouse"),
        "serve",
        str(folder),
        "--backend",
        "pytorch",
        "--context",
        "2048",
        *port,
        *threads,
    ]
    host = ["--host", "127.0.0.1", "--port", theirs.rsplit(":", 1)[1]]
    them = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", str(folder), *host]
    result = folder / "serve.json"
    with server([*us, *threads], ours, folder / "ours.log"), server(them, theirs, folder / "theirs.log"):
        command = [sys.executable, str(Path(__file__).with_name("serve.py")), ours, theirs]
        command += ["--name", "stillhouse,transformers", "--baseline", "transformers", "--streams", "4"]
        command += ["--model", f"{folder.name},{folder}", "--requests", str(arguments.requests), "--json", str(result)]
        command += ["--rounds", str(arguments.rounds), "--max-tokens", str(arguments.tokens), "--prompt-tokens", "30"]
        command += ["--no-ignore-eos"]  # transformers refuses requests that say it; random weights hardly ever end
        subprocess.run(command, check=False)
    levels = json.loads(result.read_text())["levels"]
    rates = {
        level["server"]: statistics.median(turn["tokens_per_s"] or 0.0 for turn in level["rounds"]) for level in levels
    }
    mine, other = rates["stillhouse"], rates["transformers"]
    return [
        ("served, 4 streams", f"{mine:.1f} tokens/s; transformers serve {other:.1f}: {mine / max(other, 1e-9):.1f}x")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="r1-7b")
    parser.add_argument("--streams", default="1,4,32", help="levels (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="of a reply (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="medians are taken over them (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=16, help="to each server a round (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of a CPU")
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True, help="transformers serve too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        read = write_checkpoint(folder, SHAPES[arguments.shape])
        rows = measure_engine(folder, read, arguments)
        print(*(f"{label}: {told}" for label, told in rows), sep="\n", file=sys.stderr, flush=True)
        if arguments.peer:
            rows += measure_peer(folder, arguments)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    print(f"\n{arguments.shape}, bf16, random weights, on {device}; {versions}; {time.strftime('%Y-%m-%d')}\n")
    width = max(len(label) for label, _ in rows)
    for label, told in rows:
        print(f"{label:<{width}}  {told}")


if __name__ == "__main__":
    main()
