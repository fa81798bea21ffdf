"""A GRPO step here and in TRL's GRPOTrainer, and replies from llama.cpp and from `transformers.generate`.

usage: python benchmarks/train.py [--tokenizer FOLDER] [--steps 3] [--prompts 4] [--group 8] [--tokens 54] [--threads N]
       python benchmarks/train.py --arm ours|trl|rollouts ...

The same weights (what the embedded GGUF holds, in f32), adapter, prompts, lengths, threads and losses; every arm in a
process of its own, for its peak memory. The first step of each warms up and does not count. TRL and PEFT have to be
installed; the folder has the model's tokenizer as transformers reads it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from stillhouse.train.config import RunConfig, load_config
from stillhouse.train.tasks import messages, open_task
from stillhouse.train.update import peak_memory

REWARD = """
def vowels(completions, **_):
    return [sum(c in "aeiou" for c in str(text)) / max(1, len(str(text))) for text in completions]
"""  # differs in every group, so that every reply is learned from


def configure(arguments: argparse.Namespace, folder: Path) -> RunConfig:
    """One run, as both arms have it."""
    (folder / "reward.py").write_text(REWARD, encoding="utf-8")
    return load_config(
        changes={
            "out": str(folder / "run"),
            "model.dtype": arguments.dtype,
            "model.weights": arguments.kept,
            "task.options": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
            "grpo.prompts": arguments.prompts,
            "grpo.group": arguments.group,
            "grpo.max_tokens": arguments.tokens,
            "grpo.dynamic_sampling": False,
            "grpo.token_budget": arguments.token_budget,
            "rollout.threads": arguments.threads,
            "rollout.engine": arguments.engine,
            "rollout.weights": arguments.weights,
            "rewards": {f"{folder}/reward.py:vowels": 1.0},
        }
    )


def ours(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Steps of `stillhouse train grpo`."""
    import torch

    from stillhouse.train.grpo import open_run

    torch.set_num_threads(arguments.threads)
    run = open_run(configure(arguments, folder), report=lambda words: print(words, file=sys.stderr))
    seconds, records = [], []
    for _ in range(arguments.steps + 1):
        started = time.perf_counter()
        records.append(run.step())
        seconds.append(time.perf_counter() - started)
    run.close()
    told = {
        name: statistics.mean(it[name] for it in records[1:])
        for name in ("rollout_s", "update_s", "tokens", "mismatch_kl")
    }
    peaks = [round(it["peak_gb"], 2) for it in records]
    return told | {"step_s": statistics.mean(seconds[1:]), "peak_gb": peak_memory() / 1e9, "peaks_gb": peaks}


def trl(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Steps of TRL, with its own defaults where nothing is said: gradient checkpointing, all logits, padded rows."""
    import peft
    import torch
    import transformers
    from datasets import Dataset
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    from stillhouse.train.basemodel import read_base
    from stillhouse.train.rollout import find_model

    torch.set_num_threads(arguments.threads)
    config = configure(arguments, folder)
    module = read_base(find_model(config.model.name)[0]).module
    module.config.use_cache = module.generation_config.use_cache = True
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.tokenizer)
    module.config.eos_token_id = module.generation_config.eos_token_id = tokenizer.eos_token_id
    items = open_task(config.task).train[: arguments.prompts * (arguments.steps + 1)]
    asked = [[{"role": it.role, "content": it.content} for it in messages(item, config.task)] for item in items]
    seconds: list[float] = []

    class Clock(transformers.TrainerCallback):
        started = 0.0

        def on_step_begin(self, *_, **__) -> None:
            Clock.started = time.perf_counter()

        def on_step_end(self, *_, **__) -> None:
            seconds.append(time.perf_counter() - Clock.started)

    scope: dict = {}
    exec(REWARD, scope)
    trainer = GRPOTrainer(
        module,
        lambda completions, **_: scope["vowels"]([it[0]["content"] for it in completions]),
        args=GRPOConfig(
            output_dir=str(folder / "trl"),
            max_steps=arguments.steps + 1,
            per_device_train_batch_size=arguments.group,
            gradient_accumulation_steps=arguments.prompts,
            num_generations=arguments.group,
            max_completion_length=arguments.tokens,
            loss_type="dr_grpo",
            scale_rewards="none",
            learning_rate=config.optimizer.lr,
            bf16=arguments.dtype == "bf16",
            use_cpu=True,
            save_strategy="no",
            logging_steps=1,
            report_to=[],
        ),
        train_dataset=Dataset.from_list([{"prompt": it} for it in asked]),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Clock()],
    )
    trainer.train()
    lengths = [it["completions/mean_length"] for it in trainer.state.log_history if "completions/mean_length" in it]
    return {
        "step_s": statistics.mean(seconds[1:]),
        "tokens": statistics.mean(lengths[1:]),
        "peak_gb": peak_memory() / 1e9,
    }


def rollouts(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Tokens a second of both, in turns: 16 replies of exactly the same length, log-probabilities included."""
    import torch
    import transformers

    from stillhouse.backends import machine
    from stillhouse.backends.base import GenerationRequest
    from stillhouse.train.basemodel import read_base
    from stillhouse.train.rollout import find_model, open_rollouts

    torch.set_num_threads(arguments.threads)
    config = configure(arguments, folder)
    paths, _ = find_model(config.model.name)
    drawing = open_rollouts(paths, config.rollout, arguments.tokens, folder)
    item = open_task(config.task).train[0]
    prompt_ids = drawing.ask(messages(item, config.task)).ids
    module = read_base(paths).module.eval()
    replies, tokens = 16, arguments.tokens
    settings = transformers.GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0, use_cache=True
    )
    ids = torch.tensor([list(prompt_ids)] * replies)
    rates: dict[str, list[float]] = {"llama.cpp": [], "transformers": []}
    for turn in range(arguments.steps + 1):
        drawing.use(None)
        started = time.perf_counter()
        asked = [
            GenerationRequest(f"{turn}-{n}", prompt_ids, tokens, top_logprobs=0, ignore_eos=True)
            for n in range(replies)
        ]
        machine.release_helpers()  # as `Rollouts.draw` does
        drawn = sum(1 for _ in drawing.engine.generate(asked))
        drawing.engine.between_steps(lambda _: machine.release_helpers())
        rates["llama.cpp"].append(drawn / (time.perf_counter() - started))
        started = time.perf_counter()
        with torch.no_grad():
            whole = module.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        rates["transformers"].append((whole.numel() - ids.numel()) / (time.perf_counter() - started))
    drawing.close()
    return {name: statistics.median(values[1:]) for name, values in rates.items()}


ARMS = {"ours": ours, "trl": trl, "rollouts": rollouts}


def main() -> None:
    """Run the arms in turn and print them side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", choices=ARMS)
    parser.add_argument("--tokenizer", help="folder, for TRL")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=54)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("f32", "bf16"), default="f32")
    parser.add_argument("--kept", choices=("packed", "f16", "expanded"), default="packed", help="model.weights")
    parser.add_argument("--token-budget", type=int, default=512, help="grpo.token_budget")
    parser.add_argument("--engine", choices=("llama.cpp", "pytorch", "auto"), default="llama.cpp")
    parser.add_argument("--weights", choices=("auto", "f16", "bf16", "f32", "served"), default="auto")
    arguments = parser.parse_args()
    if arguments.arm:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(ARMS[arguments.arm](arguments, Path(folder))))
        return
    for arm in ARMS:
        command = [sys.executable, __file__, *sys.argv[1:], "--arm", arm]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        print(arm, done.stdout.splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
