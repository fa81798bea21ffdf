"""The benchmark's client reads every server's stream alike, and its prompts meet caches only where they should."""

import importlib.util
import random
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parent.parent / "benchmarks" / "serve.py"
spec = importlib.util.spec_from_file_location("benchmark_serve", PATH)
assert spec and spec.loader
serve = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = serve  # dataclasses look their module up
spec.loader.exec_module(serve)

EVENTS = [
    b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n',
    b'data: {"choices":[{"delta":{"reasoning_content":"so"}}]}\n\n',
    b": keep-alive\n\n",
    b'data: {"choices":[{"delta": {"content": " 4"}}]}\n\n',
    b'data: {"choices":[{"delta":{},"finish_reason":"length"}],"usage":null}\n\n',
    b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":3,'
    b'"prompt_tokens_details":{"cached_tokens":5}}}\n\n',
    b"data: [DONE]\n\n",
]
BODY = b"".join(EVENTS)
CHUNKS = b"".join(b"%x\r\n%s\r\n" % (len(event), event) for event in EVENTS)
WIRES = {
    "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKS + b"0\r\n\r\n",
    "chunked, cut through the events": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n"
    + b"".join(b"%X;x=1\r\n%s\r\n" % (len(BODY[i : i + 20]), BODY[i : i + 20]) for i in range(0, len(BODY), 20))
    + b"0\r\nExpires: now\r\n\r\n",
    "known length": b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY),
    "until hung up": b"HTTP/1.0 200 OK\r\n\r\n" + BODY,
    "lines that end in CR LF": b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + BODY.replace(b"\n", b"\r\n"),
}


def read(*pieces: bytes):
    reply = serve.Reply(sent_s=0.0)
    for second, piece in enumerate(pieces, start=1):
        reply.feed(piece, float(second))
    if not reply.complete:
        reply.hang_up(len(pieces) + 1.0)
    return reply


@pytest.mark.parametrize("wire", WIRES.values(), ids=WIRES)
def test_every_cut_of_the_wire_gives_the_same_counts(wire):
    for cut in range(1, len(wire)):
        reply = read(wire[:cut], wire[cut:])
        counts = (len(reply.token_times_s), reply.completion_tokens, reply.prompt_tokens, reply.cached_tokens)
        assert (counts, reply.error) == ((2, 3, 9, 5), ""), cut
    assert read(*(wire[i : i + 1] for i in range(len(wire)))).completion_tokens == 3


def test_the_first_token_is_the_first_text_not_the_role():
    reply = read(WIRES["chunked"].split(EVENTS[0])[0] + EVENTS[0], b"\r\n", CHUNKS[len(EVENTS[0]) + 6 :], b"0\r\n\r\n")
    assert reply.token_times_s[0] == 3.0


LINES = {
    "text": (b'{"delta":{"content":"a"}}', True),
    "text after a space": (b'{"delta":{"content": "a"}}', True),
    "a thought beside no content": (b'{"delta":{"content":null,"reasoning_content":"a"}}', True),
    "an escaped quote": (b'{"delta":{"content":"\\""}}', True),
    "a role": (b'{"delta":{"role":"assistant","content":""}}', False),
    "a role with null": (b'{"delta":{"role":"assistant","content":null}}', False),
    "the end": (b'{"delta":{},"finish_reason":"stop"}', False),
}


@pytest.mark.parametrize(("line", "expected"), LINES.values(), ids=LINES)
def test_only_text_is_a_token(line, expected):
    assert serve.has_text(b"data: " + line) is expected


FAILURES = {
    "an error status": (b'HTTP/1.1 400 Bad\r\nContent-Length: 7\r\n\r\n{"e":1}', 'HTTP 400 {"e":1}'),
    "an error in mid-stream": (
        b'HTTP/1.0 200 OK\r\n\r\ndata: {"error":{"message":"out of memory"}}\n\n',
        '{"error":{"message":"out of memory"}}',
    ),
    "cut off": (WIRES["chunked"][:-30], "the connection was closed in the middle of the reply"),
    "no [DONE]": (WIRES["until hung up"].replace(EVENTS[-1], b""), "the stream ended without [DONE]"),
    "nothing said": (b"HTTP/1.0 200 OK\r\n\r\n" + EVENTS[-1], "the reply has no token"),
}


@pytest.mark.parametrize(("wire", "error"), FAILURES.values(), ids=FAILURES)
def test_a_failed_reply_is_an_error_and_not_a_number(wire, error):
    failed, good = read(wire), read(WIRES["chunked"])
    level = serve.summarize([failed, good], [])
    assert (failed.error, level.errors, level.ttft_p50_s, level.tokens_per_s) == (error, 1, 1.0, 3 / failed.ended_s)


def test_distinct_prompts_never_come_twice():
    prompts = [p for n in range(9) for p in serve.load("distinct", random.Random(f"seed/{n}/8"), 32, 60, 1000)[1]]
    assert len({prompt[:30] for prompt in prompts}) == len(prompts) == 288


def test_repeated_prompts_come_again_in_another_order():
    before, after = serve.load("repeat", random.Random(1), 32, 60, 1000)
    assert sorted(before) == sorted(after) and before != after


def test_a_shared_prefix_has_the_length_asked_for_and_other_endings():
    before, after = serve.load("shared-prefix", random.Random(1), 8, 60, 1000)
    openings = {tuple(prompt.split()[:1000]) for prompt in before + after}
    assert (len(openings), len({*before, *after}), len(after[0].split())) == (1, 9, 1060)


def test_a_median_of_rounds_leaves_out_what_was_not_measured_and_adds_errors_up():
    fast, slow = serve.summarize([read(WIRES["chunked"])], []), serve.summarize([read(FAILURES["cut off"][0])], [])
    both = serve.median([fast, slow, slow])
    assert (both.ttft_p50_s, both.errors, both.before_ttft_p50_s) == (1.0, 2, None)


def test_the_table_gives_ratios_to_the_baseline():
    level = serve.summarize([read(WIRES["until hung up"])], [])
    twice = serve.replace(level, ttft_p50_s=2.0, cached_tokens=None)
    heads, first, second = serve.report({(4, "a"): level, (4, "peer"): twice}, baseline="a").splitlines()
    assert len(heads) == len(first) == len(second)
    assert ("1000.0 " in first, "2000.0   2.00x" in second, "5 of 9" in first) == (True, True, True)


WRONG = {
    "a name too few": ["http://a:1", "http://b:1", "--name", "x"],
    "the same server twice": ["http://a:1", "http://a:1/v1"],
    "no scheme": ["127.0.0.1:8000"],
    "an unknown baseline": ["http://a:1", "--baseline", "b"],
    "no streams": ["http://a:1", "--streams", "4,none"],
}


@pytest.mark.parametrize("argv", WRONG.values(), ids=WRONG)
def test_a_wrong_option_is_told_before_anything_is_asked(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        serve.parse(argv)
    assert (stopped.value.code, "error: " in capsys.readouterr().err) == (2, True)
