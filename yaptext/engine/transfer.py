"""The transfer of one plan's files.

A file of plain HTTP continues where any process left it, after its hash of what is there; a file of Xet storage is the
client's own, which begins it again.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub as client
import structlog

from yaptext.engine.bars import bars
from yaptext.engine.download_plan import File, Plan, part_bytes
from yaptext.engine.hub_client import Hub, reason_of
from yaptext.engine.underway import Teller

_AT_ONCE, _AT_ONCE_XET = 4, 2
"""Files on their way together. Xet fetches the parts of one file side by side, and what is not whole is lost."""
_CHUNK_BYTES = 2**20
_TICK_S = 0.25

_log = structlog.get_logger(__name__)


class _Stopped(Exception):
    """Another file failed, or the process is to end."""


class _Part:
    """A file that grows, and its hash. What an earlier process left of it counts."""

    def __init__(self, path: Path, file: File) -> None:
        self._file, self._begin = path.open("a+b"), file
        self._file.seek(0)
        self._reset()
        while chunk := self._file.read(_CHUNK_BYTES):
            self._hash.update(chunk)
            self.size += len(chunk)

    def __enter__(self) -> _Part:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _reset(self) -> None:
        self.size = 0
        self._hash = hashlib.sha256() if self._begin.is_lfs else hashlib.sha1(b"blob %d\0" % self._begin.size)

    @property
    def is_as_named(self) -> bool:
        return self._hash.hexdigest() == self._begin.etag

    def add(self, chunk: bytes) -> None:
        self._file.write(chunk)
        self._hash.update(chunk)
        self.size += len(chunk)

    def restart(self) -> None:
        self._file.truncate(0)
        self._reset()

    def keep(self) -> None:
        """On the disk, whatever happens to the machine: its name says that it is whole."""
        self._file.flush()
        os.fsync(self._file.fileno())


class Transfer:
    """The files of one plan, in a few threads. They are daemons: a stalled one holds no process that is to end."""

    def __init__(self, hub: Hub, plan: Plan, teller: Teller) -> None:
        self._hub, self._plan, self._teller = hub, plan, teller
        self._stop, self._idle = threading.Event(), threading.Condition()
        self._left: Iterator[File] = iter(plan.missing)
        self._error: BaseException | None = None
        self._running = 0

    def run(self) -> None:
        at_once = _AT_ONCE_XET if any(file.is_xet for file in self._plan.missing) else _AT_ONCE
        threads = [
            threading.Thread(target=self._work, name="download", daemon=True)
            for _ in range(min(at_once, len(self._plan.missing)))
        ]
        self._running = len(threads)
        (self._plan.folder / "blobs").mkdir(parents=True, exist_ok=True)
        try:
            for thread in threads:
                thread.start()
            while True:
                with self._idle:
                    if not self._running or self._error is not None:
                        break
                    self._idle.wait(_TICK_S)
                self._teller.tick()
            if self._error is not None:
                raise self._error
        finally:
            self._stop.set()
            until = time.monotonic() + 1  # for the client to clear its halves away
            for thread in threads:
                thread.join(max(0.0, until - time.monotonic()))

    def _work(self) -> None:
        try:
            while not self._stop.is_set():
                with self._idle:
                    file = next(self._left, None)
                if file is None:
                    break
                begun = time.monotonic()
                (self._fetch_xet if file.is_xet else self._fetch)(file)
                self._teller.file(self._plan, file, time.monotonic() - begun)
        except BaseException as error:  # raised again in the thread that waits
            with self._idle:
                self._error = self._error or error
            self._stop.set()
        finally:
            with self._idle:
                self._running -= 1
                self._idle.notify()

    def _came(self, bytes_: int) -> None:
        if self._stop.is_set():
            raise _Stopped
        self._teller.came(bytes_)

    def _fetch(self, file: File) -> None:
        """Raises as `Hub.failure`."""
        from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

        lock, path = self._plan.lock(file), self._plan.part(file)
        lock.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if self._plan.blob(file).exists():  # another process was quicker
                return self._came(file.size - part_bytes(self._plan, file))
            with _Part(path, file) as part:
                if part.size > file.size:
                    part.restart()
                for is_last in (False, True):
                    while part.size < file.size:
                        self._hub.ask(self._plan.repo, "read", lambda: self._stream(file, part), label=self._plan.label)
                    if part.is_as_named and part.size == file.size:
                        break
                    self._came(-part.size)
                    part.restart()
                    if is_last:
                        raise self._hub.passes(
                            f"{file.path} of {self._plan.label} comes with other bytes than the hub names (its hash "
                            "differs): a proxy, a mirror (HF_ENDPOINT) or this disk changes them"
                        )
                    _log.warning("download.damaged", repo=self._plan.repo, file=file.path, hint="it is fetched again")
                part.keep()
            path.replace(self._plan.blob(file))

    def _stream(self, file: File, part: _Part) -> None:
        """One request for what is missing. Raises only if it brought nothing: with more bytes, another may do."""
        import httpx2
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

        headers = build_hf_headers(token=self._hub.api.token) | {"Accept-Encoding": "identity"}
        before = part.size
        if before:
            headers["Range"] = f"bytes={before}-"
        url = client.hf_hub_url(self._plan.repo, file.path, revision=self._plan.revision)
        asking = client.get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
        try:
            with asking as response:
                hf_raise_for_status(response)
                if before and response.status_code == 200:  # it knows no ranges
                    self._came(-before)
                    part.restart()
                    before = 0
                for chunk in response.iter_bytes(_CHUNK_BYTES):
                    part.add(chunk)
                    self._came(len(chunk))
        except httpx2.TransportError as error:
            if part.size <= before:
                raise
            _log.info(
                "download.broken", repo=self._plan.repo, file=file.path, at_bytes=part.size, error=reason_of(error)
            )
        if part.size <= before:
            raise OSError(f"{file.path} came short: {part.size} of {file.size} bytes")

    def _fetch_xet(self, file: File) -> None:
        """By the client. Its bars may see less than the file: what it knows already is not sent."""
        seen = 0

        def tell(most: int) -> None:
            nonlocal seen
            self._came(min(most, file.size) - seen)
            seen = min(most, file.size)

        def fetch() -> None:
            client.hf_hub_download(
                self._plan.repo,
                file.path,
                revision=self._plan.revision,
                cache_dir=self._hub.cache,
                token=self._hub.api.token,
                tqdm_class=bars(tell),
            )

        self._hub.ask(self._plan.repo, "read", fetch, label=self._plan.label)
        self._came(file.size - seen)
