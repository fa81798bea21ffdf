"""PPO, as far as it is compared with: its advantages, and that it trains."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch", reason="training needs torch: pip install 'stillhouse[train]'")
pytest.importorskip("transformers", reason="training needs transformers: pip install 'stillhouse[train]'")

from stillhouse.train.config import load_config  # noqa: E402 - only where torch is
from stillhouse.train.ppo import estimate, measure  # noqa: E402

MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]], dtype=torch.float64)
VALUES = torch.tensor([[0.5, -0.2, 0.3, 0.1], [0.4, 0.6, 9.0, 9.0]], dtype=torch.float64)
REWARDS = torch.tensor([1.0, -0.5], dtype=torch.float64)


def test_with_a_constant_guess_it_is_reinforce_with_a_baseline():
    better, returns = estimate(REWARDS, torch.full_like(MASK, 0.3), MASK)
    assert torch.allclose(better, (REWARDS[:, None] - 0.3) * MASK, rtol=0, atol=1e-12)
    assert torch.allclose(returns, REWARDS[:, None] * MASK, rtol=0, atol=1e-12)


def test_a_trace_of_one_is_what_was_earned_less_the_guess():
    better, returns = estimate(REWARDS, VALUES, MASK)
    assert torch.allclose(better, (REWARDS[:, None] - VALUES) * MASK, rtol=0, atol=1e-12)
    assert torch.allclose(returns, REWARDS[:, None] * MASK, rtol=0, atol=1e-12)


def test_shorter_traces_are_the_sum_of_discounted_errors():
    """GAE written as its definition: sum over l of (discount * trace)^l times the error at t + l."""
    discount, trace = 0.9, 0.8
    better, _ = estimate(REWARDS, VALUES, MASK, discount, trace)
    for row, length in enumerate((4, 2)):
        guess = [*VALUES[row, :length].tolist(), 0.0]
        earned = [0.0] * (length - 1) + [float(REWARDS[row])]
        errors = [earned[t] + discount * guess[t + 1] - guess[t] for t in range(length)]
        for t in range(length):
            expected = sum((discount * trace) ** (u - t) * errors[u] for u in range(t, length))
            assert better[row, t].item() == pytest.approx(expected, abs=1e-12)
        assert not better[row, length:].any()


def test_it_trains_and_tells_what_it_took(random_model, tmp_path):
    random_model.write_model(tmp_path / "toy.gguf", kv_heads=1, norm=0.5)
    rows = [{"id": f"q{n}", "prompt": f"say {n}", "answer": str(n)} for n in range(8)]
    (tmp_path / "task.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    share = "[sum(c in 'aeiou' for c in t) / max(1, len(t)) for t in completions]"
    reward = f"def vowels(completions, **_):\n    return {share}\n"
    (tmp_path / "reward.py").write_text(reward, encoding="utf-8")
    config = load_config(
        changes={
            "out": str(tmp_path / "run"),
            "model.name": str(tmp_path / "toy.gguf"),
            "task.name": str(tmp_path / "task.jsonl"),
            "task.held_out_size": 2,
            "lora": {"rank": 4, "alpha": 8.0},
            "grpo": {"steps": 30, "prompts": 2, "group": 8, "max_tokens": 8, "dynamic_sampling": False},
            "optimizer": {"lr": 1e-2, "warmup": 0},
            "rollout": {"weights": "f32", "threads": 1, "prompt_tokens": 256},
            "evaluation": {"every": 0, "items": 2},
            "guard": {"truncated": 0.0, "length": 0.0},
            "rewards": {f"{tmp_path}/reward.py:vowels": 1.0},
        }
    )
    found = measure(config, critic=True, report=lambda _: None)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    rewards = [record["reward"] for record in log if record["kind"] == "grpo"]
    assert sum(rewards[-5:]) > 2 * sum(rewards[:5])
    assert found["update_s"] > 0 and found["peak_gb"] > 0
    errors = [record["value_error"] for record in log if "value_error" in record]
    assert len(errors) == 30 and min(errors[10:]) < errors[0] + 0.1
