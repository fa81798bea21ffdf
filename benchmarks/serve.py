"""Measure OpenAI-compatible chat servers side by side: tokens/s, time to first token, inter-token latency.

    python benchmarks/serve.py http://127.0.0.1:8201 http://127.0.0.1:8000 --name llama-server,stillhouse

Standard library only, and a client that costs next to nothing: it finds the tokens of a stream by comparing bytes, and
parses JSON once a reply (the usage). It starts no server and knows nothing of what is inside one; README.md beside
this file says how to start the peers and how to read the numbers.
"""

import argparse
import asyncio
import itertools
import json
import random
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace

# Common words, because nearly every tokenizer has one token for each of them.
WORDS = (
    "water house light under great place small world every found never letter mother father answer should country plant"
    " school tree start city earth thought head story left close seem next hard open begin life always both paper group"
    " often until side car mile night walk white sea river four carry state book hear stop second idea enough watch far"
)


# 1. The wire: bytes in, times and counts out.


def has_text(line: bytes) -> bool:
    """Whether an event carries a token: a `content` or `reasoning_content` that is not empty.

    Inside a JSON string a quote is escaped, so that `content":` can only be a key.

    >>> has_text(b'data: {"delta":{"role":"assistant","content":""}}'), has_text(b'data: {"delta":{"content": "a"}}')
    (False, True)
    """
    at = line.find(b'content":')
    while at >= 0:
        value = line[at + 9 : at + 12].lstrip()
        if value[:1] == b'"' and value[1:2] != b'"':
            return True
        at = line.find(b'content":', at + 9)
    return False


class Reply:
    """One HTTP reply while it arrives: chunked, of a known length, or ended by the server's hanging up."""

    def __init__(self, sent_s: float, error: str = ""):
        self.sent_s, self.ended_s, self.token_times_s = sent_s, sent_s, list[float]()  # seconds of perf_counter
        self.prompt_tokens, self.cached_tokens, self.completion_tokens = None, None, 0  # None = the server did not say
        self.error, self.status, self.complete, self.keep_alive = error, 0, False, True
        self._chunked, self._in_trailer, self._is_done = False, False, False
        self._left: int | None = None  # bytes to come of this chunk, or of the whole body; None = until hung up
        self._raw, self._text, self._usage = b"", b"", b""  # an unfinished head or size line, line of text; the usage

    def feed(self, data: bytes, now_s: float) -> None:
        """Take what one read gave; it may begin and end anywhere."""
        if not self.status:
            head, blank, data = (self._raw + data).partition(b"\r\n\r\n")
            self._raw = b"" if blank else head
            if not blank:
                return
            self._read_head(head.lower())
        if self._chunked:
            data = self._unchunk(data)
        elif self._left is not None:
            data, self._left = data[: self._left], max(0, self._left - len(data))
            self.complete = self._left == 0
        lines = (self._text + data).split(b"\n")
        self._text = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                self._read_event(line, now_s)
        if self.complete:
            self._finish(now_s)

    def hang_up(self, now_s: float) -> None:
        """The connection is gone: the end where no other was announced, an error everywhere else."""
        if not self.status or self._chunked or self._left is not None:
            self.error = self.error or "the connection was closed in the middle of the reply"
        self._finish(now_s)

    def _read_head(self, head: bytes) -> None:
        status_line, *lines = head.split(b"\r\n")
        headers = {name.strip(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
        self.status = int(status_line.split()[1])
        self._chunked = b"chunked" in headers.get(b"transfer-encoding", b"")
        length = headers.get(b"content-length", b"")
        self._left = 0 if self._chunked else int(length) if length else None
        default = b"close" if status_line.startswith(b"http/1.0") else b"keep-alive"
        self.keep_alive = headers.get(b"connection", default) != b"close"

    def _unchunk(self, data: bytes) -> bytes:
        data, at, pieces = self._raw + data, 0, list[bytes]()
        while at < len(data) and not self.complete:
            if self._left:
                pieces.append(data[at : at + self._left])
                at, self._left = at + len(pieces[-1]), self._left - len(pieces[-1])
                continue
            line_end = data.find(b"\r\n", at)
            if line_end < 0:
                break
            line, at = data[at:line_end], line_end + 2
            if self._in_trailer:
                self.complete = not line
            elif line:  # an empty one closes the chunk before
                self._left = int(line.partition(b";")[0], 16)
                self._in_trailer = self._left == 0
        self._raw = data[at:]
        return b"".join(pieces)

    def _read_event(self, line: bytes, now_s: float) -> None:
        if has_text(line):
            self.token_times_s.append(now_s)
        if b'"usage":{' in line or b'"usage": {' in line:
            self._usage = line  # the last one counts; parsed at the end
            # transformers serve sends no [DONE]; its last event is the only one that tells usage and reason together
            self._is_done = self._is_done or b'"finish_reason":"' in line
        elif line[5:12].strip() == b"[DONE]":
            self._is_done = True
        elif b'"error":' in line[:20]:
            self.error = line[5:305].strip().decode(errors="replace")

    def _finish(self, now_s: float) -> None:
        self.ended_s, self.complete = now_s, True
        usage = json.loads(self._usage[5:])["usage"] if self._usage else {}
        self.completion_tokens = usage.get("completion_tokens") or len(self.token_times_s)
        self.prompt_tokens = usage.get("prompt_tokens")
        self.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        if self.status not in (0, 200):
            self.error = f"HTTP {self.status} {self._text[:300].decode(errors='replace')}".strip()
        elif not self.error and not (self._is_done and self.token_times_s):
            self.error = "the stream ended without [DONE]" if self.token_times_s else "the reply has no token"


# 2. The load: who is asked what, and how many at a time.


@dataclass(frozen=True, slots=True)
class Server:
    name: str
    url: str  # without /v1
    model: str
    api_key: str

    def request(self, prompt: str, max_tokens: int, temperature: float, ignore_eos: bool) -> bytes:
        """The whole HTTP request, ready to be written."""
        address = urllib.parse.urlsplit(self.url)
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}], "max_tokens": max_tokens}
        body |= {"temperature": temperature, "stream": True, "stream_options": {"include_usage": True}}
        payload = json.dumps(body | ({"ignore_eos": True} if ignore_eos else {})).encode()
        head = f"POST {address.path}/v1/chat/completions HTTP/1.1\r\nHost: {address.netloc}\r\n"
        head += f"Authorization: Bearer {self.api_key}\r\n" if self.api_key else ""
        head += f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
        return head.encode() + payload


class Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    is_open, ended = False, None

    def connection_made(self, transport) -> None:
        self.transport, self.is_open = transport, True

    def data_received(self, data: bytes) -> None:
        if self.ended and not self.ended.done():
            try:
                self.reply.feed(data, time.perf_counter())
            except (ValueError, LookupError):
                self.reply.error, self.reply.complete = f"this is not HTTP: {data[:80]!r}", True
            if self.reply.complete:
                self.ended.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        if self.ended and not self.ended.done():
            self.reply.hang_up(time.perf_counter())
            self.ended.set_result(None)

    async def ask(self, request: bytes, timeout_s: float) -> Reply:
        """Send one request and wait for the end of its reply, whatever kind of end that is."""
        self.ended, self.reply = asyncio.get_running_loop().create_future(), Reply(time.perf_counter())
        self.transport.write(request)
        try:
            await asyncio.wait_for(self.ended, timeout_s)
        except asyncio.TimeoutError:
            self.reply.error, self.reply.ended_s = f"no end after {timeout_s:g} s", time.perf_counter()
        if self.reply.error or not self.reply.keep_alive:
            self.is_open = False
            self.transport.abort()
        return self.reply


async def ask_all(server: Server, requests: list[bytes], streams: int, timeout_s: float) -> list[Reply]:
    """Ask everything, `streams` at a time; the next request goes out when a reply has ended."""
    loop, queue, replies = asyncio.get_running_loop(), iter(requests), list[Reply]()
    address = urllib.parse.urlsplit(server.url)
    port, tls = address.port or (443 if address.scheme == "https" else 80), address.scheme == "https" or None

    async def one_stream() -> None:
        connection = Connection()
        for request in queue:
            try:
                reply = await connection.ask(request, timeout_s) if connection.is_open else None
                if reply is None or (reply.complete and not reply.status):  # a kept one is sometimes found closed
                    _, connection = await loop.create_connection(Connection, address.hostname, port, ssl=tls)
                    reply = await connection.ask(request, timeout_s)
            except OSError as error:
                reply = Reply(time.perf_counter(), error=str(error))
            replies.append(reply)
        if connection.is_open:
            connection.transport.abort()

    await asyncio.gather(*(one_stream() for _ in range(streams)))
    return replies


