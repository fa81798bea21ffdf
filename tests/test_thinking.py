"""The state machine of a request, driven token by token through the echo backend, as every backend drives it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.backends.base import Force, Forget, GenerationRequest, Only, Sampling
from stillhouse.backends.echo import Echo, EchoVocabulary
from stillhouse.r1.thinking import CLOSING_PHRASE, Outcome, Rules, Tags, Thinking

VOCABULARY = EchoVocabulary()
TAGS = Tags.of(VOCABULARY.control, VOCABULARY.end_ids, VOCABULARY.size, VOCABULARY.encode)
PHRASE = CLOSING_PHRASE.rstrip("\n")


def answer(
    said: str | Sequence[int], rules: Rules | None = None, *, state: str = "thinking", room: int = 4000, during=None
) -> tuple[str, str, Outcome, str]:
    """What a model that wants to say `said` is heard to say: thoughts, answer, outcome, reason to end."""
    ids = VOCABULARY.encode(said) if isinstance(said, str) else said
    thinking = Thinking(TAGS, rules or Rules(break_loops=False), room, state, force=Force, only=Only)
    backend = Echo(lambda _: ids, context_length=100_000)
    backend.add(GenerationRequest("a", [1], room, Sampling(temperature=0), steer=thinking))
    texts = {"reasoning": "", "answer": ""}
    for count in itertools.count():
        if during:
            during(count, thinking)
        for token in backend.step():
            for delta in token.note.deltas:
                texts[delta.channel] += delta.text
            if token.finish:
                return texts["reasoning"], texts["answer"], token.note.outcome, token.finish
    raise AssertionError


REPLIES = {
    "thoughts and an answer": ("I think</think>\n\nfour", "I think", "four", "model"),
    "a redundant opener": ("<think>\nhm</think>\n\nfour", "hm", "four", "model"),
    "a tag in the answer": ("hm</think>\n\nuse </think> so", "hm", "use </think> so", "model"),
    "second thoughts": ("hm</think>\n\na<think>b</think>c", "hm", "a<think>b</think>c", "model"),
    "newlines around the tags": ("\n\nhm\n</think>\n\n\nfour\n", "hm", "four\n", "model"),
    "an end in the thoughts": ("hm, no", "hm, no", ".", "eos"),
    "half a tag at the end": ("hm</think>a </thi", "hm", "a </thi", "model"),
}


@pytest.mark.parametrize(("said", "reasoning", "text", "by"), REPLIES.values(), ids=REPLIES)
def test_a_reply_is_split_where_its_thoughts_end(said, reasoning, text, by):
    assert answer(said)[:3] == (reasoning, text, Outcome(answer(said)[2].reasoning_tokens, by, None))


def test_thoughts_and_answer_together_are_the_whole_reply():
    _, _, outcome, _ = answer("abc</think>\n\nxy")
    assert outcome.reasoning_tokens == len("abc") + 1  # the closing tag is a thought's


@pytest.mark.parametrize("state", ["undecided", "answering"])
def test_a_reply_without_tags_is_an_answer(state):
    assert answer("  four\n", state=state) == ("", "  four\n", Outcome(0, None, None), "stop")


def test_an_opener_that_the_model_writes_itself_opens_the_thoughts():
    assert answer("\n<think>\nhm</think>\n\nfour", state="undecided")[:2] == ("hm", "four")


def test_a_budget_closes_the_thoughts_in_r1s_voice():
    reasoning, text, outcome, _ = answer("a" * 300 + "</think>\n\nfour", Rules(budget=100, break_loops=False))
    assert (reasoning, outcome.closed_by) == ("a" * 100 + PHRASE, "budget")
    assert text.startswith("aaaa")  # the echo goes on with its script; a model would answer


def test_a_budget_closes_at_a_sentence_end_shortly_before_it_is_spent():
    said = "a" * 92 + ". " + "a" * 300
    assert answer(said, Rules(budget=100, break_loops=False))[0] == "a" * 92 + "." + PHRASE


def test_a_budget_never_closes_inside_a_character():
    said = "é" * 300  # two tokens each
    reasoning = answer(said, Rules(budget=101, break_loops=False))[0]
    assert reasoning == "é" * 51 + PHRASE


def test_the_reserve_leaves_room_for_an_answer():
    reasoning, text, outcome, finish = answer("a" * 5000, room=1000)
    assert (outcome.closed_by, finish) == ("reserve", "length")
    assert len(text) >= 256 - 2
    assert len(reasoning) > 600


@pytest.mark.parametrize("room", [1, 2, 5, 10, 20, 50, 100, 200])
def test_a_short_reply_still_ends_with_an_answer(room):
    _, text, outcome, finish = answer("abc " * 200, room=room)
    assert finish == "length"
    assert room < 5 or text.strip()
    assert room < 5 or outcome.closed_by == "reserve"


def test_a_minimum_keeps_the_thoughts_open():
    reasoning = answer("a</think>\n\nfour", Rules(min_tokens=10, break_loops=False))[0]
    assert reasoning == "a" + "." * 9


def test_empty_thoughts_are_not_let_through():
    assert answer("\n\n</think>\n\nfour", Rules(guard_bypass=True))[:2] == (".", "four")


def test_an_end_in_the_thoughts_is_an_end_where_that_is_wanted():
    assert answer("hm", Rules(want_answer=False)) == ("hm", "", Outcome(3, "eos", None), "stop")


def test_a_loop_ends_the_thoughts_and_not_the_reply():
    reasoning, text, outcome, _ = answer("Wait, no. " * 100, Rules(), room=3000)
    assert (outcome.closed_by, len(reasoning) < 200, bool(text)) == ("loop", True, True)


def test_a_user_ends_the_thoughts():
    def press(count, thinking):
        if count == 20:
            assert thinking.end_thinking()

    reasoning, _, outcome, _ = answer("a" * 500, during=press)
    assert (reasoning, outcome.closed_by) == ("a" * 20 + PHRASE, "user")


def test_a_user_cannot_end_what_is_over():
    thinking = Thinking(TAGS, Rules(), 100, "answering", force=Force, only=Only)
    assert not thinking.end_thinking()


def test_stop_strings_act_on_the_answer_only():
    said = "a STOP b</think>\n\nc STOP d"
    assert answer(said, Rules(stops=("STOP",)))[:2] == ("a STOP b", "c ")
    assert answer(said, Rules(stops=("STOP",), stop_scope="all")) == ("a ", "", Outcome(6, "stop", "STOP"), "stop")


def test_half_a_stop_string_at_the_end_of_the_thoughts_is_not_lost():
    assert answer("a ST</think>\n\nb", Rules(stops=("STOP",), stop_scope="all"))[:2] == ("a ST", "b")


def test_inline_is_the_raw_text():
    said = "\nhm\n</think>\n\nfour\n"
    reasoning, text, _, _ = answer(said, Rules(inline=True))
    assert reasoning + text == said


@pytest.mark.parametrize("name", REPLIES)
def test_every_cut_gives_the_same_split(name):
    """Tags as text, not as tokens, cut at every pair of places: a vocabulary without them has nothing else."""
    said, reasoning, text, _ = REPLIES[name]
    if name == "an end in the thoughts":
        return
    tags = Tags(None, None, frozenset({-1}), 300, (), ())
    for first, second in itertools.combinations(range(1, len(said)), 2):
        thinking = Thinking(tags, Rules(), 10_000, "thinking", force=Force, only=Only)
        heard = {"reasoning": "", "answer": ""}
        for piece, finish in ((said[:first], None), (said[first:second], None), (said[second:], "length")):
            for delta in thinking.see(0, piece, finish)[0].deltas:
                heard[delta.channel] += delta.text
        assert (heard["reasoning"], heard["answer"]) == (reasoning, text)


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="ab \n<>/think.é", max_size=60), st.text(alphabet="ab \n<>/think.é", max_size=60))
def test_no_text_is_lost_but_the_newlines_at_the_tags(thought, text):
    heard_thought, heard_text, _, _ = answer(f"{thought}x</think>\n\ny{text}")
    whole = f"{thought}x"
    if "</think>" not in thought and "<think>" not in thought:
        assert (heard_thought, heard_text) == (whole.lstrip("\n"), f"y{text}")


def test_parallel_replies_do_not_mix():
    backend = Echo(lambda prompt: VOCABULARY.encode(f"t{prompt[0]}</think>\n\na{prompt[0]}"), parallel=32)
    for i in range(32):
        steer = Thinking(TAGS, Rules(), 1000, "thinking", force=Force, only=Only)
        backend.add(GenerationRequest(str(i), [i], 1000, Sampling(temperature=0), steer=steer))
    heard = {str(i): {"reasoning": "", "answer": ""} for i in range(32)}
    while tokens := backend.step():
        for token in tokens:
            for delta in token.note.deltas:
                heard[token.request_id][delta.channel] += delta.text
    assert heard == {str(i): {"reasoning": f"t{i}", "answer": f"a{i}"} for i in range(32)}


def test_long_thoughts_cost_next_to_nothing():
    """32,000 tokens: under 20 µs each in the docs; 100 µs here, so that a busy machine does not fail it."""
    thinking = Thinking(TAGS, Rules(), 100_000, "thinking", force=Force, only=Only)
    words = [
        f"{word} "
        for word in [
            "so",
            "let",
            "me",
            "think",
            "about",
            "what",
            "the",
            "question",
            "asks",
            "and",
            "check",
            "it",
            "once",
            "more",
        ]
    ]
    started = time.perf_counter()
    for i in range(32_000):
        assert thinking.wish(lambda: None) is None
        thinking.see(300 + i % 997, words[i * i % 13], None)
    assert (time.perf_counter() - started) / 32_000 < 100e-6


def test_penalties_on_the_answer_do_not_count_the_thoughts():
    """Conformance case 33: an answer that may not use the words of its thoughts is no answer."""

    def repeats(rules: Rules) -> str:
        thinking = Thinking(TAGS, rules, 200, "thinking", force=Force, only=Only, forget=Forget())
        backend = Echo(lambda _: VOCABULARY.encode("four</think>four"))
        sampling = Sampling(temperature=0, presence_penalty=2.0, frequency_penalty=2.0, repetition_penalty=10.0)
        backend.add(GenerationRequest("a", [1], 200, sampling, steer=thinking))
        heard = ""
        while tokens := backend.step():
            heard += "".join(d.text for t in tokens for d in t.note.deltas if d.channel == "answer")
        return heard

    assert repeats(Rules()) == "four"
    assert repeats(Rules(penalty_scope="all")) != "four"
