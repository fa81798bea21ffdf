"""Learning given replies: it learns, it resumes to the bit, it tells the row that is no example."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from train_fixtures import no_room_beyond, quiet, same, timeless

torch = pytest.importorskip("torch", reason="training needs torch: pip install 'stillhouse[train]'")
pytest.importorskip("transformers", reason="training needs transformers: pip install 'stillhouse[train]'")

from stillhouse.r1.errors import UserError  # noqa: E402 - only where torch is
from stillhouse.train import update  # noqa: E402
from stillhouse.train.checkpoint import RunFolder  # noqa: E402
from stillhouse.train.export import load_peft  # noqa: E402
from stillhouse.train.grpo import open_run, run_grpo  # noqa: E402
from stillhouse.train.rollout import find_model, open_rollouts  # noqa: E402
from stillhouse.train.sft import run_sft  # noqa: E402
from stillhouse.train.tasks import open_task  # noqa: E402


@pytest.fixture
def data(tmp_path) -> Path:
    """Seven examples: with two a step, an epoch of four steps whose last is half full."""
    rows = [
        {"prompt": f"say {n}", "response": f"<think>\nit is {n}</think><answer>{n}</answer>"} for n in range(20, 27)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return tmp_path / "data.jsonl"


RESUMED = {"sft.epochs": 4, "sft.batch": 2, "save.every": 4, "optimizer.schedule": "cosine", "optimizer.warmup": 3}


def everything(folder: Path) -> tuple[dict, dict, list]:
    """Adapter, the optimizer's second moments, log."""
    matrices = load_peft(folder / "adapter").matrices
    (newest,) = (folder / "checkpoints").glob("000016")
    state = torch.load(newest / "optimizer.pt", weights_only=True)["state"]
    adapter = {f"{name}.{n}": it for name, pair in matrices.items() for n, it in enumerate(pair)}
    return adapter, {f"{n}": it["exp_avg_sq"] for n, it in state.items()}, timeless(RunFolder(folder).records())


def alike(one: Path, other: Path) -> bool:
    (adapter, moments, log), (adapter2, moments2, log2) = everything(one), everything(other)
    return same(adapter, adapter2) and same(moments, moments2) and log == log2 and len(log) == 16


