"""GGUF models through llama.cpp's C interface, with continuous batching. Knows nothing of HTTP, roles or `<think>`.

One `llama_decode` a step carries the next token of every running reply and a chunk of the prompts that are still being
read. A prompt, a forced run of tokens and a reply that lost its place in the cache are all the same thing here: tokens
that are known and not yet decoded (`todo`). When they are done, the next one is drawn.
"""

from __future__ import annotations

import ctypes
import time
from array import array
from collections import deque
from pathlib import Path
from typing import NamedTuple

import llama_cpp as C
import numpy as np
from numpy.typing import NDArray

from ..r1.errors import BadModelFile, UserError
from ..r1.gguf import Header, kv_bytes_per_token
from . import machine
from .base import BackendFailed, Force, GenerationRequest, Load, LoadOptions, Only, Token
from .draft import Draft
from .kvcache import CachedSequence, KVCache, common_prefix, token_array
from .llamacpp_sampler import LlamaSampler
from .llamacpp_vocabulary import LlamaVocabulary
from .sampling import log_softmax, mask_to

_RETAINED = 64  # sequences kept for their prefix, besides the running ones
_WORTH_WAITING = 64  # tokens: a prompt waits for another that is being read if it can then copy so many more
_STEP_S = 1.0  # a step that reads a prompt takes about so long at most
_LEAST_CHUNK = 32  # tokens: smaller ones read a prompt much slower
_KV_TYPES = {  # name -> (ggml type, bits a value)
    "f32": (0, 32),
    "f16": (1, 16),
    "bf16": (30, 16),
    "q8_0": (8, 8.5),
    "q5_1": (7, 6),
    "q5_0": (6, 5.5),
    "q4_1": (3, 5),
    "q4_0": (2, 4.5),
    "iq4_nl": (20, 4.5),
}
_MOST_SEQUENCES = 256  # LLAMA_MAX_SEQ
_MOST_DEFAULT_CONTEXT = 32_768  # DeepSeek's longest reply; a model's own 131,072 would cost gigabytes that few use
_COMPUTE_RESERVE = 0.05  # of the weights, for activations and scratch buffers (measured 2-4 % on 0.1b-7b at 512)


class _Running:
    """A reply in progress and its place in the KV cache."""

    __slots__ = ("draft", "sampler", "sequence", "todo")

    def __init__(self, draft: Draft, sampler: LlamaSampler) -> None:
        self.draft = draft
        self.sampler = sampler
        self.sequence: CachedSequence | None = None  # None while it waits
        self.todo: array[int] = token_array(draft.request.prompt_ids)  # known and not yet decoded


