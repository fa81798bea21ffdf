"""What the vocabulary of a checkpoint folder promises: llama.cpp's ids for the same text, no control by accident."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from stillhouse.r1.errors import BadModelFile
from stillhouse.r1.prompt import ChatTemplate

pytest.importorskip("tokenizers", reason="the tokenizers package is not installed: pip install stillhouse[torch]")

from stillhouse.backends.hf_vocabulary import HfVocabulary, read_chat_template, read_vocabulary

TEXTS = [
    "The quick 12345 brown\n\n  fox's Naïve 日本語 😀👩‍👩‍👧 e\u0301 x=1+2;\t\t if (a) {",
    "  lead and trail  \n",
    "<｜User｜>hi<｜Assistant｜><think>\nso</think>\n\n",
    "\u0000\ud7ff\ufdd0\r\n\r\n",
    "",
]


@pytest.fixture(scope="module")
def folder(random_checkpoint: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint.write_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def vocabulary(folder: Path) -> HfVocabulary:
    return read_vocabulary(folder)


@pytest.fixture(scope="module")
def r1(r1_vocabulary_path: Path, random_checkpoint: ModuleType) -> HfVocabulary:
    words = random_checkpoint.r1_words(r1_vocabulary_path)
    ends = frozenset({words.tokens.index(words.end)})
    return HfVocabulary(words.json, size=len(words.tokens), bos_id=words.tokens.index(words.begin), end_ids=ends)


@pytest.fixture(scope="module")
def llama(r1_vocabulary_path: Path) -> Any:
    from stillhouse.backends.llamacpp_load import silence
    from stillhouse.backends.llamacpp_vocabulary import C, LlamaVocabulary

    silence()
    params = C.llama_model_default_params()
    params.vocab_only = True
    return LlamaVocabulary(C.llama_model_load_from_file(str(r1_vocabulary_path).encode(), params))


def test_a_folder_says_where_prompts_begin_and_replies_end(vocabulary):
    assert vocabulary.size == 263
    assert vocabulary.bos_id == vocabulary.control["<|begin|>"]
    assert vocabulary.end_ids == {vocabulary.control["<|end|>"]}
    assert vocabulary.boundary_texts() == ("<|begin|>", "<|end|>")
    assert list(vocabulary.control) == ["<|begin|>", "<|end|>", "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"]


def test_control_tokens_count_as_such_and_the_tags_alone_are_shown(vocabulary):
    control = vocabulary.control
    assert vocabulary.encode("é<think>x<|end|>") == [0xC3, 0xA9, control["<think>"], ord("x"), control["<|end|>"]]
    assert [vocabulary.piece(control[name]) for name in ("<think>", "<|end|>")] == [b"<think>", b"<|end|>"]
    assert [vocabulary.shown(control[name]) for name in ("<think>", "<|end|>")] == [b"<think>", b""]
    assert [vocabulary.piece(byte) for byte in range(256)] == [bytes([byte]) for byte in range(256)]


def test_what_a_user_writes_never_becomes_a_control_token(vocabulary, folder):
    template = ChatTemplate(read_chat_template(folder), vocabulary.control, bos="<|begin|>", eos="<|end|>")
    names = list(vocabulary.control)
    said = "".join(names) + "<" * 3 + names[-1]
    rendered = template.render([message(said)])
    ids = rendered.encode(vocabulary.encode, vocabulary.bos_id)
    assert [i for i in ids if i in vocabulary.control.values()] == [
        vocabulary.control[name] for name in ("<|begin|>", "<｜User｜>", "<｜Assistant｜>", "<think>")
    ]
    assert said.encode() in b"".join(map(vocabulary.piece, ids))


def message(text: str) -> Any:
    from stillhouse.r1.messages import Message

    return Message("user", text)


def test_a_text_that_only_normalizes_to_a_control_token_stays_text(random_checkpoint):
    """With NFKC, which some tokenizers have, `＜think＞` in full width becomes `<think>`."""
    told = random_checkpoint.byte_words().json | {"normalizer": {"type": "NFKC"}}
    for token in told["added_tokens"]:
        token["normalized"] = True
    vocabulary = HfVocabulary(told)
    assert vocabulary.encode("＜think＞") == list(b"<think>")
    assert vocabulary.encode("<think>") == [vocabulary.control["<think>"]]


@pytest.mark.parametrize("text", TEXTS)
def test_r1s_text_has_the_ids_that_llama_cpp_gives_it(r1, llama, text):
    assert r1.encode(text) == llama.encode(text)
    assert b"".join(map(r1.piece, r1.encode(text))) == text.encode()


def test_r1s_text_has_the_same_ids_whatever_it_is(r1, llama):
    parts = ["a", " ", "\n", "é", "日", "1", "23", "'s", "<", "think", ">", "</", "\r\n", "\t", "😀", "\u0301", "_"]
    dice = random.Random(1)
    for _ in range(200):
        text = "".join(dice.choices(parts, k=40))
        assert r1.encode(text) == llama.encode(text), text


def test_r1s_pieces_are_the_bytes_that_llama_cpp_gives_them(r1, llama):
    assert all(r1.piece(token_id) == llama.piece(token_id) for token_id in range(llama.size))
    assert set(r1.control.items()) <= set(llama.control.items())
    assert r1.end_ids <= llama.end_ids


def test_a_row_that_no_text_uses_has_no_bytes(random_checkpoint):
    vocabulary = HfVocabulary(random_checkpoint.byte_words().json, size=300)
    assert (vocabulary.size, vocabulary.piece(299), vocabulary.shown(299)) == (300, b"", b"")


def test_pieces_of_sentencepiece_are_bytes_and_spaces(random_checkpoint):
    vocab = {"<s>": 0, "▁the": 1, "<0xE2>": 2, "é": 3}
    told = random_checkpoint.byte_words().json
    told |= {"model": told["model"] | {"vocab": vocab, "merges": []}, "added_tokens": [], "pre_tokenizer": None}
    vocabulary = HfVocabulary(told | {"decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}]}})
    assert [vocabulary.piece(token_id) for token_id in (1, 2, 3)] == [b" the", b"\xe2", "é".encode()]


def edit(folder: Path, name: str, **fields: Any) -> None:
    path = folder / name
    told = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(told | fields))


def test_no_begin_token_where_the_settings_say_so(random_checkpoint, tmp_path):
    folder = random_checkpoint.write_checkpoint(tmp_path)
    edit(folder, "tokenizer_config.json", add_bos_token=False)
    assert read_vocabulary(folder).bos_id is None
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["add_bos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert read_vocabulary(folder).bos_id == 256  # the tokenizer's own post-processor puts it there
    edit(folder, "tokenizer.json", post_processor=None)
    assert read_vocabulary(folder).bos_id is None


def test_every_end_that_a_folder_names_counts(random_checkpoint, tmp_path):
    folder = random_checkpoint.write_checkpoint(tmp_path)
    edit(folder, "generation_config.json", eos_token_id=[258, 259])
    assert read_vocabulary(folder).end_ids == {257, 258, 259}


def test_a_template_is_found_in_a_file_or_in_the_settings(random_checkpoint, tmp_path):
    folder = random_checkpoint.write_checkpoint(tmp_path)
    assert read_chat_template(folder) == random_checkpoint.TEMPLATE
    edit(folder, "tokenizer_config.json", chat_template=[{"name": "default", "template": "one"}, {"name": "tool_use"}])
    assert read_chat_template(folder) == "one"
    (folder / "chat_template.jinja").write_text("two")
    assert read_chat_template(folder) == "two"
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert read_chat_template(folder) is None


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), r"has no tokenizer\.json"),
    "cut short": (lambda f: (f / "tokenizer.json").write_text('{"model": '), r"tokenizer\.json of .* is no JSON"),
    "a list": (lambda f: (f / "tokenizer.json").write_text("[]"), r"holds no JSON object"),
    "no model in it": (lambda f: edit(f, "tokenizer.json", model=None), r"tokenizer\.json cannot be read"),
    "settings cut short": (lambda f: (f / "tokenizer_config.json").write_text("{"), r"tokenizer_config\.json of"),
}


@pytest.mark.parametrize(("breaks", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_tokenizer_is_told(random_checkpoint, tmp_path, breaks, message):
    folder = random_checkpoint.write_checkpoint(tmp_path)
    breaks(folder)
    with pytest.raises(BadModelFile, match=message):
        read_vocabulary(folder)


def test_more_tokens_than_the_model_has_are_told(folder):
    with pytest.raises(BadModelFile, match=r"tokenizer\.json has 263 tokens and the model 200"):
        read_vocabulary(folder, 200)
