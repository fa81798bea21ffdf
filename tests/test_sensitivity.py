"""The Fisher information is that of the definition, and the price of an error is the KL divergence it causes."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason='the analysis needs PyTorch: pip install "stillhouse[torch]"')
transformers = pytest.importorskip("transformers", reason='the analysis needs transformers: "stillhouse[torch]"')

from stillhouse.quantize import sensitivity  # noqa: E402
from stillhouse.quantize.architectures import hf_name  # noqa: E402
from stillhouse.quantize.pytorch_layers import Decoder  # noqa: E402
from stillhouse.quantize.pytorch_sensitivity import analyse, rounding_errors, uses_of  # noqa: E402
from stillhouse.quantize.sensitivity import Candidate, Cost, Sensitivity, sample_rows  # noqa: E402
from stillhouse.quantize.source import open_checkpoint  # noqa: E402
from stillhouse.r1.errors import UserError  # noqa: E402

EPSILON = 0.01


def _random() -> ModuleType:
    spec = importlib.util.spec_from_file_location("random_weights", Path(__file__).with_name("random_weights.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


write_checkpoint = _random().write_checkpoint


def whole(folder: Path) -> Any:
    """The same network, all of it in memory, through transformers' own loader."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def shaken(rows: np.ndarray, _: np.ndarray | None) -> np.ndarray:
    """An error of known size: the square is the same for every weight."""
    return rows + np.float32(EPSILON)


SHAKEN = Candidate("shaken", lambda rows, cols: rows * cols, shaken)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_layer_by_layer_computes_what_the_whole_model_does(family, tmp_path):
    folder = write_checkpoint(tmp_path, family)
    decoder, model = Decoder(open_checkpoint(folder)), whole(folder)
    ids = np.random.default_rng(0).integers(0, 50, (2, 9), np.int32)

    hidden = decoder.embed(ids)
    with torch.inference_mode():
        for number in range(decoder.count):
            with decoder.layer(number) as layer:
                hidden = decoder.run(layer, hidden)
        with decoder.norm() as norm:
            hidden = norm(hidden)
        expected = model.model(torch.from_numpy(ids).long()).last_hidden_state

    assert torch.allclose(hidden, expected, atol=1e-5)


def test_only_one_layer_is_in_memory(tmp_path):
    decoder = Decoder(open_checkpoint(write_checkpoint(tmp_path, num_hidden_layers=3)))

    def held() -> list[int]:
        return [n for n, layer in enumerate(decoder._layers) if not next(layer.parameters()).is_meta]

    assert held() == []
    with decoder.layer(1):
        assert held() == [1]
    with decoder.layer(2):
        assert held() == [2]
    assert held() == []


def test_the_fisher_information_of_one_token_is_the_square_of_the_gradient(tmp_path):
    """For texts of one token g x^T is the whole gradient of the weights, which autograd gives, too."""
    decoder = Decoder(open_checkpoint(write_checkpoint(tmp_path, "qwen2")))
    random = torch.Generator().manual_seed(0)
    inputs, gradient = torch.randn(2, 5, 1, 32, generator=random)
    with decoder.layer(0) as layer:
        uses, before = uses_of(decoder, layer, inputs, gradient)
        expected = {name: torch.zeros_like(linear.weight) for name, linear in layer.linears.items()}
        layer.module.requires_grad_(True)
        text = inputs[0]
        for text, back in zip(inputs, gradient, strict=True):
            layer.module.zero_grad()
            text = text[None].clone().requires_grad_()
            decoder.run(layer, text).backward(back[None])
            for name, linear in layer.linears.items():
                expected[name] += linear.weight.grad**2

    assert expected["blk.0.ffn_down.weight"].abs().max() > 0
    for name, use in uses.items():
        assert torch.allclose(use.fisher, expected[name], rtol=1e-4, atol=1e-9), name
        assert use.positions == 5
    assert torch.allclose(before[-1:], text.grad)


def test_over_many_tokens_it_is_the_sum_of_the_products_of_squares(tmp_path):
    decoder = Decoder(open_checkpoint(write_checkpoint(tmp_path)))
    random = torch.Generator().manual_seed(1)
    inputs, gradient = torch.randn(2, 3, 7, 32, generator=random)
    seen: dict[str, Any] = {}
    with decoder.layer(1) as layer:
        use = uses_of(decoder, layer, inputs, gradient)[0]["blk.1.ffn_down.weight"]
        down = layer.linears["blk.1.ffn_down.weight"]
        down.register_forward_pre_hook(lambda _, taken: seen.update(x=taken[0].detach()))
        decoder.run(layer, inputs)
    # The gradient at a layer's output is that at the output of its last matrix.
    expected = torch.einsum("nto,nti->oi", gradient**2, seen["x"] ** 2)
    assert torch.allclose(use.fisher, expected, rtol=1e-4)
    assert torch.allclose(use.squares, (seen["x"].double() ** 2).sum((0, 1)))


