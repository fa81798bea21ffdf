"""What the PyTorch backend does beyond the contract: its cache, its chunks, its sampler, live modules, what it refuses.

On models with random weights, which take a few milliseconds a step; what only a real model shows is `slow`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stepping import GREEDY, LONG, ask, cached, ids, reply, run

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install stillhouse[torch]")
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install stillhouse[torch]"
)

from stillhouse.backends import machine, pytorch_load  # noqa: E402
from stillhouse.backends.base import (  # noqa: E402
    BackendFailed,
    Force,
    Forget,
    GenerationRequest,
    LoadOptions,
    Sampling,
    Token,
)
from stillhouse.backends.hf_vocabulary import read_vocabulary  # noqa: E402
from stillhouse.backends.open import open_backend  # noqa: E402
from stillhouse.backends.pytorch import PyTorch  # noqa: E402
from stillhouse.backends.pytorch_graphs import fixed_batch  # noqa: E402
from stillhouse.backends.pytorch_load import choose_dtype  # noqa: E402
from stillhouse.backends.pytorch_sampler import Memory, Sampler, plain_chances, truncated_chances  # noqa: E402
from stillhouse.backends.rowsampler import Breakers  # noqa: E402
from stillhouse.backends.sampling import distribution  # noqa: E402
from stillhouse.r1.errors import BadModelFile, UserError  # noqa: E402


@pytest.fixture
def open_torch(open_checkpoint: Callable[..., Any], checkpoint_path: Path) -> Callable[..., PyTorch]:
    return lambda **options: open_checkpoint("pytorch", checkpoint_path, **options)


@pytest.fixture
def backend(open_torch: Callable[..., PyTorch]) -> PyTorch:
    return open_torch()


@pytest.fixture
def module(checkpoint_path: Path) -> Any:
    """The same model, as a trainer has it."""
    return transformers.AutoModelForCausalLM.from_pretrained(checkpoint_path, dtype=torch.float32)


def live(module: Any, checkpoint_path: Path, **options: Any) -> PyTorch:
    return PyTorch(module, read_vocabulary(checkpoint_path), **{"context": 512} | options)


def full_logprobs(module: Any, token_ids: Sequence[int]) -> Any:
    """What transformers itself says comes after each token, (T, vocabulary)."""
    with torch.inference_mode():
        return module(torch.tensor([token_ids])).logits[0].float().log_softmax(-1).numpy()


# The forward pass


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_the_forward_pass_is_transformers_own(random_checkpoint, tmp_path, architecture):
    """In chunks, beside others, token by token: what comes out is what the module says of the whole text at once."""
    folder = random_checkpoint.write_checkpoint(tmp_path / "m", random_checkpoint.random_model(architecture))
    module = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    backend = live(module, folder, batch_tokens=33, parallel=3)
    requests = [ask(backend, text, 20, top_logprobs=5) for text in (LONG, "So", LONG[:50] + "and more")]
    tokens = run(backend)
    for request in requests:
        said = tokens[request.id]
        expected = full_logprobs(module, [*request.prompt_ids, *ids(said)])[len(request.prompt_ids) - 1 :]
        assert ids(said) == [int(row.argmax()) for row in expected[:-1]]
        for token, row in zip(said, expected, strict=False):
            told = dict(token.top_logprobs)
            np.testing.assert_allclose([*told.values()], row[[*told]], atol=1e-4)


def test_the_products_that_a_gpu_attends_with_say_the_same(checkpoint_path, module, monkeypatch):
    from stillhouse.backends import pytorch_decoder

    plain = ids(reply(live(module, checkpoint_path), LONG, 20))
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", fails_for_rows(pytorch_decoder._attend_by_products)
    )
    assert ids(reply(live(module, checkpoint_path), LONG, 20)) == plain


def fails_for_rows(products: Callable[..., Any]) -> Callable[..., Any]:
    """Attention that sends single rows to the products, as a GPU would."""
    plain = torch.nn.functional.scaled_dot_product_attention

    def attend(q: Any, k: Any, v: Any, **options: Any) -> Any:
        return plain(q, k, v, **options) if "is_causal" in options else products(q, k, v, **options)

    return attend


def test_the_fixed_shapes_of_a_graph_say_the_same(backend):
    """Row i is place i, idle ones write where nobody reads, the mask is as wide as a power of two."""
    requests = [ask(backend, text, 30) for text in (LONG, "So", LONG[:40])]
    backend.cancel(requests[1].id)
    while any(len(reply.todo) != 1 for reply in backend._line.running) or not backend._line.running:
        backend.step()
    replies = sorted(backend._line.running, key=lambda reply: reply.place.id)
    cells, places = backend._cells, backend._line.parallel
    token_ids, positions = torch.zeros(places, dtype=torch.long), torch.full((places,), cells - 1)
    for one in replies:
        token_ids[one.place.id], positions[one.place.id] = one.todo[0], one.place.length
    with torch.inference_mode():
        plain = backend._decoder(backend._batch(dict.fromkeys(replies, 1)), backend._cache.tensors)
        fixed = backend._decoder(fixed_batch(token_ids, positions, 256), backend._cache.tensors)
    np.testing.assert_allclose(fixed[[one.place.id for one in replies]], plain, atol=1e-3)


def test_bf16_says_nearly_the_same(open_torch, backend):
    plain, half = (reply(each, LONG, 1, top_logprobs=262)[0] for each in (backend, open_torch(dtype="bf16")))
    apart = [dict(half.top_logprobs)[token_id] - logprob for token_id, logprob in plain.top_logprobs[:20]]
    assert 0 < np.abs(apart).max() < 0.5


# Prefixes


def test_the_same_prompt_again_is_read_from_the_cache(backend):
    first, second = [reply(backend, LONG, top_logprobs=3) for _ in range(2)]
    assert [cached(first), cached(second)] == [0, len(LONG) - 1]
    assert ids(first) == ids(second)
    np.testing.assert_allclose([t.logprob for t in first], [t.logprob for t in second], atol=1e-3)


def test_a_prefix_is_found_wherever_it_is(open_torch):
    backend = open_torch(parallel=2)
    alone = {text: ids(reply(open_torch(), text, 12)) for text in (LONG + "a", LONG[:40] + "another", "1, 2, 3, 4")}
    going = ask(backend, LONG, 60)  # in place 0, and written on
    for _ in range(3):
        backend.step()
    said = reply_beside(backend, LONG + "a")
    assert (cached(said), ids(said)) == (len(LONG), alone[LONG + "a"])  # copied from a place that runs
    other = reply_beside(backend, "1, 2, 3, 4")  # takes place 1: what was there goes to the store
    assert (cached(other), ids(other)) == (0, alone["1, 2, 3, 4"])
    said = reply_beside(backend, LONG[:40] + "another")
    assert (cached(said), ids(said)) == (40, alone[LONG[:40] + "another"])
    backend.cancel(going.id)


def reply_beside(backend: PyTorch, prompt: str) -> list[Token]:
    """A reply, while others go on."""
    request = ask(backend, prompt, 12)
    tokens: list[Token] = []
    while not tokens or not tokens[-1].finish:
        tokens += [token for token in backend.step() if token.request_id == request.id]
    return tokens


def test_what_left_the_cache_is_found_in_ram(open_torch):
    backend = open_torch(parallel=1)
    prompts = [chr(65 + n) * 60 for n in range(5)]
    first = [ids(reply(backend, prompt, 4)) for prompt in prompts]
    again = [reply(backend, prompt, 4) for prompt in prompts]
    assert [cached(tokens) for tokens in again] == [59] * 5
    assert [ids(tokens) for tokens in again] == first
    assert cached(reply(backend, prompts[2][:40] + "!", 2)) == 40


def test_a_reply_is_a_prefix_for_the_next_turn_as_far_as_it_is_the_same(backend):
    prompt = backend.vocabulary.encode(LONG)
    said = ids(reply(backend, LONG, 20))
    assert cached(reply(backend, [*prompt, *said, 1, 2, 3])) == len(prompt) + 19  # the last token was never read
    assert cached(reply(backend, [*prompt, *said[:10], (said[10] + 1) % 256, 2])) == len(prompt) + 10


def test_replies_to_one_prompt_share_what_is_read(backend):
    requests = [ask(backend, LONG, 8, sampling=Sampling(seed=n)) for n in range(4)]
    tokens = run(backend)
    assert [cached(tokens[request.id]) for request in requests] == [0, *[len(LONG) - 1] * 3]
    assert len({tuple(ids(tokens[request.id])) for request in requests}) == 4


# Chunks


def test_a_long_prompt_is_read_in_chunks_beside_a_reply_that_goes_on(open_torch):
    backend = open_torch(batch_tokens=32)
    going = ask(backend, "Once upon", 100)
    backend.step()
    long = ask(backend, [n % 250 for n in range(300)], 5)
    steps = [[token.request_id for token in backend.step()] for _ in range(10)]
    assert steps == [*[[going.id]] * 9, [going.id, long.id]]
    run(backend)


def test_chunks_of_any_size_read_the_same(open_torch):
    said = [reply(open_torch(batch_tokens=size), LONG * 3, 6, top_logprobs=3) for size in (32, 50, 512)]
    assert ids(said[0]) == ids(said[1]) == ids(said[2])
    for other in said[1:]:
        np.testing.assert_allclose([t.logprob for t in said[0]], [t.logprob for t in other], atol=1e-3)


def test_idle_work_waits_and_is_put_aside_for_real_work(open_torch):
    backend = open_torch(batch_tokens=32, parallel=1)
    prompt = [n % 250 for n in range(200)]
    idle = ask(backend, prompt, 0, idle=True)
    for _ in range(3):
        assert backend.step() == []
    real = ask(backend, "The sea is", 4)
    steps = [[token.request_id for token in backend.step()] for _ in range(4)]
    assert steps == [[real.id]] * 4
    assert [token.request_id for _ in range(4) for token in backend.step()] == [idle.id]
    assert cached(reply(backend, [*prompt, 1, 2], 1)) == 200


# A module that is trained


def test_a_live_module_speaks_with_the_weights_it_has_now(module, checkpoint_path):
    """What was read before an optimizer's step was taken for a prefix after it."""
    backend = live(module, checkpoint_path)
    before = reply(backend, LONG, 4, top_logprobs=0)
    assert cached(reply(backend, LONG, 1)) == len(LONG) - 1
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    prompt = [*backend.vocabulary.encode(LONG)]
    module(torch.tensor([prompt]), labels=torch.tensor([prompt])).loss.backward()
    optimizer.step()
    after = reply(backend, LONG, 4, top_logprobs=0)
    assert cached(after) == 0
    expected = full_logprobs(module, [*prompt, *ids(after)])[len(prompt) - 1 : -1]
    np.testing.assert_allclose([t.logprob for t in after], expected.max(axis=-1), atol=1e-4)
    assert [t.logprob for t in before] != [t.logprob for t in after]