def words(rng: random.Random, tokens: int) -> str:
    """About as many tokens of text, which no cache has seen."""
    return " ".join(rng.choices(WORDS.split(), k=tokens))


def load(kind: str, rng: random.Random, requests: int, tokens: int, prefix: int) -> tuple[list[str], list[str]]:
    """The prompts that are asked before, and those that are measured; `tokens` and `prefix` are token counts.

    Repeated prompts come in another order, so that most meet another slot than the first time.
    """
    if kind == "again":
        return (prompts := [words(rng, prefix)]), prompts
    prompts, opening = [words(rng, tokens) for _ in range(requests)], words(rng, prefix)
    if kind == "distinct":
        return [], prompts
    if kind == "repeat":
        return prompts, rng.sample(prompts, k=requests)
    return [f"{opening} {words(rng, tokens)}"], [f"{opening} {prompt}" for prompt in prompts]


# 3. The numbers.


@dataclass(frozen=True, slots=True)
class Level:
    """What one server did at one number of streams; None = could not be measured."""

    tokens_per_s: float | None  # all completion tokens / (last reply ended - first request sent)
    ttft_p50_s: float | None  # time to first token
    ttft_p95_s: float | None
    itl_p50_s: float | None  # inter-token latency: between two events of a reply that carry text
    itl_p95_s: float | None
    before_ttft_p50_s: float | None  # of the same prompts, or the same prefix, when they were new
    prompt_tokens: float | None  # per request, as the server counts them
    cached_tokens: float | None
    tokens_per_event: float | None
    client_cpu: float | None  # this program's share of one core
    errors: int


def percentile(values: Sequence[float | None], share: float) -> float | None:
    """The value below which `share` of the others lie, interpolated; None is left out, and stands for none.

    >>> percentile([4, 1, 2, 3], 0.5), percentile([1, None], 0.95), percentile([], 0.5)
    (2.5, 1.0, None)
    """
    ordered = sorted(value for value in values if value is not None)
    if not ordered:
        return None
    low, rest = divmod(share * (len(ordered) - 1), 1)
    low, high = ordered[int(low)], ordered[min(int(low) + 1, len(ordered) - 1)]
    return low + (high - low) * rest


def summarize(replies: list[Reply], before: list[Reply], cpu_s: float = 0.0) -> Level:
    """All replies of a level as one row; one that failed is an error and nothing else."""
    good = [reply for reply in replies if not reply.error]
    wall_s = max(reply.ended_s for reply in replies) - min(reply.sent_s for reply in replies)
    tokens, events = sum(r.completion_tokens for r in good), sum(len(r.token_times_s) for r in good)
    ttft_s = [reply.token_times_s[0] - reply.sent_s for reply in good]
    gaps_s = [later - sooner for reply in good for sooner, later in itertools.pairwise(reply.token_times_s)]
    return Level(
        tokens_per_s=tokens / wall_s if tokens else None,
        ttft_p50_s=percentile(ttft_s, 0.5),
        ttft_p95_s=percentile(ttft_s, 0.95),
        itl_p50_s=percentile(gaps_s, 0.5),
        itl_p95_s=percentile(gaps_s, 0.95),
        before_ttft_p50_s=percentile([r.token_times_s[0] - r.sent_s for r in before if not r.error], 0.5),
        prompt_tokens=percentile([reply.prompt_tokens for reply in good], 0.5),
        cached_tokens=percentile([reply.cached_tokens for reply in good], 0.5),
        tokens_per_event=tokens / events if events else None,
        client_cpu=cpu_s / wall_s if wall_s else None,
        errors=sum(bool(reply.error) for reply in before + replies),
    )


def median(levels: Sequence[Level]) -> Level:
    """Each number's own median over the rounds; errors are added up."""
    middles = {f.name: percentile([getattr(level, f.name) for level in levels], 0.5) for f in fields(Level)}
    return Level(**middles | {"errors": sum(level.errors for level in levels)})


