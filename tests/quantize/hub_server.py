"""A hub in memory on a loopback port: what the hub client asks of the real one, and failures when asked for.

Plain sockets of the standard library, because a connection has to break in the middle of a body. Routes, codes and
headers are those that huggingface_hub 2.4 uses with `HF_HUB_DISABLE_XET=1`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import SO_LINGER, SOL_SOCKET
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_aTokenOfTheTest"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Account:
    """Whose token it is. `role` is read, write or fineGrained; `orgs` maps names to roles, `scopes` names to
    permissions."""

    name: str
    role: str = "write"
    orgs: dict[str, str] = field(default_factory=dict)
    scopes: dict[str, list[str]] = field(default_factory=dict)

    def may_read(self, owner: str) -> bool:
        return owner == self.name or owner in self.orgs

    def may_create(self, owner: str) -> bool:
        if self.role == "fineGrained":
            return "repo.write" in self.scopes.get(owner, [])
        return self.role == "write" and (owner == self.name or self.orgs.get(owner, "read") != "read")

    def may_write(self, repo: str) -> bool:
        return self.may_create(repo.split("/", maxsplit=1)[0]) or "repo.write" in self.scopes.get(repo, [])


@dataclass
class Stored:
    data: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        return sha256(self.data) if self.lfs else git_sha1(self.data)

    def entry(self, path: str) -> dict[str, Any]:
        pointer = git_sha1(b"pointer " + self.oid.encode()) if self.lfs else self.oid
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(self.data), "oid": pointer}
        if self.lfs:
            entry["lfs"] = {"oid": self.oid, "size": len(self.data), "pointerSize": 134}
        return entry


@dataclass
class Commit:
    sha: str
    message: str
    files: dict[str, Stored]


@dataclass
class Repo:
    """`gated` repositories tell anyone what they hold, and give files only to the accounts in `admitted`. `names_xet`:
    its list of files tells hashes of Xet storage for the large ones."""

    private: bool = False
    names_xet: bool = False
    gated: bool = False
    admitted: set[str] = field(default_factory=set)
    branches: dict[str, list[Commit]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)

    def commit(self, branch: str, message: str, files: dict[str, Stored]) -> Commit:
        history = self.branches.setdefault(branch, [])
        state = json.dumps([message, len(history), {path: file.oid for path, file in files.items()}])
        history.append(Commit(hashlib.sha1(state.encode()).hexdigest(), message, files))
        return history[-1]

    def at(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        commits = [commit for history in self.branches.values() for commit in history]
        return next((commit for commit in commits if commit.sha == revision), None)


@dataclass
class Fault:
    """Happens to the next `times` requests whose `METHOD path` matches: a `status`; a `cut` after so many bytes of the
    body, by a reset where `reset`, of the answer's body where `late`; or silence, until the hub closes."""

    pattern: str
    times: int = 1
    status: int | None = None
    cut: int | None = None
    reset: bool = False
    late: bool = False
    message: str = "out of order"
    retry_after: str | None = None


@dataclass
class Request:
    method: str
    path: str
    range: str | None


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, code: str = "", **fields: str) -> None:
        super().__init__(message)
        self.status, self.code, self.fields = status, code, fields


class HubServer:
    """`with HubServer() as hub:` listens on `hub.url`. Tests fill `accounts` and `repos`, and read `requests`."""

    def __init__(self) -> None:
        self._port = 0
        self.closing = threading.Event()
        self.reset()
        self._listen()

    def reset(self) -> None:
        """A hub without accounts, repositories, faults and memory."""
        self.accounts: dict[str, Account] = {}
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.flipped: set[str] = set()
        """Files that lose a bit when they are stored."""
        self.bytes_per_s: int | None = None
        """Of the body of one answer; None: as fast as it goes."""
        self.knows_ranges = True

    def __enter__(self) -> HubServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @contextmanager
    def down(self) -> Iterator[None]:
        """Nobody listens on the port."""
        self._close()
        try:
            yield
        finally:
            self._listen()

    def add(self, name: str, files: dict[str, bytes], **traits: Any) -> Repo:
        """A repository with one commit, its safetensors in LFS."""
        repo = self.repos[name] = Repo(**traits)
        stored = {path: Stored(data, path.endswith(".safetensors")) for path, data in files.items()}
        repo.commit("main", "initial commit", {".gitattributes": Stored(b"", False), **stored})
        return repo

    def asked(self, pattern: str) -> list[Request]:
        return [request for request in self.requests if re.search(pattern, f"{request.method} {request.path}")]

    def fault(self, request: Request) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.pattern, f"{request.method} {request.path}"):
                fault.times -= 1
                return fault
        return None

    def wait_for_the_end(self) -> None:
        self.closing.wait(60)

    def _listen(self) -> None:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = _Server(("127.0.0.1", self._port), handler)
        self._port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def _close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def shutdown_request(self, request: Any) -> None:
        self.close_request(request)  # without the orderly end that would come before a reset