def test_a_live_module_is_left_as_it_is(module, checkpoint_path):
    names = {name: (parameter.data_ptr(), parameter.requires_grad) for name, parameter in module.named_parameters()}
    reply(live(module, checkpoint_path), LONG, 4)
    assert names == {name: (p.data_ptr(), p.requires_grad) for name, p in module.named_parameters()}
    assert module.training is False
    module.train()
    reply(live(module, checkpoint_path), LONG, 4)
    assert module.training is True


def test_log_probabilities_are_those_that_a_trainer_reckons(module, checkpoint_path):
    """Sampled, not greedy: the trainer compares them token by token."""
    backend = live(module, checkpoint_path)
    requests = [ask(backend, LONG, 30, sampling=Sampling(seed=n), top_logprobs=0) for n in range(4)]
    tokens = run(backend)
    for request in requests:
        said = tokens[request.id]
        rows = full_logprobs(module, [*request.prompt_ids, *ids(said)])[len(LONG) - 1 : -1]
        np.testing.assert_allclose([t.logprob for t in said], rows[np.arange(30), ids(said)], atol=1e-4)


class Doubled(torch.nn.Linear):
    """A projection with something around it, as adapters have."""

    def forward(self, x: Any) -> Any:
        return 2 * super().forward(x)


def test_a_projection_with_an_adapter_is_called_as_it_is(module, checkpoint_path):
    plain = ids(reply(live(module, checkpoint_path), LONG, 8))
    for layer in module.model.layers:
        for name in ("q_proj", "down_proj"):
            block = layer.self_attn if name == "q_proj" else layer.mlp
            wrapped = Doubled(*getattr(block, name).weight.shape[::-1], bias=getattr(block, name).bias is not None)
            wrapped.load_state_dict(getattr(block, name).state_dict())
            setattr(block, name, wrapped)
    said = reply(live(module, checkpoint_path), LONG, 8, top_logprobs=0)
    rows = full_logprobs(module, [*map(ord, LONG), *ids(said)])[len(LONG) - 1 : -1]
    assert ids(said) == [int(row.argmax()) for row in rows] != plain


