"""The model of each role, as this machine or the hub has it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from yaptext.commands.doctor import web
from yaptext.commands.doctor.deployment import Deployment, Unknown
from yaptext.engine import awq_results, checkpoints, demo
from yaptext.engine.base import Role
from yaptext.engine.hub_client import hub_token
from yaptext.engine.weight_files import engine_weights
from yaptext.errors import StartError, YapError

_REPO = re.compile(r"[\w.-]+(/[\w.-]+)?")
_DTYPE_BYTES = {"F64": 8, "F32": 4, "I64": 8, "I32": 4, "BF16": 2, "F16": 2}
_DEMO_BYTES = 270_000_000
Place = Literal["folder", "cache", "hub", "demo", "shelf"]


@dataclass(frozen=True, slots=True)
class Model:
    """What serves a role. `source` is as it was named, `folder` where its files lie, if they do. `config` is its
    config.json. `weights_bytes` is the size of its weight files; None: not known."""

    role: Role
    variable: str
    source: str
    place: Place
    folder: Path | None = None
    config: dict[str, Any] | None = None
    weights_bytes: int | None = None

    @property
    def known_config(self) -> dict[str, Any]:
        """Raises `Unknown`."""
        if self.config is None:
            demo_waits = "the demo model is converted at the first start"
            raise Unknown(demo_waits if self.place == "demo" else f"the config of {self.source} is not here")
        return self.config


def model_of(seen: Deployment, role: Role) -> Model:
    """Raises `Unknown` if none is named, and `StartError` if the one that is named cannot be a model."""
    return seen.once(("model", role), lambda: _find(seen, role))


def _find(seen: Deployment, role: Role) -> Model:
    settings = seen.settings
    if checkpoints.wants_demo(settings):
        folder = seen.machine.path(demo.place(settings.state))
        found = folder if os.path.exists(folder / "config.json") else None
        return Model(role, "CHAT_MODEL", demo.NAME, "demo", found, _config(found), _size(found) or _DEMO_BYTES)
    awq, plain = getattr(settings, f"awq_{role}_model"), getattr(settings, f"{role}_model")
    variable = f"AWQ_{role.upper()}_MODEL" if awq else f"{role.upper()}_MODEL"
    source: str | None = awq or plain
    if source is None:
        raise Unknown(f"{role.upper()}_MODEL is not set, and DEPLOY_MODELS={settings.deploy_models} needs it")
    if not awq and settings.quantization_of(role) in ("auto", "awq"):
        made = awq_results.finished(seen.state, source)
        if made is not None:
            return Model(role, variable, source, "shelf", made.folder, _config(made.folder), _size(made.folder))
    if source.startswith((".", "/", "~")) or os.path.isdir(source):
        folder = seen.machine.path(source)
        if not os.path.isdir(folder):
            raise StartError(f"{variable}={source} is not a folder")
        return Model(role, variable, source, "folder", folder, _config(folder), _size(folder))
    if _REPO.fullmatch(source) is None:
        raise StartError(f"{variable}={source!r} is neither a folder nor a hub id (owner/name)")
    folder_in_cache = _snapshot(seen, source)
    if folder_in_cache is not None:
        config, size = _config(folder_in_cache), _size(folder_in_cache)
        return Model(role, variable, source, "cache", folder_in_cache, config, size)
    return Model(role, variable, source, "hub", None, *_remote(seen, source))


def _snapshot(seen: Deployment, source: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source, "config.json", cache_dir=seen.hub_cache)
    return Path(found).parent if isinstance(found, str) else None


def _config(folder: Path | None) -> dict[str, Any] | None:
    try:
        found = None if folder is None else json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def weight_files(folder: Path) -> list[Path]:
    """Those that an engine loads. Raises `LookupError` if they are not all there, and `OSError`."""
    names = [file.name for file in folder.iterdir() if file.exists()]
    return [folder / name for name in engine_weights(names, lambda name: (folder / name).read_bytes())]


def _size(folder: Path | None) -> int | None:
    try:
        return sum(file.stat().st_size for file in weight_files(folder)) if folder is not None else None
    except (LookupError, OSError):
        return None


def is_offline(seen: Deployment) -> bool:
    return seen.offline or seen.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def endpoint(seen: Deployment) -> str:
    from huggingface_hub import constants

    return str(seen.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def ask_hub(seen: Deployment, path: str) -> web.Answer:
    """Of the hub, once a path. Raises `SettingsError` for a token that cannot be sent."""
    token = hub_token(seen.settings)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return seen.once(("hub", path), lambda: web.get(f"{endpoint(seen)}/{path}", headers, seen.environ))


def _remote(seen: Deployment, source: str) -> tuple[dict[str, Any] | None, int | None]:
    """Config and bytes of weights of a model that is not on this machine."""
    if is_offline(seen):
        return None, None
    told = ask_hub(seen, f"api/models/{quote(source)}")
    if told.status != 200 or not isinstance(told.json, dict):
        return None, None
    config = ask_hub(seen, f"{quote(source)}/resolve/main/config.json")
    counts = (told.json.get("safetensors") or {}).get("parameters") or {}
    size = sum(count * _DTYPE_BYTES.get(kind, 1) for kind, count in counts.items() if isinstance(count, int))
    found = config.json if config.status == 200 and isinstance(config.json, dict) else None
    return found, size or None


def hub_models(seen: Deployment) -> Iterator[Model]:
    roles: dict[Role, bool] = {"chat": seen.settings.chat_deployed, "tool": seen.settings.tool_deployed}
    for role in (role for role, deployed in roles.items() if deployed):
        with suppress(Unknown, YapError):
            if (found := model_of(seen, role)).place in ("cache", "hub"):
                yield found
