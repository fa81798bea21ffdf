"""Whole runs on a model of half a megabyte: it learns, it resumes to the bit, it notices what goes wrong."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
from train_fixtures import no_room_beyond, quiet, same, timeless

torch = pytest.importorskip("torch", reason="training needs torch: pip install 'stillhouse[train]'")
pytest.importorskip("transformers", reason="training needs transformers: pip install 'stillhouse[train]'")

from stillhouse.r1.errors import UserError  # noqa: E402 - only where torch is
from stillhouse.train import checkpoint, export, live, rewards  # noqa: E402
from stillhouse.train.grpo import Run, open_run, run_grpo  # noqa: E402
from stillhouse.train.probe import probe  # noqa: E402
from stillhouse.train.rollout import Rollouts  # noqa: E402
from stillhouse.train.tasks import messages  # noqa: E402

ENGINES = ("llama.cpp", "pytorch")


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {f"{name}.{n}": it.clone() for name, pair in run.policy.adapter().items() for n, it in enumerate(pair)}


def steps_of(run: Run) -> list[dict]:
    return timeless(run.folder.records())


# Learning


def test_a_model_learns_what_is_rewarded(configure):
    run = run_grpo(configure(**{"grpo.steps": 40, "grpo.group": 8}), anyway=True, report=quiet)
    rewards = [record["reward"] for record in run.folder.records() if record["kind"] == "grpo"]
    assert sum(rewards[:5]) / 5 < 0.2 and sum(rewards[-5:]) / 5 > 0.6
    kept = run.folder.completions()
    assert len(kept) >= 40 * 16 and {"text", "reward", "advantage", "truncated"} <= kept[0].keys()


@pytest.mark.parametrize("engine", ENGINES)
def test_engine_and_trainer_agree_at_every_step(configure, engine):
    run = run_grpo(configure(**{"rollout.engine": engine}), anyway=True, report=quiet)
    assert run.state.engine == engine
    records = [record for record in run.folder.records() if record["kind"] == "grpo"]
    assert all(0 <= record["mismatch_kl"] < 1e-8 for record in records)
    assert all(record["mismatch_ess"] > 0.9999 for record in records)
    assert records[-1]["change"] > 0


def test_the_module_that_learns_in_16_bits_replies_nearly_as_it_scores(configure):
    config = configure(**{"rollout.engine": "pytorch", "model.dtype": "bf16", "grpo.steps": 2})
    records = run_grpo(config, anyway=True, report=quiet).folder.records()
    assert all(record["mismatch_kl"] < 1e-3 for record in records if record["kind"] == "grpo")


def test_the_faster_engine_is_taken_of_those_that_keep_to_the_trainer(configure, monkeypatch):
    """Both are tried on the run's own prompts, with its adapter; a resumed run does not ask again."""
    said: list[str] = []
    config = configure(**{"rollout.engine": "auto", "grpo.steps": 2})
    first = run_grpo(config, anyway=True, report=said.append)
    assert [words.split()[1] for words in said[:2]] == list(ENGINES)
    chosen = first.state.engine
    other = next(engine for engine in ENGINES if engine != chosen)
    trials = {chosen: live.Trial(chosen, 1000.0, 0.1, 1e-5), other: live.Trial(other, 10.0, 1e-9, 1e-5)}
    monkeypatch.setattr(live, "_try", lambda name, *_: trials[name])
    said.clear()
    again = open_run(replace(config, grpo=replace(config.grpo, steps=3)), resume=True, report=said.append)
    assert not said and again.state.engine == chosen
    again.close()
    fresh = open_run(replace(config, out=f"{config.out}-2"), report=said.append)
    assert len(said) == 2 and fresh.state.engine == other  # the faster one is too far off
    fresh.close()
    trials[other] = trials[other]._replace(kl=float("nan"))
    with pytest.raises(UserError, match="neither engine"):
        open_run(replace(config, out=f"{config.out}-3"), report=quiet)


@pytest.mark.parametrize("weights, told", [("packed", True), ("expanded", False)])
def test_what_makes_pytorch_draw_slowly_on_a_cpu_is_told(configure, weights, told):
    said: list[str] = []
    config = configure(**{"rollout.engine": "pytorch", "model.weights": weights, "model.device": "cpu"})
    open_run(config, report=said.append).close()
    assert any('model.weights = "expanded" would be faster' in words for words in said) == told


