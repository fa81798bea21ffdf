"""`stillhouse serve` and `stillhouse chat`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from ..r1.errors import UserError
from ..r1.flags import flags_of
from . import settings as flags

_SERVE_EXAMPLES = """examples:
  stillhouse serve                                    the embedded small model, on 127.0.0.1:8000
  stillhouse serve deepseek-r1:1.5b                   from the catalogue; downloaded at the first time
  stillhouse serve ./model.gguf --context 16384 --parallel 8 --kv-type q8_0
  stillhouse serve deepseek-r1:7b --host 0.0.0.0 --api-key-file keys.txt
  stillhouse serve --backend openai --upstream http://127.0.0.1:8001 --upstream http://10.0.0.2:8001

A flag that is given once can also be set in the environment: --kv-type as STILLHOUSE_KV_TYPE."""

_CHAT_EXAMPLES = """examples:
  stillhouse chat "What is 17 * 23?"                  one answer on stdout, its thoughts dim on stderr
  stillhouse chat --model deepseek-r1:1.5b            a conversation; /help tells what it understands
  cat notes.txt | stillhouse chat "Summarise this" > summary.txt"""


def run(command: str, argv: list[str]) -> int:
    """Run one of the two commands; the exit code."""
    return {"serve": _serve, "chat": _chat}[command](argv)


def _serve(argv: list[str]) -> int:
    parser = flags_of("serve", "Serve a model to OpenAI clients.", _SERVE_EXAMPLES)
    flags.add_model_flags(parser)
    flags.add_server_flags(parser)
    flags.add_upstream_flags(parser)
    arguments = parser.parse_args(argv)
    settings, options, template, urls = (
        flags.settings(arguments),
        flags.load_options(arguments),
        flags.chat_template(arguments),
        flags.upstreams(arguments),
    )
    if urls:
        return _serve_upstreams(arguments, settings, urls)
    name = flags.model(arguments)
    # Slow to import, and the flags are known to be good by now.
    from .model import ServedModel, load
    from .process import serve

    flags.warn_of_strangers(settings)

    def announce(model: ServedModel, url: str) -> None:
        backend = model.engine.backend
        size = backend.load().cache_size
        why = f" ({model.reason})" if model.reason else ""
        print(
            f"{model.name} ({model.source}) on {backend.name}{why}: {model.context_length} tokens of context, "
            f"{options.parallel} replies at once, {size} tokens of KV cache\n"
            f"ready: {url}/v1 for OpenAI clients; {url}/ in a browser",
            file=sys.stderr,
            flush=True,
        )

    print(f"loading {name} …", file=sys.stderr, flush=True)
    return serve(settings, lambda: load(name, options, alias=arguments.alias, chat_template=template), announce)


def _serve_upstreams(arguments: argparse.Namespace, settings: flags.Settings, urls: tuple[str, ...]) -> int:
    key = flags.upstream_key(arguments)
    from .process import serve
    from .upstream_model import UpstreamModel, connect

    flags.warn_of_strangers(settings)
    settings = replace(settings, parallel=settings.parallel * len(urls))

    def load() -> UpstreamModel:
        model, troubles = connect(
            arguments.model,
            urls,
            key=key,
            parallel=arguments.parallel,
            silence_s=arguments.upstream_timeout,
            alias=arguments.alias,
        )
        for trouble in troubles:
            print(f"warning: {trouble}; it is asked again every few seconds", file=sys.stderr)
        return model

    def announce(model: UpstreamModel, url: str) -> None:
        context = model.context_length
        print(
            f"{model.name} ({model.source}) through OpenAI's protocol: "
            f"{'an unknown context' if context is None else f'{context} tokens of context'}, "
            f"{settings.parallel} replies at once\n"
            f"ready: {url}/v1 for OpenAI clients; {url}/ in a browser",
            file=sys.stderr,
            flush=True,
        )

    print(f"asking {len(urls)} upstream{'s' * (len(urls) > 1)} …", file=sys.stderr, flush=True)
    return serve(settings, load, announce)


def _chat(argv: list[str]) -> int:
    parser = flags_of("chat", "Talk to a model in the terminal.", _CHAT_EXAMPLES)
    parser.add_argument("question", nargs="*", help="ask this and end; without it, a conversation")
    parser.add_argument("--system", metavar="TEXT", help="a system message")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="longest reply, thoughts included")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 = always the likeliest token")
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed, the same reply")
    parser.add_argument("--hide-thoughts", action="store_true", help="show the answer only")
    flags.add_model_flags(parser, positional=False)
    arguments = parser.parse_args(argv)
    if arguments.backend == "openai":
        raise UserError("`stillhouse chat` loads a model itself; upstreams are for servers", "stillhouse serve")
    from .terminal import chat

    return chat(arguments, flags.load_options(arguments), flags.chat_template(arguments))
