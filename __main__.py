"""The command line: a table of sub-commands, each in its floor's `cli`, imported only when asked for."""

from __future__ import annotations

import importlib
import os
import sys

from . import __version__
from .r1.errors import UserError

COMMANDS = {  # name -> (module, what it does)
    "serve": ("server.cli", "serve a model to OpenAI clients"),
    "chat": ("server.cli", "talk to a model in the terminal"),
    "cluster": ("server.cluster_cli", "serve a model over several Macs; plan and examine them first"),
    "conformance": ("server.conformance.cli", "try how a server treats a model's thoughts, case by case"),
    "quantize": ("quantize.cli", "turn a 16-bit checkpoint into 4-bit files, in one pass"),
    "calibrate": ("quantize.cli", "let a model write its own calibration text"),
    "measure": ("quantize.cli", "measure what a quantized file lost"),
    "verify": ("quantize.cli", "check a quantized file: structure, tokenizer, template, errors"),
    "train": ("train.cli", "sharpen a model: supervised fine-tuning and reinforcement learning"),
    "pull": ("r1.cli", "download a model from the Hugging Face hub"),
    "list": ("r1.cli", "list the models on this disk"),
    "show": ("r1.cli", "show what a model is, and the memory it takes"),
    "rm": ("r1.cli", "delete a downloaded model"),
}

HELP = f"""Stillhouse {__version__}: run, shrink and sharpen R1-distilled models on your own machine.

usage: stillhouse COMMAND [--help] ...

{chr(10).join(f"  {name:<11} {words}" for name, (_, words) in COMMANDS.items())}

start:  stillhouse serve                      the embedded small model, on 127.0.0.1:8000
        stillhouse serve deepseek-r1:1.5b     the smallest R1 distill (1.1 GB, downloaded once)
"""


def main(argv: list[str] | None = None) -> int:
    """Run one sub-command; the exit code: 0 well, 2 or more for what the message tells, 130 stopped by Ctrl-C."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"stillhouse {__version__}")
        return 0
    command, *rest = arguments
    try:
        if command not in COMMANDS:
            raise UserError(f"there is no command {command!r}", f"one of {', '.join(COMMANDS)}")
        module = importlib.import_module(f"{__package__}.{COMMANDS[command][0]}")
        return module.run(command, rest)
    except UserError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `stillhouse list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