# The sampler against the written reference

SAMPLINGS = {
    "as it is": Sampling(),
    "hot": Sampling(temperature=1.7),
    "R1's advice": Sampling(temperature=0.6, top_p=0.95),
    "top-k": Sampling(top_k=7),
    "top-k and hot": Sampling(temperature=2, top_k=7),
    "more than there are": Sampling(top_k=100_000),
    "top-p": Sampling(top_p=0.7),
    "top-p keeps one": Sampling(top_p=0.01),
    "top-p keeps many": Sampling(temperature=4, top_p=0.99),
    "min-p": Sampling(min_p=0.1),
    "min-p and hot": Sampling(temperature=2, min_p=0.2),
    "typical": Sampling(typical_p=0.6),
    "all together": Sampling(temperature=1.3, top_k=30, typical_p=0.95, top_p=0.9, min_p=0.02),
    "repetition": Sampling(repetition_penalty=1.8),
    "repetition, a short memory": Sampling(repetition_penalty=3, penalty_last_n=5),
    "a reward for repetition": Sampling(repetition_penalty=0.6),
    "presence": Sampling(presence_penalty=1.5),
    "frequency": Sampling(frequency_penalty=0.9),
    "all penalties": Sampling(repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=-0.4, penalty_last_n=20),
    "no memory": Sampling(repetition_penalty=2, presence_penalty=2, penalty_last_n=0),
    "logit bias": Sampling(logit_bias=((65, 4.0), (66, -100.0), (67, 2.5))),
    "logit bias and top-k": Sampling(temperature=0.5, top_k=2, logit_bias=((65, 30.0), (67, 29.5))),
    "greedy": GREEDY,
    "greedy with penalties": Sampling(temperature=0, repetition_penalty=1.5, logit_bias=((70, 3.0),), top_p=0.1),
}
SIZE = 1000


