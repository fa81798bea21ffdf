"""The same rollouts, rewards and settings in TRL's GRPOTrainer and here: the same weights after five steps."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="training needs torch: pip install 'stillhouse[train]'")
pytest.importorskip("transformers", reason="training needs transformers: pip install 'stillhouse[train]'")

from stillhouse.train import export  # noqa: E402 - only where torch is
from stillhouse.train.basemodel import read_base  # noqa: E402
from stillhouse.train.checkpoint import adapter_of  # noqa: E402
from stillhouse.train.config import OptimizerConfig, load_config  # noqa: E402
from stillhouse.train.episodes import Episode  # noqa: E402
from stillhouse.train.learn import Learner  # noqa: E402
from stillhouse.train.loss import advantages  # noqa: E402
from stillhouse.train.policy import Policy  # noqa: E402
from stillhouse.train.rollout import Asking, Reply  # noqa: E402
from stillhouse.train.tasks import Item  # noqa: E402
from stillhouse.train.update import make_optimizer  # noqa: E402

STEPS, PROMPTS, GROUP, LONGEST = 5, 2, 4, 12
LR = 1e-3

pytestmark = pytest.mark.slow


def rollouts() -> list[list[Episode]]:
    """Five steps of replies of any length; prompt n is always the same."""
    chance = random.Random(3)

    def ids(count: int) -> list[int]:
        return [chance.randrange(3, 256) for _ in range(count)]

    prompts = [ids(5), ids(9)]
    steps = []
    for _ in range(STEPS):
        episodes = []
        for n, prompt_ids in enumerate(prompts):
            replies = [Reply(ids(chance.randint(2, LONGEST)), [], "", False) for _ in range(GROUP)]
            replies = [it._replace(logprobs=[0.0] * len(it.ids)) for it in replies]
            rewards = [chance.random() for _ in replies]
            better = advantages(torch.tensor([rewards], dtype=torch.float64), "none")[0].tolist()
            item = Item(f"p{n}", f"p{n}", {})
            episodes.append(Episode(item, Asking(prompt_ids, ""), replies, rewards, [{} for _ in replies], better))
        steps.append(episodes)
    return steps


def train_here(policy: Policy, steps: list[list[Episode]], loss: str) -> None:
    config = load_config(
        changes={
            "grpo.loss": loss,
            "grpo.max_tokens": LONGEST,
            "grpo.epsilon_high": 0.2,
            "grpo.token_budget": 40,
            "optimizer.lr": LR,
            "optimizer.warmup": 0,
        }
    )
    optimizer = make_optimizer(policy, OptimizerConfig(lr=LR, warmup=0))
    learner = Learner(config, policy, optimizer, exact=True, kl_stop=float("inf"))
    for number, episodes in enumerate(steps, 1):
        learner.learn(episodes, number)


def train_there(module: Any, adapter: Path, steps: list[list[Episode]], loss: str, folder: Path) -> Any:
    """The PEFT model that TRL leaves."""
    trl = pytest.importorskip("trl", reason="compares with TRL: pip install trl")
    peft = pytest.importorskip("peft", reason="compares with TRL over PEFT: pip install peft")
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(256)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")
    model = peft.PeftModel.from_pretrained(module, adapter, is_trainable=True)
    taken = iter(steps)

    def roll(prompts: list[str], _: Any) -> dict[str, list]:
        episodes = {episode.item.id: episode for episode in next(taken)}
        places: dict[str, int] = dict.fromkeys(episodes, 0)
        told: dict[str, list] = {"prompt_ids": [], "completion_ids": [], "logprobs": [], "earned": []}
        for prompt in prompts:
            episode, n = episodes[prompt], places[prompt]
            places[prompt] += 1
            told["prompt_ids"].append(list(episode.asking.ids))
            told["completion_ids"].append(list(episode.replies[n].ids))
            told["logprobs"].append([0.0] * len(episode.replies[n].ids))
            told["earned"].append(episode.rewards[n])
        return told

    def earned(earned: list[float], **_: Any) -> list[float]:
        return earned

    settings = trl.GRPOConfig(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=GROUP,
        gradient_accumulation_steps=PROMPTS,
        num_generations=GROUP,
        max_completion_length=LONGEST,
        loss_type=loss,
        scale_rewards="none",
        epsilon=0.2,
        learning_rate=LR,
        adam_beta1=0.9,
        adam_beta2=0.99,
        weight_decay=0.0,
        max_grad_norm=1.0,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    data = Dataset.from_list([{"prompt": f"p{n}"} for n in range(PROMPTS)])
    trainer = trl.GRPOTrainer(
        model, earned, args=settings, train_dataset=data, processing_class=tokenizer, rollout_func=roll
    )
    trainer.train()
    return trainer.model


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("loss", ["dr_grpo", "dapo", "grpo"])
def test_five_steps_on_the_same_rollouts_end_with_trls_weights(random_model, tmp_path, loss):
    """`grpo` here means over all replies; TRL's two micro-batches are two groups of the same size."""
    pytest.importorskip("trl", reason="compares with TRL: pip install trl")
    path = random_model.write_model(tmp_path / "toy.gguf", kv_heads=1, norm=0.5)
    policy = Policy(read_base((path,)), rank=4, alpha=8.0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in policy.layers.values():
            layer.b.copy_(torch.randn(layer.b.shape, generator=generator) * 0.05)
    before = {name: (a.clone(), b.clone()) for name, (a, b) in policy.adapter().items()}
    export.save_peft(adapter_of(policy), tmp_path / "adapter")
    steps = rollouts()
    train_here(policy, steps, loss)
    trained = train_there(read_base((path,)).module, tmp_path / "adapter", steps, loss, tmp_path)
    theirs = dict(trained.named_parameters())
    farthest, moved = 0.0, 0.0
    for name, pair in policy.adapter().items():
        for kind, ours, old in zip("AB", pair, before[name], strict=True):
            other = theirs[f"base_model.model.{name}.lora_{kind}.default.weight"].detach()
            farthest = max(farthest, float((ours - other).abs().max()))
            moved = max(moved, float((ours - old).abs().max()))
    assert moved > 2 * LR  # they did learn
    assert farthest <= 1e-5
