"""GGUF models through llama.cpp's C interface, with continuous batching. Knows nothing of HTTP, roles or `<think>`.

One `llama_decode` a step carries the next token of every running reply and a chunk of the prompts that are still being
read. A prompt, a forced run of tokens and a reply that lost its place in the cache are all the same thing here: tokens
that are known and not yet decoded (`todo`). When they are done, the next one is drawn.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# llama-cpp-python's stubs make every handle optional and every integer a C type.

from __future__ import annotations

import ctypes
import time
from array import array
from pathlib import Path

import llama_cpp as C
import numpy as np
from numpy.typing import NDArray

from ..r1.errors import BadModelFile
from ..r1.gguf import Header
from .base import BackendFailed, Force, Forget, GenerationRequest, Load, LoadOptions, Only, Token
from .draft import Draft
from .kvcache import CachedSequence, token_array
from .line import Line
from .llamacpp_batch import Batch
from .llamacpp_cache import LlamaCache
from .llamacpp_load import fit, last_words, load_adapter, load_model, make_context, silence
from .llamacpp_sampler import LlamaSampler, Shortlist
from .llamacpp_vocabulary import LlamaVocabulary
from .pace import Pace
from .sampling import log_softmax, mask_to

_RETAINED = 64  # sequences that a pooled cache keeps for their prefix, besides the running ones
_MOST_SEQUENCES = 256  # LLAMA_MAX_SEQ


class _Running:
    """A reply in progress and its place in the KV cache."""

    __slots__ = ("draft", "sampler", "sequence", "todo")

    def __init__(self, draft: Draft, sampler: LlamaSampler) -> None:
        self.draft = draft
        self.sampler = sampler
        self.sequence: CachedSequence | None = None  # None while it waits
        self.todo: array[int] = token_array(draft.request.prompt_ids)  # known and not yet decoded

    @property
    def known(self) -> array[int]:
        """Every token that is known: decoded and to be decoded."""
        return self.sequence.tokens + self.todo if self.sequence else self.todo


class LlamaCpp:
    """A GGUF model in memory. Not thread-safe, but for `vocabulary` and `load`."""

    name = "llama.cpp"

    def __init__(self, paths: tuple[Path, ...], header: Header, options: LoadOptions) -> None:
        silence()
        fitted = fit(header, sum(path.stat().st_size for path in paths), options)
        self.context_length = fitted.context
        self._model = load_model(paths, options)
        self._adapters = [load_adapter(self._model, path) for path, _ in options.loras]
        most = options.parallel if fitted.partitioned else options.parallel + _RETAINED
        sequences = min(_MOST_SEQUENCES, most)
        self._context = make_context(self._model, options, fitted, sequences)
        self._apply(self._adapters, [scale for _, scale in options.loras])
        self.vocabulary = LlamaVocabulary(self._model)
        self._shortlist = Shortlist(self.vocabulary.size)
        self._cache = LlamaCache(
            self._context,
            self._model,
            sequences,
            fitted.cache_tokens,
            partitioned=fitted.partitioned,
            stored_bytes=options.stored_bytes,
        )
        self._batch = Batch(options.batch_tokens)
        self._pace = Pace(options.batch_tokens, steady=options.steady)
        self._line: Line[_Running] = Line(options.parallel)

    # The contract

    def add(self, request: GenerationRequest) -> None:
        """Queue a request. Raises `PromptTooLong`."""
        draft = Draft(request, self.vocabulary, self.context_length)
        self._line.add(_Running(draft, LlamaSampler(self.vocabulary, request, self._shortlist)))

    def step(self) -> list[Token]:
        """One `llama_decode` and one drawn token for every reply that has nothing left to decode."""
        while True:
            self._admit()
            drawing = self._fill()
            if not self._batch.tokens:
                return []
            if self._decode():
                break
        tokens: list[Token] = []
        if drawing:
            address = C.llama_get_logits(self._context)
            logits = np.ctypeslib.as_array(address, (len(drawing), self.vocabulary.size))
            if not np.isfinite(logits[:, 0]).all():
                self._fail("the model's logits are not numbers: the file is damaged, or its type overflows here")
            rows = {reply: row for row, reply in enumerate(drawing)}
            for reply in [reply for reply in self._line.running if reply in rows]:  # in the order they came
                self._draw(reply, rows[reply], logits[rows[reply]], tokens)
        return tokens

    def cancel(self, request_id: str) -> None:
        """Forget a request. What is decoded of it stays in the cache for the next one."""
        reply = self._line.find(request_id)
        if reply is not None:
            self._release(reply)

    def load(self) -> Load:
        """How busy it is now."""
        return Load(len(self._line.running), len(self._line.waiting), self._cache.used, self._cache.cells)

    def set_adapter(self, path: Path | None, scale: float = 1.0) -> None:
        """Have another LoRA adapter, or none, in place of those there are, and forget what was computed with them.

        Raises `BadModelFile`, with the old ones still in place, and `BackendFailed` while replies are in progress.
        """
        if self._line.running or self._line.waiting:
            raise BackendFailed("an adapter cannot be changed under replies in progress")
        adapters = [load_adapter(self._model, path)] if path else []
        self._apply(adapters, [scale])
        for adapter in self._adapters:
            C.llama_adapter_lora_free(adapter)
        self._adapters = adapters
        self._forget_all()
        self._cache.clear()

    def _apply(self, adapters: list[C.llama_adapter_lora_p], scales: list[float]) -> None:
        count = len(adapters)
        pointers = (C.llama_adapter_lora_p_ctypes * count)(*adapters)
        if C.llama_set_adapters_lora(self._context, pointers, count, (ctypes.c_float * count)(*scales[:count])):
            raise BadModelFile("the LoRA adapters could not be applied", "they must be made for this very model")

    def close(self) -> None:
        """Free the context and the model."""
        self._forget_all()
        C.llama_free(self._context)
        C.llama_model_free(self._model)

    # A step, phase by phase

    def _admit(self) -> None:
        """Give waiting requests a sequence, in order, each starting from the longest prefix that is in the cache."""
        for reply in self._line.park():  # what it has decoded stays in the cache, where it will find it again
            self._vacate(reply)
        self._line.admit(self._cache.found if self._cache.reuses else len, self._begin)
        self._cache.close_gaps()

    def _begin(self, reply: _Running) -> bool:
        sequence = self._cache.begin(reply.todo)
        if sequence is None:
            return False
        reply.sequence, reply.todo = sequence, reply.todo[sequence.length :]
        reply.draft.start(sequence.length)
        return True

    def _fill(self) -> list[_Running]:
        """Put known tokens into the batch; give the replies whose next token can be drawn after it."""
        self._batch.clear()
        counts = self._line.shares(self._batch.size, self._pace)
        # By place in the cache: llama.cpp decodes a run of neighbours in one go.
        drawing: list[_Running] = []
        for reply, count in sorted(counts.items(), key=_place):
            self._batch.add(reply, count)
            if count == len(reply.todo):
                drawing.append(reply)
        return drawing

    def _decode(self) -> bool:
        """Run the batch. False where the cache was full: room was made, and the batch must be filled anew."""
        started = time.perf_counter()
        status = C.llama_decode(self._context, self._batch.struct)
        if status == 0:
            self._pace.note(self._batch.tokens, time.perf_counter() - started)
            for reply, count in self._batch.entries:
                assert reply.sequence is not None
                reply.sequence.tokens.extend(reply.todo[:count])
                reply.todo = reply.todo[count:]
            return True
        if status != 1:
            self._fail(f"llama_decode failed with status {status}: {last_words()}")
        if self._cache.make_room():
            return False
        if len(self._line.running) == 1:
            self._fail("the KV cache has no room for a single request")
        # The youngest reply gives its cells up and is decoded again when there is room.
        reply = self._line.give_way()
        assert reply.sequence is not None
        self._cache.discard(reply.sequence)
        reply.sequence = None
        return False

    def _draw(self, reply: _Running, row: int, logits: NDArray[np.float32], tokens: list[Token]) -> None:
        """Draw the next token of one reply, or take those its steer forces."""
        draft = reply.draft
        if draft.request.max_tokens == 0:
            tokens.append(draft.read())
            self._release(reply)
            return
        token: Token | None = None
        while token is None:
            wish = draft.wish(logits.copy)
            if isinstance(wish, Force):
                forced = draft.force(wish.token_ids)
                for token in forced:
                    reply.sampler.accept(token.token_id)
                    reply.todo.append(token.token_id)
                tokens.extend(forced)
                continue
            if isinstance(wish, Forget):
                reply.sampler.forget()
                continue
            logprobs = None if draft.request.top_logprobs is None else log_softmax(logits)
            changes = isinstance(wish, Only) or reply.sampler.has_biases
            unchanged = logits.copy() if changes else logits
            if isinstance(wish, Only):
                mask_to(logits, wish.bits)
            token_id = reply.sampler.sample(self._context, self._batch.outputs[row], logits)
            token = draft.take(token_id, logprobs)
            if token:
                tokens.append(token)
                reply.todo.append(token_id)
            elif changes:  # an end that was overruled: what comes instead is drawn from the model's own logits
                logits[:] = unchanged
        if token.finish:
            self._release(reply)

    def _release(self, reply: _Running) -> None:
        self._line.leave(reply)
        reply.sampler.close()
        if reply.sequence is not None:
            self._vacate(reply)

    def _vacate(self, reply: _Running) -> None:
        """Take a reply's sequence from it; its tokens stay in the cache for the next prompt that begins with them."""
        sequence, reply.sequence = reply.sequence, None
        assert sequence is not None
        self._cache.end(sequence, others_run=bool(self._line.running))

    def _fail(self, reason: str) -> None:
        """Give up every request in the batch: after a failed decode the cache cannot be trusted."""
        self._forget_all()
        self._cache.clear()
        raise BackendFailed(reason)

    def _forget_all(self) -> None:
        for reply in self._line:
            reply.sampler.close()
        self._line.clear()


def _place(entry: tuple[_Running, int]) -> int:
    sequence = entry[0].sequence
    assert sequence is not None
    return sequence.id