class LlamaCpp:
    """A GGUF model in memory. Not thread-safe, but for `vocabulary` and `load`."""

    name = "llama.cpp"

    def __init__(self, paths: tuple[Path, ...], header: Header, options: LoadOptions) -> None:
        _silence()
        fit = _fit(header, sum(path.stat().st_size for path in paths), options)
        self.context_length = fit.context
        self._model = _load_model(paths, options)
        self._adapters = [_load_adapter(self._model, path) for path, _ in options.loras]
        sequences = min(_MOST_SEQUENCES, options.parallel + _RETAINED)
        self._context = _make_context(self._model, options, fit, sequences)
        if self._adapters:
            scales = (ctypes.c_float * len(self._adapters))(*(scale for _, scale in options.loras))
            adapters = (C.llama_adapter_lora_p_ctypes * len(self._adapters))(*self._adapters)
            if C.llama_set_adapters_lora(self._context, adapters, len(self._adapters), scales):
                raise BadModelFile("the LoRA adapters could not be applied", "they must be made for this very model")
        self._memory = C.llama_get_memory(self._context)
        self.vocabulary = LlamaVocabulary(self._model)
        self._cache = KVCache(sequences, fit.cache_tokens)
        # The state of recurrent layers cannot be cut back to a prefix.
        self._reuse = not (C.llama_model_is_recurrent(self._model) or C.llama_model_is_hybrid(self._model))
        self._parallel = options.parallel
        self._batch = _Batch(options.batch_tokens)
        self._pace = _Pace(options.batch_tokens)
        self._waiting: deque[_Running] = deque()
        self._idle: deque[_Running] = deque()  # work for when nothing else is to do
        self._running: list[_Running] = []  # in the order they came
        self._crowded = False  # a reply had to give its cells up: none comes in before one has gone

    # The contract

    def add(self, request: GenerationRequest) -> None:
        """Queue a request. Raises `PromptTooLong`."""
        draft = Draft(request, self.vocabulary, self.context_length)
        reply = _Running(draft, LlamaSampler(self.vocabulary, request))
        (self._idle if request.idle else self._waiting).append(reply)

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
            for row, reply in enumerate(drawing):
                self._draw(reply, row, logits[row], tokens)
        return tokens

    def cancel(self, request_id: str) -> None:
        """Forget a request. What is decoded of it stays in the cache for the next one."""
        for queue in (self._waiting, self._idle, self._running):
            for reply in queue:
                if reply.draft.request.id == request_id:
                    queue.remove(reply)
                    self._release(reply)
                    return

    def load(self) -> Load:
        """How busy it is now."""
        return Load(len(self._running), len(self._waiting), self._cache.used, self._cache.cells)

    def close(self) -> None:
        """Free the context and the model."""
        self._forget_all()
        C.llama_free(self._context)
        C.llama_model_free(self._model)

    # A step, phase by phase

    def _admit(self) -> None:
        """Give waiting requests a sequence, in order, each starting from the longest prefix that is in the cache."""
        if self._waiting:
            self._park_idle()
        if self._crowded and self._running:
            return
        self._crowded = False
        queue = self._waiting or (self._idle if not self._running else deque())
        kept: deque[_Running] = deque()
        while queue and len(self._running) < self._parallel:
            reply = queue.popleft()
            source, length = self._cache.longest_prefix(reply.todo) if self._reuse else (None, 0)
            length = min(length, len(reply.todo) - 1)  # one token at least: its logits are wanted
            if self._reuse and self._soon(reply) >= length + _WORTH_WAITING:
                kept.append(reply)
                continue
            sequence = self._cache.open(source, length) or self._reopen(source, length)
            if sequence is None:
                kept.append(reply)
                break
            if source and length:
                C.llama_memory_seq_cp(self._memory, source.id, sequence.id, 0, length)
            reply.sequence, reply.todo = sequence, reply.todo[length:]
            reply.draft.start(length)
            self._running.append(reply)
        queue.extendleft(reversed(kept))

    def _park_idle(self) -> None:
        """Send idle work back to its queue; what it has decoded stays in the cache, where it will find it again."""
        for reply in [reply for reply in self._running if reply.draft.request.idle]:
            self._running.remove(reply)
            reply.todo = _whole(reply)
            self._vacate(reply)
            self._idle.append(reply)

    def _soon(self, reply: _Running) -> int:
        """The longest prefix that a prompt being read now will leave in the cache for this one."""
        return max(
            (common_prefix(_whole(other), reply.todo) for other in self._running if len(other.todo) > 1), default=0
        )

    def _reopen(self, source: CachedSequence | None, length: int) -> CachedSequence | None:
        """A sequence for which another has to go; never the one that it is copied from."""
        evicted = self._cache.evict(but=source)
        if evicted is None:
            return None
        C.llama_memory_seq_rm(self._memory, evicted.id, -1, -1)
        return self._cache.open(source, length)

    def _fill(self) -> list[_Running]:
        """Put known tokens into the batch; give the replies whose next token can be drawn after it."""
        self._batch.clear()
        drawing: list[_Running] = []
        # Replies first, so that a long prompt cannot hold them up; then prompts, in the order they came.
        for reply in self._running:
            if len(reply.todo) == 1:
                self._batch.add(reply, 1)
                drawing.append(reply)
        room = min(self._batch.room, self._pace.chunk(replying=bool(drawing)))
        for reply in self._running:
            if len(reply.todo) > 1:
                if not room:
                    break
                count = min(len(reply.todo), room)
                room -= count
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
            self._fail(f"llama_decode failed with status {status}: {_last_words()}")
        evicted = self._cache.evict()
        if evicted is not None:
            C.llama_memory_seq_rm(self._memory, evicted.id, -1, -1)
        elif len(self._running) > 1:
            # The youngest reply gives its cells up and is decoded again when there is room.
            reply = self._running.pop()
            assert reply.sequence is not None
            reply.todo = _whole(reply)
            C.llama_memory_seq_rm(self._memory, reply.sequence.id, -1, -1)
            self._cache.drop(reply.sequence)
            reply.sequence = None
            (self._idle if reply.draft.request.idle else self._waiting).appendleft(reply)
            self._crowded = True
        else:
            self._fail("the KV cache has no room for a single request")
        return False

    def _draw(self, reply: _Running, row: int, logits: NDArray[np.float32], tokens: list[Token]) -> None:
        """Draw the next token of one reply, or take those its steer forces."""
        draft = reply.draft
        if draft.request.max_tokens == 0:
            tokens.append(draft.read())
            self._finish(reply)
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
            logprobs = None if draft.request.top_logprobs is None else log_softmax(logits)
            if isinstance(wish, Only):
                mask_to(logits, wish.bits)
            token_id = reply.sampler.sample(self._context, self._batch.outputs[row])
            token = draft.take(token_id, logprobs)
            if token:
                tokens.append(token)
                reply.todo.append(token_id)
        if token.finish:
            self._finish(reply)

    def _finish(self, reply: _Running) -> None:
        self._running.remove(reply)
        self._release(reply)

    def _release(self, reply: _Running) -> None:
        reply.sampler.close()
        if reply.sequence is not None:
            self._vacate(reply)

    def _vacate(self, reply: _Running) -> None:
        """Take a reply's sequence from it; its tokens stay in the cache for the next prompt that begins with them."""
        sequence, reply.sequence = reply.sequence, None
        assert sequence is not None
        self._crowded = False
        if self._reuse and sequence.length:
            for covered in self._cache.retain(sequence):
                C.llama_memory_seq_rm(self._memory, covered.id, -1, -1)
        else:
            C.llama_memory_seq_rm(self._memory, sequence.id, -1, -1)
            self._cache.drop(sequence)

    def _fail(self, reason: str) -> None:
        """Give up every request in the batch: after a failed decode the cache cannot be trusted."""
        self._forget_all()
        self._cache.clear()
        C.llama_memory_clear(self._memory, True)
        raise BackendFailed(reason)

    def _forget_all(self) -> None:
        for reply in (*self._running, *self._waiting, *self._idle):
            reply.sampler.close()
        self._running, self._waiting, self._idle = [], deque(), deque()


