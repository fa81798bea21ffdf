"""`stillhouse serve` and `stillhouse chat`."""

from __future__ import annotations

import argparse
import sys

from ..r1.flags import Flags
from . import settings as flags

_SERVE_EXAMPLES = """examples:
  stillhouse serve                                    the embedded small model, on 127.0.0.1:8000
  stillhouse serve deepseek-r1:1.5b                   from the catalogue; downloaded at the first time
  stillhouse serve ./model.gguf --context 16384 --parallel 8 --kv-type q8_0
  stillhouse serve deepseek-r1:7b --host 0.0.0.0 --api-key-file keys.txt

A flag that is given once can also be set in the environment: --kv-type as STILLHOUSE_KV_TYPE."""

_CHAT_EXAMPLES = """examples:
  stillhouse chat "What is 17 * 23?"                  one answer on stdout, its thoughts dim on stderr
  stillhouse chat --model deepseek-r1:1.5b            a conversation; /help tells what it understands
  cat notes.txt | stillhouse chat "Summarise this" > summary.txt"""


def run(command: str, argv: list[str]) -> int:
    """Run one of the two commands; the exit code."""
    return {"serve": _serve, "chat": _chat}[command](argv)


def _serve(argv: list[str]) -> int:
    parser = Flags(
        prog="stillhouse serve",
        description="Serve a model to OpenAI clients.",
        epilog=_SERVE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags.add_model_flags(parser)
    flags.add_server_flags(parser)
    arguments = parser.parse_args(argv)
    settings, options, template = (
        flags.settings(arguments),
        flags.load_options(arguments),
        flags.chat_template(arguments),
    )
    # Slow to import, and the flags are known to be good by now.
    from .model import ServedModel, load
    from .process import serve

    if not settings.local_only and not settings.key_hashes:
        print(
            f"warning: anyone who can reach {settings.host} can use this server; --api-key-file asks for a key",
            file=sys.stderr,
        )

    def announce(model: ServedModel, url: str) -> None:
        backend = model.engine.backend
        size = backend.load().cache_size
        print(
            f"{model.name} ({model.source}) on {backend.name}: {model.context_length} tokens of context, "
            f"{options.parallel} replies at once, {size} tokens of KV cache\n"
            f"ready: {url}/v1 for OpenAI clients; {url}/ in a browser",
            file=sys.stderr,
            flush=True,
        )

    print(f"loading {arguments.model} …", file=sys.stderr, flush=True)
    return serve(
        settings,
        lambda: load(arguments.model, options, alias=arguments.alias, chat_template=template),
        announce,
    )


def _chat(argv: list[str]) -> int:
    parser = Flags(
        prog="stillhouse chat",
        description="Talk to a model in the terminal.",
        epilog=_CHAT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("question", nargs="*", help="ask this and end; without it, a conversation")
    parser.add_argument("--system", metavar="TEXT", help="a system message")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="longest reply, thoughts included")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 = always the likeliest token")
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed, the same reply")
    parser.add_argument("--hide-thoughts", action="store_true", help="show the answer only")
    flags.add_model_flags(parser, positional=False)
    arguments = parser.parse_args(argv)
    from .terminal import chat

    return chat(arguments, flags.load_options(arguments), flags.chat_template(arguments))