def predictions(model: Any, ids: np.ndarray) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.from_numpy(ids).long()).logits.double().log_softmax(-1)


def kl_of(model: Any, base: torch.Tensor, ids: np.ndarray, name: str, signs: torch.Tensor) -> float:
    """The mean KL divergence that an error of EPSILON with these signs causes in one matrix."""
    weight = model.get_parameter(name)
    with torch.inference_mode():
        weight += EPSILON * signs
        changed = predictions(model, ids)
        weight -= EPSILON * signs
    return float((base.exp() * (base - changed)).sum(-1).mean())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_price_of_an_error_is_the_kl_divergence_that_it_causes(tied, tmp_path):
    """For errors that know nothing of one another the diagonal is all there is: texts of one token make it exact."""
    folder = write_checkpoint(tmp_path, tied=tied)
    ids = np.tile(np.arange(50, dtype=np.int32), 60)[:, None]

    found = analyse(Decoder(open_checkpoint(folder)), ids, [SHAKEN], text="all tokens", rows=1000, first=0)

    model, random = whole(folder), torch.Generator().manual_seed(0)
    base = predictions(model, ids[:50])
    assert found.tokens == 3000
    assert set(found.costs) == {
        "token_embd.weight",
        *([] if tied else ["output.weight"]),
        *(f"blk.{n}.{part}.weight" for n in (0, 1) for part in ("attn_q", "attn_k", "attn_v", "attn_output")),
        *(f"blk.{n}.{part}.weight" for n in (0, 1) for part in ("ffn_gate", "ffn_up", "ffn_down")),
    }
    for name, types in found.costs.items():
        predicted, hf = types["shaken"].kl, hf_name(name)
        assert hf
        if "attn_q" in name or "attn_k" in name:
            assert predicted < 1e-12, "a text of one token has nothing to choose between"
            continue
        shape = model.get_parameter(hf).shape
        draws = [torch.randint(0, 2, shape, generator=random) * 2.0 - 1 for _ in range(16)]
        measured = np.mean([kl_of(model, base, ids[:50], hf, signs) for signs in draws])
        assert predicted == pytest.approx(measured, rel=0.2), name


@pytest.mark.parametrize("name", ["blk.0.ffn_down.weight", "blk.1.attn_v.weight", "output.weight"])
def test_inputs_in_8_bits_cost_what_they_are_priced_at(name, tmp_path):
    """A type that keeps weights as they are, read by a kernel that rounds what they are multiplied with, coarsely."""
    folder = write_checkpoint(tmp_path, vocab_size=400)
    ids = np.arange(400, dtype=np.int32)[:, None]
    exact = Candidate("exact", lambda rows, cols: rows * cols, lambda rows, _: rows, input_block=16)
    found = analyse(Decoder(open_checkpoint(folder)), ids, [exact], text="", first=0, rows=10)

    model, hf = whole(folder), hf_name(name)
    assert hf
    matrix = model.get_submodule(hf.removesuffix(".weight"))
    base = predictions(model, ids)
    matrix.register_forward_pre_hook(lambda _, taken: (taken[0] + rounding_errors(taken[0][:, 0], 16)[:, None],))
    changed = predictions(model, ids)
    measured = float((base.exp() * (base - changed)).sum(-1).mean())
    assert found.costs[name]["exact"].kl == pytest.approx(measured, rel=0.3)


def test_what_8_bits_leave_out_is_half_a_step_at_most():
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    x[0, :32] = 0
    errors = rounding_errors(x, 32)
    steps = x.reshape(3, 2, 32).abs().amax(-1) / 127
    assert (errors.reshape(3, 2, 32).abs().amax(-1) <= steps / 2 * 1.001).all()
    assert errors[1].abs().max() > steps.max() / 4


