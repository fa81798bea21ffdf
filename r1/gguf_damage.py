"""What is wrong with a file that should be GGUF, and what to do about it, in words."""

from __future__ import annotations

from pathlib import Path

from .errors import BadModelFile

PULL_AGAIN = "it was not downloaded completely: run `stillhouse pull` again, or copy the file again"


def check_magic(path: Path, data: bytes, file_size: int) -> None:
    """Raise `BadModelFile` where a file does not begin as a GGUF file does, and say what it seems to be."""
    if file_size == 0:
        raise BadModelFile(f"{path} is empty", PULL_AGAIN)
    if data[:4] == b"GGUF":
        return
    raise BadModelFile(f"{path} is not a GGUF file; it seems to be {_looks_like(data, file_size)}", _what_to_do(data))


def _looks_like(data: bytes, file_size: int) -> str:
    text = data[:512].lstrip().lower()
    if b"GGUF".startswith(data[:4]):
        return "the first bytes of one"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page"
    if data.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file it points to"
    if data.startswith(b"PK\x03\x04"):
        return "a zip archive (a PyTorch checkpoint?)"
    if data[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        return "a Python pickle (a PyTorch checkpoint?)"
    if data[:4] in (b"lmgg", b"tjgg", b"fmgg", b"algg"):
        return "an old GGML file, of before August 2023"
    if len(data) > 8 and int.from_bytes(data[:8], "little") < file_size and data[8:9] == b"{":
        return "a safetensors file"
    if data.startswith(b"\x1f\x8b"):
        return "a gzip archive"
    if not data[:4096].strip(b"\0"):
        return "a file of zeros (an unfinished download)"
    if text[:1] in (b"{", b"["):
        return "JSON"
    return "text" if text.isascii() and b"\0" not in text else "something else"


def _what_to_do(data: bytes) -> str:
    if data.startswith(b"version https://git-lfs"):
        return "run `git lfs pull` in its folder, or `stillhouse pull` the model"
    text = data[:512].lstrip().lower()
    if text.startswith((b"<!doctype", b"<html")):
        return "on the hub, the download link of a file has `/resolve/` in it where its page has `/blob/`"
    return "name a .gguf file; `stillhouse list` shows what is here"


def check_version(path: Path, version: int) -> None:
    """Raise `BadModelFile` for a version that is not read here."""
    if version in (2, 3):
        return
    if version & 0xFFFF == 0:
        raise BadModelFile(f"{path} is a big-endian GGUF file", "download the little-endian one")
    hint = "convert the model again" if version < 2 else "a newer stillhouse may read it"
    raise BadModelFile(f"{path} is GGUF version {version}; this reads versions 2 and 3", hint)


def shown(value: object) -> str:
    """A value from a hostile file, short and without control characters."""
    text = "".join(c if c.isprintable() else "?" for c in str(value)[:60])
    return text + ("…" if len(str(value)) > 60 else "")


def damaged(path: Path, what: str) -> BadModelFile:
    """The error for a file that says what cannot be."""
    return BadModelFile(f"{path} is damaged: {what}", "download it again, and from a source you trust")


def cut_short(path: Path, file_size: int, start: int, size: int) -> BadModelFile:
    """The error for a file that ends before its header does."""
    return BadModelFile(
        f"{path} is cut short or damaged: at byte {start:,} its header wants {size:,} more, of {file_size:,} in all",
        PULL_AGAIN,
    )
