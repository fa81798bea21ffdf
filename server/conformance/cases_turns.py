"""Cases 34 to 44: the next turn, what is counted, and what goes over the wire."""

from __future__ import annotations

import re
import threading
import time
from contextlib import suppress
from typing import Any

from .cases_budget import thinking_tokens
from .cases_split import CLOSE, FOUR, PLUS, TWO, count_up, counted, exactly, steered
from .client import Broken, Client, Refused, Reply, thoughts_of
from .suite import case
from .target import END, Fail, NotApplicable, Target, expect

_THOUGHT = "three and three is six, and two and two is four, so the sum that was asked for must be ten"
_NEWLINES = 3  # tokens of white space that a template may leave where thoughts were
_PARALLEL = 32
_SILENCE_S = 35.0  # many proxies cut a connection after 60 s of silence; every 15 to 30 s is usual
_RUNNING = re.compile(
    r"^(?:r1_requests_running|r1_requests_waiting|llamacpp:requests_processing|llamacpp:requests_deferred"
    r"|vllm:num_requests_running|vllm:num_requests_waiting|sglang:num_running_reqs|sglang:num_queue_reqs)"
    r"(?:\{[^}]*\})?\s+([0-9.e+]+)",
    re.MULTILINE,
)


@case(34, "thoughts that come back")
def thoughts_that_come_back(target: Target) -> str:
    """Are the thoughts in earlier turns taken in every form, and left out of the prompt?"""
    target.need_thinking()
    forms: dict[str, dict[str, Any]] = {
        "none": {"content": "Ten."},
        "reasoning_content": {"content": "Ten.", "reasoning_content": _THOUGHT},
        "reasoning": {"content": "Ten.", "reasoning": _THOUGHT},
        "inline": {"content": f"<think>\n{_THOUGHT}\n</think>\n\nTen."},
        "empty": {"content": ""},
        "never closed": {"content": f"<think>\n{_THOUGHT}"},
    }
    sizes = {}
    for name, turn in forms.items():
        body = target.body("What is the sum?", max_tokens=1)
        body["messages"] += [{"role": "assistant", **turn}, {"role": "user", "content": "And twice that?"}]
        try:
            sizes[name] = target.client.chat(body).usage.get("prompt_tokens")
        except Refused as refused:
            raise Fail(f"{name}: refused, {refused}") from None
    if None in sizes.values():
        raise NotApplicable("it does not tell the size of prompts")
    for name in ("reasoning_content", "reasoning", "inline"):
        more = sizes[name] - sizes["none"]
        expect(more <= _NEWLINES, f"{name}: kept in the prompt, {more} tokens")
    kept = sizes["never closed"] - sizes["empty"]
    expect(kept <= _NEWLINES, f"thoughts that were never closed are kept in the prompt, {kept} tokens")
    return f"{sizes['none']} tokens of prompt in every form"


@case(35, "the cache of the next turn")
def the_cache_of_the_next_turn(target: Target) -> str:
    """Is the next turn's prompt in the KV cache but for the new question?"""
    target.need_thinking()
    if target.is_scripted:
        raise NotApplicable("the scripted backend keeps no KV cache")
    # A question never asked before: what an earlier run left in the cache must not count.
    question = f"It is {time.time_ns()}. " + "Tell me about the sea. " * 6
    follow_up = "And what about the mountains?"
    fields = target.setting("budget", 12) if target.budget_works else None
    first = target.ask(question, max_tokens=96, **(fields or {}))
    if not first.content and fields is None:
        steering = target.steered(TWO, CLOSE, max_tokens=64)
        first = target.client.chat(steering | {"messages": [{"role": "user", "content": question}]})
    answer = first.content
    if len(answer) < 40:
        raise NotApplicable(f"no answer long enough to be found again: {first.shown()}")
    time.sleep(1.0)  # a user reads
    body = target.body(question, temperature=0, max_tokens=1)
    body["messages"] += [{"role": "assistant", "content": answer}, {"role": "user", "content": follow_up}]
    second = target.client.chat(body)
    alone = target.ask(follow_up, max_tokens=1).usage.get("prompt_tokens")
    prompt, cached = second.usage.get("prompt_tokens"), second.cached_tokens
    if cached is None:
        cached = (second.head.get("timings") or {}).get("cache_n")
    expect(cached is not None, "it does not tell how much of a prompt was in the cache")
    assert prompt is not None and alone is not None and cached is not None
    read = prompt - cached
    expect(read <= alone + 8, f"{read} of {prompt} tokens were read again; the new question has {alone}")
    return f"{cached} of {prompt} tokens were there; the new question has {alone}"


