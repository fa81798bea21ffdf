"""A base that stays packed: the bits of every type, the same numbers and gradients as expanded, less memory."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs torch: pip install 'stillhouse[train]'")
pytest.importorskip("transformers", reason="training needs transformers: pip install 'stillhouse[train]'")
gguf = pytest.importorskip("gguf", reason="compares with gguf: pip install 'stillhouse[train]'")

from stillhouse.r1.gguf import TENSOR_TYPES, read_header  # noqa: E402 - only where torch is
from stillhouse.train import export, packed  # noqa: E402
from stillhouse.train.basemodel import copy_model, read_base, read_tensors  # noqa: E402
from stillhouse.train.checkpoint import adapter_of  # noqa: E402
from stillhouse.train.config import load_config  # noqa: E402
from stillhouse.train.grpo import Run, open_run, run_grpo  # noqa: E402
from stillhouse.train.policy import Group, Policy, log_probabilities  # noqa: E402
from stillhouse.train.ppo import measure  # noqa: E402
from stillhouse.train.sft import run_sft  # noqa: E402

SIZES = {name: (block, size) for name, block, size in TENSOR_TYPES.values()}
GROUPS = [Group(list(range(9)), [[5, 6, 7], [8], list(range(40, 52))]), Group([1, 2, 3], [[9] * 7, [7] * 7])]


@pytest.fixture(scope="module")
def mixed(random_model: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models with matrices in several types, by their architecture; the llama's embedding is its output, too."""
    folder = tmp_path_factory.mktemp("packed")
    made = {}
    for name in ("llama", "qwen2"):
        whole = random_model.write_model(folder / f"whole-{name}.gguf", architecture=name, kv_heads=1, norm=0.5)
        made[name] = quantize(whole, folder / f"{name}.gguf", is_tied=name == "llama")
    return made