class _Handler(BaseHTTPRequestHandler):
    """One connection; its methods are the routes."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for an acknowledgement

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.request_of = Request(self.command, unquote(urlsplit(self.path).path), self.headers.get("Range"))
        self.hub.requests.append(self.request_of)
        self.fault = self.hub.fault(self.request_of)
        length = int(self.headers.get("Content-Length") or 0)
        try:
            if self.fault and self.fault.status is None and self.fault.cut is None:
                self.hub.wait_for_the_end()
                return self._cut()
            if self.fault and self.fault.cut is not None and self.command != "GET" and not self.fault.late:
                self.rfile.read(self.fault.cut)
                return self._cut()
            self.body = self.rfile.read(length)
            if self.fault and self.fault.status:
                raise Refused(self.fault.status, self.fault.message, retry_after=self.fault.retry_after or "")
            self._route()
        except Refused as refused:
            headers = {"X-Error-Code": refused.code} if refused.code else {}
            if after := refused.fields.pop("retry_after", ""):
                headers["Retry-After"] = after
            self._send(refused.status, json.dumps({"error": str(refused), **refused.fields}).encode(), headers)
        except ConnectionError:
            self.close_connection = True  # the client is gone

    do_HEAD = do_POST = do_PUT = do_GET

    def _route(self) -> None:
        line = f"{self.command} {self.request_of.path}"
        for pattern, route in ROUTES:
            if match := re.fullmatch(pattern, line):
                answer = route(self, **match.groupdict())
                if answer is not None:
                    self._send(200, json.dumps(answer).encode())
                return
        raise Refused(404, f"no such route: {line}")

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault and self.fault.cut is not None:
            self.wfile.write(body[: self.fault.cut])
            return self._cut()
        if self.hub.bytes_per_s is None:
            self.wfile.write(body)
            return
        for at in range(0, len(body), piece := max(1, self.hub.bytes_per_s // 20)):
            self.wfile.write(body[at : at + piece])
            if self.hub.closing.wait(0.05):
                return self._cut()

    def _cut(self) -> None:
        self.close_connection = True
        if self.fault and self.fault.reset:
            self.connection.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))

    # --- who asks, and for what

    def _account(self) -> Account | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        account = self.hub.accounts.get(header.removeprefix("Bearer "))
        if account is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        return account

    def _repo(self, name: str, *, write: bool = False) -> Repo:
        account, repo = self._account(), self.hub.repos.get(name)
        if repo is None or (repo.private and not (account and account.may_read(name.split("/", maxsplit=1)[0]))):
            raise Refused(404 if account else 401, "Repository not found", "RepoNotFound")
        if write and not (account and account.may_write(name)):
            raise Refused(403, "You don't have write permission on this repository")
        return repo

    def _commit(self, repo: Repo, revision: str) -> Commit:
        if (commit := repo.at(revision)) is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # --- the routes

    def whoami(self) -> dict[str, Any]:
        if (account := self._account()) is None:
            raise Refused(401, "Invalid username or password.")
        token: dict[str, Any] = {"displayName": "test", "role": account.role}
        if account.role == "fineGrained":
            scoped = [{"entity": {"name": name}, "permissions": given} for name, given in account.scopes.items()]
            token["fineGrained"] = {"global": [], "scoped": scoped}
        orgs = [{"type": "org", "name": name, "roleInOrg": role} for name, role in account.orgs.items()]
        return {"name": account.name, "orgs": orgs, "auth": {"type": "access_token", "accessToken": token}}

    def create(self) -> dict[str, Any]:
        asked, account = json.loads(self.body), self._account()
        owner = asked["organization"]
        if account is None or not account.may_create(owner):
            raise Refused(403, f"You don't have the rights to create a model under the namespace {owner}")
        name = f"{owner}/{asked['name']}"
        if name in self.hub.repos:
            raise Refused(409, "You already created this model repo", url=f"{self.hub.url}/{name}")
        self.hub.add(name, {}, private=asked.get("visibility") == "private")
        return {"url": f"{self.hub.url}/{name}", "name": name}

    def info(self, name: str, revision: str = "main") -> dict[str, Any]:
        repo = self._repo(name)
        commit = self._commit(repo, revision)
        siblings = [{"rfilename": path} for path in commit.files]
        return {"id": name, "sha": commit.sha, "private": repo.private, "gated": repo.gated, "siblings": siblings}

    def tree(self, name: str, revision: str) -> None:
        repo = self._repo(name)
        entries = [file.entry(path) for path, file in self._commit(repo, revision).files.items()]
        for entry in entries:
            if repo.names_xet and "lfs" in entry:
                entry["xetHash"] = sha256(entry["oid"].encode())
        self._send(200, json.dumps(entries).encode())

    def auth_check(self, name: str, write: str) -> dict[str, Any]:
        self._repo(name, write=bool(write))
        return {}

    def branch(self, name: str, branch: str) -> dict[str, Any]:
        repo = self._repo(name, write=True)
        if branch in repo.branches:
            raise Refused(409, "Reference already exists")
        repo.branches[branch] = list(repo.branches["main"])
        return {}

    def validate_yaml(self) -> dict[str, Any]:
        return {"errors": [], "warnings": []}

    def preupload(self, name: str, revision: str) -> dict[str, Any]:
        there = self._commit(self._repo(name, write=True), revision).files
        files = []
        for file in json.loads(self.body)["files"]:
            lfs = file["path"].endswith(".safetensors") or file["size"] > 10_000_000
            entry = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if file["path"] in there:
                entry["oid"] = there[file["path"]].oid
            files.append(entry)
        return {"files": files}

    def batch(self, name: str) -> dict[str, Any]:
        repo = self._repo(name, write=True)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            entry = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in repo.objects:
                href = f"{self.hub.url}/storage/{name}/{asked['oid']}?signature=SIGNED"
                entry["actions"] = {"upload": {"href": href}, "verify": {"href": f"{self.hub.url}/{name}/verify"}}
            objects.append(entry)
        return {"transfer": "basic", "objects": objects}

    def put(self, name: str, oid: str) -> dict[str, Any]:
        if sha256(self.body) != oid:
            raise Refused(400, "the content has another hash")
        self.hub.repos[name].objects[oid] = self.body
        return {}

    def verify(self, name: str) -> dict[str, Any]:
        asked = json.loads(self.body)
        if asked["oid"] not in self._repo(name, write=True).objects:
            raise Refused(404, "no such object")
        return {}

    def commit(self, name: str, revision: str) -> dict[str, Any]:
        repo = self._repo(name, write=True)
        files = dict(self._commit(repo, revision).files)
        message = ""
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            match item["key"]:
                case "header":
                    message = value["summary"]
                case "file":
                    files[value["path"]] = Stored(base64.b64decode(value["content"]), False)
                case "lfsFile":
                    if value["oid"] not in repo.objects:
                        raise Refused(400, f"{value['path']} was not uploaded")
                    files[value["path"]] = Stored(repo.objects[value["oid"]], True)
                case "deletedFile":
                    del files[value["path"]]
        for path in self.hub.flipped & set(files):
            data = files[path].data
            files[path] = Stored(bytes([data[0] ^ 1]) + data[1:], files[path].lfs)
        sha = repo.commit(revision, message, files).sha
        return {"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha}

    def resolve(self, name: str, revision: str, path: str) -> None:
        repo, account = self._repo(name), self._account()
        if repo.gated and (account is None or account.name not in repo.admitted):
            raise Refused(403 if account else 401, f"Access to model {name} is restricted", "GatedRepo")
        commit = self._commit(repo, revision)
        if path not in commit.files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        file = commit.files[path]
        headers = {"ETag": f'"{file.oid}"', "X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
        body, status = file.data, 200
        if self.request_of.range and self.hub.knows_ranges:
            first, last = self.request_of.range.removeprefix("bytes=").split("-")
            start, end = int(first), min(int(last or len(body)), len(body) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(body)}"
            body, status = body[start : end + 1], 206
        self._send(status, body, headers)


_REPO = "(?P<name>[^/]+/[^/]+)"
ROUTES: list[tuple[str, Callable[..., dict[str, Any] | None]]] = [
    ("GET /api/whoami-v2", _Handler.whoami),
    ("POST /api/repos/create", _Handler.create),
    ("POST /api/validate-yaml", _Handler.validate_yaml),
    (f"GET /api/models/{_REPO}", _Handler.info),
    (f"GET /api/models/{_REPO}/revision/(?P<revision>.+)", _Handler.info),
    (f"GET /api/models/{_REPO}/tree/(?P<revision>.+)", _Handler.tree),
    (f"GET /api/models/{_REPO}/auth-check(?P<write>/write)?", _Handler.auth_check),
    (f"POST /api/models/{_REPO}/branch/(?P<branch>.+)", _Handler.branch),
    (f"POST /api/models/{_REPO}/preupload/(?P<revision>.+)", _Handler.preupload),
    (f"POST /api/models/{_REPO}/commit/(?P<revision>.+)", _Handler.commit),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    (f"PUT /storage/{_REPO}/(?P<oid>[0-9a-f]+)", _Handler.put),
    (f"POST /{_REPO}/verify", _Handler.verify),
    (f"(HEAD|GET) /{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]
