"""The Hugging Face Hub: float models come from it, AWQ folders go to it.

What was uploaded the hub keeps by content; downloads are those of every command (`engine.download`).
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import huggingface_hub as client  # loads its parts, and reads its variables, at their first use
import structlog

from yaptext.engine import header
from yaptext.engine.bars import bars
from yaptext.engine.base import Role
from yaptext.engine.download import bring
from yaptext.engine.download_plan import Read, plan
from yaptext.engine.hub_client import Hub, Pause, cache, client_errors, hub_token, is_unanswered, reason_of
from yaptext.engine.underway import Progress
from yaptext.errors import QuantizeDelayed, QuantizeRefused, SettingsError
from yaptext.quantize import checkpoint
from yaptext.quantize.kept import TEMPLATES
from yaptext.settings import Settings

T = TypeVar("T")

WANTED = """config.json generation_config.json tokenizer* vocab* merges.txt special_tokens_map.json added_tokens.json
    *processor_config.json tekken.json *.model chat_template* *.jinja *.safetensors *.safetensors.index.json
    README.md LICEN[CS]E* licen[cs]e* NOTICE* USE_POLICY*"""
UNWANTED = ["*/*", "consolidated*", "adapter_*"]
"""Exports in other formats have folders of their own, and Mistral's repositories hold their weights twice. The one
folder that is wanted is that of more templates."""
_PEEKED = ["config.json", header.INDEX, "adapter_config.json"]
"""What says of a model what it is, beside its weights."""

_NO_TOKEN = "HF_AWQ_PUSH=1 needs HF_TOKEN: a token that may write"
_READ = re.compile(rf"[^/]+\.(safetensors(\.index\.json)?|bin)|{TEMPLATES}/.+")
"""Files that a loader reads because they are there."""

log = structlog.get_logger(__name__)


class Source(NamedTuple):
    """A float model on disk. `revision` is its commit on the hub, None for a folder of the user's own."""

    folder: Path
    revision: str | None


class Pushed(NamedTuple):
    """Where an upload is. `files` is how many its commit changed: with 0 all was there, and no commit was made."""

    url: str
    revision: str
    files: int


# --- from the hub


def download(source: str, settings: Settings, *, progress: Progress | None = None, pause: Pause = time.sleep) -> Source:
    """The model `source`, a hub id or a folder; of a hub id the files that quantizing needs, and no others.

    If the hub cannot be reached, a model that lies whole in the cache is taken. Raises `SettingsError` if the hub says
    no, `QuantizeRefused` for a model without weights, and `QuantizeDelayed`: one line with the model's name and what
    to do.
    """
    folder, local = Path(source), os.path.isdir(source)
    if not local:
        hub = _hub(settings, pause)
        wanted = partial(_wanted, source)
        attempt = partial(_or_cached, hub, source, WANTED.split(), _has_weights, lambda: plan(hub, source, wanted))
        found = hub.ask(source, "read", attempt)
        folder = found if isinstance(found, Path) else bring(hub, [found], progress=progress)[0]
    if not (folder / header.WHOLE).is_file() and not (folder / header.INDEX).is_file():
        raise QuantizeRefused(f"{source} has no model.safetensors, whole or in shards: name a model that has")
    if local:
        return Source(folder, None)
    log.info("hub.downloaded", repo=source, revision=folder.name)
    return Source(folder, folder.name)


def peek_config(source: str, settings: Settings, *, pause: Pause = time.sleep) -> dict[str, Any]:
    """The config.json of a hub id or a folder; of a hub id at most the index of its weights is fetched, too. Raises as
    `download`."""
    folder = Path(source)
    if not os.path.isdir(source):  # where Path.is_dir raises, in a folder that is closed to us, it is none
        if os.path.isfile(source):
            raise SettingsError(f"{source} is a file: name its folder, {folder.parent}")
        hub = _hub(settings, pause)
        fetch = partial(_snapshot, hub, source, _PEEKED, [])
        folder = hub.ask(source, "read", lambda: _or_cached(hub, source, ["config.json"], _has_config, fetch))
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise checkpoint.without_config(folder, source)
    return config