class Plain:
    """A vocabulary of a thousand letters."""

    size = SIZE
    end_ids = frozenset({7})

    def piece(self, token_id: int) -> bytes:
        return b"\n" if token_id == 10 else b"x"


def memory(sampling: Sampling, prompt: Sequence[int] = (), said: Sequence[int] = ()) -> Memory:
    kept = Memory(GenerationRequest("1", list(prompt), 1, sampling), frozenset())
    for token_id in said:
        kept.accept(token_id)
    return kept


def rows_of_logits(count: int, spread: float = 3.0) -> Any:
    return torch.from_numpy(np.random.default_rng(count).normal(0, spread, (count, SIZE)).astype(np.float32))


def test_what_all_settings_leave_is_what_the_reference_leaves():
    """Every setting in one batch, each row by its own: the chances themselves, not only what was drawn."""
    prompt, said = [*b"hello, so it is: ABCA"], [*b"oo, hello oo"]
    logits = rows_of_logits(len(SAMPLINGS))
    memories = [memory(sampling, prompt, said) for sampling in SAMPLINGS.values()]
    adjusted = Sampler(Breakers(Plain()))._adjusted(logits, memories, [None] * len(memories))
    for row, (name, sampling) in enumerate(SAMPLINGS.items()):
        expected = distribution(logits[row].numpy().astype(np.float64), sampling, prompt, said)
        if sampling.temperature == 0:
            assert int(adjusted[row].argmax()) == expected.argmax(), name
            continue
        whole = plain_chances(adjusted[row : row + 1], [sampling])
        if sampling.top_k or sampling.top_p < 1 or sampling.typical_p < 1:
            for full in (False, True):
                chances, ids, enough = truncated_chances(adjusted[row : row + 1], [sampling], [False], full=full)
                if enough.item():
                    whole = torch.zeros(1, SIZE, dtype=chances.dtype).scatter(1, ids, chances)
                    np.testing.assert_allclose((whole / whole.sum())[0], expected, atol=1e-6, err_msg=name)
            assert enough.item(), name
        np.testing.assert_allclose((whole / whole.sum())[0], expected, atol=1e-6, err_msg=name)


