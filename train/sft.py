"""Supervised fine-tuning: the model learns to write given replies, a cold start in R1's format, say.

A row has a prompt (or question) and a response (or completion), or `messages` whose last one is the assistant's. What
a template opens by itself (`<think>`) is not learned twice. Knows nothing of rewards.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..r1.clock import duration
from ..r1.errors import UserError
from ..r1.messages import Message
from .basemodel import read_base
from .checkpoint import Restored, RunFolder, start_from
from .config import RunConfig, TaskConfig
from .policy import Group, Policy, micro_batches
from .rollout import Rollouts, find_model, open_rollouts
from .tasks import open_task, read_rows
from .update import clip_and_step, give_back_memory, make_optimizer, place, rate, use_threads

Report = Callable[[str], None]
_TELL_EVERY = 10  # steps; or
_TELL_S = 10.0  # seconds, where a step takes that long


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


def run_sft(config: RunConfig, data: Path, report: Report = print, *, resume: bool = False) -> Finished:
    """Train an adapter on a file of replies, or go on training it, in the run's folder. Raises `UserError`."""
    paths, _ = find_model(config.model.name)
    folder = RunFolder(Path(config.out))
    folder.begin(config, resume=resume, kind="sft")
    rollouts = open_rollouts(paths, config.rollout, config.sft.max_tokens)
    try:
        examples = not_held_out(read_examples(data, rollouts, config.task), config.task, report)
    finally:
        rollouts.close()
    examples = _short_enough(examples, config.sft.max_tokens, report)
    use_threads(config.rollout.threads)
    device, dtype = place(config.model)
    base = read_base(paths, dtype, config.model.weights)
    base.module.to(device)
    policy = Policy(base, config.lora.rank, config.lora.alpha, config.seed, config.model.checkpointing)
    optimizer = make_optimizer(policy, config.optimizer)
    restored = folder.restore(policy, optimizer) if resume else None
    if config.lora.start and not restored:
        start_from(policy, config.lora.start)
    mark = hashlib.sha256(repr([(it.prompt_ids, it.reply_ids) for it in examples]).encode()).hexdigest()
    if restored and restored.state.get("examples") != mark:
        raise UserError(
            f"the examples are not those that the run in {config.out} has learned from so far",
            "go on with the same data, task and sft.max_tokens, or choose another --out",
        )
    folder.start(config, restored)
    begun = restored or Restored(0, {"examples": mark, "seconds": 0.0})
    finished = fit(policy, optimizer, examples, config, folder, begun, report)
    report(
        f"loss {finished.first_loss:.3f} -> {finished.last_loss:.3f} in {finished.steps} steps; saved in {config.out}"
    )
    return finished


def fit(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    examples: Sequence[Example],
    config: RunConfig,
    folder: RunFolder,
    begun: Restored,
    report: Report,
) -> Finished:
    """Minimise the mean cross-entropy of the replies' tokens, from the beginning or from where a run was."""
    settings = config.sft
    steps, first = settings.epochs * -(-len(examples) // settings.batch), begun.step
    losses = [record["loss"] for record in folder.records()]
    started = time.monotonic() - begun.state["seconds"]
    began = told = time.monotonic()
    step = saved = first

    def save() -> None:
        state = begun.state | {"seconds": _since(started)}
        folder.save(step, policy, optimizer, state, keep=config.save.keep)

    while step < steps:
        if settings.minutes and _since(started) > settings.minutes * 60:
            report(f"sft.minutes = {settings.minutes:g} are over")
            break
        step += 1
        batch = _batch(examples, settings.batch, step, config.seed)
        loss, norm = _learn(policy, optimizer, config, batch, step, steps)
        losses.append(loss)
        folder.log({"step": step, "kind": "sft", "loss": loss, "gradient": norm, "seconds": _since(started)})
        if step % _TELL_EVERY == 0 or step in (first + 1, steps) or _since(told) > _TELL_S:
            told = time.monotonic()
            left = _since(began) / (step - first) * (steps - step)
            if settings.minutes:
                left = max(0.0, min(left, settings.minutes * 60 - _since(started)))
            words = f", about {duration(left)} left" if step < steps else ""
            report(f"step {step}/{steps}  loss {loss:.3f}  gradient {norm:.2f}  {duration(_since(started))}{words}")
        if step % config.save.every == 0:
            save()
            saved = step
    if saved < step or step == first:
        save()
    few = max(1, len(losses) // 10)
    return Finished(step, sum(losses[:few]) / few, sum(losses[-few:]) / few)


def _short_enough(examples: list[Example], most: int, report: Report) -> list[Example]:
    """The examples that are not too long. Raises `UserError` where there are none."""
    kept = [it for it in examples if len(it.prompt_ids) + len(it.reply_ids) <= most]
    if left_out := len(examples) - len(kept):
        report(f"{left_out} of {len(examples)} examples are longer than sft.max_tokens = {most}: left out")
    if not kept:
        raise UserError("there is no example to learn from", "raise sft.max_tokens, or look at the file")
    return kept


def _batch(examples: Sequence[Example], size: int, step: int, seed: int) -> list[Example]:
    """What a step learns from, counted from 1: every epoch has an order of its own."""
    epoch, place_in = divmod(step - 1, -(-len(examples) // size))
    order = random.Random(f"{seed} {epoch}").sample(range(len(examples)), len(examples))
    return [examples[i] for i in order[place_in * size : (place_in + 1) * size]]


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
    give_back_memory()
    return total, norm


def _turns(path: Path, number: int, row: dict[str, Any], task: TaskConfig) -> tuple[list[Message], str, str]:
    """A row's conversation up to the reply, the reply, and the question."""
    talk = row.get("messages")
    if isinstance(talk, list) and talk:
        turns = _messages(path, number, talk)
        if turns[-1].role != "assistant" or len(turns) < 2:
            raise UserError(f"{path}, row {number}: the last message has to be the assistant's")
        return turns[:-1], turns[-1].content, turns[-2].content
    prompt, response = row.get("prompt", row.get("question")), row.get("response", row.get("completion"))
    if not isinstance(prompt, (str, list)) or not prompt or not isinstance(response, str) or not response:
        raise UserError(
            f"{path}, row {number} has no prompt and response",
            'a row is {"prompt": "…", "response": "<think>…</think><answer>…</answer>"}',
        )
    system = [Message("system", task.system)] if task.system else []
    if isinstance(prompt, list):  # as in a task: the conversation stays as it is
        return [*system, *_messages(path, number, prompt)], response, json.dumps(prompt, ensure_ascii=False)
    text = f"{prompt}\n\n{task.instruction}" if task.instruction else prompt
    return [*system, Message("user", text)], response, prompt


def _messages(path: Path, number: int, talk: list[Any]) -> list[Message]:
    try:
        return [Message(turn["role"], turn["content"]) for turn in talk]
    except (KeyError, TypeError):
        raise UserError(f"{path}, row {number}: a message has no role or no content") from None


def _since(started: float) -> float:
    return time.monotonic() - started