@case(36, "thoughts to go on with")
def thoughts_to_go_on_with(target: Target) -> str:
    """Can a reply that was cut in its thoughts be taken up where it broke off?"""
    target.need_thoughts()
    if target.is_scripted:
        body = target.scripted(f" two{CLOSE}\n\nfour")
        bare = target.client.chat(body).usage.get("prompt_tokens", 0)
        body["messages"].append({"role": "assistant", "content": "", "reasoning_content": "two and"})
        reply = target.both(body)
        exactly(reply, " two", "four")
        grown = reply.usage.get("prompt_tokens", 0) - bare
        expect(grown == len("two and"), f"the prompt grew by {grown} tokens for 7")
        return reply.shown()
    cut = target.ask("Prove that there are infinitely many primes.", max_tokens=64).reasoning
    expect(len(cut) >= 8, f"nothing to go on with: {cut!r}")
    least = max(4, thinking_tokens(target, Reply(reasoning=cut)) // 2)  # less the one or two that may merge
    body = target.body("Prove that there are infinitely many primes.", temperature=0, max_tokens=48)
    bare = target.client.chat(body | {"max_tokens": 1}).usage.get("prompt_tokens", 0)
    for name in ("reasoning_content", "reasoning"):
        turn = {"role": "assistant", "content": "", name: cut}
        resumed = body | {"messages": [*body["messages"], turn]} | (target.setting("resumed") or {})
        reply = target.client.chat(resumed)
        grown = reply.usage.get("prompt_tokens", 0) - bare
        if grown >= least:
            break
    expect(grown >= least, f"the thoughts were left out of the prompt, which grew by {grown} tokens")
    expect(bool(reply.reasoning) and CLOSE not in reply.content, f"it did not go on thinking: {reply.shown()}")
    return f"the prompt grew by {grown} tokens; {reply.shown()}"


@case(37, "thinking tokens are counted")
def thinking_tokens_are_counted(target: Target) -> str:
    """Does `usage` tell the thinking tokens, those after a prompt-opened tag too?"""
    target.need_thoughts()
    if target.is_scripted:
        for body in (target.scripted(f"two and two{CLOSE}\n\nfour"), target.scripted(f"<think>hm{CLOSE}four")):
            reply = target.both(body | {"stream_options": {"include_usage": True}} if body.get("stream") else body)
            streamed = target.client.chat_streamed(body | {"stream_options": {"include_usage": True}})
            expect(streamed.usage == reply.usage, f"usage differs: {reply.usage} whole, {streamed.usage} streamed")
            expected = 12 if "and" in reply.reasoning else 4
            expect(reply.reasoning_tokens == expected, f"{reply.reasoning_tokens} tokens of {expected}")
        return f"{expected} tokens, the tags among them"
    try:
        reply = steered(target.client.chat(target.steered(TWO, PLUS, CLOSE, FOUR, END)), "two", "plus", "four")
        allowed = range(2, 4)  # with or without the closing tag
    except NotApplicable:
        reply = target.ask("What is two and two?", max_tokens=64)
        allowed = range(1, reply.completion_tokens + 1)
    expect(reply.reasoning_tokens is not None, "usage does not tell them")
    expect(reply.reasoning_tokens in allowed, f"{reply.reasoning_tokens} tokens told for {reply.shown()}")
    return f"{reply.reasoning_tokens} of {reply.completion_tokens} tokens"


@case(38, "log-probabilities of the answer")
def logprobs_of_the_answer(target: Target) -> str:
    """Are those in `logprobs.content` the answer's, without the thoughts'?"""
    target.need_thoughts()
    fields = {"logprobs": True, "top_logprobs": 2}
    if target.is_scripted:
        body = target.scripted(f"two and two{CLOSE}\n\nfour", **fields)
    else:
        body = target.steered(TWO, PLUS, CLOSE, FOUR, END, **fields)
    for reply in (target.client.chat(body), target.client.chat_streamed(body)):
        steered(reply, "two", "four")
        tokens = "".join(str(entry.get("token")) for entry in reply.logprobs)
        expect(bool(tokens), "none are given")
        expect("two" not in tokens, f"the thoughts are among them: {tokens!r:.50}")
        expect("four" in tokens, f"the answer is not among them: {tokens!r:.50}")
    return f"{len(reply.logprobs)} tokens: {tokens!r:.40}"


@case(39, "the shape of a stream")
def the_shape_of_a_stream(target: Target) -> str:
    """Role first, no content key beside thoughts, usage only where asked for, `[DONE]`?"""
    if target.is_scripted:
        body = target.scripted(f"two and two{CLOSE}\n\nfour")
    else:
        body = target.body("What is two and two?", temperature=0, max_tokens=48)
    for include_usage in (False, True):
        reply = target.client.chat_streamed(
            body | ({"stream_options": {"include_usage": True}} if include_usage else {})
        )
        expect(bool(reply.deltas) and reply.deltas[0].get("role") == "assistant", f"first delta: {reply.deltas[:1]}")
        beside = sum(bool(thoughts_of(delta)) and delta.get("content") is not None for delta in reply.deltas)
        expect(beside == 0, f"{beside} deltas have content beside thoughts")
        empty = [at for at, chunk in enumerate(reply.chunks) if not chunk.get("choices")]
        expect(reply.done, "no [DONE]")
        if include_usage:
            expect(
                empty == [len(reply.chunks) - 1] and bool(reply.chunks[-1].get("usage")), "no usage chunk at the end"
            )
        else:
            expect(not empty, f"{len(empty)} chunks without choices, and nobody asked for usage")
        expect(reply.finish is not None, "no finish_reason")
    return f"{len(reply.chunks)} chunks"


@case(40, "a client that hangs up")
def a_client_that_hangs_up(target: Target) -> str:
    """Is the work of a client that went away given up within half a second?"""
    if running(target) is None:
        raise NotApplicable("it tells nobody how many requests run")
    expect(_idle_within(target, 20), "it is not idle before the case begins")
    if target.is_scripted:  # so many that they would go on for long
        body = target.scripted(count_up(600), n=64, break_loops=False, max_tokens=3500)
    else:
        body = target.body("Write a long story, of many chapters.", max_tokens=_longest(target))
    with target.client.stream(body) as stream:
        texts = 0
        for chunk in stream:
            deltas = [choice.get("delta") or {} for choice in chunk.get("choices") or ()]
            texts += any(thoughts_of(delta) or delta.get("content") for delta in deltas)
            if texts >= 5:
                break
        busy = running(target)
    if not busy:
        raise NotApplicable("the reply was over before one could hang up")
    began = time.monotonic()
    expect(_idle_within(target, 0.5), f"still {running(target):g} running half a second after the client had gone")
    return f"idle again after {(time.monotonic() - began) * 1000:.0f} ms"


@case(41, "a sign of life")
def a_sign_of_life(target: Target) -> str:
    """Does a stream that has nothing to show yet say that it lives, before a proxy cuts it?"""
    crowd = threading.Event()  # set = go home
    if target.is_scripted:
        bodies = [target.scripted(count_up(600), n=64, break_loops=False, max_tokens=3500)] * 16
    else:
        bodies = [target.body("Write a long story, of many chapters.", max_tokens=_longest(target))]
        bodies *= _places(target) + 1
    threads = [threading.Thread(target=_keep_busy, args=(target, body, crowd), daemon=True) for body in bodies]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    began = time.monotonic()
    try:
        patient = Client(target.client.base_url, api_key=target.client.api_key, timeout_s=_SILENCE_S)
        with patient.stream(target.body("Hello.", max_tokens=4)) as stream:
            for event in stream.with_comments():
                if event is None:
                    return f"a comment after {time.monotonic() - began:.0f} s"
                deltas = [choice.get("delta") or {} for choice in event.get("choices") or ()]
                if any(delta.get("content") or thoughts_of(delta) for delta in deltas):
                    waited = time.monotonic() - began
                    raise NotApplicable(
                        f"it kept one more request waiting for {waited:.1f} s only; no silence came about"
                    )
        raise Fail("the stream ended without a word")
    finally:
        crowd.set()
        for thread in threads:
            thread.join(10)


def _places(target: Target) -> int:
    """How many requests it takes at once; more than a few would take its last connection, too."""
    try:
        return len(target.client.get("/slots"))
    except (Refused, Broken, TypeError):
        return 4


def _longest(target: Target) -> int:
    return min(4000, (target.context or 2048) - 128)


def _keep_busy(target: Target, body: dict[str, Any], crowd: threading.Event) -> None:
    with suppress(Refused, Broken), target.client.stream(body) as stream:
        for _ in stream.with_comments():
            if crowd.is_set():
                return


@case(42, "a full context")
def a_full_context(target: Target) -> str:
    """Where the context fills up while thinking, does the reply end in order, without a shift?"""
    target.need_thoughts()
    if target.context is None or target.context > 16384:
        raise NotApplicable(
            "its context is unknown" if target.context is None else "its context takes too long to fill"
        )
    if target.is_scripted:
        if target.context > 8192:
            raise NotApplicable("filled only where it is small: serve echo without --context")
        body = target.scripted(count_up(target.context * 2 // 15), break_loops=False)
        reply = target.both({name: value for name, value in body.items() if name != "max_tokens"})
        counted(reply)
        expect(bool(reply.content), f"no answer: {reply.shown()}")
    else:
        per_word = 200 / max(1, _prompt_size(target, 250) - _prompt_size(target, 50))
        words = int((target.context - 140 - _prompt_size(target, 1)) * per_word)
        reply = target.ask("word " * words)
        expect(bool(reply.reasoning), f"no thoughts: {reply.shown()}")
        expect(reply.reasoning not in reply.content, f"thoughts in the answer: {reply.shown()}")
    total = (reply.usage.get("prompt_tokens") or 0) + reply.completion_tokens
    expect(total <= target.context, f"{total} tokens in a context of {target.context}")
    expect(reply.finish in ("length", "stop"), f"finish {reply.finish}")
    return f"{total} of {target.context} tokens, {reply.shown()}"


def _prompt_size(target: Target, words: int) -> int:
    return target.ask("word " * words, max_tokens=1).usage.get("prompt_tokens") or 0


@case(43, "long thoughts, short work")
def long_thoughts_short_work(target: Target) -> str:
    """Does a token late in long thoughts take no longer than an early one?"""
    if not target.is_scripted:
        raise NotApplicable("a real model's own time would hide the parser's")
    length = min((target.context or 4096) // 2 - 400, 32_768)  # far enough from the end that nothing is closed early
    script = count_up(length // 5)
    took = []
    for part in (script[: length // 4], script):
        best = 1e9
        for _ in range(2):
            began = time.perf_counter()
            reply = target.client.chat(target.scripted(part + CLOSE + "\n\nfour", answer_reserve_tokens=0))
            best = min(best, time.perf_counter() - began)
            expect((reply.reasoning, reply.content) == (part.strip(), "four"), reply.shown())
        took.append(best)
    ratio = took[1] / took[0]
    expect(ratio < 8, f"four times the thoughts took {ratio:.1f} times as long")
    return f"{length} tokens in {took[1]:.2f} s, {ratio:.1f} times as long as a quarter of them"


@case(44, "many streams at once")
def many_streams_at_once(target: Target) -> str:
    """Do 32 streams in parallel each carry their own reply and no other's?"""
    target.need_thinking()
    words = [TWO, PLUS, FOUR, " five", " six", " red", " blue", " green"]
    bodies, expected = [], []
    for at in range(_PARALLEL):
        if target.is_scripted:
            word = f"stream{at:02}"
            bodies.append(target.scripted(f"{word} thinks. {word}{CLOSE}\n\n{word} answers"))
            expected.append((f"{word} thinks. {word}", f"{word} answers"))
        else:
            thought, answer = words[at % 8], words[(at // 8 + 1 + at) % 8]
            bodies.append(target.steered(thought, CLOSE, answer, END))
            expected.append((thought.strip(), answer.strip()))
    replies = _at_once(target, bodies)
    wrong = 0
    for reply, (thought, answer) in zip(replies, expected, strict=True):
        if isinstance(reply, Exception):
            raise Fail(f"a stream broke off: {reply}")
        said = (reply.reasoning.strip(), reply.content.strip())
        # Where nothing is set apart (case 1), the words must still be its own.
        wrong += said != (thought, answer) and (target.splits is True or said[1] != f"{thought}{CLOSE} {answer}")
    expect(wrong == 0, f"{wrong} of {_PARALLEL} are not their own; expected {expected[0]}, {_reply(replies[0])}")
    return f"{_PARALLEL} streams, each its own"


def _reply(reply: Reply | Exception) -> str:
    return str(reply) if isinstance(reply, Exception) else reply.shown()


def _at_once(target: Target, bodies: list[dict[str, Any]]) -> list[Reply | Exception]:
    found: list[Reply | Exception] = [Broken("no reply")] * len(bodies)

    def one(at: int) -> None:
        try:
            found[at] = target.client.chat_streamed(bodies[at])
        except (Refused, Broken) as error:
            found[at] = error

    threads = [threading.Thread(target=one, args=(at,), daemon=True) for at in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def running(target: Target) -> float | None:
    """How many requests run or wait there, by its metrics or its slots; `None` where it does not tell."""
    try:
        found = _RUNNING.findall(str(target.client.get("/metrics")))
        if found:
            return sum(map(float, found))
    except (Refused, Broken):
        pass
    try:
        return float(sum(bool(slot["is_processing"]) for slot in target.client.get("/slots")))
    except (Refused, Broken, KeyError, TypeError):
        return None


def _idle_within(target: Target, limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while running(target):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
