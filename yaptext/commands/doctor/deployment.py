"""Whose settings are examined: the unit's, as systemd would start it, or those of this shell."""

from __future__ import annotations

import os
import re
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from yaptext.commands.doctor import env_file, unit_file
from yaptext.commands.doctor.env_file import EnvFile
from yaptext.commands.doctor.machine import Machine
from yaptext.commands.doctor.unit_file import Unit
from yaptext.errors import SettingsError
from yaptext.secrets import SECRETS
from yaptext.settings import DEFAULT_API_KEY, Settings

ENV_FILE = "/etc/yap-text/yap-text.env"
_TOKENS = ("HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "HUGGINGFACE_TOKEN")
_USER = re.compile(r"(?<=://)[^/@\s]*@")
_LEAST_SECRET = 4
T = TypeVar("T")


class Unknown(Exception):
    """A check cannot be made; the text says why."""


class Deployment:
    """One machine, one set of settings. Threads may share it."""

    def __init__(self, machine: Machine, *, offline: bool = False, shell: bool = False) -> None:
        """`shell` takes the settings of this process even if a unit is installed."""
        self.machine, self.offline = machine, offline
        self._lock = threading.Lock()
        self._known: dict[Any, Future[Any]] = {}
        self.closed: list[Path] = []
        """Files with settings that this user may not read."""
        self.installed = None if shell else self._read_unit(unit_file.SERVICE)
        """The unit whose settings these are; None: the shell's."""
        self.socket = self._read_unit(unit_file.SOCKET) if self.installed else None
        self.env_file: EnvFile | None = None
        self.environ: Mapping[str, str] = machine.environ
        if self.installed is not None:
            self.environ = self._of_unit(self.installed)
        self.refusals: list[str] = []
        self.loaded = self._load()

    def _read_unit(self, name: str) -> Unit | None:
        try:
            return unit_file.read(self.machine, name)
        except OSError:
            return None

    def _of_unit(self, unit: Unit) -> dict[str, str]:
        """What systemd would put into the environment, with the credentials instead of their files."""
        values = unit.environment()
        for named in unit.values("EnvironmentFile"):
            content = self._content(Path(named.removeprefix("-")))
            if content is not None:
                parsed = env_file.parse(content)
                values |= parsed.values
                if self.env_file is None:
                    self.env_file = parsed
        for key in ("StateDirectory", "CacheDirectory"):
            if name := unit.value(key):
                folder = {"StateDirectory": "/var/lib", "CacheDirectory": "/var/cache"}[key]
                values[f"{key.removesuffix('Directory').upper()}_DIRECTORY"] = f"{folder}/{name}"
        for name, path in unit.credentials().items():
            if name == "YAP_TEXT_KEY_FILE":
                values[name] = path
            elif name in SECRETS:
                content = self._content(Path(path))
                text = (content or b"").decode(errors="replace").strip().removeprefix("\ufeff").strip()
                if text:
                    values[name] = text
                elif self.machine.path(path) in self.closed and name == "YAP_TEXT_API_KEY":
                    values[name] = f"unread-{secrets.token_hex(16)}"  # there is one; which one is not known here
        return values

    def _content(self, path: Path) -> bytes | None:
        try:
            return self.machine.path(path).read_bytes()
        except PermissionError:
            self.closed.append(self.machine.path(path))
        except OSError:
            pass
        return None

    def _load(self) -> Settings | None:
        if any(path.name == Path(ENV_FILE).name for path in self.closed):
            return None
        try:
            with _as_environment(self.environ):
                settings = Settings.load()
        except SettingsError as error:
            self.refusals = str(error).splitlines()
            return None
        device = settings.device
        if device == "auto":
            device = "cuda" if self.machine.path("/proc/driver/nvidia/version").exists() else "cpu"
        return settings.model_copy(update={"device": device})

    @property
    def settings(self) -> Settings:
        """With the device that `auto` means here. Raises `Unknown` if they are wrong or may not be read."""
        if self.loaded is None:
            raise Unknown("the settings are not known" if self.closed else "the settings are wrong: settings.valid")
        return self.loaded

    @property
    def on_cuda(self) -> bool:
        """Also while the settings are wrong."""
        if self.loaded is not None:
            return self.loaded.on_cuda
        device = self.environ.get("YAP_TEXT_DEVICE", "auto").lower()
        return device == "cuda" or (device != "cpu" and self.machine.path("/proc/driver/nvidia/version").exists())

    @property
    def address(self) -> tuple[str, int]:
        """Where clients find the service."""
        if self.socket is not None and (found := unit_file.addresses(self.socket)):
            return found[-1]
        return self.settings.host, self.settings.port

    @property
    def key(self) -> str | None:
        """The own key, as far as it is known here."""
        key = self.settings.api_key.get_secret_value()
        return None if key.startswith("unread-") and self.closed else key

    @property
    def state(self) -> Path:
        """The state folder on this machine. Raises `Unknown`."""
        return self.machine.path(self.settings.state)

    @cached_property
    def hub_cache(self) -> Path:
        """Where hub downloads lie, by the rules of the hub's client."""
        environ = self.environ
        if cache := environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE"):
            return self.machine.path(os.path.expanduser(cache))
        home = environ.get("HF_HOME") or Path(environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
        expanded = os.path.expanduser(str(home).replace("~", environ.get("HOME", "~"), 1) if self.installed else home)
        return self.machine.path(expanded) / "hub"

    def once(self, name: Any, find: Callable[[], T]) -> T:
        """The result of `find`, which is called once for a name; its exception counts as a result."""
        with self._lock:
            known = self._known.get(name)
            if known is None:
                future: Future[T] = Future()
                self._known[name] = future
        if known is None:
            try:
                future.set_result(find())
            except Exception as error:
                future.set_exception(error)
            known = future
        result: T = known.result()
        return result

    def hide(self, text: str) -> str:
        """Without keys, tokens, and the names and passwords in addresses."""
        for secret in self._secrets:
            text = text.replace(secret, "(hidden)")
        return _USER.sub("(hidden)@", text)

    @cached_property
    def _secrets(self) -> list[str]:
        found = {self.environ.get(name, "").strip() for name in (*SECRETS, *_TOKENS)}
        found |= {self.machine.environ.get(name, "").strip() for name in (*SECRETS, *_TOKENS)}
        found |= {word for value in found for word in value.split()}
        return sorted((value for value in found if len(value) >= _LEAST_SECRET and value != DEFAULT_API_KEY), key=len)[
            ::-1
        ]


@contextmanager
def _as_environment(environ: Mapping[str, str]) -> Iterator[None]:
    """`Settings` reads the environment of its process: for a moment that is this one. No thread runs yet."""
    kept = dict(os.environ)
    if environ == kept:
        yield
        return
    os.environ.clear()
    os.environ.update(environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)
