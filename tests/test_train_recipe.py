"""R1's stages as one file: each starts where it should, what is done is left out, mistakes are told before anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stillhouse.r1.errors import UserError
from stillhouse.train.recipe import config_of, read_recipe, run_recipe

RECIPE = """
out = "small"

[common]
lora = { rank = 4, alpha = 8 }
model = { name = "toy.gguf" }
task = { name = "task.jsonl", held_out_size = 2, instruction = "" }
optimizer = { lr = 1e-2, warmup = 0 }
rollout = { weights = "f32", threads = 1, prompt_tokens = 64 }
evaluation = { every = 0, items = 2, temperature = 0.3 }
sft = { epochs = 40, batch = 8 }
grpo = { steps = 1, prompts = 2, group = 4, max_tokens = 48, dynamic_sampling = false }

[[stage]]
name = "cold"
kind = "sft"
data = "data.jsonl"

[[stage]]
name = "reason"
kind = "grpo"
set = { "grpo.steps" = 2, "optimizer.lr" = 1e-4 }

[[stage]]
name = "harvest"
kind = "sift"
samples = 2
items = 5

[[stage]]
name = "again"
kind = "sft"
data = "harvest"
start = "base"
"""


@pytest.fixture
def recipe(random_model, tmp_path, monkeypatch) -> Path:
    """A recipe, with its model and data, in the working folder."""
    pytest.importorskip("torch", reason="pip install 'stillhouse[train]'")
    pytest.importorskip("transformers", reason="pip install 'stillhouse[train]'")
    monkeypatch.chdir(tmp_path)
    random_model.write_model(Path("toy.gguf"), kv_heads=1, norm=0.5)
    rows = [{"id": f"q{n}", "prompt": f"say {n}", "answer": "1"} for n in range(10)]
    Path("task.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    examples = [{"prompt": f"say {n}", "response": "<think>\nyes</think><answer>1</answer>"} for n in range(10, 30)]
    Path("data.jsonl").write_text("\n".join(map(json.dumps, examples)), encoding="utf-8")
    Path("recipe.toml").write_text(RECIPE, encoding="utf-8")
    return Path("recipe.toml")


def test_four_stages_run_in_order_and_only_once(recipe):
    told: list[str] = []
    assert run_recipe(read_recipe(recipe), told.append, anyway=True) == Path("small/again")
    began = [words for words in told if words.startswith("stage ")]
    assert began == [
        "stage cold (sft), from the base model",
        "stage reason (grpo), from small/cold",
        "stage harvest (sift), from small/reason",
        "stage again (sft), from the base model",
    ]
    harvest = [json.loads(line) for line in Path("small/harvest/data.jsonl").read_text(encoding="utf-8").splitlines()]
    assert harvest and all("<answer>1</answer>" in row["response"] for row in harvest)
    assert Path("small/again/adapter.gguf").is_file()
    told.clear()
    Path("small/again/done").unlink()
    run_recipe(read_recipe(recipe), told.append, anyway=True)
    assert [words for words in told if words.startswith("stage ")] == began[-1:]


def test_a_recipe_that_was_stopped_goes_on_in_the_middle_of_a_stage(recipe, monkeypatch):
    """Stopped once in the cold start, once in the harvest: all is as if it had not been, to the bit."""
    monkeypatch.setattr("stillhouse.train.distill._PORTION", 2)
    whole = run_recipe(read_recipe(recipe), lambda _: None, anyway=True)
    recipe.write_text(RECIPE.replace('"small"', '"second"'), encoding="utf-8")
    told: list[str] = []

    def until(beginning: str) -> None:
        def stop(words: str) -> None:
            told.append(words)
            if words.startswith(beginning):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_recipe(read_recipe(recipe), stop, anyway=True)

    until("step 20/120")
    told.clear()
    until("2/5 prompts")
    assert any(words.startswith("step 11/120") for words in told)
    assert not any(words.startswith("step 1/120") for words in told)
    told.clear()
    other = run_recipe(read_recipe(recipe), told.append, anyway=True)
    assert any(words.startswith("3/3 prompts") for words in told) and not any(it.startswith("2/5") for it in told)
    for name in ("harvest/data.jsonl", "cold/adapter.gguf", "again/adapter.gguf"):
        assert (whole.parent / name).read_bytes() == (other.parent / name).read_bytes(), name


def test_a_stage_has_the_common_settings_and_its_own(tmp_path):
    (tmp_path / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    recipe = read_recipe(tmp_path / "recipe.toml")
    config = config_of(recipe, recipe.stages[1], "small/cold")
    assert (config.grpo.steps, config.grpo.group, config.out) == (2, 4, "small/reason")
    assert config.lora.start == "small/cold"


@pytest.mark.parametrize(
    "text, words",
    {
        "nothing": ("out = 'x'", "has no [[stage]]"),
        "no kind": ("[[stage]]\nname = 'a'", "stage 1 has no name or no kind"),
        "another kind": ("[[stage]]\nname = 'a'\nkind = 'ppo'", "stage 1 cannot be 'ppo'"),
        "no data": ("[[stage]]\nname = 'a'\nkind = 'sft'", "has no data to learn"),
        "a misspelt key": ("[[stage]]\nname = 'a'\nkind = 'grpo'\nsteps = 3", "there is no 'steps'"),
        "a misspelt setting": ("[[stage]]\nname = 'a'\nkind = 'grpo'\nset = { 'grpo.step' = 3 }", "mean `grpo.steps`"),
        "from nowhere": ("[[stage]]\nname = 'a'\nkind = 'grpo'\nstart = 'b'", "no stage before it"),
        "one name twice": ("[[stage]]\nname = 'a'\nkind = 'grpo'\n" * 2, "has the name of another"),
    }.values(),
)
def test_a_mistake_is_told_before_anything_runs(tmp_path, text, words):
    (tmp_path / "recipe.toml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as told:
        read_recipe(tmp_path / "recipe.toml")
    assert words in str(told.value)
