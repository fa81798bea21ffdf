"""Measure what 4-bit files of a checkpoint lose: llama.cpp's mixes next to ours at the same bytes.

    python benchmarks/quality.py prepare CHECKPOINT FOLDER      importance, sensitivity, the base's hidden states
    python benchmarks/quality.py measure FOLDER [NAME ...]      write files, measure them; what is done is kept
    python benchmarks/quality.py table FOLDER                   print what was measured, as Markdown

State is kept in FOLDER, so that each step can be run alone and again. Texts: the pack's three parts, one for
calibration, two for measuring. The base is the checkpoint in float32 (PyTorch); files are read by llama.cpp.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from stillhouse.backends.base import LoadOptions
from stillhouse.backends.open import open_scorer
from stillhouse.quantize import gguf, importance, sensitivity
from stillhouse.quantize.allocate import Assignment, allocate, plan_of
from stillhouse.quantize.calibration import chunks_of, pack
from stillhouse.quantize.candidates import AFFINE, TYPES, gguf_candidates
from stillhouse.quantize.measure import CONTEXT, ExactBase, hold, measure
from stillhouse.quantize.plan import make_plan
from stillhouse.quantize.readers import checkpoint_reader
from stillhouse.quantize.recipes import Choice, assign
from stillhouse.quantize.source import open_checkpoint
from stillhouse.quantize.weights import Weights, from_checkpoint

PARTS = ("reasoning", "general")
RECIPES = ("BF16", "F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0")
NO_AFFINE = [type for type in TYPES if type not in AFFINE]


def prepare(arguments: argparse.Namespace) -> None:
    from stillhouse.quantize import pytorch_importance, pytorch_sensitivity
    from stillhouse.quantize.pytorch_layers import Decoder, read_states

    folder, checkpoint = arguments.folder, open_checkpoint(arguments.checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "checkpoint").write_text(str(arguments.checkpoint.resolve()))
    reader, decoder = checkpoint_reader(checkpoint), Decoder(checkpoint)
    texts = chunks_of(pack("calibration"), reader, CONTEXT)
    done(
        folder / "imatrix.gguf",
        lambda path: importance.write(path, pytorch_importance.collect(decoder, texts, ("pack",))),
    )
    known = importance.read(folder / "imatrix.gguf")
    some = texts[np.random.default_rng(0).choice(len(texts), min(arguments.chunks, len(texts)), replace=False)]
    done(
        folder / "sensitivity.json",
        lambda path: sensitivity.write(
            path,
            pytorch_sensitivity.analyse(decoder, some, gguf_candidates(), text="pack", importance=known),
        ),
    )
    for part in PARTS:
        chunks = chunks_of(pack(part), reader, CONTEXT)
        done(
            folder / f"{part}.npz",
            lambda path, chunks=chunks: np.savez(path, chunks=chunks, states=read_states(decoder, chunks)),
        )


def done(path: Path, make: Callable[[Path], Any]) -> None:
    """Make a file, unless it is there, and say how long it took."""
    if path.exists():
        return
    started = time.perf_counter()
    make(path)
    print(f"{path.name}: {time.perf_counter() - started:.0f} s", flush=True)


def assignments(weights: Weights, prices: sensitivity.Sensitivity) -> dict[str, tuple[Assignment, float]]:
    """What is compared: a name, the types, the predicted KL."""
    found: dict[str, tuple[Assignment, float]] = {}
    costs = prices.costs
    for recipe in RECIPES:
        types = assign(recipe, weights, has_importance=True).types
        ours = {name: type for name, type in types.items() if name in costs}
        known = all(type in costs[name] for name, type in ours.items())
        found[recipe] = (types, plan_of(costs, ours).kl if known else float("nan"))
    for recipe in ("Q4_K_M", "Q4_0"):
        types = found[recipe][0]
        budget = plan_of(costs, {name: type for name, type in types.items() if name in costs}).bytes
        for words, prices_of, trust in (
            ("Fisher", costs, 1.0),
            ("Fisher, no Q4_1 or Q5_1", prices.of_types(NO_AFFINE), 1.0),
            ("hedged", costs, 0.7),
            ("squared error", costs, 0.0),
        ):
            plan = allocate(prices_of, budget, trust=trust)
            found[f"{words} @ {recipe}"] = (types | plan.assignment, plan.kl)
    return found


def measure_all(arguments: argparse.Namespace) -> None:
    folder = arguments.folder
    weights = from_checkpoint(open_checkpoint(Path((folder / "checkpoint").read_text())))
    known = importance.read(folder / "imatrix.gguf")
    head = next(t for name in ("output.weight", "token_embd.weight") for t in weights.tensors if t.name == name)
    results = read_results(folder)
    bases = {}
    for name, (types, predicted) in assignments(weights, sensitivity.read(folder / "sensitivity.json")).items():
        if name in results or (arguments.names and name not in arguments.names):
            continue
        started = time.perf_counter()
        path = folder / "measured.gguf"
        output = gguf.outputs([make_plan(path, name, weights, Choice(types, {}), {})], weights, known.values)
        hashes = gguf.write(output, weights, known.values, threads=arguments.threads, resume=False)
        gguf.seal(output[0], {"stillhouse.source.sha256": json.dumps(hashes)})
        gguf.publish(output[0])
        written = time.perf_counter()
        scorer = open_scorer([path], LoadOptions(threads=arguments.threads), context=CONTEXT)
        found: dict[str, Any] = {"name": name, "bits": output[0].plan.bits_per_weight}
        for part in PARTS:
            if part not in bases:
                kept = np.load(folder / f"{part}.npz")
                bases[part] = ExactBase(kept["chunks"], kept["states"], hold(head))
            found[part] = measure(bases[part], scorer).as_json()
        scorer.close()
        with (folder / "results.jsonl").open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(
            f"{name}: {found['bits']:.3f} bits, predicted {predicted:.4f}, "
            f"measured {found['reasoning']['kl']['value']:.4f}, {found['general']['kl']['value']:.4f}; "
            f"{written - started:.0f} + {time.perf_counter() - written:.0f} s",
            flush=True,
        )


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / "results.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {found["name"]: found for found in map(json.loads, lines)}


def table(arguments: argparse.Namespace) -> None:
    folder = arguments.folder
    weights = from_checkpoint(open_checkpoint(Path((folder / "checkpoint").read_text())))
    predicted = {n: kl for n, (_, kl) in assignments(weights, sensitivity.read(folder / "sensitivity.json")).items()}
    print("| mix | bits | predicted KL | reasoning: KL | p99 | top-1 | ln PPL ratio | general: KL | top-1 |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, found in read_results(folder).items():
        a, b = found["reasoning"], found["general"]
        print(
            f"| {name} | {found['bits']:.3f} | {predicted[name]:.4f} "
            f"| {a['kl']['value']:.5f} ± {a['kl']['error']:.5f} | {a['kl_percentiles']['99']:.3f} "
            f"| {a['same_top']['value']:.1%} | {a['ln_ppl_ratio']['value']:+.4f} "
            f"| {b['kl']['value']:.5f} ± {b['kl']['error']:.5f} | {b['same_top']['value']:.1%} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(required=True)
    step = steps.add_parser("prepare")
    step.add_argument("checkpoint", type=Path)
    step.add_argument("folder", type=Path)
    step.add_argument("--chunks", type=int, default=8, help="of 512 tokens, for the Fisher information")
    step.set_defaults(run=prepare)
    step = steps.add_parser("measure")
    step.add_argument("folder", type=Path)
    step.add_argument("names", nargs="*")
    step.add_argument("--threads", type=int, default=2)
    step.set_defaults(run=measure_all)
    step = steps.add_parser("table")
    step.add_argument("folder", type=Path)
    step.set_defaults(run=table)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
