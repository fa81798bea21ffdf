"""The vocabulary of a GGUF model. llama.cpp only reads it, so any thread may ask."""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# llama-cpp-python's stubs make every handle optional and every integer a C type.

from __future__ import annotations

import ctypes
from pathlib import Path

import llama_cpp as C

from ..r1.errors import BadModelFile
from .llamacpp_load import last_words, silence

_CONTROL = C.LLAMA_TOKEN_ATTR_CONTROL
_USER_DEFINED = C.LLAMA_TOKEN_ATTR_USER_DEFINED


def load_vocabulary(path: Path) -> LlamaVocabulary:
    """The vocabulary of a file whose weights are not wanted. Raises `BadModelFile`."""
    silence()
    params = C.llama_model_default_params()
    params.vocab_only = True
    model = C.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise BadModelFile(f"llama.cpp cannot read the vocabulary of {path.name}: {last_words()}", "verify the file")
    return LlamaVocabulary(model)


class LlamaVocabulary:
    """Text to token ids and back."""

    def __init__(self, model: C.llama_model_p) -> None:
        self.handle = C.llama_model_get_vocab(model)
        self.size: int = C.llama_vocab_n_tokens(self.handle)
        bos = C.llama_vocab_bos(self.handle)
        self.bos_id: int | None = bos if bos >= 0 and C.llama_vocab_get_add_bos(self.handle) else None
        self.end_ids = frozenset(i for i in range(self.size) if C.llama_vocab_is_eog(self.handle, i))
        self.control: dict[str, int] = {}
        self._hidden: set[int] = set()
        for token_id in range(self.size):
            attributes = C.llama_vocab_get_attr(self.handle, token_id)
            if attributes & (_CONTROL | _USER_DEFINED):
                self.control[C.llama_vocab_get_text(self.handle, token_id).decode(errors="replace")] = token_id
            if attributes & _CONTROL:
                self._hidden.add(token_id)
        self._pieces: dict[int, bytes] = {}

    def boundary_texts(self) -> tuple[str, str]:
        """The begin- and end-of-sequence tokens as chat templates write them, "" where there is none."""
        return self._text(C.llama_vocab_bos(self.handle)), self._text(C.llama_vocab_eos(self.handle))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, in which control tokens count as such; nothing is put in front."""
        data = text.encode()
        room = len(data) + 2
        while True:
            ids = (C.llama_token * room)()
            count = C.llama_tokenize(self.handle, data, len(data), ids, room, False, True)
            if count >= 0:
                return ids[:count]
            room = -count

    def piece(self, token_id: int) -> bytes:
        """The bytes of one token; not always whole characters."""
        known = self._pieces.get(token_id)
        if known is None:
            buffer = ctypes.create_string_buffer(64)
            length = C.llama_token_to_piece(self.handle, token_id, buffer, len(buffer), 0, True)
            if length < 0:
                buffer = ctypes.create_string_buffer(-length)
                length = C.llama_token_to_piece(self.handle, token_id, buffer, len(buffer), 0, True)
            known = self._pieces[token_id] = buffer.raw[:length]
        return known

    def _text(self, token_id: int) -> str:
        return self.piece(token_id).decode(errors="replace") if token_id >= 0 else ""

    def shown(self, token_id: int) -> bytes:
        """The bytes of one token as a reader sees them: none for a control token."""
        return b"" if token_id in self._hidden else self.piece(token_id)
