"""Models from the hub, before anything opens them: what is missing, how far it is, and what the next run finds.

A file of plain HTTP goes on where any process left it, after its hash of what is there; a file of Xet storage is the
client's own, which begins it again. What is whole lies where the client keeps it, so vLLM and transformers find it.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import huggingface_hub as client
import structlog

from yaptext.engine.hub import Hub, client_errors, reason_of
from yaptext.engine.underway import Progress, Teller, size

Read = Callable[[str], bytes]
Choose = Callable[[Sequence[str], Read], list[str]]
"""Of a repository's paths those that are wanted. The second argument reads one of them: for an index."""

INDEX = "model.safetensors.index.json"
BESIDE = ["*.json", "tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "*.jinja"]
"""What lies beside weights in a repository's own folder, and some loader may want. All of it is small."""
_AT_ONCE, _AT_ONCE_XET = 4, 2
"""Files on their way together. Xet fetches the parts of one file side by side, and what is not whole is lost."""
_CHUNK_BYTES = 2**20
_TICK_S = 0.25

_log = structlog.get_logger(__name__)


class File(NamedTuple):
    """`etag` is the hub's name for the content: its sha256 if it is large (`is_lfs`), else its SHA-1 as git has it."""

    path: str
    size: int
    etag: str
    is_lfs: bool
    is_xet: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """What is wanted of one repository at one commit. `label` is its name for people. `there_bytes` are on disk, parts
    of `missing` among them. `is_linked` says that a loader finds all of it."""

    repo: str
    label: str
    revision: str
    folder: Path
    files: tuple[File, ...]
    missing: tuple[File, ...]
    total_bytes: int
    there_bytes: int
    is_linked: bool

    @property
    def snapshot(self) -> Path:
        return self.folder / "snapshots" / self.revision

    def blob(self, file: File) -> Path:
        return self.folder / "blobs" / file.etag

    def part(self, file: File) -> Path:
        return self.folder / "blobs" / f"{file.etag}.incomplete"

    def lock(self, file: File) -> Path:
        return self.folder.parent / ".locks" / self.folder.name / f"{file.etag}.lock"


def engine_files(paths: Sequence[str], read: Read) -> list[str]:
    """What an engine's weights, config, tokenizer and template are read from. Raises as `engine_weights`."""
    beside = [path for path in paths if any(fnmatch.fnmatch(path, pattern) for pattern in BESIDE) and "/" not in path]
    beside += [path for path in paths if path.startswith("additional_chat_templates/")]
    return sorted({*beside, *engine_weights(paths, read)})


def engine_weights(paths: Sequence[str], read: Read) -> list[str]:
    """Those that vLLM takes (0.32: `DefaultModelLoader._prepare_weights`, `download_weights_from_hf`). Raises
    `LookupError` if there are none."""
    own = [path for path in paths if "/" not in path]
    if fnmatch.filter(own, "consolidated*.safetensors"):  # as Mistral has them: vLLM prefers these
        weights = fnmatch.filter(paths, "consolidated*.safetensors")
    elif named := _named_weights(read(INDEX)) if INDEX in own else []:
        if absent := sorted(set(named) - set(paths)):
            raise LookupError(f"lacks {len(absent)} of {len(named)} files of its weights: {absent[0]}")
        weights = named
    else:
        kinds = (
            fnmatch.filter(paths, kind) for kind in ("*.safetensors", "*.bin", "*.pt") if fnmatch.filter(own, kind)
        )
        weights = [path for path in next(kinds, []) if not fnmatch.fnmatch(path, "original/**/*")]
    if not weights:
        raise LookupError("has no weights that an engine loads: *.safetensors, *.bin or *.pt")
    return weights


def _named_weights(index: bytes) -> list[str]:
    try:
        return sorted(set(json.loads(index)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


def plan(hub: Hub, repo: str, choose: Choose, *, label: str | None = None) -> Plan:
    """What is wanted of `repo`, and what of it is missing. Raises what the client raises, and `Hub.stays` if `choose`
    finds nothing."""
    revision = str(hub.api.model_info(repo).sha)
    with suppress(client_errors().CachedRepoTreeNotFoundError):
        # Without the hashes of large files: it serves only if there is nothing to fetch.
        noted = client.get_cached_repo_tree(repo, revision=revision, cache_dir=hub.cache)
        if (found := _plan(hub, repo, choose, label or repo, revision, noted)).is_linked:
            return found
    listed = hub.api.list_repo_tree(repo, revision=revision, recursive=True)
    return _plan(hub, repo, choose, label or repo, revision, listed)


def _plan(hub: Hub, repo: str, choose: Choose, label: str, revision: str, listed: Iterable[Any]) -> Plan:
    by_path = {entry.path: entry for entry in listed if isinstance(entry, client.hf_api.RepoFile)}

    def read(path: str) -> bytes:
        return Path(hub.api.hf_hub_download(repo, path, revision=revision, cache_dir=hub.cache)).read_bytes()

    try:
        files = tuple(_file(by_path[path]) for path in choose(list(by_path), read))
    except LookupError as error:
        raise hub.stays(f"{label} {error}") from None
    folder = hub.cache / f"models--{repo.replace('/', '--')}"
    at = Plan(repo, label, revision, folder, files, missing=(), total_bytes=0, there_bytes=0, is_linked=True)
    linked = {file.etag for file in files if os.path.exists(at.snapshot / file.path)}
    wanted = {file.etag: file for file in files}  # what is in several files comes once
    missing = tuple(file for etag, file in wanted.items() if etag not in linked and not os.path.exists(at.blob(file)))
    total = sum(file.size for file in wanted.values())
    return replace(
        at,
        missing=missing,
        total_bytes=total,
        there_bytes=total - sum(file.size - _part_bytes(at, file) for file in missing),
        is_linked=all(os.path.exists(at.snapshot / file.path) for file in files),
    )


def _file(entry: Any) -> File:
    from huggingface_hub import constants

    is_xet = bool(entry.xet_hash) and not constants.HF_HUB_DISABLE_XET and find_spec("hf_xet") is not None
    return File(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id, bool(entry.lfs), is_xet)


def _part_bytes(plan: Plan, file: File) -> int:
    try:
        there = 0 if file.is_xet else os.stat(plan.part(file)).st_size
    except OSError:
        return 0
    return there if there <= file.size else 0


def weights_lacking_in_cache(hub: Hub, repo: str) -> list[str]:
    """Paths that an engine without a hub would not find. Of a repository whose list of files was not noted down, only
    what an index names can be missed."""
    found = client.try_to_load_from_cache(repo, "config.json", cache_dir=hub.cache)
    if not isinstance(found, str):
        return ["config.json"]
    snapshot = Path(found).parent

    def read(path: str) -> bytes:
        try:
            return (snapshot / path).read_bytes()
        except OSError:
            return b""

    try:
        paths = [file.path for file in client.get_cached_repo_tree(repo, cache_dir=hub.cache)]
    except client_errors().CachedRepoTreeNotFoundError:
        paths = [path.name for path in snapshot.iterdir() if path.exists()]
        paths += _named_weights(read(INDEX))
    try:
        wanted = engine_weights(paths, read)
    except LookupError:
        return ["model.safetensors"]
    return [path for path in wanted if not os.path.exists(snapshot / path)]


# --- the transfer


def bring(hub: Hub, plans: Sequence[Plan], *, progress: Progress | None = None) -> list[Path]:
    """Fetches what the plans lack, and returns the folder of each. Says nothing if nothing is missing. Raises as
    `Hub.failure`; a signal that raises in this thread ends it within a second."""
    lacking = [plan for plan in plans if plan.missing]
    if lacking:
        hub.cache.mkdir(parents=True, exist_ok=True)
        for plan in lacking:
            _clear(plan)
        _check_disk(hub, lacking)
        with Teller(lacking, is_watched=hub.is_watched, progress=progress) as teller:
            for plan in lacking:
                with teller.bringing(plan):
                    _Transfer(hub, plan, teller).run()
    return [plan.snapshot if plan.is_linked else _link(hub, plan) for plan in plans]


def _clear(plan: Plan) -> None:
    """Deletes what killed processes left under names of their own, as the client does; one that lives has the lock."""
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    for file in plan.missing:
        for leftover in plan.folder.glob(f"blobs/{file.etag}.*.incomplete"):
            with suppress(OSError), WeakFileLock(plan.lock(file), timeout=0.1):
                leftover.unlink()


def _check_disk(hub: Hub, plans: list[Plan]) -> None:
    needed, free = sum(plan.total_bytes - plan.there_bytes for plan in plans), shutil.disk_usage(hub.cache).free
    if needed > free:
        names = " and ".join(plan.label for plan in plans)
        verb = "needs" if len(plans) == 1 else "need"
        raise hub.passes(
            f"{names} {verb} {size(needed)} more in {hub.cache}, and {size(free)} are free: free some, or set HF_HOME "
            "to a folder of a larger disk"
        )


def _link(hub: Hub, plan: Plan) -> Path:
    """Has the client give what came its names. It also notes down the branch's commit and the list of files."""

    def link() -> Path:
        names = [glob.escape(file.path) for file in plan.files]
        return Path(
            client.snapshot_download(
                plan.repo,
                cache_dir=hub.cache,
                token=hub.api.token,
                allow_patterns=names,
                tqdm_class=bars(lambda _: None),
            )
        )

    return hub.ask(plan.repo, "read", link, label=plan.label)


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


class _Transfer:
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
                return self._came(file.size - _part_bytes(self._plan, file))
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


def bars(tell: Callable[[int], None]) -> type:
    """A class to stand where the client wants tqdm's: it draws nothing, and tells how many bytes have come.

    The client keeps two bars of bytes, one of those that came and one of those on disk; what is ahead counts.
    """
    lock = threading.Lock()
    most = 0

    class Bar:
        format_dict: ClassVar[dict[str, Any]] = {}

        def __init__(self, *_: Any, total: int | None = None, initial: int = 0, unit: str = "", **__: Any) -> None:
            self.total, self.n, self._of_bytes = total, initial, unit == "B"

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def __getattr__(self, _: str) -> Callable[..., None]:
            return lambda *_, **__: None  # refresh, close, set_description and their like

        def update(self, n: int | None = 1) -> None:
            nonlocal most
            with lock:
                self.n += n or 0
                if self._of_bytes and self.n > most:
                    most = self.n
                    tell(most)

    return Bar
