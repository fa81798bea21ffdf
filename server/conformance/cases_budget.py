"""Cases 17 to 25: how long a model thinks, and who decides it."""

from __future__ import annotations

from .cases_split import CLOSE, count_up, counted, exactly
from .client import Refused, Reply, gather, thoughts_of
from .suite import case
from .target import Fail, NotApplicable, Target, expect

_HARD = "Prove that there are infinitely many primes, in detail."
_SPARE = 48  # tokens that a closing phrase may add to a budget


def thinking_tokens(target: Target, reply: Reply) -> int:
    """How many tokens were thought: as told, or as the server's own tokenizer counts the text, or by its length."""
    if reply.reasoning_tokens is not None:
        return reply.reasoning_tokens
    try:
        return len(target.pieces(reply.reasoning))
    except NotApplicable:
        return len(reply.reasoning) // 4


@case(17, "no thoughts at all")
def no_thoughts_at_all(target: Target) -> str:
    """Does a budget of 0, or any other switch there is, give an answer without thoughts?"""
    target.need_thoughts()
    if target.is_scripted:
        for fields in target.ways_without_thoughts:
            exactly(target.say("four", **fields), "", "four")
        return "by budget, by effort and by template switch"
    left = []
    for fields in target.ways_without_thoughts:
        try:
            reply = target.ask("What is two and two?", max_tokens=32, **fields)
        except Refused as refused:
            left.append(f"{_name(fields)}: {refused}")
            continue
        if reply.content.strip() and not reply.reasoning.strip() and CLOSE not in reply.content:
            return f"{_name(fields)}: {reply.shown()}"
        left.append(f"{_name(fields)}: {reply.shown()}")
    raise Fail("; ".join(left))


