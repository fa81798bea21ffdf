"""The policy's log-probabilities: shared prefixes, chunks, switching the adapter off, and llama.cpp's own numbers."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs torch: pip install 'stillhouse[train]'")
pytest.importorskip("transformers", reason="training needs transformers: pip install 'stillhouse[train]'")

from stillhouse.backends import machine  # noqa: E402 - only where torch is
from stillhouse.backends.base import GenerationRequest  # noqa: E402 - only where torch is
from stillhouse.backends.engine import Engine  # noqa: E402
from stillhouse.r1.errors import UserError  # noqa: E402
from stillhouse.r1.gguf import read_header  # noqa: E402
from stillhouse.train import export  # noqa: E402
from stillhouse.train.basemodel import copy_model, read_base, read_tensors  # noqa: E402
from stillhouse.train.layers import GatedMlp, LoraLinear, Norm, Switch, share_changed  # noqa: E402
from stillhouse.train.policy import Group, Policy, log_probabilities, micro_batches  # noqa: E402

ARCHITECTURES = ("llama", "qwen2")


@pytest.fixture(scope="module")
def model_paths(random_model: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("train")
    return {
        # Tamer than other tests want it: what is compared to 1e-5 should not amplify the rounding of f32.
        name: random_model.write_model(folder / f"{name}.gguf", architecture=name, kv_heads=1, norm=0.5)
        for name in ARCHITECTURES
    }


def make_policy(path: Path, *, moved: bool = True, dtype: torch.dtype = torch.float32, **fields) -> Policy:
    policy = Policy(read_base((path,), dtype), rank=4, alpha=8.0, **fields)
    if moved:
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for layer in policy.layers.values():
                layer.b.copy_(torch.randn(layer.b.shape, generator=generator) * 0.05)
    return policy


def adapter_of(policy: Policy) -> export.Adapter:
    base = policy.base
    return export.Adapter(policy.adapter(), policy.rank, policy.alpha, base.shape, base.paths[0].name, base.fingerprint)


def some_groups(seed: int = 0) -> list[Group]:
    random = np.random.default_rng(seed)

    def ids(count: int) -> list[int]:
        return random.integers(0, 256, count).tolist()

    return [Group(ids(9), [ids(5), ids(1), ids(12)]), Group(ids(3), [ids(7), ids(7)])]


# The same numbers, however they are computed


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_shared_prompt_gives_what_every_reply_alone_gives(model_paths, architecture):
    """Values and gradients; the plain way is transformers' own attention over prompt and reply."""
    policy = make_policy(model_paths[architecture], dtype=torch.float64)
    model, groups = policy.base.module, some_groups()
    together = policy.score(groups)
    together.logp.square().sum().backward()
    gradients = [weights.grad.clone() for weights in policy.parameters()]
    model.set_attn_implementation("eager")
    model.zero_grad()
    row = 0
    for prompt_ids, replies in groups:
        for reply in replies:
            ids = torch.tensor([[*prompt_ids, *reply]])
            logits = model(ids).logits[0, len(prompt_ids) - 1 : -1]
            logp = torch.log_softmax(logits, -1).gather(-1, torch.tensor(reply)[:, None])[:, 0]
            logp.square().sum().backward()
            assert torch.allclose(together.logp[row, : len(reply)], logp, rtol=0, atol=1e-6)
            assert not together.logp[row, len(reply) :].any()
            row += 1
    for ours, weights in zip(gradients, policy.parameters(), strict=True):
        assert torch.allclose(ours, weights.grad, rtol=1e-4, atol=1e-5)


def test_order_and_company_change_nothing(model_paths):
    policy = make_policy(model_paths["llama"])
    first, second = some_groups()
    together = policy.score([first, second]).logp
    swapped = policy.score([second, first]).logp
    alone = policy.score([Group(first.prompt_ids, first.replies[::-1])]).logp
    assert torch.allclose(together[:3], swapped[2:], rtol=0, atol=1e-5)
    assert torch.allclose(together[:3], alone.flip(0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["f32", "f64"])
def test_chunks_give_what_all_logits_give(chunk, dtype, bound):
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(shape, generator=generator).to(dtype) for shape in ((7, 16), (50, 16)))
    targets, temperature = torch.randint(50, (7,), generator=generator), 0.7
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    layer = torch.nn.Linear(16, 50, bias=False)
    layer.weight = torch.nn.Parameter(head)
    logp, entropy = log_probabilities(ours, layer, targets, temperature=temperature, chunk=chunk)
    full = torch.log_softmax(theirs @ head.T / temperature, -1)
    assert (logp - full.gather(-1, targets[:, None])[:, 0]).abs().max() <= bound * 10
    assert (entropy + (full.exp() * full).sum(-1)).abs().max() <= bound * 10
    logp.square().sum().backward()
    full.gather(-1, targets[:, None]).square().sum().backward()
    assert ((ours.grad - theirs.grad).abs().max() / theirs.grad.abs().max()) <= bound