def test_a_sample_of_rows_gives_the_price_of_all(tmp_path):
    """Unbiased: the mean over seeds is the price by all rows."""
    checkpoint = open_checkpoint(write_checkpoint(tmp_path))
    ids = np.random.default_rng(0).integers(0, 50, (4, 12), np.int32)
    candidate = Candidate("rounded", lambda rows, cols: rows * cols, lambda rows, _: np.round(rows * 8) / 8)

    def price(seed: int, rows: int) -> float:
        found = analyse(Decoder(checkpoint), ids, [candidate], text="", rows=rows, seed=seed)
        return sum(types["rounded"].kl for types in found.costs.values())

    exact = np.mean([price(seed, 1000) for seed in range(8)])
    sampled = np.mean([price(seed, 12) for seed in range(24)])
    assert sampled == pytest.approx(exact, rel=0.1)


def test_sampled_rows_stand_for_all_rows():
    random = np.random.default_rng(0)
    mass = random.exponential(1, 500) ** 3
    values = mass * random.uniform(0.5, 2, 500)
    totals = []
    for _ in range(100):
        sample = sample_rows(mass, 40, random)
        assert abs(len(sample.rows) - 40) <= 1
        assert len(set(sample.rows)) == len(sample.rows)
        totals.append(float(sample.weights @ values[sample.rows]))
    assert np.mean(totals) == pytest.approx(values.sum(), rel=0.02)
    assert np.std(totals) / np.mean(totals) < 0.1, "rows that matter are nearly always in"


def test_few_rows_are_all_taken_and_those_without_mass_never():
    sample = sample_rows(np.array([0, 1, 0, 2.0]), 10, np.random.default_rng(0))
    assert sample.rows.tolist() == [1, 3]
    assert sample.weights.tolist() == [1, 1]


def test_a_type_that_cannot_take_a_row_has_no_price(tmp_path):
    narrow = Candidate("narrow", lambda rows, cols: rows if cols % 48 == 0 else None, shaken)
    found = analyse(
        Decoder(open_checkpoint(write_checkpoint(tmp_path))), np.zeros((1, 4), np.int32), [SHAKEN, narrow], text=""
    )
    assert {name for name, types in found.costs.items() if "narrow" in types} == {
        "blk.0.ffn_down.weight",
        "blk.1.ffn_down.weight",
    }


def test_a_price_list_is_read_as_it_was_written(tmp_path):
    written = Sensitivity({"blk.0.attn_q.weight": {"Q4_K": Cost(0.25, 1.5, 99)}}, "model", "texts", 7)
    sensitivity.write(tmp_path / "a.json", written)
    assert sensitivity.read(tmp_path / "a.json") == written
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_what_is_no_price_list_is_refused(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(UserError, match="not a sensitivity file"):
        sensitivity.read(tmp_path / "a.json")


def test_another_models_price_list_is_refused():
    found = Sensitivity({"a": {"x": Cost(1, 1, 1)}}, "other", "", 1)
    sensitivity.refuse_other(found, ["a"])
    for matrices in ([], ["a", "b"]):
        with pytest.raises(UserError, match="the price list is of other"):
            sensitivity.refuse_other(found, matrices)


def test_forbidden_types_are_left_out_unless_a_tensor_has_no_other():
    found = Sensitivity({"a": {"x": Cost(1, 1, 1), "y": Cost(2, 2, 2)}, "b": {"x": Cost(3, 3, 3)}}, "", "", 1)
    assert found.of_types(["y"]) == {"a": {"y": Cost(2, 2, 2)}, "b": {"x": Cost(3, 3, 3)}}


PEAK = """
import sys, threading, time
from pathlib import Path
import numpy as np, torch
torch.set_num_threads(1)
from stillhouse.quantize.candidates import gguf_candidates
from stillhouse.quantize.pytorch_layers import Decoder
from stillhouse.quantize.pytorch_sensitivity import analyse
from stillhouse.quantize.source import open_checkpoint

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("RssAnon"))

peak, done = 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)

decoder, chunks = Decoder(open_checkpoint(Path(sys.argv[1]))), np.zeros((2, 64), np.int32)
before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
analyse(decoder, chunks, gguf_candidates(["Q4_K"]), text="", rows=16)
done = True
thread.join()
print(peak - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read off /proc")
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path):
    """A layer has 16 MB of weights here; eight more would be 128 MB more, were they kept."""
    size = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "head_dim": 64}
    peaks = []
    for layers in (2, 10):
        folder = write_checkpoint(tmp_path / str(layers), num_hidden_layers=layers, **size)
        done = subprocess.run([sys.executable, "-c", PEAK, folder], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout))
    assert peaks[0] > 16, "one layer is in memory"
    assert peaks[1] < peaks[0] + 24