def _name(fields: dict[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in fields.items())


@case(18, "a budget of N")
def a_budget(target: Target) -> str:
    """Do the thoughts end within their budget, and does an answer follow?"""
    target.need_thoughts()
    if target.is_scripted:
        hard = target.say(count_up(200), thinking_budget=64, max_tokens=900)
        counted(hard)
        thought = hard.reasoning[: len(hard.reasoning.rstrip()) - len(hard.reasoning.lstrip("t0123456789 ").rstrip())]
        expect(40 <= len(thought) <= 64, f"{len(thought)} tokens of a budget of 64")
        expect(hard.closed_by == "budget" and bool(hard.content), f"closed by {hard.closed_by}: {hard.shown()}")
        soft = target.say(f"{count_up(12)}. {count_up(100)}", thinking_budget=64, max_tokens=900)
        expect(soft.reasoning.startswith(count_up(12) + ".\n"), soft.shown())
        return f"hard after {len(thought)} of 64 tokens, soft at the end of a sentence"
    if not target.setting("budget", 1):
        raise Fail("it has no thinking budget")
    reply = target.ask(_HARD, max_tokens=128, **(target.setting("budget", 16) or {}))
    used = thinking_tokens(target, reply)
    expect(used <= 16 + _SPARE and bool(reply.content), f"{used} tokens of a budget of 16: {reply.shown()}")
    return f"{used} tokens for a budget of 16, the closing words among them"


@case(19, "closed by the special token")
def closed_by_the_special_token(target: Target) -> str:
    """Is a forced `</think>` the one token that the model knows, not its letters?"""
    target.budget(8)  # or not applicable
    target.need_thoughts()
    if target.is_scripted:
        # Without words before it: ten tokens of thoughts, and the closing tag is one more. In letters it were eight.
        reply = target.say("abcdefghijklmnopqrstuvwxyz", thinking_budget=10, max_tokens=60)
        expect(reply.reasoning_tokens == 11, f"{reply.reasoning_tokens} tokens for ten and the tag")
        return "the tag is one token"
    if target.token_id(CLOSE) and target.owner == "stillhouse":
        reply = target.ask(_HARD, max_tokens=64, **target.budget(8))
        expect((reply.reasoning_tokens or 99) <= 9, f"{reply.reasoning_tokens} tokens for eight and the tag")
        return "the tag is one token"
    reply = target.ask(_HARD, max_tokens=128, logprobs=True, top_logprobs=1, **target.budget(8))
    tokens = [str(entry.get("token")) for entry in reply.logprobs]
    if CLOSE in tokens:
        return "the tag is one token among those with log-probabilities"
    if CLOSE in "".join(tokens):
        raise Fail("the tag came as several tokens")
    raise NotApplicable("it tells no token of the forced close")


@case(20, "a budget under speculation")
def a_budget_under_speculation(target: Target) -> str:
    """Does the budget hold where tokens are drafted and accepted several at a time?"""
    target.need_thinking()
    reply = target.ask("What is two and two?", max_tokens=48)
    timings = reply.head.get("timings") or {}
    if not timings.get("draft_n"):
        raise NotApplicable("no sign of speculative decoding")
    reply = target.ask(_HARD, max_tokens=128, **target.budget(16))
    used = thinking_tokens(target, reply)
    expect(used <= 16 + _SPARE and bool(reply.content), f"{used} tokens of a budget of 16")
    return f"{used} tokens for a budget of 16"


@case(21, "a budget is for thoughts only")
def a_budget_is_for_thoughts_only(target: Target) -> str:
    """Does the answer go on past the thinking budget, in the middle of code too?"""
    target.budget(8)  # or not applicable
    target.need_thoughts()
    if target.is_scripted:
        answer = "```python\n" + "print(1)  # <tool_call>\n" * 4 + "```"
        return exactly(target.say(f"two{CLOSE}\n\n{answer}", thinking_budget=8), "two", answer)
    reply = target.ask("Count from 1 to 100 in words.", max_tokens=96, **target.budget(8))
    answered = reply.completion_tokens - thinking_tokens(target, reply)
    expect(answered > 16, f"{answered} tokens of answer: {reply.shown()}")
    return f"{answered} tokens of answer after a budget of 8"


@case(22, "effort by name")
def effort_by_name(target: Target) -> str:
    """Does `reasoning_effort` change how long is thought, and does the reply tell the limit?"""
    target.need_thoughts()
    if target.is_scripted:
        limits = {}
        for effort in ("minimal", "low", "medium", "high"):
            reply = target.say(f"two{CLOSE}\n\nfour", reasoning_effort=effort)
            limits[effort] = (reply.head.get("thinking_limit") or {}).get("tokens")
        exactly(target.say("four", reasoning_effort="none"), "", "four")
        long = target.say(count_up(120), reasoning_effort="minimal", max_tokens=1200)
        expect(long.closed_by == "budget", f"closed by {long.closed_by} at minimal effort")
        rising = sorted(value for value in limits.values() if value)
        expect(len(set(rising[:3])) == 3 and rising == list(limits.values()), f"limits told: {limits}")
        return ", ".join(f"{effort} {limit}" for effort, limit in limits.items())
    none = target.ask("What is two and two?", max_tokens=32, reasoning_effort="none")
    expect(not none.reasoning.strip() and bool(none.content), f"at effort none: {none.shown()}")
    low = target.ask(_HARD, max_tokens=400, reasoning_effort="minimal")
    told = (low.head.get("thinking_limit") or {}).get("tokens")
    used = thinking_tokens(target, low)
    expect(told is not None or used < 380, f"at effort minimal {used} tokens, and no limit told")
    return f"none: no thoughts; minimal: {used} tokens, limit told: {told}"


@case(23, "a budget beyond max_tokens")
def a_budget_beyond_max_tokens(target: Target) -> str:
    """Is a budget that leaves no answer clamped, or refused by name?"""
    target.budget(8)  # or not applicable
    target.need_thoughts()
    if target.is_scripted:
        reply = target.say(count_up(200), thinking_budget=100_000, max_tokens=200)
        expect(bool(reply.content), f"no answer: {reply.shown()}")
        limit = reply.head.get("thinking_limit") or {}
        expect(limit.get("clamped") is True, f"not said in the reply: {limit}")
        return f"clamped to {limit.get('tokens')}, and said"
    fields = target.setting("budget", 1000) or {}
    try:
        reply = target.ask(_HARD, max_tokens=64, **fields)
    except Refused as refused:
        named = any(name in f"{refused.param} {refused.message}" for name in fields)
        expect(400 <= refused.status < 500 and named, f"refused without its name, {refused}")
        return f"refused by name, {refused}"
    expect(bool(reply.content.strip()), f"no answer: {reply.shown()}")
    return reply.shown()


@case(24, "an end at the user's word")
def an_end_at_the_users_word(target: Target) -> str:
    """Can the thoughts of a reply in progress be ended, so that its answer comes?"""
    target.need_thoughts()
    if target.is_scripted:
        # Four replies at once take the longest; the word must come while the first still thinks.
        body = target.scripted(count_up(600), n=4, break_loops=False, max_tokens=3500)
    else:
        body = target.body(_HARD, temperature=0, max_tokens=400, reasoning_control=True)
    tried = ""
    for _ in range(4):
        reply, tried = _ended_early(target, body)
        if reply is None:
            continue
        expect(bool(reply.reasoning) and bool(reply.content.strip()), f"no answer after the end: {reply.shown()}")
        expect(reply.closed_by in (None, "user"), f"closed by {reply.closed_by}")
        if target.is_scripted:
            expect(len(reply.reasoning) < 2900, "the thoughts went on to their limit")
        else:
            used = thinking_tokens(target, reply)
            expect(used < 300, f"{used} tokens were thought")
        return f"{tried}: {reply.shown()}"
    raise Fail(f"the thoughts cannot be ended: {tried}")


def _ended_early(target: Target, body: dict[str, object]) -> tuple[Reply | None, str]:
    """A streamed reply whose thoughts are ended after a few tokens, and by which path; none where no path takes it."""
    chunks, by, thought = [], "", 0
    with target.client.stream(body) as stream:
        for chunk in stream:
            chunks.append(chunk)
            thought += any(thoughts_of(choice.get("delta") or {}) for choice in chunk.get("choices") or ())
            if thought >= 4 and not by:
                by = _end_thinking(target, str(chunk.get("id")))
                if not by.startswith("POST"):
                    return None, by
    return gather(chunks), by


def _end_thinking(target: Target, reply_id: str) -> str:
    words = "no thoughts came"
    for path, body in (
        (f"/v1/chat/completions/{reply_id}/end_thinking", {}),
        ("/v1/chat/completions/control", {"id": reply_id, "action": "reasoning_end", "model": target.model}),
    ):
        try:
            told = target.client.post(path, body)
        except Refused as refused:
            words = str(refused)
            continue
        if isinstance(told, dict) and told.get("success") is False:
            words = str(told.get("message"))
            continue
        return f"POST …/{path.rpartition('/')[2]}"
    return words


@case(25, "thoughts that go round")
def thoughts_that_go_round(target: Target) -> str:
    """Is a loop in the thoughts closed, and the reply kept alive for its answer?"""
    target.need_thoughts()
    if target.is_scripted:
        exact = target.say("Wait, let me check that again. " * 40, max_tokens=3000)
        circles = "".join(
            f"Hmm {n}, {a} the sum of the two numbers {b}. "
            for n in range(1)
            for _ in range(12)
            for a, b in (("is", "four then"), ("then is", "four"))
        )
        near = target.say(circles, max_tokens=3000)
        for reply in (exact, near):
            expect(reply.closed_by == "loop" and bool(reply.content), f"closed by {reply.closed_by}: {reply.shown()}")
        return f"closed after {exact.reasoning_tokens} and {near.reasoning_tokens} tokens"
    reply = target.both(target.insisted(" two", max_tokens=400))
    if "two two two" not in reply.reasoning + reply.content:
        raise NotApplicable(f"the model could not be steered into a loop: {reply.shown()}")
    used = thinking_tokens(target, reply)
    expect(used < 160 and bool(reply.content.strip()), f"{used} tokens of one word: {reply.shown()}")
    return f"closed after {used} tokens: {reply.shown()}"