def test_rows_do_not_mix_in_a_batch():
    """The same request draws the same tokens alone and among others, whatever theirs are."""
    logits = rows_of_logits(len(SAMPLINGS))
    sampler = Sampler(Breakers(Plain()))

    def seeded() -> list[Memory]:
        return [memory(replace(sampling, seed=row), [1, 2, 3]) for row, sampling in enumerate(SAMPLINGS.values())]

    together = sampler.draw(logits, seeded(), [None] * len(logits), [None] * len(logits))
    alone = [
        sampler.draw(logits[row : row + 1], [kept], [None], [None])[0]
        for row, kept in enumerate(seeded())  # pyright: ignore[reportOptionalSubscript]
    ]
    assert together == alone


@pytest.mark.parametrize("name", ["as it is", "R1's advice", "top-p keeps many", "min-p and hot", "all together"])
def test_tokens_are_drawn_as_often_as_the_reference_says(name):
    sampling, draws = SAMPLINGS[name], 3000
    logits = rows_of_logits(1).expand(draws, SIZE)
    memories = [memory(replace(sampling, seed=seed)) for seed in range(draws)]
    drawn = Sampler(Breakers(Plain())).draw(logits, memories, [None] * draws, [None] * draws)
    assert drawn
    counts = np.bincount([token.token_id for token in drawn], minlength=SIZE)
    chances = distribution(logits[0].numpy().astype(np.float64), sampling, [], [])
    assert not counts[chances == 0].any()
    often = chances * draws >= 5
    expected = [*(chances[often] * draws), chances[~often].sum() * draws]
    seen = [*counts[often], counts[~often].sum()]
    surprise = sum((a - b) ** 2 / b for a, b in zip(seen, expected, strict=True) if b > 1e-9)
    freedom = max(1, len(seen) - 1)
    assert surprise < freedom + 5 * (2 * freedom) ** 0.5 + 10


