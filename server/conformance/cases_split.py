"""Cases 1 to 16: where thoughts begin, where they end, and what belongs to neither tag."""

from __future__ import annotations

from .client import Reply, thoughts_of
from .suite import case
from .target import CLOSE, END, OPEN, NotApplicable, Target, expect

TWO, PLUS, FOUR, FIVE = " two", " plus", " four", " five"  # single tokens of nearly every vocabulary


def exactly(reply: Reply, reasoning: str, content: str) -> str:
    """Expect these thoughts and this answer, to the byte."""
    expect((reply.reasoning, reply.content) == (reasoning, content), reply.shown())
    return reply.shown()


def steered(reply: Reply, *words: str) -> Reply:
    """Make sure that the model said what it was steered to; what it did with the tags is the case's affair."""
    everything = reply.reasoning + reply.content
    if any(word not in everything for word in words):
        raise NotApplicable(f"the model could not be steered: {reply.shown()}")
    return reply


def apart(reply: Reply, thought: str, answer: str) -> str:
    """Expect a word in the thoughts, another in the answer, and no tag in either."""
    clean = OPEN not in reply.content and CLOSE not in reply.reasoning + reply.content
    split = thought in reply.reasoning and answer in reply.content and thought not in reply.content
    expect(clean and split, reply.shown())
    return reply.shown()


def count_up(numbers: int) -> str:
    """Thoughts that never repeat: `t000 t001 …`; five bytes each."""
    return " ".join(f"t{number:03}" for number in range(numbers))


def counted(reply: Reply) -> str:
    """Expect every number that was thought or answered to come once, the first ones in the thoughts."""
    words = [word for word in (reply.reasoning + reply.content).split() if word.startswith("t") and len(word) == 4]
    expect(reply.reasoning.startswith("t000 t001"), f"the thoughts are not in their field: {reply.shown()}")
    expect(len(words) == len(set(words)), f"thoughts come twice: {reply.shown()}")
    return reply.shown()


@case(1, "opened by the template")
def opened_by_the_template(target: Target) -> str:
    """Where the prompt opens the thoughts, is a reply without an opener split right?"""
    target.need_thoughts()
    if target.is_scripted:
        return exactly(target.say(f"two and two{CLOSE}\n\nfour"), "two and two", "four")
    if target.prompt_opens is False:
        raise NotApplicable("its template leaves the opening to the model")
    try:
        reply = steered(target.steer(TWO, CLOSE, FOUR, END), "two", "four")
    except NotApplicable:
        reply = target.ask("What is two and two?", max_tokens=64)
        expect(bool(reply.reasoning) and CLOSE not in reply.content, reply.shown())
        return reply.shown()
    return apart(reply, "two", "four")


@case(2, "opened by the model")
def opened_by_the_model(target: Target) -> str:
    """Is a `<think>` that the model writes first, after white space, taken for the opener?"""
    target.need_thoughts()
    if target.is_scripted:
        return exactly(target.say(f"\n{OPEN}\ntwo and two{CLOSE}\n\nfour"), "two and two", "four")
    if target.prompt_opens:
        raise NotApplicable("its template opens the thoughts; a second opener is case 3")
    return apart(steered(target.steer(OPEN, TWO, CLOSE, FOUR, END), "two", "four"), "two", "four")


@case(3, "opened twice")
def opened_twice(target: Target) -> str:
    """Is an opener dropped where the thoughts are open already, and a later one kept as text?"""
    target.need_thoughts()
    if target.is_scripted:
        return exactly(target.say(f"{OPEN}\ntwo {OPEN} and two{CLOSE}\n\nfour"), f"two {OPEN} and two", "four")
    if target.prompt_opens is False:
        raise NotApplicable("its template leaves the opening to the model")
    # It says nothing else; after a close that the server forces, openers are the answer's (case 12).
    reply = target.both(target.insisted(OPEN, max_tokens=6))
    expect(OPEN * 6 not in reply.reasoning, f"the opener is in the thoughts: {reply.shown()}")
    expect(OPEN not in reply.content or bool(reply.closed_by), f"the opener is in the answer: {reply.shown()}")
    return reply.shown()


@case(4, "never closed")
def never_closed(target: Target) -> str:
    """Where the model ends inside its thoughts, do they stay out of the answer?"""
    target.need_thoughts()
    if target.is_scripted:
        replies = [target.say("two and two"), target.say("two and two", empty_answer="allow")]
    else:
        fields = target.setting("plain_end") or {}
        replies = [target.steer(TWO, PLUS, END, max_tokens=32, **fields)]
        steered(replies[0], "two", "plus")
    for reply in replies:
        expect("two" in reply.reasoning and "two" not in reply.content, reply.shown())
        expect(reply.finish == "stop" or not target.is_scripted, f"finish {reply.finish}")
        expect(reply.closed_by in (None, "eos"), f"closed by {reply.closed_by}")
    return replies[-1].shown()


