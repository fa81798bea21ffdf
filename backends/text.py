"""Bytes of tokens in, whole characters out. Knows nothing of vocabularies."""

from __future__ import annotations

import codecs


class TextDecoder:
    """Joins the pieces of one reply into text and holds back a character until its last byte is there.

    >>> decoder = TextDecoder()
    >>> decoder.add("é".encode()[:1]), decoder.add("é".encode()[1:])
    ('', 'é')
    """

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, piece: bytes) -> str:
        """Give the text that is complete with these bytes; bytes that are no UTF-8 become U+FFFD."""
        return self._utf8.decode(piece)

    def finish(self) -> str:
        """Give what is held back, and keep it: U+FFFD where the reply stops inside a character, mostly nothing."""
        held, _ = self._utf8.getstate()
        return held.decode(errors="replace")
