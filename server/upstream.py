"""One upstream: an OpenAI-compatible server behind ours, what it serves, what it can do, and how it is.

It knows paths and JSON keys of other servers (OpenAI's, and what vLLM, llama-server and Stillhouse have besides), and
nothing of queues, of thoughts, or of the others beside it.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx

from ..backends.base import BackendFailed
from ..r1.errors import UserError
from ..r1.prompt import OPEN

_CONNECT_S = 5.0
_CHECK_S = 10.0  # an answer to "how are you?"
_LONGEST_EVENT = 4 * 1024 * 1024  # bytes
_LONGEST_WORDS = 300  # characters of an upstream's own message that are told on
_TAIL = 16  # tokens of a prompt that tell whether it ends inside the thoughts
_QUESTION = [{"role": "user", "content": "Say yes."}]
_PROBE_TOKENS = 8


class UpstreamFailed(BackendFailed):
    """An upstream did not do what it should. `elsewhere`: another one may be asked the same."""

    def __init__(self, message: str, *, status: int = 502, elsewhere: bool = True, is_down: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.elsewhere = elsewhere
        self.is_down = is_down  # nobody need ask it until it answers again


class UpstreamRefused(UserError):
    """What an upstream says is wrong with a request; the caller's to know."""

    def __init__(self, status: int, message: str, code: str | None, param: str | None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


@dataclass(frozen=True, slots=True)
class Traits:
    """What an upstream serves and can do, as far as it shows."""

    model: str  # as it calls it
    is_ours: bool  # another Stillhouse: it keeps the rules for thoughts itself
    context_length: int | None
    dialect: Literal["tokenize", "apply-template"] | None  # how it turns a conversation into token ids, if it does
    opens: bool  # its prompts end inside the thoughts, and its text begins there without saying so

    @property
    def can_continue(self) -> bool:
        """Whether a reply that was cut can be gone on with: by its token ids."""
        return self.dialect is not None


class Upstream:
    """A server behind ours. Lives on one event loop, but for `probe`, which brings its own connection."""

    def __init__(self, url: str, *, model: str | None, key: str | None, silence_s: float) -> None:
        self.url = _base_url(url)
        self.name = urlsplit(self.url).netloc
        self.traits: Traits | None = None
        self.trouble: str | None = "not asked yet"  # why it is not asked now; `None` = it is up
        self.running = 0  # replies in progress
        self.replies = 0  # that it was asked for, ever
        self.failures = 0
        self._model = model
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._timeout = httpx.Timeout(silence_s, connect=_CONNECT_S, pool=None)
        self._kept: httpx.AsyncClient | None = None

    async def close(self) -> None:
        """Hang up."""
        if self._kept:
            await self._kept.aclose()

    # How it is

    async def probe(self) -> Traits:
        """Find out what it serves and can do, and have it say a word. Raises `UserError` in words for the operator."""
        async with self._connection() as client:
            try:
                listed = await self._models(client)
                entry = self._entry(listed)
                model = str(entry["id"])
                dialect, prompt_end = await self._dialect(client, model)
                parses = await self._parses(client, model)
            except UpstreamFailed as error:
                raise UserError(error.message, "stillhouse serve --backend openai --upstream URL") from None
            except UpstreamRefused as error:
                raise UserError(f"the upstream {self.name} refuses a plain question: {error.message}") from None
        self.traits = Traits(
            model=model,
            is_ours=entry.get("owned_by") == "stillhouse",
            context_length=_context(entry),
            dialect=dialect,
            opens=prompt_end.rstrip().endswith(OPEN) and not parses,
        )
        self.trouble = None
        return self.traits

    async def check(self) -> None:
        """Ask how it is, and put it into `trouble`."""
        try:
            if self.traits is None or self.trouble is not None:
                await self.probe()  # it may be another server by now
            else:
                self._entry(await self._models(self._client))
        except UserError as error:
            self.trouble = error.message

    async def _models(self, client: httpx.AsyncClient) -> list[dict[str, Any]]:
        response = await self._ask(client, "GET", "/v1/models", timeout=_CHECK_S)
        if response.status_code in (401, 403):
            words = "wants a key" if not self._headers else "does not take our key"
            raise UserError(
                f"the upstream {self.name} {words} ({response.status_code})",
                "put its key into STILLHOUSE_UPSTREAM_KEY, or into the file of --upstream-key-file",
            )
        if response.status_code == 503:
            raise UpstreamFailed(f"the upstream {self.name} is not ready yet (503)", status=503, is_down=True)
        with suppress(ValueError, KeyError, TypeError):
            data = response.json()["data"]
            if response.status_code == 200 and all(isinstance(entry["id"], str) for entry in data):
                return list(data)
        raise UserError(
            f"{self.url} is no OpenAI-compatible server: /v1/models answered {response.status_code} "
            f"with {_kind(response)}",
            "--upstream takes the URL in front of /v1, such as http://127.0.0.1:8001",
        )

    def _entry(self, listed: Sequence[dict[str, Any]]) -> dict[str, Any]:
        names = [entry["id"] for entry in listed]
        told = ", ".join(names)[:_LONGEST_WORDS] or "none"
        if self._model is None:
            if len(names) != 1:
                raise UserError(
                    f"the upstream {self.name} serves {len(names)} models: {told}",
                    "say which: stillhouse serve NAME --backend openai --upstream URL",
                )
            return listed[0]
        for entry in listed:
            if self._model in (entry["id"], *_names(entry)):
                return entry
        raise UserError(f"the upstream {self.name} does not serve {self._model!r}; it serves {told}")

    async def _dialect(self, client: httpx.AsyncClient, model: str) -> tuple[Any, str]:
        """How it turns a conversation into tokens, and how the prompt of a plain question ends."""
        for dialect in ("tokenize", "apply-template"):
            with suppress(UpstreamFailed, UpstreamRefused):
                text, ids = await self._rendered(client, dialect, model, _QUESTION, {})
                if ids:
                    return dialect, text
        return None, ""

    async def _parses(self, client: httpx.AsyncClient, model: str) -> bool:
        """Whether it tells thoughts apart from the answer. A few tokens show it, and that it speaks sense."""
        body = {"model": model, "messages": _QUESTION, "max_tokens": _PROBE_TOKENS, "stream": True}
        said = [choice.get("delta") or {} async for event in self._events(client, body) for choice in choices_of(event)]
        if not said:
            raise self._nonsense("its stream has no reply in it")
        return any(delta.get("reasoning_content") or delta.get("reasoning") for delta in said)

    # What it says

    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The events of a reply, as JSON objects. Raises `UpstreamFailed`, or `UpstreamRefused`."""
        assert self.traits is not None, "a server that was never up is not asked"
        async with aclosing(self._events(self._client, {"model": self.traits.model, **body}, path)) as events:
            async for event in events:
                yield event

    async def prompt_ids(self, messages: Sequence[Any], variables: Mapping[str, Any]) -> tuple[str, list[int]]:
        """How a conversation's prompt ends, and its token ids. Only where `traits.can_continue`."""
        assert self.traits is not None and self.traits.dialect is not None
        return await self._rendered(self._client, self.traits.dialect, self.traits.model, messages, variables)

    async def encode(self, text: str) -> list[int]:
        """The token ids of a text in which control tokens count as such; nothing is put in front."""
        assert self.traits is not None
        body = {"model": self.traits.model, "prompt": text, "content": text, "add_special_tokens": False}
        return await self._tokens(self._client, body | {"add_special": False, "parse_special": True})

    async def _rendered(
        self,
        client: httpx.AsyncClient,
        dialect: str,
        model: str,
        messages: Sequence[Any],
        variables: Mapping[str, Any],
    ) -> tuple[str, list[int]]:
        asked = {"messages": messages} | ({"chat_template_kwargs": variables} if variables else {})
        if dialect == "tokenize":
            ids = await self._tokens(client, {"model": model, "add_generation_prompt": True, **asked})
            told = await self._object(client, "/detokenize", {"model": model, "tokens": ids[-_TAIL:]}) if ids else {}
            return _text(told, "prompt"), ids
        prompt = _text(await self._object(client, "/apply-template", asked), "prompt")
        ids = await self._tokens(client, {"content": prompt, "add_special": True, "parse_special": True})
        return prompt, ids if prompt else []

    async def _tokens(self, client: httpx.AsyncClient, body: Mapping[str, Any]) -> list[int]:
        ids = (await self._object(client, "/tokenize", body)).get("tokens")
        if not isinstance(ids, list) or not all(isinstance(token_id, int) for token_id in ids):
            raise self._nonsense("/tokenize tells no token ids")
        return ids

    async def _object(self, client: httpx.AsyncClient, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        response = await self._ask(client, "POST", path, json=body)
        if response.status_code != 200:
            raise self._refusal(response.status_code, response.content, response.headers)
        with suppress(ValueError):
            if isinstance(told := response.json(), dict):
                return told
        raise self._nonsense(f"{path} answered with {_kind(response)}")

    async def _events(
        self, client: httpx.AsyncClient, body: Mapping[str, Any], path: str = "/v1/chat/completions"
    ) -> AsyncGenerator[dict[str, Any], None]:
        try:
            async with client.stream("POST", path, json=body) as response:
                if response.status_code != 200:
                    raise self._refusal(response.status_code, await response.aread(), response.headers)
                if not response.headers.get("content-type", "").startswith("text/event-stream"):
                    raise self._nonsense(f"it answered with {_kind(response)} where a stream was asked for")
                async for data in _datas(response.aiter_bytes()):
                    if data == b"[DONE]":
                        return
                    yield self._event(data)
        except ValueError:
            raise self._nonsense("an event of its stream has no end") from None
        except httpx.HTTPError as error:
            raise self._failure(error) from None

    def _event(self, data: bytes) -> dict[str, Any]:
        try:
            event = json.loads(data)
        except (ValueError, RecursionError):
            raise self._nonsense("an event of its stream is no JSON") from None
        if not isinstance(event, dict):
            raise self._nonsense("an event of its stream is no object")
        if error := event.get("error"):
            words = error.get("message") if isinstance(error, dict) else error
            raise UpstreamFailed(f"the upstream {self.name} broke off: {str(words)[:_LONGEST_WORDS]}")
        return event

    # When something is wrong

    async def _ask(self, client: httpx.AsyncClient, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            return await client.request(method, path, **options)
        except httpx.HTTPError as error:
            raise self._failure(error) from None

    def _failure(self, error: httpx.HTTPError) -> UpstreamFailed:
        if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)):
            words = str(error) or "no connection"
            return UpstreamFailed(f"the upstream {self.name} cannot be reached: {words}", is_down=True)
        if isinstance(error, httpx.TimeoutException):
            return UpstreamFailed(f"the upstream {self.name} says nothing", status=504, is_down=True)
        return UpstreamFailed(f"the upstream {self.name} hung up: {str(error) or type(error).__name__}", is_down=True)

    def _refusal(self, status: int, content: bytes, headers: Mapping[str, str]) -> Exception:
        """What an error response means for the caller."""
        error: Any = None
        with suppress(ValueError, RecursionError):
            told = json.loads(content)
            error = told.get("error", told) if isinstance(told, dict) else None
        fields = error if isinstance(error, dict) else {}
        words = str(fields.get("message") or error or content[:_LONGEST_WORDS].decode(errors="replace"))
        told = f"the upstream {self.name} says: {words[:_LONGEST_WORDS]}"
        if status in (429, 503):
            return UpstreamFailed(told, status=status)
        if status in (401, 403):
            return UpstreamFailed(f"the upstream {self.name} does not take our key ({status})", is_down=True)
        if 400 <= status < 500:
            code, param = fields.get("code"), fields.get("param")
            return UpstreamRefused(
                status, told, code if isinstance(code, str) else None, param if isinstance(param, str) else None
            )
        return UpstreamFailed(f"{told} ({status})")

    def _nonsense(self, words: str) -> UpstreamFailed:
        return UpstreamFailed(f"the upstream {self.name} speaks nonsense: {words}", elsewhere=True)

    # The connection

    @property
    def _client(self) -> httpx.AsyncClient:
        if self._kept is None:
            self._kept = self._connection()
        return self._kept

    def _connection(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        return httpx.AsyncClient(base_url=self.url, headers=self._headers, timeout=self._timeout, limits=limits)


async def _datas(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """What stands behind `data:` in each line of a stream. Raises `ValueError` where a line has no end."""
    held = b""
    async for chunk in chunks:
        *lines, held = (held + chunk).split(b"\n")
        if len(held) > _LONGEST_EVENT:
            raise ValueError
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()
    if held.startswith(b"data:"):
        yield held[5:].strip()


def _base_url(text: str) -> str:
    """The part of an upstream's URL in front of `/v1`."""
    no_url = UserError(f"--upstream {text!r} is no URL", "it looks like http://127.0.0.1:8001")
    try:
        parts = urlsplit(text)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise no_url
    except ValueError:  # a port of letters
        raise no_url from None
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError(
            f"--upstream {parts.scheme}://{parts.hostname}…: a URL with a name, a key or a query in it is not taken",
            "put the key into STILLHOUSE_UPSTREAM_KEY",
        )
    return text.rstrip("/").removesuffix("/v1").rstrip("/")


def choices_of(event: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The choices of a chunk; none where it has none, as the last one with the usage."""
    choices = event.get("choices")
    return [choice for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []


def _names(entry: Mapping[str, Any]) -> list[str]:
    names = entry.get("aliases")
    return [str(name) for name in names] if isinstance(names, list) else []


def _context(entry: Mapping[str, Any]) -> int | None:
    meta = entry.get("meta")
    meta = meta if isinstance(meta, dict) else {}
    for length in (entry.get("max_model_len"), meta.get("n_ctx"), meta.get("n_ctx_train")):
        if isinstance(length, int) and length > 0:
            return length
    return None


def _text(told: Mapping[str, Any], key: str) -> str:
    text = told.get(key)
    return text if isinstance(text, str) else ""


def _kind(response: httpx.Response) -> str:
    return response.headers.get("content-type", "something without a type").partition(";")[0][:80]