def test_recomputing_activations_changes_no_gradient(model_paths):
    gradients = []
    for checkpointing in (False, True):
        policy = make_policy(model_paths["llama"], checkpointing=checkpointing)
        policy.score(some_groups()).logp.sum().backward()
        gradients.append([weights.grad for weights in policy.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_without_its_adapter_the_policy_is_the_base_bit_for_bit(model_paths):
    path = model_paths["qwen2"]
    moved, fresh = make_policy(path), make_policy(path, moved=False)
    with moved.reference():
        reference = moved.score(some_groups()).logp
    assert torch.equal(reference, fresh.score(some_groups()).logp)
    assert not torch.allclose(reference, moved.score(some_groups()).logp, atol=1e-2)
    assert fresh.change() == 0 < moved.change()


def test_how_far_an_adapter_moves_is_measured_without_the_whole_matrix():
    layer = LoraLinear(torch.nn.Linear(6, 5, bias=False), 2, 4.0, Switch())
    with torch.no_grad():
        layer.a.normal_()
        layer.b.normal_()
    whole = float((layer.scale * layer.b @ layer.a).detach().norm() / layer.base.weight.detach().norm())
    assert share_changed(layer) == pytest.approx(whole, rel=1e-5)


def test_the_layers_keep_less_and_give_the_same_gradients():
    """Each against finite differences in f64."""
    generator = torch.Generator().manual_seed(1)

    def some(*shape: int) -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))

    def linear(inside: int, outside: int) -> LoraLinear:
        base = torch.nn.Linear(inside, outside, dtype=torch.float64).requires_grad_(False)
        layer = LoraLinear(base, 2, 4.0, Switch()).double()
        torch.nn.init.normal_(layer.a, generator=generator)
        torch.nn.init.normal_(layer.b, generator=generator)
        return layer

    norm = torch.nn.Module()
    norm.weight, norm.variance_epsilon = some(6).requires_grad_(False), 1e-3
    mlp = torch.nn.Module()
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = linear(6, 5), linear(6, 5), linear(5, 6)
    layer = linear(6, 4)
    for module in (Norm(norm), GatedMlp(mlp), layer):
        assert torch.autograd.gradcheck(module, some(2, 3, 6))
    x = some(3, 6).detach()

    def adapted(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"a": a, "b": b}, x)

    assert torch.autograd.gradcheck(adapted, (layer.a, layer.b))


def test_micro_batches_hold_the_budget_and_lose_nothing():
    groups = [Group([1] * n, [[1, 1]]) for n in (3, 50, 8, 20, 1)]
    batches = micro_batches(groups, 30)
    assert sorted(index for batch in batches for index in batch) == list(range(5))
    assert all(len(batch) == 1 or sum(groups[i].tokens for i in batch) <= 30 for batch in batches)
    assert len(batches) == 3


# llama.cpp says the same


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_exported_adapter_gives_llamacpp_the_trainers_numbers(
    open_llama: Callable, model_paths, tmp_path, architecture
):
    """F32 weights, f32 cache, no flash attention: every token's log-probability to 1e-5, after swapping it in."""
    path = model_paths[architecture]
    backend = open_llama(path, kv_type="f32", flash_attention=False, parallel=4)
    policy = make_policy(path)
    export.save_gguf(adapter_of(policy), tmp_path / "adapter.gguf")
    prompts = [group.prompt_ids for group in some_groups()]
    for adapter in (None, tmp_path / "adapter.gguf"):
        backend.set_adapter(adapter)
        for prompt in prompts:
            for n in range(3):
                backend.add(GenerationRequest(f"{n}", prompt, 16, top_logprobs=0, ignore_eos=True))
            drawn: dict[str, list] = {}
            while sum(backend.load()[:2]):
                for token in backend.step():
                    drawn.setdefault(token.request_id, []).append(token)
            replies = [[token.token_id for token in tokens] for tokens in drawn.values()]
            theirs = np.array([[token.logprob for token in tokens] for tokens in drawn.values()])
            policy.switch.on = adapter is not None
            with torch.no_grad():
                ours = policy.score([Group(prompt, replies)]).logp.numpy()
            assert np.abs(ours - theirs).max() < 1e-5
    policy.switch.on = False
    with torch.no_grad():
        stale = policy.score([Group(prompt, replies)]).logp.numpy()
    assert np.abs(stale - theirs).max() > 0.05  # an adapter that is not there would be seen


