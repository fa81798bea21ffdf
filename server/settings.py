"""What a server is told when it starts. Flags, then environment variables `STILLHOUSE_…`, then these defaults."""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..backends.base import LoadOptions
from ..backends.open import BACKENDS
from ..r1.catalog import DEFAULT_MODEL
from ..r1.errors import UserError

UPSTREAM = "openai"  # the backend that is other servers
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True)
class Settings:
    """How a server listens, and whom it answers."""

    host: str = "127.0.0.1"
    port: int = 8000
    key_hashes: frozenset[bytes] = frozenset()  # SHA-256 of the API keys; empty = no key is asked for
    origins: tuple[str, ...] = ()  # web pages that may call, by their origin; "*" = any
    max_body: int = 8 * 1024 * 1024  # bytes
    parallel: int = 4  # requests that the backend takes at once
    max_waiting: int = 64  # requests that wait for a place; more are told to come back
    grace_s: float = 30.0  # that replies in progress get when the server is told to stop

    @property
    def local_only(self) -> bool:
        """Whether only this machine can connect."""
        return self.host in _LOOPBACK


def add_model_flags(parser: argparse.ArgumentParser, *, positional: bool = True) -> None:
    """The flags that say which model, and how it is loaded."""
    default = _environment("MODEL")
    words = (
        "catalogue name, GGUF file, checkpoint folder, hub id (org/repo[:quantization]) or `echo`; "
        f"default {DEFAULT_MODEL}"
    )
    if positional:
        parser.add_argument("model", nargs="?", default=default, help=words)
    else:
        parser.add_argument("--model", default=default, help=words)
    group = parser.add_argument_group("model")
    flag(
        group,
        "--backend",
        type=one_of("auto", *BACKENDS, UPSTREAM),
        default="auto",
        metavar="NAME",
        help="auto, llama.cpp, pytorch, mlx, or openai: upstreams serve it; auto goes by the files, the machine and "
        "what is installed",
    )
    flag(
        group,
        "--context",
        type=positive,
        metavar="TOKENS",
        help="prompt and reply together; default: what fits, up to 32768",
    )
    flag(group, "--parallel", type=places, default=4, metavar="N", help="replies in progress at once (default 4)")
    flag(group, "--cache-tokens", type=positive, metavar="TOKENS", help="KV cache of all requests together")
    flag(
        group,
        "--kv-type",
        default="f16",
        metavar="TYPE",
        help="f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0 or iq4_nl (default f16)",
    )
    flag(
        group,
        "--threads",
        type=positive,
        metavar="N",
        help="compute threads; default: OMP_NUM_THREADS, or else the physical cores",
    )
    flag(group, "--gpu-layers", type=_layers, metavar="N", help="layers on the GPU; auto: all where there is one")
    flag(
        group,
        "--flash-attention",
        type=one_of("auto", "on", "off"),
        default="auto",
        metavar="auto|on|off",
        help="default auto",
    )
    flag(
        group,
        "--batch-tokens",
        type=positive,
        default=512,
        metavar="N",
        help="tokens a step decodes at most (default 512)",
    )
    group.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[=SCALE]",
        help="an adapter of the backend's kind; may be repeated",
    )
    flag(
        group,
        "--dtype",
        type=one_of("auto", "f32", "bf16", "f16"),
        default="auto",
        metavar="TYPE",
        help="what PyTorch computes in: auto, f32, bf16 or f16",
    )
    group.add_argument(
        "--trust-remote-code", action="store_true", help="run the Python files that come with a checkpoint"
    )
    group.add_argument(
        "--allow-pickle", action="store_true", help="load weights from files that can hold programs (PyTorch's .bin)"
    )
    flag(group, "--chat-template", metavar="FILE", help="a Jinja chat template instead of the model's own")
    flag(group, "--alias", metavar="NAME", help="serve the model under this name")


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say how the server listens."""
    group = parser.add_argument_group("server")
    flag(group, "--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine only)")
    flag(group, "--port", type=port_number, default=8000, help="default 8000")
    flag(group, "--api-key-file", metavar="FILE", help="one key a line; requests must carry one of them")
    group.add_argument(
        "--cors", action="append", default=[], metavar="ORIGIN", help="a web page's origin that may call, or *"
    )
    flag(group, "--max-body", type=positive, default=8, metavar="MB", help="largest request (default 8)")
    flag(group, "--max-waiting", type=_count, default=64, metavar="N", help="requests that may wait (default 64)")
    flag(
        group,
        "--grace",
        type=seconds,
        default=30.0,
        metavar="SECONDS",
        help="for replies in progress at shutdown (default 30)",
    )


def add_upstream_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of a server whose model others serve."""
    group = parser.add_argument_group("upstreams (--backend openai)")
    group.add_argument(
        "--upstream", action="append", default=[], metavar="URL", help="an OpenAI-compatible server; may be repeated"
    )
    flag(group, "--upstream-key-file", metavar="FILE", help="the key that upstreams are asked with")
    flag(
        group,
        "--upstream-timeout",
        type=seconds,
        default=300.0,
        metavar="SECONDS",
        help="an upstream that is silent for so long has failed (default 300)",
    )


def model(arguments: argparse.Namespace) -> str:
    """The model that is named, or the default."""
    return arguments.model or DEFAULT_MODEL


