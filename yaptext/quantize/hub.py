"""The Hugging Face Hub: float models come from it, AWQ folders go to it.

The client keeps what it fetched file by file: a later run goes on after the last whole file, and a stream that breaks
goes on where it broke while the process lives. What was uploaded the hub keeps by content.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import huggingface_hub as client  # loads its parts, and reads its variables, at their first use
import structlog

from yaptext.engine.base import Role
from yaptext.engine.weights import hub_token
from yaptext.errors import QuantizeDelayed, QuantizeRefused, SettingsError
from yaptext.settings import Settings

T = TypeVar("T")
Pause = Callable[[float], None]
Progress = Callable[[int, int], None]
"""Called with the bytes done, what was there before included, and the bytes in all; never by two threads at once.
What it raises ends the transfer after the piece it is at: a signal alone waits for every file that is on its way."""

PAUSES_S = (5.0, 20.0)
"""Between the three tries."""
SILENCE_S = 120.0
"""A hub that says nothing for this long counts as unreachable; of itself the client would wait for ever."""
WANTED = """config.json generation_config.json tokenizer* vocab* merges.txt special_tokens_map.json added_tokens.json
    *.model chat_template* *.jinja *.safetensors *.safetensors.index.json README.md LICEN[CS]E* licen[cs]e* NOTICE*
    USE_POLICY*"""
UNWANTED = ["*/*", "consolidated*", "adapter_*"]
"""Exports in other formats have folders of their own, and Mistral's repositories hold their weights twice."""

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

    Without `progress` the journal gets a line every ten seconds. Where the hub cannot be reached, a model that lies
    whole in the cache is taken. Raises `SettingsError` if the hub says no, `QuantizeRefused` for a model without
    weights, and `QuantizeDelayed`: one line with the model's name and what to do.
    """
    folder, local = Path(source), os.path.isdir(source)
    if not local:
        tell = progress or log_progress("hub.downloading", source)
        folder = _snapshot(source, settings, WANTED.split(), _has_weights, tell, pause)
    if not _has_weights(folder):
        raise QuantizeRefused(f"{source} has no model.safetensors, whole or in shards: name a model that has")
    if local:
        return Source(folder, None)
    log.info("hub.downloaded", repo=source, revision=folder.name)
    return Source(folder, folder.name)


def peek_config(source: str, settings: Settings, *, pause: Pause = time.sleep) -> dict[str, Any]:
    """The config.json of a hub id or a folder; of a hub id nothing else is fetched. Raises as `download`."""
    folder = Path(source)
    if not os.path.isdir(source):  # where Path.is_dir raises, in a folder that is closed to us, it is none
        folder = _snapshot(source, settings, ["config.json"], _has_config, lambda done, total: None, pause)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise QuantizeRefused(f"{source} has no config.json that can be read: it is no model to quantize")
    return config


def cached_revision(source: str, settings: Settings) -> str | None:
    """The commit that `main` of `source` had when it was last seen, where the cache holds anything of it; else None.

    Asks nobody and reads one file of 40 bytes; the client's constants, all that is loaded for it, take 20 ms.
    """
    repo = _cache(settings) / f"models--{source.replace('/', '--')}"
    try:
        revision = (repo / "refs" / "main").read_text().strip()
    except OSError:
        return None
    return revision if (repo / "snapshots" / revision).is_dir() else None


def _snapshot(
    source: str, settings: Settings, wanted: list[str], whole: Callable[[Path], bool], tell: Progress, pause: Pause
) -> Path:
    api, cache = _client(settings), _cache(settings)
    patterns: dict[str, Any] = {"allow_patterns": wanted, "ignore_patterns": UNWANTED}
    fetch: Callable[..., Any] = partial(client.snapshot_download, source, cache_dir=cache, token=api.token, **patterns)

    def fetch_missing() -> Path:
        plan = fetch(dry_run=True)
        total = sum(file.file_size or 0 for file in plan)
        missing = sum(file.file_size or 0 for file in plan if file.will_download)
        cache.mkdir(parents=True, exist_ok=True)
        if missing > (free := shutil.disk_usage(cache).free):
            raise QuantizeDelayed(f"{source} needs {missing} bytes more in {cache}, and {free} are free")
        done = total - missing

        def come(bytes_: int) -> None:
            nonlocal done
            done = min(total - missing + bytes_, total)
            tell(done, total)

        if missing:
            tell(done, total)
        folder = Path(fetch(tqdm_class=_bars(come)))
        if done < total:  # files of the same content come once
            tell(total, total)
        return folder

    def fetch_or_find() -> Path:
        try:
            return fetch_missing()
        except Exception as error:  # whatever it was: a hub that gave no answer does not stop who needs none
            if not _unanswered(error):
                raise
            try:
                found = Path(fetch(local_files_only=True))
            except client.errors.LocalEntryNotFoundError:
                raise error from error.__cause__
            if not whole(found):
                raise
            log.warning("hub.unreachable", repo=source, error=_reason(error, api), cached=found.name)
            return found

    return _ask(api, source, "read", fetch_or_find, pause)


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
    wanted = [role for role in deployed if deployed[role]] if roles is None else list(roles)
    repos = {role: _repo(settings, role) for role in wanted}
    if len(repos) > len(set(repos.values())) and settings.chat_model != settings.tool_model:
        raise SettingsError(f"HF_AWQ_CHAT_REPO and HF_AWQ_TOOL_REPO are both {repos['chat']}, but the models differ")
    branch = settings.hf_awq_branch
    if not re.fullmatch(r"\w[\w./-]*", branch) or ".." in branch or branch.endswith(("/", ".", ".lock")):
        raise SettingsError(f"HF_AWQ_BRANCH={branch!r} is not allowed: git has no such branches")
    api = _client(settings, writes=True)

    def is_there(repo: str) -> bool:
        try:
            api.auth_check(repo, write=True)
        except client.errors.HfHubHTTPError as error:
            if error.response.status_code != 404:
                raise
            return False
        return True

    account = _ask(api, "the hub", "use", api.whoami, pause)
    if _access(account).get("role") == "read":
        raise SettingsError("HF_TOKEN is a read token, and HF_AWQ_PUSH=1 needs one that may write")
    for role, repo in repos.items():
        if _ask(api, repo, "write to", partial(is_there, repo), pause):
            continue
        name = f"HF_AWQ_{role.upper()}_REPO={repo}"
        if not settings.hf_awq_allow_create:
            raise SettingsError(f"{name} is not on the hub: create it, or set HF_AWQ_ALLOW_CREATE=1")
        if reason := _may_not_create(account, repo.split("/")[0]):
            raise SettingsError(f"{name} cannot be created: {reason}")


def upload(
    folder: Path, role: Role, settings: Settings, *, progress: Progress | None = None, pause: Pause = time.sleep
) -> Pushed:
    """Brings the branch `HF_AWQ_BRANCH` of the role's repository to what `folder` holds, in one commit or in none.

    What the hub has is not sent again, so a broken upload goes on where it broke. Weights that `folder` has not are
    deleted: a loader would read them, too. At the end every hash that the hub names is compared with the file here.
    `progress` moves file by file. Raises `SettingsError` if the hub says no, else `QuantizeDelayed`, also where the hub
    then holds other bytes.
    """
    repo, branch, message = _repo(settings, role), settings.hf_awq_branch, _message(folder, role, settings)
    api = _client(settings, writes=True)
    tell = progress or log_progress("hub.uploading", repo)

    def changes(revision: str) -> list[client.CommitOperationAdd | client.CommitOperationDelete]:
        """What the hub has not or has otherwise, and the weights that it alone has."""
        seen = api.verify_repo_checksums(repo, revision=revision, local_dir=folder)
        ours = sorted(seen.extra_paths + [file["path"] for file in seen.mismatches])
        stale = [name for name in seen.missing_paths if re.fullmatch(r"[^/]+\.(safetensors(\.index\.json)?|bin)", name)]
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
        for file in files:  # one by one: the client tells nothing of how far it is within a call
            api.preupload_lfs_files(repo, [file], revision=branch)
            tell(done := done + file.upload_info.size, total)
        # Not upload_folder: with hf_xet it may make several commits, and between two the branch holds half a model.
        commit = api.create_commit(repo, operations, commit_message=message, revision=branch)
        if wrong := ", ".join(operation.path_in_repo for operation in changes(commit.oid)):
            raise QuantizeDelayed(f"{repo} holds other bytes than {folder} at {commit.oid}: {wrong}")
        return Pushed(commit.commit_url, commit.oid, len(operations))

    pushed = _ask(api, repo, "write to", push, pause)
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
    """What whoami tells of a token: its `role` is read, write or fineGrained. Empty for other kinds of login."""
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


def _client(settings: Settings, *, writes: bool = False) -> client.HfApi:
    token = hub_token(settings)
    if writes and not token:
        raise SettingsError("HF_AWQ_PUSH=1 needs HF_TOKEN: a token that may write")
    _cache(settings)  # sets the client's variables before they are read
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()  # where they had been read already
    logging.getLogger("huggingface_hub").handlers.clear()  # ours, at the root, writes its lines already
    for quoting in ("huggingface_hub", "httpx2"):  # signed addresses; what went wrong is told in `_ask`
        logging.getLogger(quoting).setLevel(logging.ERROR)
    return client.HfApi(token=token)


def _cache(settings: Settings) -> Path:
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    if settings.hf_home:
        os.environ["HF_HOME"] = str(settings.hf_home)
    if settings.hf_xet_high_performance:
        os.environ["HF_XET_HIGH_PERFORMANCE"] = "1"
    from huggingface_hub import constants

    if settings.hf_home and settings.hf_home.expanduser() != Path(constants.HF_HOME):
        return settings.hf_home.expanduser() / "hub"  # someone in this process used the client before
    return Path(constants.HF_HUB_CACHE)


def _ask(api: client.HfApi, repo: str, doing: str, attempt: Callable[[], T], pause: Pause) -> T:
    """What `attempt` returns, tried three times while its errors may pass. Raises `SettingsError` where the hub says no
    and `QuantizeDelayed` else, both without a cause: the client's errors quote signed addresses."""
    import httpx2  # what the client speaks HTTP with

    for wait in (*PAUSES_S, None):
        hooks = client.get_session().event_hooks["request"]
        if _limit_silence not in hooks:
            hooks.append(_limit_silence)
        try:
            return attempt()
        except (OSError, RuntimeError, ValueError, httpx2.HTTPError) as error:  # the roots of some dozens
            reason = _reason(error, api)
            if wait is None or not _may_pass(error):
                line = _line(error, reason, repo, doing, known=bool(api.token))
                raise (SettingsError if _stays(error) else QuantizeDelayed)(line) from None
        log.warning("hub.retry", repo=repo, error=reason, pause_s=wait)
        pause(wait)
    raise AssertionError("the last try returns or raises")