def test_an_adapter_in_sixteen_bits_holds_the_same_numbers_rounded(model_paths, tmp_path):
    gguf = pytest.importorskip("gguf")
    adapter = adapter_of(make_policy(model_paths["llama"]))
    export.save_gguf(adapter, tmp_path / "whole.gguf")
    export.save_gguf(adapter, tmp_path / "half.gguf", half=True)
    whole, half = (gguf.GGUFReader(tmp_path / name).tensors for name in ("whole.gguf", "half.gguf"))
    assert [it.name for it in whole] == [it.name for it in half]
    for one, other in zip(whole, half, strict=True):
        assert other.data.dtype == np.float16 and np.array_equal(one.data.astype(np.float16), other.data)


def test_a_swapped_adapter_forgets_what_the_old_one_computed(open_llama, model_paths, tmp_path):
    backend = open_llama(model_paths["llama"], parallel=2)
    export.save_gguf(adapter_of(make_policy(model_paths["llama"])), tmp_path / "a.gguf")
    engine = Engine(backend)
    prompt = list(b"the same prompt, asked again")

    def first(number: int):
        (token,) = engine.generate([GenerationRequest(f"{number}", prompt, 1, top_logprobs=3)])
        return token

    before = first(0)
    assert first(1).started.cached_tokens > 0
    engine.between_steps(lambda backend: backend.set_adapter(tmp_path / "a.gguf"))
    after = first(2)
    assert after.started.cached_tokens == 0
    assert after.top_logprobs != before.top_logprobs
    engine.between_steps(lambda backend: backend.set_adapter(None))
    assert [it[0] for it in first(3).top_logprobs] == [it[0] for it in before.top_logprobs]
    with pytest.raises(UserError, match="no LoRA adapter"):
        engine.between_steps(lambda backend: backend.set_adapter(tmp_path / "nothing.gguf"))
    assert first(4).started.cached_tokens > 0  # the engine lives on
    engine.between_steps(lambda backend: None)


# Formats


def test_a_saved_adapter_comes_back_the_same(model_paths, tmp_path):
    policy = make_policy(model_paths["qwen2"])
    export.save_peft(adapter_of(policy), tmp_path / "adapter")
    back = export.load_peft(tmp_path / "adapter")
    assert back.base == "qwen2.gguf" and back.fingerprint == policy.base.fingerprint
    assert (back.rank, back.alpha, back.shape) == (4, 8.0, policy.base.shape)
    for name, (a, b) in policy.adapter().items():
        assert torch.equal(a, back.matrices[name][0]) and torch.equal(b, back.matrices[name][1])


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_peft_reads_the_adapter_and_says_the_same(model_paths, tmp_path):
    peft = pytest.importorskip("peft", reason="compares with peft: pip install peft")
    policy = make_policy(model_paths["llama"])
    export.save_peft(adapter_of(policy), tmp_path / "adapter")
    plain = read_base((model_paths["llama"],)).module
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")
    (group, _) = some_groups()
    ids = torch.tensor([[*group.prompt_ids, *group.replies[0]]])
    logits = theirs(ids).logits[0, len(group.prompt_ids) - 1 : -1]
    expected = torch.log_softmax(logits, -1).gather(-1, torch.tensor(group.replies[0])[:, None])[:, 0]
    ours = policy.score([Group(group.prompt_ids, group.replies[:1])]).logp[0]
    assert torch.allclose(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_merged_weights_say_what_base_and_adapter_say(model_paths, tmp_path, architecture):
    path = model_paths[architecture]
    policy = make_policy(path)
    export.save_merged(adapter_of(policy), (path,), tmp_path / "merged.gguf", "F32")
    merged = Policy(read_base((tmp_path / "merged.gguf",)), rank=1, alpha=1.0)
    ours, theirs = (it.score(some_groups()).logp for it in (policy, merged))
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-4)


