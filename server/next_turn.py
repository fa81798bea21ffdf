"""Reading ahead: while the engine is idle it reads what the next turn's prompt will begin with.

Without its thoughts, a conversation parts from what is in the KV cache right after the user's last message; the answer
would have to be read again while the user is waiting. Knows nothing of how a reply is written down.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from ..backends.base import GenerationRequest
from ..r1.errors import BadPrompt
from ..r1.prompt import Prompt
from .model import ServedModel

log = logging.getLogger("stillhouse")


def read_ahead(model: ServedModel, render: Callable[[], Prompt], reply_id: str) -> None:
    """Have a conversation and its answer, as `render` gives them, read into the KV cache. Returns at once.

    Nobody waits for it. It is no task of the request's: clients hang up at `[DONE]`, and what hangs on the request ends
    with it.
    """
    asyncio.get_running_loop().run_in_executor(None, _read, model, render, reply_id)


def _read(model: ServedModel, render: Callable[[], Prompt], reply_id: str) -> None:
    try:
        prompt_ids = render().encode(model.vocabulary.encode, model.vocabulary.bos_id)
        if len(prompt_ids) < model.context_length:
            model.engine.read(GenerationRequest(f"{reply_id}-next", prompt_ids, max_tokens=0, idle=True))
    except BadPrompt:
        pass  # some templates want every conversation to end with the user
    except Exception:  # nobody hears of it otherwise
        log.exception("reading ahead failed")
