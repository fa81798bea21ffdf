"""One file from the hub into the hub's cache: resumed after any interruption, hashed as it comes, never half-visible.

huggingface_hub (2.4) throws a partial file away when its process ends, so the bytes of large files are fetched here:
they grow in `blobs/SHA256.incomplete` and get their name only when the hash is right. Making the cache's links is left
to `hf_hub_download`, which finds the blob in place. It knows nothing of models, of names, or of what is in a file.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .cache import repository_folder, size_text
from .errors import BadModelFile, ModelNotFound, UserError

CHUNK_BYTES = 1 << 20
TIMEOUT_S = 30.0  # without a single byte
RETRY_PAUSES_S = (1.0, 2.0, 4.0, 8.0, 15.0)  # between tries that bring nothing new


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file in a repository, at one commit."""

    repository: str
    path: str
    commit: str
    size: int  # bytes
    sha256: str  # "" = small, kept in git itself: the hub tells no SHA-256


def check_space(files: list[RemoteFile], cache: Path) -> None:
    """Refuse a download that cannot fit, before its first byte."""
    needed = sum(_missing_bytes(file, cache) for file in files)
    folder = cache
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"the download needs {size_text(needed)}, and {cache} has {size_text(free)} free",
            "free some space (`stillhouse rm`), or point HF_HUB_CACHE to a larger disk",
        )


def download(file: RemoteFile, *, endpoint: str, cache: Path, progress: bool) -> Path:
    """Fetch a file unless it is there, and link it into the cache's snapshot; returns the link.

    Raises `BadModelFile` where its bytes do not have the hub's SHA-256, and `UserError` for all else that can go wrong.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import disable_progress_bars

    with hub_errors(file.repository, endpoint, file.path):
        if file.sha256:
            _fetch(file, endpoint, cache, progress)
        disable_progress_bars()  # what is left is small
        link = Path(
            hf_hub_download(file.repository, file.path, revision="main", cache_dir=str(cache), endpoint=endpoint)
        )
    if file.sha256 and link.is_symlink() and Path(os.readlink(link)).name != file.sha256:
        raise UserError(f"{file.repository} changed while {file.path} was coming", "run the same command again")
    return link


def _blob_path(file: RemoteFile, cache: Path) -> Path:
    return repository_folder(cache, file.repository) / "blobs" / file.sha256


def _partial_path(blob: Path) -> Path:
    return blob.with_name(blob.name + ".incomplete")


def _missing_bytes(file: RemoteFile, cache: Path) -> int:
    blob = _blob_path(file, cache)
    if file.sha256 and blob.exists():
        return 0
    partial = _partial_path(blob)
    return file.size - (min(partial.stat().st_size, file.size) if file.sha256 and partial.exists() else 0)


def _fetch(file: RemoteFile, endpoint: str, cache: Path, progress: bool) -> None:
    blob = _blob_path(file, cache)
    if blob.exists():
        return
    blob.parent.mkdir(parents=True, exist_ok=True)
    with _alone(cache / ".locks" / blob.parent.parent.name / f"{file.sha256}.lock", file.path):
        if blob.exists():
            return
        partial = _partial_path(blob)
        found = _grow(partial, file, endpoint, progress)
        if found != file.sha256:
            partial.unlink()
            raise BadModelFile(
                f"{file.path} of {file.repository} came with the wrong checksum "
                f"(SHA-256 {found[:12]}… where the hub says {file.sha256[:12]}…), and was deleted",
                "pull it again; if it happens twice, a proxy or the disk changes its bytes",
            )
        partial.replace(blob)


def _grow(partial: Path, file: RemoteFile, endpoint: str, progress: bool) -> str:
    """Fetch what is missing of a partial file, trying again where the connection breaks; returns its SHA-256."""
    digest, have, failures = hashlib.sha256(), 0, 0
    with partial.open("a+b") as out, _meter(file, progress) as show:
        out.seek(0)
        while chunk := out.read(CHUNK_BYTES):
            digest.update(chunk)
            have += len(chunk)
        show(have)
        try:
            while have < file.size:
                before = have
                try:
                    for start, chunk in _stream(file, endpoint, have):
                        if start != have:  # the server began anew
                            out.truncate(start)
                            digest, have = hashlib.sha256(), start
                        out.write(chunk)
                        digest.update(chunk)
                        have += len(chunk)
                        show(have)
                        if have > file.size:
                            break
                except _Broken as error:
                    reason = str(error)
                else:
                    reason = "the connection was closed early"
                if have < file.size:
                    failures = 0 if have > before else failures + 1
                    if failures >= len(RETRY_PAUSES_S):
                        raise UserError(
                            f"the connection to {_host(endpoint)} was lost at {size_text(have)} of "
                            f"{size_text(file.size)}: {reason}",
                            "what came is kept; the same command goes on from there",
                        )
                    time.sleep(RETRY_PAUSES_S[failures])
        except KeyboardInterrupt:
            show(None)
            kept = f"{size_text(have)} of {size_text(file.size)} are kept"
            print(f"stopped: {kept}, and the same command goes on from there", file=sys.stderr)
            raise
    return digest.hexdigest()


class _Broken(Exception):
    """The transport failed: worth another try."""


def _stream(file: RemoteFile, endpoint: str, start: int) -> Iterator[tuple[int, bytes]]:
    """The file's bytes from `start`, or from 0 where the server does not know ranges: (place, bytes)."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    session = get_session()
    # huggingface_hub's HTTP library is httpx or httpx2, by its version; the session tells which.
    transport_error: type[Exception] = sys.modules[type(session).__module__.partition(".")[0]].TransportError
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    url = hf_hub_url(file.repository, file.path, revision=file.commit, endpoint=endpoint)
    try:
        with session.stream("GET", url, headers=headers, follow_redirects=True, timeout=TIMEOUT_S) as response:
            if response.status_code in (408, 429) or response.status_code >= 500:
                raise _Broken(f"the hub answered {response.status_code}")
            hf_raise_for_status(response)
            place = start if response.status_code == 206 else 0
            for chunk in response.iter_bytes(CHUNK_BYTES):
                yield place, chunk
                place += len(chunk)
    except transport_error as error:
        raise _Broken(str(error) or type(error).__name__) from error


