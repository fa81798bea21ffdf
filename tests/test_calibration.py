"""Texts to calibrate with and to measure on: written down as the model reads them, and never the same ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stillhouse.backends.echo import EchoVocabulary
from stillhouse.backends.open import open_echo
from stillhouse.quantize import calibration
from stillhouse.quantize.calibration import (
    FINGERPRINTS,
    Reader,
    Sample,
    Texts,
    chunks_of,
    pack,
    read_texts,
    refuse_shared,
    tokens_of,
)
from stillhouse.quantize.traces import Wish, finished, write_traces
from stillhouse.r1.errors import UserError
from stillhouse.r1.messages import Message
from stillhouse.r1.prompt import ChatTemplate

VOCABULARY = EchoVocabulary()
R1 = Reader(
    VOCABULARY.encode,
    VOCABULARY.bos_id,
    ChatTemplate(None, VOCABULARY.control, bos="<|begin|>", eos="<|end|>"),
    "<|end|>",
)
PLAIN = Reader(
    VOCABULARY.encode,
    None,
    ChatTemplate("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]", ["<|end|>"]),
    "<|end|>",
)


def read(reader: Reader, reply: str) -> str:
    sample = Sample((Message("user", "2+2?"), Message("assistant", reply)))
    return b"".join(VOCABULARY.piece(token_id) for token_id in reader.read(sample)).decode()


ASKED = "<|begin|><｜User｜>2+2?<｜Assistant｜><think>\n"


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("<think>\nhm\n</think>\n\nfour", ASKED + "hm\n</think>\n\nfour<|end|>"),
        ("<think>\nhm, and then", ASKED + "hm, and then"),
        ("four", ASKED + "</think>\n\nfour<|end|>"),
        ("hm</think>four", ASKED + "hm\n</think>\n\nfour<|end|>"),
    ],
    ids=["thoughts and answer", "cut short while thinking", "without thoughts", "without the opener"],
)
def test_a_conversation_is_what_the_model_would_have_read_and_written(reply, expected):
    assert read(R1, reply) == expected


def test_a_model_without_thinking_tags_thinks_aloud():
    assert read(PLAIN, "<think>\nhm\n</think>\n\nfour") == "[user]2+2?[assistant]hm\n\nfour<|end|>"


def test_every_conversation_of_the_pack_has_thoughts_an_answer_and_one_begin():
    for part in ("calibration", "reasoning"):
        for sample in pack(part).samples:
            ids = R1.read(sample)
            for name, times in (("<|begin|>", 1), ("<think>", 1), ("</think>", 1), ("<|end|>", 1)):
                assert ids.count(VOCABULARY.control[name]) == times, sample.messages[0].content


def test_the_parts_of_the_pack_have_no_text_in_common():
    parts = [pack(part) for part in ("calibration", "reasoning", "general")]
    questions = [{s.messages[0].content if s.messages else s.text for s in part.samples} for part in parts]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not parts[a].fingerprints & parts[b].fingerprints
        assert not questions[a] & questions[b]


def test_the_pack_is_small_and_of_many_kinds():
    folder = Path(calibration.__file__).with_name("texts")
    assert sum(path.stat().st_size for path in folder.iterdir()) < 200_000
    topics = [json.loads(line)["topic"] for line in (folder / "calibration.jsonl").read_text("utf-8").splitlines()]
    assert {"maths", "code", "chinese", "reasoning", "science"} <= set(topics)
    assert max(topics.count(topic) for topic in topics) <= len(topics) / 2


def test_a_text_that_tuned_a_file_is_refused_as_a_measure_of_it():
    tuned = calibration.metadata(pack("calibration"))[FINGERPRINTS].split()
    refuse_shared([pack("reasoning"), pack("general")], tuned)
    mixed = Texts("mine.jsonl", (*pack("reasoning").samples, pack("calibration").samples[3]))
    with pytest.raises(UserError, match=r"1 of the 16 texts in mine\.jsonl were used for calibration"):
        refuse_shared([mixed], tuned)


def test_white_space_makes_no_other_text():
    assert Sample(text="a  b\n").fingerprint == Sample(text=" a b").fingerprint != Sample(text="ab").fingerprint


def test_texts_become_full_chunks_that_begin_as_the_model_wants():
    texts = Texts("t", (Sample(text="abcdefghij"), Sample(text="klm")))
    assert bytes(tokens_of(texts, PLAIN)) == b"abcdefghij\n\nklm"
    chunks = chunks_of(texts, R1, context=6)
    assert chunks.shape == (2, 6)
    assert (chunks[:, 0] == VOCABULARY.bos_id).all()
    assert chunks_of(texts, R1, context=6, most=1).shape == (1, 6)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", "", "no texts"),
        ("a.jsonl", '{"text": "fine"}\n{"nothing": 1}', r"a\.jsonl:2 is neither"),
        ("a.jsonl", '{"messages": []}', r"a\.jsonl:1 is neither"),
        ("a.jsonl", "not json", r"a\.jsonl:1 is neither"),
        ("a.txt", "\n\n", "no texts"),
    ],
    ids=["empty", "an unknown key", "nobody speaks", "no JSON", "only blank lines"],
)
def test_a_file_without_texts_says_where_it_went_wrong(name, content, words, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words):
        read_texts(tmp_path / name)


def test_prompts_texts_and_paragraphs_are_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "why?"}\n\n{"text": "so"}\n')
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n")
    assert read_texts(tmp_path / "a.jsonl").samples == (Sample((Message("user", "why?"),)), Sample(text="so"))
    assert read_texts(tmp_path / "a.txt").samples == (Sample(text="one\ntwo"), Sample(text="three\n"))


# Traces

WISH = Wish(count=3, max_tokens=200, temperature=0.0, top_p=1.0, seed=5)
PROMPTS = Texts("p", tuple(Sample((Message("user", f"script:{n} thinks</think>\n\n{n}<|end|>"),)) for n in "ab"))


def test_traces_are_conversations_that_can_be_calibrated_with(tmp_path):
    assert write_traces(open_echo(), PROMPTS, WISH, tmp_path / "t.jsonl") == 3

    lines = {n["number"]: n for n in map(json.loads, (tmp_path / "t.jsonl").read_text().splitlines())}
    assert [lines[n]["messages"][-1]["content"] for n in range(3)] == [
        "<think>\na thinks</think>\n\na",
        "<think>\nb thinks</think>\n\nb",
        "<think>\na thinks</think>\n\na",
    ]
    assert {line["finish"] for line in lines.values()} == {"stop"}
    sample = read_texts(tmp_path / "t.jsonl").samples[0]
    assert R1.read(sample).count(VOCABULARY.control["</think>"]) >= 1


def test_an_interrupted_run_goes_on_behind_the_last_whole_line(tmp_path):
    path = tmp_path / "t.jsonl"
    write_traces(open_echo(), PROMPTS, WISH, path)
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(whole[0] + whole[1][:20])

    assert write_traces(open_echo(), PROMPTS, WISH, path) == 2

    assert path.read_bytes().startswith(whole[0])
    assert finished(path) == {0, 1, 2}
    assert sorted(path.read_bytes().splitlines(keepends=True)) == sorted(whole)


def test_a_file_of_something_else_is_not_appended_to(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "mine"}\n')
    with pytest.raises(UserError, match="other lines than traces"):
        write_traces(open_echo(), PROMPTS, WISH, tmp_path / "t.jsonl")
    assert (tmp_path / "t.jsonl").read_text() == '{"text": "mine"}\n'