class _Batch:
    """The `llama_batch` of a step, in arrays that are filled by slices."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.tokens = 0
        self.entries: list[tuple[_Running, int]] = []  # whose tokens, and how many
        self.outputs: list[int] = []  # places in the batch whose logits are wanted
        self._ids = np.zeros(size, np.int32)
        self._positions = np.zeros(size, np.int32)
        self._sequences = np.zeros(size, np.int32)
        self._wanted = np.zeros(size, np.int8)
        self._counts = np.ones(size, np.int32)
        first, step = self._sequences.ctypes.data, self._sequences.itemsize
        self._pointers = (ctypes.POINTER(C.llama_seq_id) * size)(
            *(ctypes.cast(first + i * step, ctypes.POINTER(C.llama_seq_id)) for i in range(size))
        )
        self.struct = C.llama_batch(
            n_tokens=0,
            token=self._ids.ctypes.data_as(ctypes.POINTER(C.llama_token)),
            embd=None,
            pos=self._positions.ctypes.data_as(ctypes.POINTER(C.llama_pos)),
            n_seq_id=self._counts.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            seq_id=self._pointers,
            logits=self._wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    @property
    def room(self) -> int:
        return self.size - self.tokens

    def clear(self) -> None:
        self.tokens, self.entries, self.outputs = 0, [], []

    def add(self, reply: _Running, count: int) -> None:
        """Take the first `count` known tokens of a reply; the logits of the last are wanted if no more are known."""
        assert reply.sequence is not None
        start, end, position = self.tokens, self.tokens + count, reply.sequence.length
        self._ids[start:end] = reply.todo[:count]
        self._positions[start:end] = range(position, position + count)
        self._sequences[start:end] = reply.sequence.id
        self._wanted[start:end] = 0
        if count == len(reply.todo):
            self._wanted[end - 1] = 1
            self.outputs.append(end - 1)
        self.entries.append((reply, count))
        self.tokens = self.struct.n_tokens = end


class _Pace:
    """How many prompt tokens a step may carry, so that replies beside it don't stall and a cancellation is not late."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._token_s = _STEP_S / min(most, 256)  # measured as soon as a prompt has been read

    def chunk(self, *, replying: bool) -> int:
        """Prompt tokens for the next step; a third as long where replies wait for it."""
        step_s = _STEP_S / 3 if replying else _STEP_S
        return max(_LEAST_CHUNK, min(self._most, int(step_s / self._token_s)))

    def note(self, tokens: int, seconds: float) -> None:
        """Learn from a step; those of a few tokens tell nothing, they are as slow as one of many."""
        if tokens >= _LEAST_CHUNK:
            self._token_s += 0.3 * (seconds / tokens - self._token_s)


class _Fit(NamedTuple):
    context: int  # tokens a request may have
    cache_tokens: int  # tokens of all requests together