def quantize(whole: Path, target: Path, *, is_tied: bool = False, unknown: str = "") -> Path:
    """A copy with other types: rows of 64 and 128 fit the legacy types."""
    kinds = {"attn_q": "Q4_1", "attn_k": "Q8_0", "attn_v": "Q5_1", "attn_output": "Q5_0", "ffn_up": "F16"}
    kinds |= {"ffn_gate": "BF16", "token_embd": "Q8_0", "output": "Q4_0", unknown: "TQ2_0"}
    reader = gguf.GGUFReader(whole)
    writer = gguf.GGUFWriter(target, read_header(whole).architecture)
    for entry in reader.fields.values():
        if not entry.name.startswith("GGUF.") and entry.name != "general.architecture":
            inner = entry.types[-1] if entry.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(entry.name, entry.contents(), entry.types[0], inner)
    for name, weights in read_tensors((whole,)):
        if is_tied and name == "output.weight":
            continue
        kind = kinds.get(name.split(".")[-2], "Q4_0") if weights.ndim > 1 else "F32"
        stored = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quants.quantize(weights, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def make_policy(path: Path, weights: str, *, dtype: torch.dtype = torch.float32, **fields) -> Policy:
    """With an adapter that does something."""
    policy = Policy(read_base((path,), dtype, weights), rank=4, alpha=8.0, **fields)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in policy.layers.values():
            layer.b.copy_(torch.randn(layer.b.shape, generator=generator) * 0.05)
    return policy


def learned(policy: Policy) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Log-probabilities, and the gradients of their sum."""
    scores = policy.score(GROUPS)
    scores.logp.sum().backward()
    return scores.logp.detach(), [weights.grad for weights in policy.parameters()]


def bytes_of(policy: Policy) -> int:
    """That the frozen matrices take."""
    module = policy.base.module
    frozen = {it.data_ptr(): it.nbytes for it in [*module.parameters(), *module.buffers()] if not it.requires_grad}
    return sum(frozen.values())


# Bits


@pytest.mark.parametrize("unpack", [packed.unpack, packed.by_torch])
@pytest.mark.parametrize("kind", packed.KINDS)
def test_random_blocks_become_the_numbers_of_gguf_bit_for_bit(kind, unpack):
    block, size = SIZES[kind]
    bytes_ = np.random.default_rng(0).integers(0, 256, (5, size * 12), dtype=np.uint8)
    stored = bytes_.view({"F32": np.float32, "F16": np.float16}.get(kind, np.uint8))
    with np.errstate(all="ignore"):
        expected = np.array(gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[kind]), np.float32)
    ours = unpack(torch.from_numpy(bytes_), kind)
    assert ours.shape == (5, block * 12)
    real = ~np.isnan(expected)
    assert np.array_equal(np.isnan(ours.numpy()), ~real) and real.mean() > 0.9
    assert np.array_equal(ours.numpy().view(np.uint32)[real], expected.view(np.uint32)[real])


def test_some_rows_are_those_of_the_whole():
    bytes_ = torch.randint(256, (6, 34 * 3), dtype=torch.uint8)
    matrix = packed.Matrix(bytes_, "Q8_0", torch.float32)
    ids = torch.tensor([[4, 0], [4, 5]])
    whole = matrix.rows()
    assert torch.equal(matrix.rows(slice(2, 5)).nan_to_num(), whole[2:5].nan_to_num())
    assert torch.equal(packed.Embedding(matrix)(ids).nan_to_num(), whole[ids].nan_to_num())


# The same model


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_packed_learns_what_expanded_learns_to_the_bit(mixed, architecture, dtype):
    expanded, kept = (make_policy(mixed[architecture], weights, dtype=dtype) for weights in ("expanded", "packed"))
    (logp, gradients), (same_logp, same_gradients) = learned(expanded), learned(kept)
    assert torch.equal(logp, same_logp)
    assert all(torch.equal(one, other) for one, other in zip(gradients, same_gradients, strict=True))
    assert expanded.change() == kept.change() > 0


def test_in_16_bits_it_is_the_copy_that_llamacpp_draws_from(mixed, tmp_path):
    copy_model((mixed["llama"],), tmp_path / "f16.gguf", "F16")
    logp, _ = learned(make_policy(mixed["llama"], "f16"))
    copied, _ = learned(make_policy(tmp_path / "f16.gguf", "expanded"))
    served, _ = learned(make_policy(mixed["llama"], "expanded"))
    assert torch.equal(logp, copied) and not torch.equal(logp, served)


def test_recomputed_activations_are_those_of_packed_weights(mixed):
    plain, again = (make_policy(mixed["qwen2"], "packed", checkpointing=it) for it in (False, True))
    (logp, gradients), (same_logp, same_gradients) = learned(plain), learned(again)
    assert torch.allclose(logp, same_logp, rtol=0, atol=1e-6)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(gradients, same_gradients, strict=True))


def test_a_packed_base_takes_the_bytes_of_its_file(mixed):
    for path in mixed.values():
        expanded, half, kept = (bytes_of(make_policy(path, it)) for it in ("expanded", "f16", "packed"))
        header = read_header(path)
        assert header.weights_bytes <= kept < header.weights_bytes + 1024  # rotations
        assert kept < 0.35 * expanded and half < 0.55 * expanded


def test_nothing_expanded_is_kept_for_the_backward_pass(mixed):
    policy = make_policy(mixed["llama"], "packed")
    widths = {layer.base.in_features for layer in policy.layers.values()}
    kept: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda it: it):
        policy.score(GROUPS)
    outs = {layer.base.out_features for layer in policy.layers.values()}
    assert kept and not [it.shape for it in kept if it.ndim == 2 and it.shape[0] in outs and it.shape[1] in widths]


def test_without_its_adapter_packed_is_the_base(mixed):
    policies = [make_policy(mixed["llama"], weights) for weights in ("expanded", "packed")]
    references = []
    for policy in policies:
        with policy.reference(), torch.no_grad():
            references.append(policy.score(GROUPS).logp)
    assert torch.equal(*references)


def test_a_type_that_cannot_stay_packed_is_expanded(random_model, tmp_path):
    assert "TQ2_0" not in packed.KINDS
    whole = random_model.write_model(tmp_path / "whole.gguf", forward=256)
    path = quantize(whole, tmp_path / "odd.gguf", unknown="ffn_down")
    kept, half, expanded = (
        read_base((path,), weights=weights).module.model.layers[0].mlp for weights in ("packed", "f16", "expanded")
    )
    assert isinstance(kept.up_proj, packed.Linear)
    assert not isinstance(kept.down_proj, packed.Linear)
    assert torch.equal(kept.down_proj.weight, expanded.down_proj.weight)
    assert torch.equal(kept.up_proj.weight, expanded.up_proj.weight)
    assert half.down_proj.matrix.kind == half.up_proj.matrix.kind == "F16"


@pytest.mark.parametrize("chunk", [7, 64, 300])
def test_a_packed_head_is_made_a_part_at_a_time(mixed, chunk):
    head = read_base((mixed["qwen2"],), weights="packed").module.lm_head
    asked: list[int] = []
    rows = head.matrix.rows
    head.matrix.rows = lambda which=slice(None), room=None: asked.append(len(made := rows(which, room))) or made
    hidden = torch.randn(5, 64, requires_grad=True)
    logp, _ = log_probabilities(hidden, head, torch.tensor([0, 261, 7, 100, 255]), chunk=chunk)
    expected = torch.log_softmax(hidden @ rows().T, -1)[torch.arange(5), [0, 261, 7, 100, 255]]
    assert torch.allclose(logp, expected, rtol=0, atol=1e-5)
    assert sum(asked) == head.out_features + 5 and max(asked) <= chunk


# Runs


@pytest.fixture
def configure(mixed, tmp_path):
    rows = [{"id": f"q{n}", "prompt": f"say {n}", "answer": str(n)} for n in range(12)]
    (tmp_path / "task.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    share = "[sum(c in 'aeiou' for c in t) / max(1, len(t)) for t in completions]"
    (tmp_path / "reward.py").write_text(f"def vowels(completions, **_):\n    return {share}\n", encoding="utf-8")

    def configure(out: str, weights: str, **changes):
        given = {
            "out": str(tmp_path / out),
            "model.name": str(mixed["qwen2"]),
            "model.weights": weights,
            "task": {"name": str(tmp_path / "task.jsonl"), "held_out_size": 4, "instruction": ""},
            "lora": {"rank": 4, "alpha": 8.0},
            "grpo": {"steps": 4, "prompts": 2, "group": 4, "max_tokens": 8},
            "optimizer": {"lr": 1e-2, "warmup": 0},
            "rollout": {"weights": "f32", "threads": 1, "prompt_tokens": 64},
            "evaluation": {"every": 0, "items": 2},
            "save.every": 2,
            "guard": {"length": 0.0, "truncated": 0.0},
            "rewards": {f"{tmp_path}/reward.py:vowels": 1.0},
        }
        return load_config(changes=given | changes)

    return configure


def quiet(_: str) -> None:
    pass


def weights_of(run: Run) -> list[torch.Tensor]:
    return [it.detach().clone() for it in run.policy.parameters()]


@pytest.mark.parametrize("engine", ["llama.cpp", "pytorch"])
def test_a_packed_run_is_the_expanded_run_and_resumes_as_either(configure, engine):
    """To the bit: what is stopped as one may go on as the other."""
    drawn_by = {"rollout.engine": engine}
    whole = run_grpo(configure("whole", "expanded", **drawn_by), anyway=True, report=quiet)
    for first, then in (("packed", "packed"), ("packed", "expanded"), ("expanded", "packed")):
        out = f"{first}-{then}"

        def stop(words: str) -> None:
            if words.startswith("step 3/"):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_grpo(configure(out, first, **drawn_by), anyway=True, report=stop)
        again = run_grpo(configure(out, then, **drawn_by), resume=True, report=quiet)
        assert again.policy.change() > 0
        assert all(map(torch.equal, weights_of(whole), weights_of(again)))
        assert whole.folder.completions() == again.folder.completions()


def test_engine_and_trainer_agree_in_16_bits(configure):
    run = run_grpo(configure("run", "f16", **{"rollout.weights": "f16"}), anyway=True, report=quiet)
    records = [record for record in run.folder.records() if record["kind"] == "grpo"]
    assert len(records) == 4 and all(record["mismatch_kl"] < 1e-5 for record in records)


def test_a_packed_run_is_merged_into_its_weights(configure, mixed, tmp_path):
    run = run_grpo(configure("run", "packed"), anyway=True, report=quiet)
    export.save_merged(adapter_of(run.policy), (mixed["qwen2"],), tmp_path / "merged.gguf", "F32")
    merged = Policy(read_base((tmp_path / "merged.gguf",)), rank=1, alpha=1.0)
    with torch.no_grad():
        ours, theirs = (it.score(GROUPS).logp for it in (run.policy, merged))
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-4)


def test_supervised_and_ppo_runs_take_a_packed_base(configure, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"say {n}", "response": f"{n}"}) for n in range(20, 28)))
    losses = [run_sft(configure(f"sft-{it}", it, **{"sft.batch": 4}), data, quiet) for it in ("expanded", "packed")]
    assert losses[0] == losses[1] and losses[1].last_loss < losses[1].first_loss
    found = [measure(configure(f"ppo-{it}", it), critic=True, report=quiet) for it in ("expanded", "packed")]
    assert found[0]["after"] == found[1]["after"] and found[1]["update_s"] > 0


def test_a_kl_towards_a_packed_base_is_one_towards_the_base(configure):
    runs = [open_run(configure(it, it, **{"grpo.beta": 0.1, "guard.kl": 9.0})) for it in ("expanded", "packed")]
    records = []
    for run in runs:
        run.step()
        records.append(run.step())
        run.close()
    assert records[0]["kl_base"] == records[1]["kl_base"] > 0