@pytest.mark.parametrize("threads, told, used", [(0, "3", 3), (0, "2,1", 2), (2, "3", 2)])
def test_engine_and_trainer_have_as_many_threads_as_they_are_told(configure, monkeypatch, threads, told, used):
    llama_cpp = pytest.importorskip("llama_cpp")
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", told)
    run = open_run(configure(**{"rollout.threads": threads}), report=quiet)
    assert torch.get_num_threads() == used
    assert llama_cpp.llama_n_threads(run.rollouts.engine.backend._context) == used
    run.close()
    torch.set_num_threads(before)


# Repeating


@pytest.mark.parametrize("engine", ENGINES)
def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(configure, tmp_path, engine):
    """Weights, optimizer, log and what is said next; the run is stopped in the middle of a step, after a save."""
    fields = {"grpo.steps": 5, "evaluation.every": 1, "save.every": 2, "grpo.curriculum": True}
    fields["rollout.engine"] = engine
    whole = run_grpo(configure(**fields), anyway=True, report=quiet)
    config = configure(**fields, out=str(tmp_path / "second"))

    def stop(words: str) -> None:
        if words.startswith("step 3/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_grpo(config, anyway=True, report=stop)
    again = run_grpo(config, resume=True, report=quiet)
    assert same(weights(whole), weights(again))
    assert steps_of(whole) == steps_of(again)
    assert whole.folder.completions() == again.folder.completions()
    one, other = (run.optimizer.state_dict()["state"] for run in (whole, again))
    assert all(torch.equal(one[n]["exp_avg_sq"], other[n]["exp_avg_sq"]) for n in one)


def test_the_split_into_micro_batches_changes_nothing(configure, tmp_path):
    runs = [
        run_grpo(
            configure(
                out=str(tmp_path / f"{budget}"),
                **{"grpo.token_budget": budget, "grpo.steps": 2, "optimizer.lr": 1e-3},
            ),
            anyway=True,
            report=quiet,
        )
        for budget in (1, 100_000)
    ]
    one, other = map(weights, runs)
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-5


@pytest.mark.parametrize(
    "fields",
    {
        "a KL and two updates": {"grpo.beta": 0.05, "grpo.updates": 2, "guard.kl": 9.0},
        "sequences": {"grpo.loss": "gspo", "grpo.normalisation": "group"},
        "cut off replies penalised": {"grpo.loss": "dapo", "grpo.truncated": "penalise"},
        "whatever the groups": {"grpo.loss": "cispo", "grpo.epsilon_high": 5.0, "grpo.dynamic_sampling": False},
        "a colder policy": {"rollout.temperature": 0.8},
        "a correction": {"rollout.correction": "sequence_mask"},
        "recomputed activations": {"model.checkpointing": True},
        "half-size rollouts": {"rollout.weights": "f16"},
    }.values(),
    ids=str,
)
def test_every_way_to_train_takes_steps(configure, fields):
    run = run_grpo(configure(**{"grpo.steps": 2, **fields}), anyway=True, report=quiet)
    records = [record for record in run.folder.records() if record["kind"] == "grpo"]
    assert [record["step"] for record in records] == [1, 2]
    assert all(record["gradient"] > 0 for record in records)


def test_a_reply_that_was_cut_off_is_not_learned_from_where_that_is_wanted(configure):
    run = open_run(configure(**{"grpo.truncated": "mask"}), resume=False)
    assert run.step()["truncated"] == 1.0
    assert all(not weights.grad.any() for weights in run.policy.parameters())
    run.close()


# What goes wrong


BRITTLE = """
from pathlib import Path

def brittle(completions, **_):
    if Path(__file__).with_name("break").exists():
        {failure}
    return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in completions]
"""


@pytest.mark.parametrize(
    "failure, words",
    {
        "raises": ("raise OSError('no route')", r"failed in brittle\.py, line 6: OSError: no route"),
        "hangs": ("__import__('time').sleep(60)", r"did not end within 0\.5 s"),
        "gives NaN": ("return [float('nan')] * len(completions)", r"gave nan for item q\d"),
    }.values(),
)
def test_a_run_whose_reward_failed_goes_on_once_it_is_mended_as_if_nothing_had_been(
    configure, tmp_path, monkeypatch, failure, words
):
    monkeypatch.setattr(rewards, "TIME_LIMIT_S", 0.5)
    (tmp_path / "brittle.py").write_text(BRITTLE.format(failure=failure), encoding="utf-8")
    fields = {"rewards": {f"{tmp_path}/brittle.py:brittle": 1.0}}
    whole = run_grpo(configure(**fields), anyway=True, report=quiet)
    config = configure(**fields, out=str(tmp_path / "second"))

    def stop_working(said: str) -> None:
        if said.startswith("step 3/"):
            (tmp_path / "break").touch()

    with pytest.raises(UserError, match=words):
        run_grpo(config, anyway=True, report=stop_working)
    (tmp_path / "break").unlink()
    again = run_grpo(config, resume=True, report=quiet)
    assert same(weights(whole), weights(again)) and steps_of(whole) == steps_of(again)


def test_a_row_without_an_answer_is_told_before_a_model_is_loaded(configure, tmp_path):
    rows = [{"id": f"q{n}", "prompt": f"say {n}", "answer": str(n) if n != 5 else None} for n in range(12)]
    (tmp_path / "task.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    fields = {"task.name": str(tmp_path / "task.jsonl"), "rewards": {"accuracy": 1.0}}
    with pytest.raises(UserError, match=r"task\.jsonl: item q5 has no `answer`, which the reward accuracy needs"):
        open_run(configure(**fields), report=quiet)
    assert not (tmp_path / "run").exists()


class Forgetful(Rollouts):
    """The bug: the engine is never told of a new adapter."""

    def take(self, write) -> None:
        pass


def test_an_engine_with_an_old_adapter_is_noticed(configure):
    run = open_run(configure(**{"optimizer.lr": 0.05}), resume=False)
    run.step()
    it = run.rollouts
    run.rollouts = Forgetful(it.engine, it.template, it.weights, it.end_id, it.context, it.folder)
    with pytest.raises(UserError, match="may have an old adapter"):
        run.step()
    run.close()


def test_tensorboard_shows_every_step_once(configure, tmp_path):
    board = pytest.importorskip("tensorboardX", reason="writes TensorBoard's files: pip install tensorboardX")
    run = run_grpo(configure(**{"save.tensorboard": True, "grpo.steps": 2}), anyway=True, report=quiet)
    from tensorboardX.proto.event_pb2 import Event

    (path,) = (run.folder.path / "tensorboard").iterdir()
    data, at, shown = path.read_bytes(), 0, []
    while at < len(data):  # length, checksum, event, checksum
        size = int.from_bytes(data[at : at + 8], "little")
        event = Event.FromString(data[at + 12 : at + 12 + size])
        shown += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        at += 16 + size
    rewards = [(step, value) for tag, step, value in shown if tag == "grpo/reward"]
    records = [record for record in run.folder.records() if record["kind"] == "grpo"]
    assert rewards == [(record["step"], pytest.approx(record["reward"], rel=1e-6)) for record in records]
    assert {"evaluation/pass_1", "grpo/entropy"} <= {tag for tag, _, _ in shown}
    assert board


def test_a_run_that_goes_wrong_goes_back_to_its_best(configure):
    """A guard that no step can please: after two strikes the best weights are back, and after three returns it ends."""
    said: list[str] = []
    config = configure(**{"grpo.steps": 20, "evaluation.every": 1, "guard.entropy": 99.0, "guard.strikes": 2})
    run = open_run(config, report=quiet)
    run.state.best = -1.0
    best: dict[str, torch.Tensor] = {}

    def watch(words: str) -> None:
        said.append(words)
        if "back to the best" in words:
            assert same(weights(run), best)
        elif words.startswith("step 1/"):
            best.update(weights(run))
            run.state.best = -0.5  # the evaluation after this step is the best there will be

    with pytest.raises(UserError, match="going wrong: the entropy is"):
        run.go(watch)
    run.close()
    assert sum("back to the best" in words for words in said) == 3
    rollbacks = [record for record in run.folder.records() if record["kind"] == "rollback"]
    assert [record["step"] for record in rollbacks] == [2, 4, 6]


def test_a_run_is_not_written_over_and_another_base_is_refused(configure, random_model, tmp_path):
    config = configure(**{"grpo.steps": 2})
    run_grpo(config, anyway=True, report=quiet)
    with pytest.raises(UserError, match="holds a run already"):
        run_grpo(config, anyway=True, report=quiet)
    with pytest.raises(UserError, match="no run in"):
        run_grpo(configure(out=str(tmp_path / "none")), resume=True, report=quiet)
    random_model.write_model(tmp_path / "other.gguf", kv_heads=1, seed=3)
    told = (tmp_path / "run" / "config.toml").read_text(encoding="utf-8")
    with pytest.raises(UserError, match=r"trained on toy\.gguf, and other\.gguf has other weights"):
        run_grpo(configure(**{"grpo.steps": 3, "model.name": str(tmp_path / "other.gguf")}), resume=True, report=quiet)
    assert (tmp_path / "run" / "config.toml").read_text(encoding="utf-8") == told


@pytest.mark.parametrize("file", ["adapter", "optimizer"])
def test_a_full_disk_leaves_the_last_checkpoint_whole(configure, file):
    run = run_grpo(configure(**{"grpo.steps": 2}), anyway=True, report=quiet)
    before = weights(run)
    size = (run.folder.path / "adapter" / "adapter_model.safetensors").stat().st_size
    with torch.no_grad():
        run.policy.parameters()[0].add_(1)
    words = r"checkpoints/000003.* could not be written: File too large"
    with (
        no_room_beyond({"adapter": size // 2, "optimizer": size + 1000}[file]),
        pytest.raises(UserError, match=words) as told,
    ):
        run.folder.save(3, run.policy, run.optimizer, {})
    assert "--resume" in told.value.hint
    assert run.folder.restore(run.policy).step == 2
    assert same(weights(run), before)
    assert sorted(path.name for path in (run.folder.path / "checkpoints").iterdir()) == ["000002"]


def test_a_full_disk_leaves_the_adapter_that_is_served_whole(configure):
    """Every way in which a file may end too early: in its header, in a tensor, in the last bytes."""
    run = run_grpo(configure(**{"grpo.steps": 1}), anyway=True, report=quiet)
    path = run.folder.path / "adapter.gguf"
    before = path.read_bytes()
    with torch.no_grad():
        run.policy.parameters()[0].add_(1)
    for size in (100, len(before) // 2, len(before) - 3000, len(before) - 40):
        with no_room_beyond(size), pytest.raises(UserError, match=r"adapter\.gguf could not be written: "):
            export.save_gguf(checkpoint.adapter_of(run.policy), path)
        assert path.read_bytes() == before and not path.with_name("adapter.gguf.partial").exists()
    export.save_gguf(checkpoint.adapter_of(run.policy), path)
    assert path.read_bytes() != before


def test_a_full_disk_leaves_log_and_configuration_whole(configure):
    run = run_grpo(configure(**{"grpo.steps": 2}), anyway=True, report=quiet)
    files = [run.folder.path / name for name in ("log.jsonl", "completions.jsonl", "config.toml")]
    before = [path.read_bytes() for path in files]
    with no_room_beyond(100), pytest.raises(UserError, match=r"log\.jsonl cannot be written: File too large"):
        open_run(configure(**{"grpo.steps": 3}), resume=True, report=quiet)
    assert [path.read_bytes() for path in files] == before
    assert run_grpo(configure(**{"grpo.steps": 3}), resume=True, report=quiet).state.step == 3


def test_groups_that_teach_nothing_are_asked_anew_and_end_the_run(configure, toy):
    run = open_run(configure(**{"rewards": {f"{toy}/reward.py:nothing": 1.0}}), resume=False)
    record = run.step()
    assert record["replies"] == 4 * 2 * (1 + run.config.grpo.refills) and record["useful"] == 0
    assert "loss" not in record and run.policy.change() == 0
    run.close()
    config = configure(**{"rewards": {f"{toy}/reward.py:nothing": 1.0}, "grpo.steps": 9})
    with pytest.raises(UserError, match="no group taught anything for 5 steps"):
        run_grpo(replace(config, out=config.out + "-2"), anyway=True, report=quiet)


def test_replies_that_are_all_cut_off_end_the_run_which_can_be_resumed_with_more_room(configure):
    with pytest.raises(UserError, match="nearly all replies are cut off at 8 tokens") as told:
        run_grpo(configure(**{"guard.truncated": 0.5, "save.every": 1}), anyway=True, report=quiet)
    assert told.value.hint == "raise grpo.max_tokens, and go on with --resume"
    config = configure(**{"guard.truncated": 0.5, "grpo.max_tokens": 200})
    assert run_grpo(config, resume=True, report=quiet).state.step == 4


@pytest.mark.parametrize("lr", [1e30, 1e4])
def test_a_run_that_blew_up_is_told_and_goes_on_from_before(configure, lr):
    """The step that was too large is noticed at the latest when nothing can be drawn any more."""
    run_grpo(configure(**{"grpo.steps": 2}), anyway=True, report=quiet)
    words = r"drew nothing with the adapter|is not a number|may have an old adapter"
    with pytest.raises(UserError, match=words) as told:
        run_grpo(configure(**{"grpo.steps": 6, "save.every": 9, "optimizer.lr": lr}), resume=True, report=quiet)
    assert "resume" in told.value.hint
    assert run_grpo(configure(**{"grpo.steps": 3}), resume=True, report=quiet).state.step == 3


def test_a_damaged_checkpoint_is_told_and_the_one_before_it_is_gone_on_from(configure, tmp_path):
    run_grpo(configure(**{"grpo.steps": 4}), anyway=True, report=quiet)
    newest = tmp_path / "run" / "checkpoints" / "000004"
    (newest / "optimizer.pt").write_bytes((newest / "optimizer.pt").read_bytes()[:1000])
    with pytest.raises(UserError, match=r"000004 is damaged: [^.\n]*$") as told:
        open_run(configure(), resume=True, report=quiet)
    assert told.value.hint == "delete it to go on from the one before"
    shutil.rmtree(newest)
    assert run_grpo(configure(), resume=True, report=quiet).state.step == 4


def test_a_hopeless_task_is_refused_before_any_step(configure, toy):
    config = configure(**{"rewards": {f"{toy}/reward.py:nothing": 1.0}})
    with pytest.raises(UserError, match="this will not learn"):
        run_grpo(config, report=quiet)


def test_a_probe_tells_what_there_is_to_learn(configure):
    run = open_run(configure(), resume=False)
    verdict = probe(run, quiet)
    run.close()
    assert verdict.useful > 0.5 and verdict.truncated > 0.5
    assert verdict.hopeless and "cut off at 8 tokens" in verdict.words
    assert verdict.update_s > 0 and "useful groups" in str(verdict)


def test_there_is_room_for_the_longest_prompt_and_little_more(configure):
    run = open_run(configure(**{"rollout.prompt_tokens": 0}), report=quiet)
    longest = max(len(run.rollouts.ask(messages(item, run.config.task)).ids) for item in run.task.train)
    room = run.rollouts.context - run.config.grpo.max_tokens
    run.close()
    assert longest < room <= 1.25 * longest + 1


def test_a_prompt_that_does_not_fit_is_told(configure):
    run = open_run(configure(**{"rollout.prompt_tokens": 4}), resume=False)
    with pytest.raises(UserError, match="a prompt has"):
        run.step()
    run.close()


def test_an_adapter_of_another_rank_cannot_be_gone_on_from(configure, tmp_path):
    run_grpo(configure(**{"grpo.steps": 1}), anyway=True, report=quiet)
    with pytest.raises(UserError, match="has rank 4") as told:
        open_run(
            configure(out=str(tmp_path / "b"), **{"lora.start": str(tmp_path / "run"), "lora.rank": 8}), resume=False
        )
    assert told.value.hint == "--set lora.rank=4 --set lora.alpha=8"


def test_the_served_adapter_is_the_newest(configure, tmp_path):
    run = run_grpo(configure(**{"grpo.steps": 2}), anyway=True, report=quiet)
    adapter = export.load_peft(tmp_path / "run" / "adapter")
    saved = {f"{name}.{n}": it for name, pair in adapter.matrices.items() for n, it in enumerate(pair)}
    assert same(saved, weights(run))
    assert (tmp_path / "run" / "adapter.gguf").is_file()
    assert not list((tmp_path / "run").glob("rollout-*"))
    assert checkpoint.RunFolder(tmp_path / "run").records()[-1]["kind"] == "evaluation"