def _fit(header: Header, weights: int, options: LoadOptions) -> _Fit:
    """Choose the context and the KV cache, or say why what was asked for cannot be had."""
    trained = header.context_length or _MOST_DEFAULT_CONTEXT
    if options.context and options.context > trained:
        raise UserError(
            f"--context {options.context} is more than the {trained} tokens this model was trained to read",
            f"serve with --context {trained} or less",
        )
    if options.kv_type not in _KV_TYPES:
        raise UserError(f"there is no KV cache type {options.kv_type!r}", f"choose one of {', '.join(_KV_TYPES)}")
    bits = _KV_TYPES[options.kv_type][1]
    per_token = max(1, kv_bytes_per_token(header, bits, bits))
    # On a GPU the driver says what fits; the RAM is no measure of it.
    free = 1 << 62 if _offloads(options) else machine.free_memory()
    budget = int(free - weights * (1 + _COMPUTE_RESERVE))
    if budget < 512 * per_token:
        raise UserError(
            f"the model needs {_gb(weights)} of memory and {_gb(free)} are free",
            "close other programs, or choose a smaller model or quantization",
        )
    most = budget // per_token
    context = options.context or min(trained, _MOST_DEFAULT_CONTEXT)
    if options.context and max(options.context, options.cache_tokens or 0) > most:
        raise UserError(
            f"a KV cache for {max(options.context, options.cache_tokens or 0)} tokens needs "
            f"{_gb(max(options.context, options.cache_tokens or 0) * per_token)} of memory and {_gb(budget)} are free "
            f"beside the weights",
            f"serve with --context {most // 256 * 256} or less"
            + (", or with --kv-type q8_0 (half as much)" if bits > 8.5 else ""),
        )
    while context > max(512, most):
        context //= 2
    shared = max(context, min(options.parallel * context, _MOST_DEFAULT_CONTEXT, most // 4))
    return _Fit(context, max(context, options.cache_tokens or shared))


def _offloads(options: LoadOptions) -> bool:
    return options.gpu_layers != 0 and bool(C.llama_supports_gpu_offload())


def _load_model(paths: tuple[Path, ...], options: LoadOptions) -> C.llama_model_p:
    params = C.llama_model_default_params()
    params.n_gpu_layers = (-1 if options.gpu_layers is None else options.gpu_layers) if _offloads(options) else 0
    params.load_mode = C.LLAMA_LOAD_MODE_MMAP if options.mmap else C.LLAMA_LOAD_MODE_NONE
    names = (ctypes.c_char_p * len(paths))(*(str(path).encode() for path in paths))
    model = C.llama_model_load_from_splits(names, len(paths), params)
    if not model:
        raise BadModelFile(
            f"llama.cpp cannot load {paths[0].name}: {_last_words()}", "stillhouse show tells what is in it"
        )
    return model


def _load_adapter(model: C.llama_model_p, path: Path) -> C.llama_adapter_lora_p:
    if not path.is_file():
        raise BadModelFile(f"there is no LoRA adapter {path}", "--lora takes a GGUF file and, after =, its scale")
    adapter = C.llama_adapter_lora_init(model, str(path).encode())
    if not adapter:
        raise BadModelFile(
            f"llama.cpp cannot load the LoRA adapter {path.name}: {_last_words()}",
            "it must be made for this very model",
        )
    return adapter


def _make_context(model: C.llama_model_p, options: LoadOptions, fit: _Fit, sequences: int) -> C.llama_context_p:
    params = C.llama_context_default_params()
    params.n_ctx = fit.cache_tokens
    params.n_batch = params.n_ubatch = options.batch_tokens
    params.n_seq_max = params.n_outputs_max = sequences
    threads = options.threads or machine.physical_cores()
    params.n_threads = params.n_threads_batch = threads
    params.type_k = params.type_v = _KV_TYPES[options.kv_type][0]
    params.flash_attn_type = -1 if options.flash_attention is None else int(options.flash_attention)
    params.kv_unified = True  # one pool of cells, so that a prefix can be shared and a long reply can borrow
    params.swa_full = True  # a sliding window would forget the prefixes that are to be shared
    context = C.llama_init_from_model(model, params)
    if not context:
        raise UserError(
            f"llama.cpp cannot make a context of {fit.cache_tokens} tokens: {_last_words()}",
            "try a smaller --context, --kv-type f16, or --flash-attention on",
        )
    return context


def _whole(reply: _Running) -> array[int]:
    """Every token of a reply that is known: decoded and to be decoded."""
    return reply.sequence.tokens + reply.todo if reply.sequence else reply.todo


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


# llama.cpp reports through a log callback only: keep what it complained about, print nothing.
_complaints: deque[str] = deque(maxlen=8)


@C.llama_log_callback
def _listen(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    if level in (3, 4) and text.strip():  # GGML_LOG_LEVEL_WARN, GGML_LOG_LEVEL_ERROR
        _complaints.append(text.decode(errors="replace").strip())


def _silence() -> None:
    _complaints.clear()
    C.llama_log_set(_listen, ctypes.c_void_p(0))
    C.llama_backend_init()


def _last_words() -> str:
    """The first complaint of a failed call: what follows are its consequences."""
    last = _complaints[-1] if _complaints else "no reason given"
    words = next((line for line in _complaints if "error" in line.lower() or "fail" in line.lower()), last)
    return words.split(": ", 1)[-1] if words.startswith("llama_") else words