def test_mlx_finds_every_layer_the_other_way_round(model_paths, tmp_path):
    import json

    from safetensors.torch import load_file

    policy = make_policy(model_paths["llama"])
    export.save_mlx(adapter_of(policy), tmp_path / "mlx")
    tensors = load_file(tmp_path / "mlx" / "adapters.safetensors")
    assert len(tensors) == 2 * len(policy.layers)
    a, b = policy.adapter()["model.layers.1.mlp.up_proj"]
    assert torch.equal(tensors["model.layers.1.mlp.up_proj.lora_a"], a.T)
    assert torch.equal(tensors["model.layers.1.mlp.up_proj.lora_b"], b.T)
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["lora_parameters"]["scale"] == 2.0 and "self_attn.q_proj" in config["lora_parameters"]["keys"]


def test_mlx_lm_says_with_the_exported_adapter_what_the_trainer_says(model_paths, tmp_path):
    mx = pytest.importorskip("mlx.core", reason="compares with mlx-lm: pip install 'mlx[cpu]' mlx-lm")
    utils = pytest.importorskip("mlx_lm.utils", reason="compares with mlx-lm: pip install mlx-lm")
    policy = make_policy(model_paths["llama"])
    export.save_mlx(adapter_of(policy), tmp_path / "mlx")
    read_base((model_paths["llama"],)).module.save_pretrained(tmp_path / "base")
    model, _ = utils.load_model(tmp_path / "base")
    model = utils.load_adapters(model, str(tmp_path / "mlx"))
    group = some_groups()[0]
    row = [*group.prompt_ids, *group.replies[2]]
    logits = torch.from_numpy(np.array(model(mx.array([row]))[0].astype(mx.float32)))
    theirs = torch.log_softmax(logits[len(group.prompt_ids) - 1 : -1], -1)
    theirs = theirs.gather(-1, torch.tensor(group.replies[2])[:, None])[:, 0]
    with torch.no_grad():
        ours = policy.score([Group(group.prompt_ids, [group.replies[2]])]).logp[0]
        with policy.reference():
            bare = policy.score([Group(group.prompt_ids, [group.replies[2]])]).logp[0]
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-3)
    assert not torch.allclose(bare, theirs, rtol=0, atol=1e-2)


def test_an_adapter_of_another_model_is_refused(model_paths, tmp_path):
    adapter = adapter_of(make_policy(model_paths["llama"]))
    with pytest.raises(UserError, match="has other weights"):
        export.check_belongs(adapter, [read_header(model_paths["qwen2"])])
    with pytest.raises(UserError, match="no adapter"):
        export.load_peft(tmp_path)


def test_a_failing_write_leaves_the_old_folder(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "good").write_text("kept")

    def full(partial: Path) -> None:
        (partial / "half").write_text("lost")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        export.replace_folder(tmp_path / "run", full)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert (tmp_path / "run" / "good").read_text() == "kept"


# Files


def test_a_copy_in_other_types_is_the_same_model(model_paths, tmp_path):
    path = model_paths["llama"]
    copy_model((path,), tmp_path / "f16.gguf", "F16")
    old, new = dict(read_tensors((path,))), dict(read_tensors((tmp_path / "f16.gguf",)))
    assert old.keys() == new.keys()
    assert all(np.allclose(old[name], new[name], rtol=1e-3, atol=1e-4) for name in old)
    headers = [read_header(it) for it in (path, tmp_path / "f16.gguf")]
    assert headers[0].chat_template == headers[1].chat_template
    assert headers[0].vocabulary_size == headers[1].vocabulary_size
    assert headers[1].quantization == "F16"


def test_what_is_not_a_gguf_of_a_known_architecture_is_told(tmp_path, random_model):
    with pytest.raises(UserError, match="not a GGUF file"):
        read_base((tmp_path / "model.safetensors",))


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts its threads in Linux's /proc")
def test_a_threads_helpers_go_when_they_are_sent_away():
    """A trainer and an engine that compute in turn would otherwise slow each other down."""
    if "libgomp" not in Path("/proc/self/maps").read_text():
        pytest.skip("this torch computes with another library than GNU's")

    def threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        torch.ones(1 << 20).exp()
        busy = threads()
        machine.release_helpers()
        deadline = time.monotonic() + 5
        while threads() > busy - 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert threads() <= busy - 2
        assert float(torch.ones(1 << 20).sum()) == 1 << 20  # and come back
    finally:
        torch.set_num_threads(before)