@case(5, "cut short while thinking")
def cut_short(target: Target) -> str:
    """Where `max_tokens` ends the thoughts, do they stay out of the answer?"""
    target.need_thoughts()
    if target.is_scripted:
        return counted(target.say(count_up(100), max_tokens=40))
    reply = target.ask("Prove that there are infinitely many primes.", max_tokens=24)
    expect(bool(reply.reasoning), f"no thoughts: {reply.shown()}")
    expect(reply.reasoning not in reply.content and CLOSE not in reply.content, reply.shown())
    expect(reply.finish == "length", f"finish {reply.finish}")
    return reply.shown()


@case(6, "an answer within a small limit")
def an_answer_arrives(target: Target) -> str:
    """Are the thoughts closed early enough that `max_tokens` leaves an answer?"""
    target.need_thoughts()
    if target.is_scripted:
        reply = target.say(count_up(200), max_tokens=200)
        counted(reply)
    else:
        reply = target.ask("Prove that there are infinitely many primes.", max_tokens=64)
    expect(bool(reply.reasoning) and bool(reply.content.strip()), f"no answer: {reply.shown()}")
    return reply.shown()


@case(7, "thoughts skipped")
def thoughts_skipped(target: Target) -> str:
    """Can the model be kept from closing its thoughts before it has thought?"""
    target.need_thoughts()
    if target.is_scripted:
        replies = [target.say(f"\n\n{CLOSE}\n\nfour"), target.say(f"two{CLOSE}\n\nfour", min_thinking_tokens=9)]
        expect((replies[1].reasoning_tokens or 0) >= 9, f"{replies[1].reasoning_tokens} tokens of 9 asked for")
    else:
        replies = [target.steer(CLOSE, FOUR, END, **(target.setting("minimum", 1) or {}))]
    expect(bool(replies[0].reasoning.strip()), f"nothing was thought: {replies[0].shown()}")
    return replies[0].shown()


@case(8, "a tag in pieces")
def a_tag_in_pieces(target: Target) -> str:
    """Is half a tag never shown as a tag's remains, in whatever pieces it comes?"""
    target.need_thoughts()
    if target.is_scripted:
        thought = "a </th, < and </thin </think > b"
        return exactly(target.say(f"{thought}{CLOSE}\n\nfour"), thought, "four")
    reply = steered(target.steer(TWO, "</", "think", ">", FOUR, END), "two", "four")
    if "four" in reply.content:
        return apart(reply, "two", "four")
    # Tags are told by token id here: the pieces are text, and must be all there.
    expect(CLOSE in reply.reasoning, f"a part of the tag is lost: {reply.shown()}")
    return reply.shown()


@case(9, "half a tag at the end")
def half_a_tag_at_the_end(target: Target) -> str:
    """Is held-back text given out on every way a reply can end?"""
    target.need_thoughts()
    if target.is_scripted:
        exactly(target.say("a <b </thi", empty_answer="allow"), "a <b </thi", "")
        exactly(target.say(f"two{CLOSE}\n\nfour </thi"), "two", "four </thi")
        exactly(target.say(f"two{CLOSE}\n\nfour </thixx", max_tokens=16, thinking_budget=9), "two", "four </thi")
        return exactly(target.say(f"two{CLOSE}\n\nfour </STOP", stop=["STOP", "</think"]), "two", "four </")
    reply = steered(target.steer(TWO, "</", END, max_tokens=32, **(target.setting("plain_end") or {})), "two")
    expect("</" in reply.reasoning, f"held-back text is lost: {reply.shown()}")
    reply = steered(target.steer(TWO, CLOSE, FOUR, "</", END), "two", "four")
    expect(reply.content.endswith("</"), f"held-back text is lost: {reply.shown()}")
    return reply.shown()


@case(10, "two channels, two deltas")
def two_channels_two_deltas(target: Target) -> str:
    """Does no delta carry thoughts and answer at once?"""
    target.need_thoughts()
    if target.is_scripted:
        reply = target.client.chat_streamed(target.scripted(count_up(60), thinking_budget=100, max_tokens=900))
    else:
        try:
            body = target.steered(TWO, CLOSE, FOUR, END)
        except NotApplicable:
            body = target.body("What is two and two?", max_tokens=400)
        reply = target.client.chat_streamed(body)
    expect(bool(reply.reasoning), f"no thoughts: {reply.shown()}")
    if not reply.content:
        raise NotApplicable("no answer came")
    mixed = sum(bool(thoughts_of(delta) and delta.get("content")) for delta in reply.deltas)
    expect(mixed == 0, f"{mixed} of {len(reply.deltas)} deltas carry both")
    return f"{len(reply.deltas)} deltas, none with both"