def upstreams(arguments: argparse.Namespace) -> tuple[str, ...]:
    """The upstreams' URLs; none where the model is loaded here. Raises `UserError` where the flags contradict."""
    if arguments.backend != UPSTREAM:
        if arguments.upstream:
            raise UserError("--upstream is for models that others serve", "add --backend openai")
        return ()
    if not arguments.upstream:
        raise UserError("--backend openai needs a server to ask", "--upstream http://127.0.0.1:8001")
    for flag in ("context", "cache_tokens", "lora", "chat_template"):
        if getattr(arguments, flag):
            name = f"--{flag.replace('_', '-')}"
            raise UserError(f"{name} says how a model is loaded; an upstream has loaded its own", f"leave {name} out")
    return tuple(arguments.upstream)


def upstream_key(arguments: argparse.Namespace) -> str | None:
    """The key that upstreams are asked with."""
    if arguments.upstream_key_file is None:
        return _environment("UPSTREAM_KEY")
    keys = _lines(arguments.upstream_key_file, "upstream key file")
    if len(keys) != 1 or not keys[0].isascii():
        raise UserError(f"the upstream key file {arguments.upstream_key_file} holds {len(keys)} keys", "it holds one")
    return keys[0]


def load_options(arguments: argparse.Namespace) -> LoadOptions:
    """The backends' options from the command line."""
    return LoadOptions(
        context=arguments.context,
        parallel=arguments.parallel,
        cache_tokens=arguments.cache_tokens,
        kv_type=arguments.kv_type,
        threads=arguments.threads,
        gpu_layers=None if arguments.gpu_layers in (None, "auto") else arguments.gpu_layers,
        flash_attention={"auto": None, "on": True, "off": False}[arguments.flash_attention],
        batch_tokens=max(arguments.batch_tokens, arguments.parallel),
        loras=tuple(_lora(text) for text in arguments.lora),
        backend=arguments.backend,
        dtype=arguments.dtype,
        trust_remote_code=arguments.trust_remote_code,
        allow_pickle=arguments.allow_pickle,
    )


def settings(arguments: argparse.Namespace) -> Settings:
    """The server's settings from the command line."""
    return Settings(
        host=arguments.host,
        port=arguments.port,
        key_hashes=_keys(arguments.api_key_file),
        origins=tuple(arguments.cors),
        max_body=arguments.max_body * 1024 * 1024,
        parallel=arguments.parallel,
        max_waiting=arguments.max_waiting,
        grace_s=arguments.grace,
    )


def warn_of_strangers(settings: Settings) -> None:
    """Say on stderr where everybody would be answered."""
    if not settings.local_only and not settings.key_hashes:
        print(
            f"warning: anyone who can reach {settings.host} can use this server; --api-key-file asks for a key",
            file=sys.stderr,
        )


def chat_template(arguments: argparse.Namespace) -> str | None:
    """The template of `--chat-template`."""
    return None if arguments.chat_template is None else _read(arguments.chat_template, "chat template")


def key_hash(key: str) -> bytes:
    """What is kept of an API key, and compared in constant time."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def _keys(path: str | None) -> frozenset[bytes]:
    keys = [key] if (key := _environment("API_KEY")) else []
    if path is not None:
        keys += _lines(path, "API key file")
    return frozenset(map(key_hash, keys))


def _lines(path: str, what: str) -> list[str]:
    lines = (line.strip() for line in _read(path, what).splitlines())
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise UserError(f"the {what} {path} holds no key", "put one key on each line")
    return found


def _read(path: str, what: str) -> str:
    try:
        return Path(path).expanduser().read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the {what} {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _lora(text: str) -> tuple[Path, float]:
    path, _, scale = text.rpartition("=") if "=" in text and not Path(text).exists() else (text, "", "1")
    try:
        return Path(path).expanduser(), float(scale)
    except ValueError:
        raise UserError(f"--lora {text}: {scale!r} is not a number", "write FILE=0.5") from None


def flag(group: argparse._ArgumentGroup, name: str, **options: object) -> None:
    """A flag whose default may come from the environment: `--kv-type` from STILLHOUSE_KV_TYPE."""
    value = _environment(name.removeprefix("--").replace("-", "_").upper())
    if value is not None:
        options["default"] = value  # argparse converts and checks a default that is text
    group.add_argument(name, **options)  # type: ignore[arg-type]


def _environment(name: str) -> str | None:
    return os.environ.get(f"STILLHOUSE_{name}") or None


def positive(text: str) -> int:
    """A flag's number from 1."""
    return _whole(text, 1, 2**31 - 1)


def _count(text: str) -> int:
    return _whole(text, 0, 1_000_000)


def places(text: str) -> int:
    """How many replies may be in progress at once."""
    return _whole(text, 1, 192)


def port_number(text: str) -> int:
    """A port; 0 = any that is free."""
    return _whole(text, 0, 65535)


def _layers(text: str) -> int | str:
    return text if text == "auto" else _whole(text, 0, 10_000)


def one_of(*names: str) -> Callable[[str], str]:
    """argparse checks `choices` for flags, and not for the environment; a type is checked for both."""

    def check(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is not {', '.join(names[:-1])} or {names[-1]}")
        return text

    return check


def seconds(text: str) -> float:
    """How long something may take, a day at most."""
    try:
        given = float(text)
    except ValueError:
        given = -1.0
    if not 0 <= given <= 86_400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 to 86400")
    return given


def _whole(text: str, least: int, most: int) -> int:
    if not text.strip().isdecimal() or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
    return int(text)
