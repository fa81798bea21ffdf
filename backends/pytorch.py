"""Safetensors, GGUF and live modules through PyTorch, with continuous batching. Knows nothing of HTTP or `<think>`.

One forward pass a step carries the next token of every running reply and a chunk of the prompts that are still being
read; then the next tokens are drawn, all of them together, on the device. As in the llama.cpp backend, a prompt and a
forced run of tokens are the same thing: tokens that are known and not yet decoded (`todo`).
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .base import BackendFailed, Force, Forget, GenerationRequest, Load, Only, Token, Vocabulary
from .draft import Draft
from .kvcache import CachedSequence, token_array
from .line import Line
from .pace import Pace
from .pytorch_cache import TorchCache
from .pytorch_decoder import Batch, Chunk, Decoder, Rows
from .pytorch_graphs import Graphs
from .pytorch_sampler import Memory, Sampler
from .rowsampler import Breakers

_CELLS = 64  # attention looks at whole multiples of so many cells: its kernels are compiled for a shape, once
_WASTE = 2.0  # neighbours are attended to together if that looks at no more than so many times their own cells


class _Running:
    """A reply in progress and its place in the KV cache."""

    __slots__ = ("draft", "memory", "sequence", "todo")

    def __init__(self, draft: Draft, memory: Memory) -> None:
        self.draft = draft
        self.memory = memory
        self.sequence: CachedSequence | None = None  # None while it waits
        self.todo: array[int] = token_array(draft.request.prompt_ids)  # known and not yet decoded

    @property
    def known(self) -> array[int]:
        """Every token that is known: decoded and to be decoded."""
        return self.sequence.tokens + self.todo if self.sequence else self.todo

    @property
    def place(self) -> CachedSequence:
        """Where it runs."""
        assert self.sequence is not None
        return self.sequence


class PyTorch:
    """A module in memory. Not thread-safe, but for `vocabulary` and `load`."""

    name = "pytorch"

    def __init__(
        self,
        module: nn.Module,
        vocabulary: Vocabulary,
        *,
        context: int = 2048,
        parallel: int = 4,
        batch_tokens: int = 512,
        own: bool = False,
        steady: bool = False,
    ) -> None:
        """Run a transformers `*ForCausalLM`, with or without adapters; it stays the caller's.

        While nothing is asked of it the module may be trained: prefixes that were read with other weights are not
        used again. `own`: nobody else uses the module, and it may be rearranged. `steady`: how prompts are cut does not
        depend on the machine's speed, and no prefix is kept beside the cache. Raises `BadModelFile`.
        """
        self._module = module
        self._decoder = Decoder(module, own=own)
        self.vocabulary = vocabulary
        self.context_length = context
        self._sampler = Sampler(Breakers(vocabulary))
        self._parameters = [] if own else list(module.parameters())
        self._version = -1
        with torch.inference_mode():
            # One cell more than a context has: a CUDA graph writes rows that decode nothing somewhere.
            self._cells = -(-(context + 1) // _CELLS) * _CELLS
            self._decoder.prepare(self._cells)
            tensors = self._decoder.new_cache(parallel, self._cells)
        self._cache = TorchCache(tensors, context, stored_bytes=0 if steady else None)
        self._graphs = Graphs(self._decoder, tensors) if own and self._decoder.device.type == "cuda" else None
        self._batch_tokens = max(batch_tokens, parallel + 1)
        self._pace = Pace(batch_tokens, steady=steady)
        self._line: Line[_Running] = Line(parallel)

    # The contract

    def add(self, request: GenerationRequest) -> None:
        """Queue a request. Raises `PromptTooLong`."""
        draft = Draft(request, self.vocabulary, self.context_length)
        self._line.add(_Running(draft, Memory(request, self.vocabulary.end_ids)))

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """One forward pass, and one drawn token for every reply that has nothing left to decode."""
        self._admit()
        counts = self._fill()
        if not counts:
            return []
        try:
            drawing, logits = self._decode(counts)
        except (RuntimeError, MemoryError) as error:
            self._fail(error)
        try:
            return self._draw(drawing, logits) if drawing else []
        except torch.OutOfMemoryError as error:
            self._fail(error)

    def cancel(self, request_id: str) -> None:
        """Forget a request. What is decoded of it stays in the cache for the next one."""
        reply = self._line.find(request_id)
        if reply is not None:
            self._line.leave(reply)
            self._vacate(reply)

    def load(self) -> Load:
        """How busy it is now."""
        return Load(len(self._line.running), len(self._line.waiting), self._cache.used, self._cache.cells)

    def forget(self) -> None:
        """Forget the prefixes of replies that have ended, so that the next ones are computed anew."""
        self._cache.forget()

    def close(self) -> None:
        """Let go of the cache, and of the module."""
        self._give_up()
        self._cache.close()
        del self._graphs, self._decoder, self._module, self._parameters

    # A step, phase by phase

    def _admit(self) -> None:
        """Give waiting requests a place, in order, each starting from the longest prefix that is there."""
        line = self._line
        for reply in line.park():  # what it has decoded stays in the cache, where it will find it again
            self._vacate(reply)
        if (line.waiting or line.idle) and not line.running:
            self._look_at_weights()
        line.admit(self._cache.found, self._begin)

    def _begin(self, reply: _Running) -> bool:
        sequence = self._cache.begin(reply.todo)
        assert sequence is not None  # there are as many places as may run
        reply.sequence, reply.todo = sequence, reply.todo[sequence.length :]
        reply.draft.start(sequence.length)
        return True

    def _look_at_weights(self) -> None:
        """Forget what was read with other weights: every in-place change of a parameter counts its version up."""
        version = sum(parameter._version for parameter in self._parameters)
        if version != self._version:
            self._cache.forget()
        self._version = version

    def _fill(self) -> dict[_Running, int]:
        """How many known tokens of which reply this step decodes: single ones first, each kind by place."""
        shares = self._line.shares(self._batch_tokens, self._pace)
        singles = sorted((reply for reply, size in shares.items() if size == 1), key=lambda reply: reply.place.id)
        return dict.fromkeys(singles, 1) | {reply: size for reply, size in shares.items() if size > 1}

    def _decode(self, counts: dict[_Running, int]) -> tuple[list[_Running], Tensor]:
        """Run the batch. Gives the replies whose next token can be drawn, and their logits, (R, vocabulary)."""
        started = time.perf_counter()
        drawing = [reply for reply, count in counts.items() if count == len(reply.todo)]
        if self._graphs is not None and drawing and all(count == 1 for count in counts.values()):
            ids = [reply.todo[0] for reply in counts]
            positions = [reply.place.length for reply in counts]
            logits = self._graphs.decode(ids, positions, [reply.place.id for reply in counts])
            if len(drawing) < len(counts):
                logits = logits[[row for row, reply in enumerate(counts) if len(reply.todo) == 1]]
        else:
            logits = self._decoder(self._batch(counts), self._cache.tensors)
        logits = logits.float()
        for reply, count in counts.items():
            reply.place.tokens.extend(reply.todo[:count])
            reply.todo = reply.todo[count:]
        tokens = sum(counts.values())
        if tokens > len(counts) and self._decoder.device.type != "cpu":
            logits[:1, :1].cpu()  # another device is still at it; how long a prompt takes is worth the wait
        self._pace.note(tokens, time.perf_counter() - started)
        return drawing, logits

    def _batch(self, counts: dict[_Running, int]) -> Batch:
        ids = token_array(())
        spans: list[NDArray[np.int64]] = []
        wanted: list[int] = []
        singles: list[tuple[int, int]] = []  # place, position
        chunks: list[Chunk] = []
        for reply, count in counts.items():
            place, start = reply.place.id, reply.place.length
            ids.extend(reply.todo[:count])
            spans.append(np.stack((np.arange(start, start + count), np.full(count, place))))
            if count == 1:
                singles.append((place, start))
            else:
                chunks.append(Chunk(place, start, count))
            if count == len(reply.todo):
                wanted.append(len(ids) - 1)
        numbers = np.concatenate((np.array(ids, np.int64)[None], np.concatenate(spans, axis=1)))
        device = self._decoder.device
        tokens, positions, places = torch.from_numpy(numbers).to(device)
        rows = [self._rows(run, device) for run in _runs(singles)]
        return Batch(tokens, positions, places, rows, chunks, torch.tensor(wanted, dtype=torch.int64).to(device))

    def _rows(self, run: Sequence[tuple[int, int]], device: torch.device) -> Rows:
        """Neighbours that are attended to together."""
        positions = [position for _, position in run]
        longest = min(self._cells, -(-(max(positions) + 1) // _CELLS) * _CELLS)
        mask = torch.arange(longest, device=device) <= torch.tensor(positions).to(device)[:, None]
        return Rows(run[0][0], len(run), longest, mask[:, None, None])

    def _draw(self, drawing: Sequence[_Running], logits: Tensor) -> list[Token]:
        """Draw the next token of each reply, or take those its steer forces."""
        rows = {reply: row for row, reply in enumerate(drawing)}
        given: dict[_Running, list[Token]] = {}
        pending = [reply for reply in self._line.running if reply in rows]  # in the order they came
        while pending:
            masks: dict[_Running, NDArray[np.uint32] | None] = {}
            for reply in pending:
                tokens = self._ask(reply, logits[rows[reply]], masks)
                if tokens:
                    given[reply] = tokens
            asking = list(masks)
            if not asking:
                break
            index = [rows[reply] for reply in asking]
            drawn = self._sampler.draw(
                logits if index == list(range(len(logits))) else logits[index],
                [reply.memory for reply in asking],
                list(masks.values()),
                [reply.draft.request.top_logprobs for reply in asking],
            )
            if drawn is None:
                self._give_up()
                reason = "the model's logits are not numbers: the file is damaged, or its type overflows here"
                raise BackendFailed(reason, "f16 overflows where bf16 and f32 do not: --dtype bf16")
            pending = []
            for reply, (token_id, told) in zip(asking, drawn, strict=True):
                token = reply.draft.take(token_id, told=told)
                if token is None:  # the steer overruled the end: it is asked again
                    pending.append(reply)
                else:
                    self._note(reply, token)
                    given[reply] = [token]
        tokens = [token for reply in self._line.running for token in given.get(reply, ())]
        for reply, last in given.items():
            if last[-1].finish:
                self._line.leave(reply)
                self._vacate(reply)
        return tokens

    def _ask(
        self, reply: _Running, logits: Tensor, masks: dict[_Running, NDArray[np.uint32] | None]
    ) -> list[Token] | None:
        """Ask a reply's steer: tokens that it forces, or an entry in `masks` for what may be drawn."""
        draft = reply.draft
        if draft.request.max_tokens == 0:
            return [draft.read()]
        while True:
            wish = draft.wish(lambda: logits.cpu().numpy().copy())
            if isinstance(wish, Force):
                forced = draft.force(wish.token_ids)
                for token in forced:
                    self._note(reply, token)
                if forced:
                    return forced
            elif isinstance(wish, Forget):
                reply.memory.forget()
            else:
                masks[reply] = wish.bits if isinstance(wish, Only) else None
                return None

    def _note(self, reply: _Running, token: Token) -> None:
        reply.memory.accept(token.token_id)
        reply.todo.append(token.token_id)

    def _vacate(self, reply: _Running) -> None:
        """Take a reply's place from it; its tokens stay in the cache for the next prompt that begins with them."""
        sequence, reply.sequence = reply.sequence, None
        if sequence is not None:
            self._cache.end(sequence)

    def _fail(self, error: BaseException) -> NoReturn:
        self._give_up()
        reason = str(error).strip().split("\n", 1)[0][:200]
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "alloc" in reason:
            hint = "lower --parallel or --context, or choose a smaller model or quantization"
            raise BackendFailed(f"out of memory: {reason}", hint) from None
        raise BackendFailed(f"the forward pass failed: {reason}") from error

    def _give_up(self) -> None:
        """Give up every request: after a failed step the cache cannot be trusted."""
        self._line.clear()
        self._cache.clear()
        if self._decoder.device.type == "cuda":
            torch.cuda.empty_cache()


def _runs(singles: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Neighbours of much the same length, from (place, position) in the order of their places.

    >>> _runs([(0, 10), (1, 12), (3, 9), (4, 5000)])
    [[(0, 10), (1, 12)], [(3, 9)], [(4, 5000)]]
    """
    runs: list[list[tuple[int, int]]] = []
    for place, position in singles:
        if runs and runs[-1][-1][0] == place - 1:
            cells = [max(other, _CELLS) for _, other in (*runs[-1], (place, position))]
            if max(cells) * len(cells) <= _WASTE * sum(cells):
                runs[-1].append((place, position))
                continue
        runs.append([(place, position)])
    return runs