@case(11, "`</think>` in the answer")
def closing_tag_in_the_answer(target: Target) -> str:
    """Is a closing tag in the answer left as it is?"""
    target.need_thoughts()
    if target.is_scripted:
        answer = f"the tag {CLOSE} ends thoughts, `{CLOSE}` too"
        return exactly(target.say(f"two{CLOSE}\n\n{answer}"), "two", answer)
    reply = target.both(target.insisted(CLOSE, max_tokens=24))
    expect(CLOSE in reply.content, f"the tag is lost: {reply.shown()}")
    return reply.shown()


@case(12, "`<think>` in the answer")
def opening_tag_in_the_answer(target: Target) -> str:
    """Is an opening tag in the answer text, and not the start of new thoughts?"""
    target.budget(8)  # or not applicable
    target.need_thoughts()
    if target.is_scripted:
        answer = f"four {OPEN} five {CLOSE} six"
        return exactly(target.say(f"two{CLOSE}\n\n{answer}"), "two", answer)
    reply = target.both(target.insisted(OPEN, max_tokens=64, **target.budget(8)))
    expect(OPEN in reply.content, f"no opener in the answer: {reply.shown()}")
    return reply.shown()


@case(13, "words before a forced close")
def words_before_a_forced_close(target: Target) -> str:
    """Is a forced close led up to in words, so that the model stops thinking?"""
    target.budget(8)  # or not applicable
    target.need_thoughts()
    if target.is_scripted:
        reply = target.say(count_up(200), thinking_budget=64, max_tokens=900)
        words = reply.reasoning.lstrip("t0123456789 ").strip()
        expect(len(words.split()) >= 3, f"no words: {reply.shown()}")
        return f"the thoughts end with {words[-44:]!r}"
    ends = []
    for question in ("Prove that there are infinitely many primes.", "Name the colours of the rainbow."):
        ends.append(target.ask(question, max_tokens=200, **target.budget(16)).reasoning.rstrip())
    shared = 0
    while shared < min(map(len, ends)) and ends[0][-shared - 1] == ends[1][-shared - 1]:
        shared += 1
    words = ends[0][len(ends[0]) - shared :]
    expect(len(words.split()) >= 3, f"two forced closes have no words in common: …{ends[0][-24:]!r}")
    return f"the thoughts end with {words[-44:]!r}"


@case(14, "white space around the tags")
def white_space_around_the_tags(target: Target) -> str:
    """Are newlines next to the tags dropped, the same whole and streamed?"""
    target.need_thoughts()
    if target.is_scripted:
        script = f"\n\ntwo\n\n{CLOSE}\n\n\nfour\n"
        raw = target.say(script, reasoning_format="inline")
        expect(raw.content.endswith(script), f"inline is not the raw text: {raw.content!r:.50}")
        return exactly(target.say(script), "two", "four\n")
    reply = steered(target.steer(TWO, "\n\n", CLOSE, "\n\n\n", FOUR, END), "two", "four")
    expect(not reply.reasoning.endswith("\n"), f"a newline ends the thoughts: {reply.shown()}")
    expect(not reply.content.startswith("\n"), f"a newline begins the answer: {reply.shown()}")
    return reply.shown()


@case(15, "end of sequence as text")
def end_of_sequence_as_text(target: Target) -> str:
    """Is the name of an end token, written as text, only text?"""
    if not target.is_scripted:
        raise NotApplicable("a real model cannot be made to write an end token's name letter by letter")
    thought, answer = "R1 ends with <｜end▁of▁sentence｜>, Qwen with <|im_end|>", "so </s> or <|eot_id|>"
    return exactly(target.say(f"{thought}{CLOSE}\n\n{answer}"), thought, answer)


@case(16, "a close inside a character")
def a_close_inside_a_character(target: Target) -> str:
    """Does a forced close wait until a character is complete?"""
    target.budget(8)  # or not applicable
    target.need_thoughts()
    if target.is_scripted:
        for budget in (40, 41, 42, 43):
            reply = target.say("😀é€" * 40, thinking_budget=budget, max_tokens=300, break_loops=False)
            expect(
                bool(reply.reasoning and reply.content) and "�" not in reply.reasoning + reply.content, reply.shown()
            )
        return reply.shown()
    tokens = next((ids for sign in "𒀀𓂀🪿ꙮ𐎀" if len(set(ids := target.pieces(sign))) == len(ids) >= 3), None)
    if tokens is None:
        raise NotApplicable("its vocabulary has no character of three tokens or more")
    bias = {str(token): weight for token, weight in zip(tokens, (100, 84, 68, 54), strict=False)}
    fields = {"temperature": 0, "repetition_penalty": 10, "repeat_penalty": 10, "logit_bias": bias, "max_tokens": 64}
    for budget in (1, 2):
        body = target.body("Please begin.", **fields | target.budget(budget))
        for reply in (target.client.chat(body), target.client.chat_streamed(body)):
            expect("�" not in reply.reasoning.lstrip()[:1], f"cut inside a character: {reply.shown()}")
    return reply.shown()