def report(medians: dict[tuple[int, str], Level], baseline: str) -> str:
    """For every number of streams one line a server; behind each number its ratio to the baseline's."""
    columns = {"tok/s": "tokens_per_s", "TTFT p50 ms": "ttft_p50_s", "TTFT p95 ms": "ttft_p95_s"}
    columns |= {"ITL p50 ms": "itl_p50_s", "ITL p95 ms": "itl_p95_s"}
    has_before = any(level.before_ttft_p50_s for level in medians.values())
    rows = [
        ["streams", "server", *columns, *(["before ms", "TTFT/before"] * has_before), "cached", "client CPU", "errors"]
    ]
    for (streams, name), level in medians.items():
        row = [str(streams), name]
        for metric in columns.values():
            value, base = getattr(level, metric), getattr(medians[streams, baseline], metric)
            ratio = f"{value / base:7.2f}x" if value and base and name != baseline else " " * 8
            row.append(("-" if value is None else f"{value if metric == 'tokens_per_s' else value * 1000:.1f}") + ratio)
        if has_before:
            now_s, before_s = level.ttft_p50_s, level.before_ttft_p50_s
            row += [f"{before_s * 1000:.1f}", f"{now_s / before_s:.3f}"] if now_s and before_s else ["-", "-"]
        told = level.cached_tokens is not None and level.prompt_tokens is not None
        row.append(f"{level.cached_tokens:.0f} of {level.prompt_tokens:.0f}" if told else "-")
        rows.append([*row, f"{level.client_cpu or 0:.1%}", str(level.errors)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligns = [str.ljust if head == "server" else str.rjust for head in rows[0]]
    return "\n".join("  ".join(map(lambda align, *cell: align(*cell), aligns, row, widths)) for row in rows)


# 4. The command line.


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, with `servers` put together from four of them; a wrong one exits with 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("urls", nargs="+", metavar="URL", help="a server, with or without /v1")
    option("--name", default="", help="labels for the table: a,b,c (default: host and port)")
    option("--model", default="", help="one for all, or a,b,c (default: the first of each server's /v1/models)")
    option("--api-key", default="", help="one for all, or a,b,c")
    option("--baseline", default="", help="URL or label that the ratios refer to (default: the first)")
    option("--prompts", choices=("distinct", "repeat", "shared-prefix"), default="distinct")
    option("--cache-check", action="store_true", help="send a prompt of --prefix-tokens twice, and nothing else")
    option("--streams", default="1,4,8,16", help="levels: how many requests at a time (default: %(default)s)")
    option("--requests", type=int, default=32, help="measured per level and round (default: %(default)s)")
    option("--rounds", type=int, default=3, help="medians are taken over them (default: %(default)s)")
    option("--max-tokens", type=int, default=64, help="of a reply (default: %(default)s)")
    option("--prompt-tokens", type=int, default=60, help="about, without the template's (default: %(default)s)")
    option("--prefix-tokens", type=int, default=1000, help="about (default: %(default)s)")
    option("--temperature", type=float, default=0.7)
    option("--ignore-eos", action=argparse.BooleanOptionalAction, default=True, help="replies of full length")
    option("--timeout-s", type=float, default=600.0, help="of one reply (default: %(default)s)")
    option("--seed", default=str(time.time_ns()), help="of the prompts; a used one finds its prompts in the caches")
    option("--json", metavar="FILE", help="write every round's numbers there")
    args = parser.parse_args(argv)

    urls = [url.rstrip("/").removesuffix("/v1") for url in args.urls]
    names = args.name.split(",") if args.name else [urllib.parse.urlsplit(url).netloc for url in urls]
    models, keys = (text.split(",") if "," in text else [text] * len(urls) for text in (args.model, args.api_key))
    if not len(urls) == len(names) == len(models) == len(keys):
        parser.error(f"--name, --model and --api-key take one value for each of the {len(urls)} servers")
    if len(set(urls)) < len(urls) or len(set(names)) < len(urls):
        parser.error("the same URL or name is there twice; the second would be answered from the first one's cache")
    if not all(urllib.parse.urlsplit(url).scheme in ("http", "https") for url in urls):
        parser.error("a URL begins with http:// or https://")
    args.servers = [Server(*server) for server in zip(names, urls, models, keys, strict=True)]
    baseline = (args.baseline or names[0]).rstrip("/").removesuffix("/v1")
    args.baseline = next((server.name for server in args.servers if baseline in (server.name, server.url)), "")
    if not args.baseline:
        parser.error(f"--baseline {baseline} is none of the servers: {', '.join(names)}")
    args.streams = [int(level) if level.isdigit() else 0 for level in args.streams.split(",")]
    if min(args.rounds, args.requests, args.max_tokens, args.prompt_tokens, args.prefix_tokens, *args.streams) < 1:
        parser.error("--streams, --requests, --rounds and the numbers of tokens are whole numbers from 1")
    if args.cache_check:
        args.prompts, args.requests, args.max_tokens, args.streams = "again", 1, min(args.max_tokens, 8), [1]
    return args


def first_model(server: Server) -> str:
    """The model that the server names first, or "default" where it names none."""
    headers = {"Authorization": f"Bearer {server.api_key}"} if server.api_key else {}
    request = urllib.request.Request(f"{server.url}/v1/models", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)["data"][0]["id"]
    except (OSError, ValueError, LookupError, TypeError):  # the warm-up tells what is wrong, if something is
        return "default"


async def run(args: argparse.Namespace) -> dict[tuple[int, str], list[Level]]:
    """Every round measures every server at every level in turn, so that the machine's drift hurts all alike."""

    async def ask(server: Server, prompts: list[str], streams: int, max_tokens: int) -> tuple[list[Reply], float]:
        requests = [server.request(prompt, max_tokens, args.temperature, args.ignore_eos) for prompt in prompts]
        cpu_s = time.process_time()
        replies = await ask_all(server, requests, streams, args.timeout_s)
        return replies, time.process_time() - cpu_s

    servers = [replace(server, model=server.model or first_model(server)) for server in args.servers]
    for server in servers:
        [reply], _ = await ask(server, ["Hello"], 1, max_tokens=8)
        if reply.error:
            sys.exit(f"error: {server.name} ({server.url}): {reply.error}")
    levels = {(streams, server.name): list[Level]() for streams in args.streams for server in servers}
    for round_number, streams in itertools.product(range(1, args.rounds + 1), args.streams):
        for server in servers[:: 1 if round_number % 2 else -1]:
            rng = random.Random(f"{args.seed}/{round_number}/{streams}")  # the same prompts for every server
            earlier, prompts = load(args.prompts, rng, args.requests, args.prompt_tokens, args.prefix_tokens)
            before, _ = await ask(server, earlier, streams, args.max_tokens)
            replies, cpu_s = await ask(server, prompts, streams, args.max_tokens)
            level = summarize(replies, before, cpu_s)
            levels[streams, server.name].append(level)
            done = f"round {round_number}, {streams} streams, {server.name}: {level.tokens_per_s or 0:.1f} tok/s"
            trouble = next((f"; {level.errors} errors: {r.error}" for r in before + replies if r.error), "")
            print(done + trouble, file=sys.stderr, flush=True)
    return levels


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; the exit code tells whether every request was answered."""
    args = parse(argv)
    levels = asyncio.run(run(args))
    medians = {key: median(rounds) for key, rounds in levels.items()}
    print(f"rounds {args.rounds}, requests {args.requests} a level, {args.max_tokens} tokens a reply, {args.prompts}")
    print(f"prompts (seed {args.seed}); medians over the rounds, ratios to {args.baseline}\n")
    print(report(medians, args.baseline))
    if any(abs((level.tokens_per_event or 1) - 1) > 0.05 for level in medians.values()):
        print("note: some events carry several tokens or none; ITL is between events (tokens_per_event in --json)")
    if args.json:
        options = {name: value for name, value in vars(args).items() if name not in ("servers", "api_key", "json")}
        rows = [
            {"streams": streams, "server": name, "rounds": [asdict(level) for level in rounds]}
            for (streams, name), rounds in levels.items()
        ]
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"options": options, "levels": rows}, file, indent=1)
    return 1 if any(level.errors for level in medians.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
