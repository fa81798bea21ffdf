"""A run's configuration: what it may say, and what it says when it is wrong."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from stillhouse.r1.errors import UserError
from stillhouse.train.config import PRESETS, RunConfig, dump_config, load_config


def write(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_nothing_said_is_the_local_preset():
    config = load_config()
    assert config == RunConfig()
    assert (config.grpo.loss, config.grpo.beta, config.grpo.group, config.lora.rank) == ("dr_grpo", 0.0, 8, 16)
    assert (config.grpo.epsilon_low, config.grpo.epsilon_high) == (0.2, 0.28)


def test_the_r1_preset_is_the_papers():
    grpo, optimizer = load_config(changes={"preset": "r1"}).grpo, load_config(changes={"preset": "r1"}).optimizer
    assert (grpo.group, grpo.prompts, grpo.beta, grpo.epsilon_high, optimizer.lr) == (16, 32, 0.001, 10.0, 3e-6)
    assert load_config(changes={"preset": "r1-stage2"}).rollout.temperature == 0.7


def test_a_file_stands_over_its_preset_and_the_command_line_over_the_file(tmp_path):
    path = write(tmp_path, 'preset = "dapo"\n[grpo]\nsteps = 7\ngroup = 4\n[rewards]\naccuracy = 2\n')
    config = load_config(path, {"grpo.steps": 9, "task.options": {"min_terms": 2}})
    assert (config.grpo.loss, config.grpo.steps, config.grpo.group) == ("dapo", 9, 4)
    assert config.rewards == {"accuracy": 2.0}  # replaced as a whole
    assert config.task.options == {"min_terms": 2}


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_written_down_reads_back_the_same(tmp_path, preset):
    changes = {"preset": preset, "task.options": {"min_terms": 2, "words": ["a", "b"], "deep": {"x": 0.5}}}
    changes |= {"rewards": {"my rewards.py:short": 0.5, "accuracy": 1.0}, "gates": {"accuracy": "my rewards.py:short"}}
    config = load_config(changes=changes)
    assert load_config(write(tmp_path, dump_config(config))) == config


@pytest.mark.parametrize(
    "text, words",
    {
        "a misspelt key": ("[grpo]\nstep = 3", "did you mean `grpo.steps`"),
        "a misspelt table": ("[grop]\nsteps = 3", "did you mean `grpo`"),
        "a text for a number": ('[grpo]\nsteps = "3"', "`grpo.steps` is '3' and has to be a whole number"),
        "half a step": ("[grpo]\nsteps = 1.5", "`grpo.steps` is 1.5"),
        "a number for a table": ("grpo = 3", "`grpo` is a table"),
        "true for a number": ("[grpo]\nsteps = true", "`grpo.steps` is True"),
        "an unknown loss": ('[grpo]\nloss = "ppo"', "no loss 'ppo'"),
        "an unknown choice": ('[rollout]\nweights = "q4"', "`rollout.weights` cannot be 'q4'"),
        "an unknown preset": ('preset = "fast"', "no preset 'fast'"),
        "a group of one": ("[grpo]\ngroup = 1", "compared with others"),
        "no steps": ("[grpo]\nsteps = 0", "`grpo.steps` is 0"),
        "a nucleus": ("[rollout]\ntop_p = 0.9", "another distribution"),
        "two updates without a ratio": ('[grpo]\nloss = "rloo"\nupdates = 2', "one update a rollout"),
        "no reward": ("[rewards]\naccuracy = 0", "no reward has a weight"),
        "a gate of nothing": ('[gates]\naccuracy = "code"', "names a reward that is not"),
        "not TOML": ("[grpo", "is not TOML"),
    }.values(),
)
def test_a_mistake_is_told_by_its_name(tmp_path, text, words):
    with pytest.raises(UserError) as told:
        load_config(write(tmp_path, text))
    assert words in str(told.value)


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path / "nothing.toml")


def test_the_training_page_names_every_setting_and_its_default():
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| `([\w.]+)` \| `?(.*?)`? \|", page.partition("## Settings")[2], re.MULTILINE))
    real: dict[str, object] = {}
    for name, value in dataclasses.asdict(RunConfig()).items():
        inside = value if isinstance(value, dict) and name not in ("rewards", "gates") else None
        real |= {f"{name}.{key}": it for key, it in inside.items()} if inside else {name: value}
    assert told.keys() == real.keys()
    for name, value in real.items():
        if isinstance(value, (bool, int, float)):
            assert told[name].lower() == str(value).lower(), name