def _limit_silence(request: Any) -> None:
    limits = request.extensions.get("timeout") or {}
    steps = ("connect", "read", "write", "pool")
    request.extensions["timeout"] = {step: limits.get(step) or SILENCE_S for step in steps}


def _links(error: BaseException) -> list[BaseException]:
    """The error and its causes, the first cause last."""
    return [error, *(_links(error.__cause__) if error.__cause__ else [])]


def _has(error: BaseException, *types: type[BaseException]) -> bool:
    return any(isinstance(link, types) for link in _links(error))


def _status(error: BaseException) -> int | None:
    """The HTTP status of the hub's answer, None where none came."""
    answers = [link.response for link in _links(error) if isinstance(link, client.errors.HfHubHTTPError)]
    return answers[0].status_code if answers else None


def _unanswered(error: BaseException) -> bool:
    return _may_pass(error) or _has(error, client.errors.OfflineModeIsEnabled)


def _may_pass(error: BaseException) -> bool:
    import httpx2

    if status := _status(error):
        return status in (408, 409, 412, 425, 429) or status >= 500
    files = [link for link in _links(error) if isinstance(link, OSError)]
    if any(link.filename or link.errno in (errno.ENOSPC, errno.EDQUOT) for link in files):
        return False
    # hf_xet raises RuntimeErrors, and a file that came too short is an OSError.
    passing = _has(error, httpx2.TransportError, RuntimeError, OSError)
    return passing and not _has(error, client.errors.OfflineModeIsEnabled)