def test_examples_are_learned_and_served(configure, tmp_path, toy):
    rows = [{"prompt": f"say {n}", "response": "<think>\nokay</think><answer>done</answer>"} for n in range(4)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    config = configure(**{"sft.epochs": 30, "sft.batch": 4})
    done = run_sft(config, tmp_path / "data.jsonl", quiet)
    assert done.first_loss > 2 and done.last_loss < 0.3
    paths, adapter = find_model(f"{toy / 'toy.gguf'}+{tmp_path / 'run'}")
    rollouts = open_rollouts(paths, config.rollout, 64)
    rollouts.use(adapter / "adapter.gguf")
    from stillhouse.r1.messages import Message

    asked = rollouts.ask([Message("user", "say 2")])
    assert asked.prefix == "<think>\n"  # opened by the template, so not learned
    ((reply,),) = rollouts.draw([asked.ids], 1, 64, ["x"], temperature=0)
    rollouts.close()
    assert reply.text == "okay</think><answer>done</answer>" and not reply.truncated


# Going on


def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(configure, tmp_path, data):
    """Stopped two steps after a save, in the middle of an epoch; and what it says of its losses is of the whole."""
    whole = run_sft(configure(**RESUMED), data, quiet)
    config = configure(**RESUMED, out=str(tmp_path / "second"))
    said: list[str] = []

    def stop(words: str) -> None:
        said.append(words)
        if words.startswith("step 10/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sft(config, data, stop)
    assert " left" in said[-1]
    said.clear()
    assert run_sft(config, data, said.append, resume=True) == whole
    assert any(words.startswith("step 9/16") for words in said)
    assert not any(words.startswith("step 1/") for words in said)
    assert alike(tmp_path / "run", tmp_path / "second")
    assert run_sft(config, data, said.append, resume=True) == whole  # nothing is left to do, and nothing is done
    assert alike(tmp_path / "run", tmp_path / "second")


def test_a_full_disk_is_told_and_the_run_goes_on_once_there_is_room(configure, tmp_path, data):
    run_sft(configure(**RESUMED), data, quiet)
    config = configure(**RESUMED, out=str(tmp_path / "second"))
    limits = []

    def fill(words: str) -> None:
        if words.startswith("step 10/"):
            limits.append(no_room_beyond(8192))
            limits[0].__enter__()

    try:
        with pytest.raises(UserError, match=r"checkpoints/000012.* could not be written: File too large") as told:
            run_sft(config, data, fill)
    finally:
        limits[0].__exit__(None, None, None)
    assert "--resume" in told.value.hint
    run_sft(config, data, quiet, resume=True)
    assert alike(tmp_path / "run", tmp_path / "second")


def test_a_run_is_gone_on_with_on_its_own_examples_and_by_its_own_command(configure, tmp_path, data):
    config = configure(**RESUMED)
    run_sft(config, data, quiet)
    with pytest.raises(UserError, match="holds a run already"):
        run_sft(config, data, quiet)
    with pytest.raises(UserError, match="was begun with `train sft`"):
        open_run(config, resume=True, report=quiet)
    (tmp_path / "other.jsonl").write_text(json.dumps({"prompt": "say 20", "response": "no"}), encoding="utf-8")
    before = (tmp_path / "run" / "log.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"examples are not those that the run .* has learned from"):
        run_sft(config, tmp_path / "other.jsonl", quiet, resume=True)
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == before
    run_grpo(configure(out=str(tmp_path / "grpo"), **{"grpo.steps": 1}), anyway=True, report=quiet)
    with pytest.raises(UserError, match="was begun with `train grpo`"):
        run_sft(configure(out=str(tmp_path / "grpo")), data, quiet, resume=True)


def test_a_step_that_gives_no_number_is_not_taken_and_the_run_goes_on_from_before(configure, tmp_path, data):
    run_sft(configure(**RESUMED | {"sft.epochs": 1}), data, quiet)
    before = (tmp_path / "run" / "adapter.gguf").read_bytes()
    with pytest.raises(UserError, match="is not a number; this step was not taken") as told:
        run_sft(configure(**RESUMED, **{"optimizer.lr": 1e30}), data, quiet, resume=True)
    assert "--resume" in told.value.hint
    assert (tmp_path / "run" / "adapter.gguf").read_bytes() == before
    assert run_sft(configure(**RESUMED), data, quiet, resume=True).steps == 16


def test_another_base_is_refused_and_changes_nothing(configure, tmp_path, data, random_model):
    run_sft(configure(**RESUMED | {"sft.epochs": 1}), data, quiet)
    told = (tmp_path / "run" / "config.toml").read_bytes()
    other = str(random_model.write_model(tmp_path / "other.gguf", kv_heads=1, seed=3))
    with pytest.raises(UserError, match=r"trained on toy\.gguf, and other\.gguf has other weights"):
        run_sft(configure(**RESUMED, **{"model.name": other}), data, quiet, resume=True)
    with pytest.raises(UserError, match="has other weights"):
        run_sft(configure(out=str(tmp_path / "b"), **{"model.name": other, "lora.start": str(tmp_path / "run")}), data)
    assert (tmp_path / "run" / "config.toml").read_bytes() == told


def test_memory_is_given_back_after_every_step(configure, data, monkeypatch):
    given: list[int] = []
    monkeypatch.setattr("stillhouse.train.sft.give_back_memory", lambda: given.append(1) or update.give_back_memory())
    assert run_sft(configure(**RESUMED), data, quiet).steps == len(given) == 16


def test_an_example_may_be_a_conversation_as_a_task_has_it(configure, tmp_path):
    """What `distill` writes of a task whose prompts are lists of messages; one that is held out is left out, too."""
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    asked = [[*talk, {"role": "user", "content": f"say {n}"}] for n in range(3)]
    rows = [{"prompt": prompt, "answer": "1"} for prompt in asked]
    (tmp_path / "task.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    config = configure(**{"task.name": str(tmp_path / "task.jsonl"), "task.held_out_size": 1, "sft.epochs": 1})
    (tmp_path / "data.jsonl").write_text(
        "\n".join(json.dumps({"prompt": prompt, "response": "1"}) for prompt in asked), encoding="utf-8"
    )
    told: list[str] = []
    assert run_sft(config, tmp_path / "data.jsonl", told.append).steps == 1
    assert any(words.startswith("left out: 1 of 3 examples, held out") for words in told)


# What is no example


def test_an_example_of_a_held_out_question_is_not_learned(configure, tmp_path):
    held_out = [item.question for item in open_task(configure().task).held_out]
    rows = [{"prompt": text, "response": "x"} for text in (held_out[0], "say something else")]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    told: list[str] = []
    done = run_sft(configure(**{"sft.epochs": 1}), tmp_path / "data.jsonl", told.append)
    assert done.steps == 1 and any(words.startswith("left out: 1 of 2 examples, held out") for words in told)


@pytest.mark.parametrize(
    "row, words",
    [
        ({"prompt": "a"}, "row 1 has no prompt and response"),
        ({"messages": [{"role": "user", "content": "a"}]}, "row 1: the last message"),
        ({"messages": [{"content": "a"}]}, "row 1: a message has no role"),
        ({"prompt": [{"content": "a"}], "response": "b"}, "row 1: a message has no role"),
    ],
)
def test_an_example_without_a_reply_is_told_by_its_row(configure, tmp_path, row, words):
    (tmp_path / "data.jsonl").write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(UserError, match=words):
        run_sft(configure(), tmp_path / "data.jsonl", quiet)