def cached_revision(source: str, settings: Settings) -> str | None:
    """The commit that `main` of `source` had when it was last seen, where the cache holds anything of it; else None.

    Makes no request and reads one file of 40 bytes. It loads only the client's constants, which takes 20 ms.
    """
    repo = cache(settings) / f"models--{source.replace('/', '--')}"
    try:
        revision = (repo / "refs" / "main").read_text().strip()
    except OSError:
        return None
    return revision if (repo / "snapshots" / revision).is_dir() else None


def _wanted(source: str, paths: Sequence[str], read: Read) -> list[str]:
    """Raises `QuantizeRefused` if the index names weights that the repository lacks: before the others are fetched."""
    from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

    if header.INDEX in paths:
        try:
            named = set(json.loads(read(header.INDEX))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            named = set()  # told when it has come
        if absent := sorted(named - set(paths)):
            raise checkpoint.lacking(source, absent[0])
    own = [path for path in paths if "/" not in path]
    found = filter_repo_objects(own, allow_patterns=WANTED.split(), ignore_patterns=UNWANTED)
    return [*found, *(path for path in paths if fnmatch(path, f"{TEMPLATES}/*.jinja"))]


def _snapshot(hub: Hub, source: str, patterns: list[str], unwanted: list[str], *, local: bool = False) -> Path:
    """By the client alone, without a word."""
    given: dict[str, Any] = {"cache_dir": hub.cache, "token": hub.api.token, "local_files_only": local}
    given |= {"allow_patterns": patterns, "ignore_patterns": unwanted, "tqdm_class": bars(lambda _: None)}
    return Path(client.snapshot_download(source, **given))


def _or_cached(
    hub: Hub, source: str, patterns: list[str], whole: Callable[[Path], bool], attempt: Callable[[], T]
) -> T | Path:
    """What `attempt` returns, or if the hub gave no answer, a folder of the cache that is `whole`."""
    try:
        return attempt()
    except Exception as error:  # any failure: a hub without an answer does not matter if none is needed
        if not is_unanswered(error):
            raise
        try:
            found = _snapshot(hub, source, patterns, UNWANTED, local=True)
        except client_errors().LocalEntryNotFoundError:
            raise error from error.__cause__
        if not whole(found):
            raise
        log.warning("hub.unreachable", repo=source, error=reason_of(error, hub.api.token), cached=found.name)
        return found


def _has_config(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _has_weights(folder: Path) -> bool:
    shards = {"model.safetensors"}
    if (index := folder / "model.safetensors.index.json").is_file():
        try:
            shards = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            return False
    return _has_config(folder) and all((folder / shard).is_file() for shard in shards)


# --- to the hub


def check(settings: Settings, roles: Iterable[Role] | None = None, *, pause: Pause = time.sleep) -> None:
    """Finds out before hours of work whether what is made of `roles` (default: all deployed) can be pushed.

    Does nothing without `HF_AWQ_PUSH`. What the hub's answers leave open counts as allowed. Raises `SettingsError`
    where a variable is missing or wrong, `QuantizeDelayed` where the hub cannot be asked.
    """
    if not settings.hf_awq_push:
        return
    deployed: dict[Role, bool] = {"chat": settings.chat_deployed, "tool": settings.tool_deployed}
    wanted = [role for role in deployed if deployed[role]] if roles is None else list(dict.fromkeys(roles))
    if wrong := _wrong(settings, wanted):
        raise SettingsError("\n".join(wrong))
    repos = {role: _repo(settings, role) for role in wanted}
    hub = _hub(settings, pause, writes=True)
    api = hub.api

    def is_there(repo: str) -> bool:
        try:
            api.auth_check(repo, write=True)
        except client_errors().HfHubHTTPError as error:
            if error.response.status_code != 404:
                raise
            return False
        return True

    account = hub.ask("the hub", "use", api.whoami)
    if _access(account).get("role") == "read":
        raise SettingsError("HF_TOKEN is a read token, and HF_AWQ_PUSH=1 needs one that may write")
    absent = []
    for role, repo in repos.items():
        if hub.ask(repo, "write to", partial(is_there, repo)):
            continue
        name = f"HF_AWQ_{role.upper()}_REPO={repo}"
        if not settings.hf_awq_allow_create:
            absent.append(f"{name} is not on the hub: create it, or set HF_AWQ_ALLOW_CREATE=1")
        elif reason := _may_not_create(account, repo.split("/")[0]):
            absent.append(f"{name} cannot be created: {reason}")
    if absent:
        raise SettingsError("\n".join(absent))


def _wrong(settings: Settings, roles: Sequence[Role]) -> list[str]:
    """What is missing or wrong in the settings of an upload, one line each: all faults at once."""
    lines: list[str] = []
    try:
        if not hub_token(settings):
            lines.append(_NO_TOKEN)
    except SettingsError as error:
        lines.append(str(error))
    repos: list[str] = []
    for role in roles:
        try:
            repos.append(_repo(settings, role))
        except SettingsError as error:
            lines.append(str(error))
    if len(repos) > len(set(repos)) and settings.chat_model != settings.tool_model:
        lines.append(f"HF_AWQ_CHAT_REPO and HF_AWQ_TOOL_REPO are both {repos[0]}, but the models differ")
    branch = settings.hf_awq_branch
    if not re.fullmatch(r"\w[\w./-]*", branch) or ".." in branch or branch.endswith(("/", ".", ".lock")):
        lines.append(f"HF_AWQ_BRANCH={branch!r} is not allowed: git has no such branches")
    return lines


def upload(
    folder: Path, role: Role, settings: Settings, *, progress: Progress | None = None, pause: Pause = time.sleep
) -> Pushed:
    """Brings the branch `HF_AWQ_BRANCH` of the role's repository to what `folder` holds, in one commit or in none.

    Files that the hub has are not sent again, so an interrupted upload continues where it stopped. Weights and
    templates that `folder` does not have are deleted: a loader would also read them. At the end every hash of the hub
    is compared with the file here. `progress` moves file by file. Raises `SettingsError` if the hub says no, else
    `QuantizeDelayed`, also if the hub then holds other bytes.
    """
    repo, branch, message = _repo(settings, role), settings.hf_awq_branch, _message(folder, role, settings)
    hub = _hub(settings, pause, writes=True)
    api = hub.api
    tell = progress or log_progress("hub.uploading", repo)

    def changes(revision: str) -> list[client.CommitOperationAdd | client.CommitOperationDelete]:
        """What the hub has not or has otherwise, and what a loader would read that it alone has."""
        seen = api.verify_repo_checksums(repo, revision=revision, local_dir=folder)
        ours = sorted(seen.extra_paths + [file["path"] for file in seen.mismatches])
        stale = [name for name in seen.missing_paths if _READ.fullmatch(name)]
        adds = [client.CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in ours]
        return [*adds, *(client.CommitOperationDelete(name) for name in stale)]

    def push() -> Pushed:
        if settings.hf_awq_allow_create:
            api.create_repo(repo, private=settings.hf_awq_private, exist_ok=True)
        if branch != "main":
            api.create_branch(repo, branch=branch, exist_ok=True)
        operations = changes(branch)
        if not operations:
            head = str(api.model_info(repo, revision=branch).sha)
            return Pushed(f"{api.endpoint}/{repo}/commit/{head}", head, 0)
        files = [operation for operation in operations if isinstance(operation, client.CommitOperationAdd)]
        done, total = 0, sum(file.upload_info.size for file in files)
        tell(done, total)
        for file in files:  # one by one: the client reports no progress within a call
            api.preupload_lfs_files(repo, [file], revision=branch)
            tell(done := done + file.upload_info.size, total)
        # Not upload_folder: with hf_xet it may make several commits, and between two the branch holds half a model.
        commit = api.create_commit(repo, operations, commit_message=message, revision=branch)
        if wrong := ", ".join(operation.path_in_repo for operation in changes(commit.oid)):
            raise QuantizeDelayed(f"{repo} holds other bytes than {folder} at {commit.oid}: {wrong}")
        return Pushed(commit.commit_url, commit.oid, len(operations))

    pushed = hub.ask(repo, "write to", push)
    log.info("hub.uploaded", repo=repo, branch=branch, **pushed._asdict())
    return pushed


def _repo(settings: Settings, role: Role) -> str:
    name = f"HF_AWQ_{role.upper()}_REPO"
    repo = settings.hf_awq_chat_repo if role == "chat" else settings.hf_awq_tool_repo
    if not repo:
        raise SettingsError(f"HF_AWQ_PUSH=1 needs {name}: where to push the {role} model")
    # The hub's rules: https://huggingface.co/docs/hub/repositories-settings, as its client checks them.
    if not re.fullmatch(r"\w[\w.-]*/\w([\w.-]*\w)?", repo, re.ASCII) or re.search(r"--|\.\.|\.git$|^.{97}", repo):
        raise SettingsError(f"{name}={repo!r} is not allowed: write owner/name, of letters, digits, '-', '_' and '.'")
    if repo in (settings.chat_model, settings.tool_model):
        raise SettingsError(f"{name}={repo} is a float model's own repository: its weights would be replaced")
    return repo


def _message(folder: Path, role: Role, settings: Settings) -> str:
    given = settings.hf_awq_commit_msg_chat if role == "chat" else settings.hf_awq_commit_msg_tool
    model = settings.chat_model if role == "chat" else settings.tool_model
    how = peek_config(str(folder), settings).get("quantization_config", {})
    name = Path(model).name if model else "the demo model"  # no more than its name: the message may be public
    return given or f"Upload {name} as AWQ, {how.get('bits')} bits in groups of {how.get('group_size')}"


def _access(account: dict[str, Any]) -> dict[str, Any]:
    """What whoami reports about a token: its `role` is read, write or fineGrained. Empty for other kinds of login."""
    access: dict[str, Any] = (account.get("auth") or {}).get("accessToken") or {}
    return access


def _may_not_create(account: dict[str, Any], owner: str) -> str | None:
    access, name = _access(account), str(account.get("name"))
    if access.get("role") == "fineGrained":
        scopes = (access.get("fineGrained") or {}).get("scoped")
        owners = [s["entity"].get("name", "").lower() for s in scopes or [] if "repo.write" in s["permissions"]]
        allowed = scopes is None or owner.lower() in owners
        return None if allowed else f"HF_TOKEN has no permission repo.write for {owner}"
    roles = {org["name"].lower(): org.get("roleInOrg") for org in account.get("orgs", [])}
    if owner.lower() not in (name.lower(), *roles):
        return f"{name}, whose token HF_TOKEN is, is no member of {owner}"
    return f"{name} may only read in {owner}" if roles.get(owner.lower()) == "read" else None


# --- the client


def _hub(settings: Settings, pause: Pause, *, writes: bool = False) -> Hub:
    if writes and not hub_token(settings):
        raise SettingsError(_NO_TOKEN)
    return Hub(settings, SettingsError, QuantizeDelayed, pause=pause)


# --- progress


def log_progress(
    event: str, repo: str, *, every_s: float = 10, clock: Callable[[], float] = time.monotonic
) -> Progress:
    """A `Progress` for the journal: a line in `every_s` and one at the end. `left_s` goes by this run's mean speed."""
    first: tuple[float, int] | None = None
    last = float("-inf")

    def tell(done: int, total: int) -> None:
        nonlocal first, last
        now = clock()
        first = first or (now, done)
        if now - last < every_s and done < total:
            return
        last = now
        came = done - first[1]
        left_s = round((total - done) * (now - first[0]) / came) if came else None
        log.info(event, repo=repo, done_bytes=done, total_bytes=total, left_s=left_s)

    return tell
