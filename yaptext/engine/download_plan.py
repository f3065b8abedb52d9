"""What a command wants of a repository on the hub, file by file, with what of it is on this disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub as client

from yaptext.engine.hub_client import Hub, client_errors

Read = Callable[[str], bytes]
Choose = Callable[[Sequence[str], Read], list[str]]
"""Of a repository's paths those that are wanted. The second argument reads one of them: for an index."""


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
        there_bytes=total - sum(file.size - part_bytes(at, file) for file in missing),
        is_linked=all(os.path.exists(at.snapshot / file.path) for file in files),
    )


def _file(entry: Any) -> File:
    from huggingface_hub import constants

    is_xet = bool(entry.xet_hash) and not constants.HF_HUB_DISABLE_XET and find_spec("hf_xet") is not None
    return File(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id, bool(entry.lfs), is_xet)


def part_bytes(plan: Plan, file: File) -> int:
    """How many bytes of a file an earlier transfer left; 0 if they cannot be continued."""
    try:
        there = 0 if file.is_xet else os.stat(plan.part(file)).st_size
    except OSError:
        return 0
    return there if there <= file.size else 0