@contextlib.contextmanager
def _meter(file: RemoteFile, progress: bool) -> Iterator[Any]:
    """A function that takes the bytes so far (None = no more) and shows them: a bar, or off a terminal two lines."""
    name = file.path.rpartition("/")[2]
    if not progress:
        yield lambda have: None
        return
    if not sys.stderr.isatty():
        started = time.monotonic()
        print(f"downloading {name} ({size_text(file.size)}) from {file.repository}", file=sys.stderr)
        yield lambda have: None
        print(f"downloaded {name} in {time.monotonic() - started:.0f} s", file=sys.stderr)
        return
    from tqdm import tqdm

    with tqdm(total=file.size, desc=name[-40:], unit="B", unit_scale=True, leave=True) as bar:
        seen = 0

        def show(have: int | None) -> None:
            nonlocal seen
            if have is None:
                bar.close()
                return
            if not seen:
                bar.initial = have  # what was there before does not count as speed
                bar.n = have
                bar.refresh()
            bar.update(have - bar.n)
            seen = have

        yield show


@contextlib.contextmanager
def _alone(lock_path: Path, name: str) -> Iterator[None]:
    """Hold a file's lock; another process that fetches the same file is waited for."""
    from filelock import FileLock, Timeout

    lock_path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(lock_path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting: another process is downloading {name}", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def hub_errors(repository: str, endpoint: str, path: str = "") -> Iterator[None]:
    """Turn what huggingface_hub and the system raise into one sentence and what to do."""
    from huggingface_hub import errors

    try:
        yield
    except UserError:
        raise
    except errors.GatedRepoError:
        raise UserError(
            f"{repository} is gated: its owners want you to accept their terms",
            f"accept them at {endpoint}/{repository}, then set HF_TOKEN to a token of your account",
        ) from None
    except errors.RepositoryNotFoundError as error:
        status = error.response.status_code
        if status == 401:
            message = f"the hub has no {repository}, or it is private"
        else:
            message = f"the hub has no repository {repository}"
        raise ModelNotFound(message, "check the spelling; for a private one, set HF_TOKEN") from None
    except errors.RemoteEntryNotFoundError:
        raise ModelNotFound(f"{repository} has no file {path}", f"see {endpoint}/{repository}/tree/main") from None
    except errors.LocalEntryNotFoundError as error:
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise _unreachable(endpoint, cause) from None
    except errors.HFValidationError:
        raise ModelNotFound(f"`{repository}` is not a hub id", "they look like org/repo") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        hint = "set HF_TOKEN to a token that may read it" if status in (401, 403) else "try again later"
        raise UserError(f"{_host(endpoint)} answered {status} for {repository}", hint) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "what came is kept; free some space (`stillhouse rm`) and run the same command again"
            raise UserError("the disk is full", hint) from None
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            hint = "point HF_HUB_CACHE to a folder of yours"
            raise UserError(f"the cache cannot be written: {error.strerror} ({error.filename})", hint) from None
        raise _unreachable(endpoint, error) from None
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2"):
            raise
        raise _unreachable(endpoint, error) from None


class HubUnreachable(UserError):
    """The hub did not answer at all."""


def _unreachable(endpoint: str, error: Exception) -> HubUnreachable:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return HubUnreachable(
        f"{_host(endpoint)} cannot be reached: {reason}",
        "check the network; HF_ENDPOINT names a mirror; models on this disk work without (`stillhouse list`)",
    )


def _host(endpoint: str) -> str:
    return urlsplit(endpoint).netloc or endpoint
