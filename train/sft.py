"""Supervised fine-tuning: the model learns to write given replies, a cold start in R1's format, say.

A row has a prompt (or question) and a response (or completion), or `messages` whose last one is the assistant's. What
a template opens by itself (`<think>`) is not learned twice. Knows nothing of rewards.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..r1.errors import UserError
from ..r1.messages import Message
from .basemodel import read_base
from .checkpoint import RunFolder, start_from
from .config import RunConfig, TaskConfig
from .policy import Group, Policy, micro_batches
from .rollout import Rollouts, find_model, open_rollouts
from .tasks import open_task, read_rows
from .update import clip_and_step, make_optimizer, place, rate

Report = Callable[[str], None]


class Example(NamedTuple):
    """One prompt and the reply to learn."""

    prompt_ids: list[int]
    reply_ids: list[int]
    question: str  # the user's last words, without the instruction


class Finished(NamedTuple):
    """What a run came to."""

    steps: int
    first_loss: float  # nats a token
    last_loss: float
    left_out: int  # examples that were too long


def not_held_out(examples: list[Example], task: TaskConfig, report: Report) -> list[Example]:
    """The examples whose question no evaluation will ask. Where the task cannot be opened, all of them, and a note."""
    try:
        held_out = {item.question for item in open_task(task).held_out}
    except UserError as error:
        report(f"not compared with held-out items: {error.message}")
        return examples
    kept = [it for it in examples if it.question not in held_out]
    if len(kept) < len(examples):
        report(f"left out: {len(examples) - len(kept)} of {len(examples)} examples, held out in {task.name}")
    return kept


def read_examples(path: Path, rollouts: Rollouts, task: TaskConfig) -> list[Example]:
    """Every row as token ids. Raises `UserError` by row."""
    examples = []
    for number, row in read_rows(path):
        turns, response, question = _turns(path, number, row, task)
        asked = rollouts.ask(turns)
        text = response.removeprefix(asked.prefix) if asked.prefix else response
        if asked.prefix and text == response:
            text = response.removeprefix(asked.prefix.strip())  # the template's own newline may be missing
        ids = rollouts.vocabulary.encode(text)
        examples.append(Example(asked.ids, [*ids, rollouts.end_id], question))
    return examples


def run_sft(config: RunConfig, data: Path, report: Report = print) -> Finished:
    """Train an adapter on a file of replies and save it in the run's folder. Raises `UserError`."""
    paths, _ = find_model(config.model.name)
    folder = RunFolder(Path(config.out))
    folder.begin(config, resume=False)
    rollouts = open_rollouts(paths, config.rollout, config.sft.max_tokens)
    try:
        examples = not_held_out(read_examples(data, rollouts, config.task), config.task, report)
    finally:
        rollouts.close()
    device, dtype = place(config.model)
    base = read_base(paths, dtype, config.model.weights)
    base.module.to(device)
    policy = Policy(base, config.lora.rank, config.lora.alpha, config.seed, config.model.checkpointing)
    if config.lora.start:
        start_from(policy, config.lora.start)
    finished = fit(policy, examples, config, folder, report)
    report(
        f"loss {finished.first_loss:.3f} -> {finished.last_loss:.3f} in {finished.steps} steps; saved in {config.out}"
    )
    return finished


def fit(
    policy: Policy, examples: Sequence[Example], config: RunConfig, folder: RunFolder | None, report: Report
) -> Finished:
    """Minimise the mean cross-entropy of the replies' tokens."""
    settings = config.sft
    kept = [it for it in examples if len(it.prompt_ids) + len(it.reply_ids) <= settings.max_tokens]
    left_out = len(examples) - len(kept)
    if left_out:
        report(
            f"{left_out} of {len(examples)} examples are longer than sft.max_tokens = {settings.max_tokens}: left out"
        )
    if not kept:
        raise UserError("there is no example to learn from", "raise sft.max_tokens, or look at the file")
    optimizer = make_optimizer(policy, config.optimizer)
    per_epoch = -(-len(kept) // settings.batch)
    steps = settings.epochs * per_epoch
    started, losses, step = time.monotonic(), [], 0
    for epoch in range(settings.epochs):
        order = random.Random(f"{config.seed} {epoch}").sample(range(len(kept)), len(kept))
        for begin in range(0, len(order), settings.batch):
            step += 1
            loss, norm = _learn(
                policy, optimizer, config, [kept[i] for i in order[begin : begin + settings.batch]], step, steps
            )
            losses.append(loss)
            if folder:
                folder.log({"step": step, "kind": "sft", "loss": loss, "gradient": norm, "seconds": _since(started)})
            if step % 10 == 0 or step == steps:
                report(f"step {step}/{steps}  loss {loss:.3f}  gradient {norm:.2f}  {_since(started):.0f} s")
            if settings.minutes and _since(started) > settings.minutes * 60:
                report(f"sft.minutes = {settings.minutes:g} are over")
                steps = step
                break
        if step == steps:
            break
    if folder:
        folder.save(step, policy, optimizer, {"kind": "sft"}, keep=config.save.keep)
    few = max(1, len(losses) // 10)
    return Finished(step, sum(losses[:few]) / few, sum(losses[-few:]) / few, left_out)


def _learn(
    policy: Policy, optimizer: torch.optim.Optimizer, config: RunConfig, batch: list[Example], step: int, steps: int
) -> tuple[float, float]:
    groups = [Group(example.prompt_ids, [example.reply_ids]) for example in batch]
    tokens = sum(len(example.reply_ids) for example in batch)
    optimizer.zero_grad()
    total = 0.0
    for indices in micro_batches(groups, config.sft.token_budget):
        scores = policy.score([groups[index] for index in indices])
        loss = -(scores.logp * scores.mask).sum() / tokens
        loss.backward()
        total += float(loss.detach())
    norm = clip_and_step(policy, optimizer, config.optimizer, rate(config.optimizer, step, steps), total)
    return total, norm


def _turns(path: Path, number: int, row: dict[str, Any], task: TaskConfig) -> tuple[list[Message], str, str]:
    """A row's conversation up to the reply, the reply, and the question."""
    talk = row.get("messages")
    if isinstance(talk, list) and talk:
        try:
            turns = [Message(turn["role"], turn["content"]) for turn in talk]
        except (KeyError, TypeError):
            raise UserError(f"{path}, row {number}: a message has no role or no content") from None
        if turns[-1].role != "assistant" or len(turns) < 2:
            raise UserError(f"{path}, row {number}: the last message has to be the assistant's")
        return turns[:-1], turns[-1].content, turns[-2].content
    prompt, response = row.get("prompt", row.get("question")), row.get("response", row.get("completion"))
    if not isinstance(prompt, str) or not isinstance(response, str) or not response:
        raise UserError(
            f"{path}, row {number} has no prompt and response",
            'a row is {"prompt": "…", "response": "<think>…</think><answer>…</answer>"}',
        )
    system = [Message("system", task.system)] if task.system else []
    text = f"{prompt}\n\n{task.instruction}" if task.instruction else prompt
    return [*system, Message("user", text)], response, prompt


def _since(started: float) -> float:
    return time.monotonic() - started