def test_a_mask_leaves_only_what_it_allows_and_a_bias_works_inside_it():
    logits = rows_of_logits(2)
    bits = np.zeros(-(-SIZE // 32), np.uint32)
    for token_id in (31, 32, 999):
        bits[token_id // 32] |= np.uint32(1 << token_id % 32)
    biased = Sampling(temperature=0, logit_bias=((32, 50.0), (5, 100.0)))
    for sampling, wanted in ((biased, {32}), (Sampling(top_p=0.9, temperature=3), {31, 32, 999})):
        drawn = Sampler(Breakers(Plain())).draw(logits, [memory(sampling)] * 2, [bits, None], [None, 0])
        assert drawn
        assert drawn[0].token_id in wanted
        assert drawn[1].told and drawn[1].told.logprob <= 0


def test_an_end_that_is_ignored_is_never_drawn():
    logits = torch.zeros(1, SIZE)
    logits[0, 7] = 50
    request = GenerationRequest("1", [1], 1, Sampling(), ignore_eos=True)
    drawn = Sampler(Breakers(Plain())).draw(logits, [Memory(request, Plain.end_ids)], [None], [None])
    assert drawn and drawn[0].token_id != 7


def test_dry_breaks_a_repetition(backend):
    bias = tuple((token_id, 60.0 - 30 * n) for n, token_id in enumerate(b"ab"))
    plain = bytes(ids(reply(backend, "So", 20, sampling=Sampling(temperature=0, logit_bias=bias))))
    dry = bytes(ids(reply(backend, "So", 20, sampling=Sampling(temperature=0, logit_bias=bias, dry_multiplier=50.0))))
    assert plain == b"a" * 20
    assert dry[:4] == b"aaab"


def test_xtc_leaves_all_good_choices_out_but_the_least_likely():
    logits = torch.full((1, SIZE), -9.0)
    logits[0, [3, 4, 5]] = torch.tensor([2.0, 1.9, 1.8])
    for threshold, wanted in ((0.1, {5}), (0.4, {3, 4, 5}), (0.6, {3, 4, 5})):
        xtc = Sampling(xtc_probability=1, xtc_threshold=threshold, top_p=0.99)
        memories = [memory(replace(xtc, seed=seed)) for seed in range(40)]
        drawn = Sampler(Breakers(Plain())).draw(logits.expand(40, SIZE), memories, [None] * 40, [None] * 40)
        assert drawn and {token.token_id for token in drawn} == wanted


def test_what_is_forgotten_is_not_penalized(backend):
    class Forgets:
        """Forces three letters, forgets them, and then leaves the model free."""

        def __init__(self, *wishes: Any) -> None:
            self.wishes = iter(wishes)

        def wish(self, logits: Any) -> Any:
            return next(self.wishes, None)

        def see(self, token_id: int, text: str, finish: Any) -> Any:
            return None, finish

    said = tuple(b"abc")
    bias = tuple((token_id, 200.0 - 20 * n) for n, token_id in enumerate(b"abcd"))
    harsh = Sampling(temperature=0, presence_penalty=100.0, logit_bias=bias)
    kept = ids(reply(backend, "So", 4, sampling=harsh, steer=Forgets(Force(said))))
    forgotten = ids(reply(backend, "So", 4, sampling=harsh, steer=Forgets(Force(said), Forget())))
    assert (bytes(kept), bytes(forgotten)) == (b"abcd", b"abca")


# Loading


def test_a_gguf_file_says_what_the_checkpoint_says(random_checkpoint, tmp_path):
    model = random_checkpoint.random_model("qwen3")
    folder = random_checkpoint.write_checkpoint(tmp_path / "m", model)
    file = random_checkpoint.write_gguf(tmp_path / "m.gguf", model)
    options = LoadOptions(context=512, threads=1, backend="pytorch", dtype="f32")
    opened = [open_backend(paths, options) for paths in ([folder / "model.safetensors"], [file])]
    first, second = (reply(each.backend, LONG, 12, top_logprobs=0) for each in opened)  # pyright: ignore[reportArgumentType]
    assert ids(first) == ids(second)
    np.testing.assert_allclose([t.logprob for t in first], [t.logprob for t in second], atol=1e-4)
    assert [each[1:4] for each in opened] == [(random_checkpoint.TEMPLATE, "<|begin|>", "<|end|>")] * 2


def test_shards_are_read_together(random_checkpoint, tmp_path, backend):
    folder = random_checkpoint.write_checkpoint(tmp_path, shards=3)
    options = LoadOptions(context=512, threads=1, backend="pytorch")
    opened = open_backend(sorted(folder.glob("*.safetensors")), options)
    assert ids(reply(opened.backend, LONG)) == ids(reply(backend, LONG))  # pyright: ignore[reportArgumentType]


@pytest.mark.filterwarnings("ignore")  # bitsandbytes' own
def test_a_checkpoint_in_nf4_is_served_as_it_is(random_checkpoint, checkpoint_path, open_checkpoint, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    module = transformers.AutoModelForCausalLM.from_pretrained(checkpoint_path, quantization_config=config)
    random_checkpoint.write_checkpoint(tmp_path)  # its tokenizer
    module.save_pretrained(tmp_path)
    backend = open_checkpoint("pytorch", tmp_path)
    assert type(backend._module.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    said = reply(backend, LONG, 12, top_logprobs=0)
    rows = full_logprobs(backend._module, [*map(ord, LONG), *ids(said)])[len(LONG) - 1 : -1]
    assert ids(said) == [int(row.argmax()) for row in rows]


CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DTYPES = {
    "a CPU with bf16": ("BF16", CPU, True, "auto", torch.bfloat16),
    "a CPU without": ("BF16", CPU, False, "auto", torch.float32),
    "f16 on a CPU loses nothing": ("F16", CPU, True, "auto", torch.float32),
    "f32 stays": ("F32", CUDA, True, "auto", torch.float32),
    "a GPU": ("BF16", CUDA, False, "auto", torch.bfloat16),
    "f16 on a GPU": ("F16", CUDA, False, "auto", torch.float16),
    "fewer bits": ("", CUDA, False, "auto", torch.bfloat16),
    "asked for": ("BF16", CPU, True, "f32", torch.float32),
}


@pytest.mark.parametrize(("stored", "device", "fast", "asked", "wanted"), DTYPES.values(), ids=DTYPES)
def test_it_computes_in_what_suits_the_machine(monkeypatch, stored, device, fast, asked, wanted):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert choose_dtype(stored, device, LoadOptions(dtype=asked)) == wanted


# Keys and values of one token of the random Qwen2, f32: 2 blocks x 2 heads x 16 wide x 2 x 4 bytes
PER_TOKEN = 512


def test_a_context_that_nobody_asked_for_is_made_to_fit_all_replies(open_torch, checkpoint_path, monkeypatch):
    weights = (checkpoint_path / "model.safetensors").stat().st_size
    monkeypatch.setattr(pytorch_load, "_LEAST_CONTEXT", 256)
    monkeypatch.setattr(machine, "free_memory", lambda: int(weights * 1.05) + 2100 * PER_TOKEN)
    backend = open_torch(context=None, parallel=4)
    assert (backend.context_length, backend._line.parallel) == (512, 4)
    backend = open_torch(context=1024, parallel=4)
    assert (backend.context_length, backend._line.parallel) == (1024, 2)
    with pytest.raises(UserError, match=r"a KV cache for 2048 tokens needs .*--context 1\d\d\d or less"):
        monkeypatch.setattr(machine, "free_memory", lambda: int(weights * 1.05) + 1900 * PER_TOKEN)
        open_torch(context=2048)


REFUSALS = {
    "a quantized cache": ({"kv_type": "q8_0"}, r"KV cache in the type it computes in, not in q8_0"),
    "an adapter": ({"loras": ((Path("a"), 1.0),)}, r"serves no adapters"),
    "a part on the GPU": ({"gpu_layers": 10}, r"on the GPU as a whole or not at all"),
    "no such type": ({"dtype": "f8"}, r"no type 'f8' to compute in.*f32, bf16, f16"),
    "more context than trained for": ({"context": 4096}, r"--context 4096 is more than the 2048 tokens"),
}


@pytest.mark.parametrize(("options", "message"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_had_is_told_in_a_line(open_torch, options, message):
    with pytest.raises(UserError, match=message) as told:
        open_torch(**options)
    assert "\n" not in str(told.value)


def edited(folder: Path, **fields: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def test_weights_that_do_not_fit_their_config_are_told_in_a_line(random_checkpoint, open_checkpoint, tmp_path):
    folder = edited(random_checkpoint.write_checkpoint(tmp_path), intermediate_size=96)
    with pytest.raises(BadModelFile, match="transformers cannot load") as told:
        open_checkpoint("pytorch", folder)
    assert "\n" not in str(told.value)


def test_a_sliding_window_is_refused(random_checkpoint, open_checkpoint, tmp_path):
    model = random_checkpoint.random_model("qwen2")
    folder = random_checkpoint.write_checkpoint(tmp_path, model)
    edited(folder, use_sliding_window=True, sliding_window=64, max_window_layers=0)
    with pytest.raises(BadModelFile, match="sliding window"):
        open_checkpoint("pytorch", folder)


def test_a_module_that_is_no_language_model_is_told(checkpoint_path):
    with pytest.raises(BadModelFile, match="no causal language model"):
        PyTorch(torch.nn.Linear(2, 2), read_vocabulary(checkpoint_path))


# What goes wrong later


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"), "out of memory: CUDA .* 2 GiB"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), r"out of memory: .*--parallel or --context"),
        (RuntimeError("no such kernel"), "the forward pass failed: no such kernel"),
    ],
)
def test_a_failed_forward_is_told_and_forgotten(backend, monkeypatch, error, message):
    before = ids(reply(backend, LONG))

    def fails(*_: Any) -> Any:
        raise error

    ask(backend, LONG)
    with monkeypatch.context() as patched:
        patched.setattr(backend, "_decoder", type("", (), {"__call__": fails, "device": CPU})())
        with pytest.raises(BackendFailed, match=message) as told:
            backend.step()
        assert "\n" not in str(told.value)
    assert backend.load()[:3] == (0, 0, 0)
    after = reply(backend, LONG)
    assert (cached(after), ids(after)) == (0, before)


def test_logits_that_are_no_numbers_are_told(random_checkpoint, open_checkpoint, tmp_path):
    broken = random_checkpoint.random_model("qwen2", norm=float("nan"))
    backend = open_checkpoint("pytorch", random_checkpoint.write_checkpoint(tmp_path, broken))
    ask(backend, LONG)
    with pytest.raises(BackendFailed, match="logits are not numbers"):
        backend.step()
    assert backend.load()[:3] == (0, 0, 0)