def _stays(error: BaseException) -> bool:
    """A later try ends the same way: the hub says no, or there is no such name, or the cache is no folder of ours."""
    wrong = (client.errors.HFValidationError, FileExistsError, NotADirectoryError, PermissionError)
    return not _unanswered(error) and (_status(error) is not None or _has(error, *wrong))


def _reason(error: BaseException, api: client.HfApi) -> str:
    last = _links(error)[-1]
    text = f"{type(last).__name__}: {last}"
    for link in _links(error):
        if isinstance(link, client.errors.HfHubHTTPError):
            text = f"{link.response.status_code} {link.server_message or link.response.reason_phrase}"
    text = re.sub(r"\?\S+", "", text)  # what follows the ? of an address may be a signature
    return text.replace(str(api.token or "\0"), "***").splitlines()[0][:300]


def _line(error: BaseException, reason: str, repo: str, doing: str, *, known: bool) -> str:
    """What the user reads; `known` says that HF_TOKEN is set."""
    if _has(error, client.errors.HFValidationError):
        return f"{repo} is neither a folder nor the name of a model on the hub"
    if _has(error, client.errors.GatedRepoError):
        return f"{repo} is gated: accept its terms on its page, and set HF_TOKEN to a token of that account"
    if _status(error) == 401 and known:
        return "HF_TOKEN is not valid: the hub does not know it"
    if _status(error) == 401 or _has(error, client.errors.RepositoryNotFoundError):
        private = "HF_TOKEN may not see it" if known else "is private and needs HF_TOKEN"
        return f"{repo} is not on the hub, or {private}: check the name"
    if _status(error) == 403:
        return f"HF_TOKEN may not {doing} {repo} ({reason})"
    if _unanswered(error):
        return f"the hub cannot be reached for {repo}: {reason}"
    return f"cannot {doing} {repo}: {reason}"


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


def _bars(tell: Callable[[int], None]) -> type:
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
