"""What nix/module.nix declares as options: name, type, bounds and meaning of each setting, out of its class.

python nix/settings.py > nix/settings.json
"""

from __future__ import annotations

import json
import sys
import types
import typing
from pathlib import Path
from typing import Any

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo
from pydantic_settings import NoDecode

from yaptext.settings import Settings
from yaptext.settings.old_names import RENAMED

OF_THE_SOCKET = ("HOST", "PORT")
"""systemd holds the port: `services.yap-text.host` and `port`."""
_KINDS: dict[Any, str] = {bool: "bool", int: "int", float: "number", str: "text", Path: "path"}
_BOUNDS = {Ge: ("least", "ge"), Gt: ("above", "gt"), Le: ("most", "le"), Lt: ("below", "lt")}


def _kind(annotation: Any) -> tuple[str, list[str]]:
    """The type without `None`, and what it may be if that is a choice. A JSON object is text in the environment."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        (annotation,) = (choice for choice in typing.get_args(annotation) if choice is not type(None))
    if typing.get_origin(annotation) is typing.Literal:
        return "choice", list(typing.get_args(annotation))
    return _KINDS[str if typing.get_origin(annotation) is dict else annotation], []


def option(field: FieldInfo) -> dict[str, Any]:
    kind, choices = _kind(field.annotation)
    option: dict[str, Any] = {"type": kind, "meaning": field.description}
    if choices:
        option["choices"] = choices
    for bound in field.metadata:
        if type(bound) in _BOUNDS:
            name, attribute = _BOUNDS[type(bound)]
            option[name] = getattr(bound, attribute)
        elif pattern := getattr(bound, "pattern", None):
            # builtins.match knows POSIX's extended expressions, and matches the whole text.
            if "\\" in pattern or not (pattern.startswith("^") and pattern.endswith("$")):
                raise ValueError(f"Nix cannot match {pattern!r}: anchor it, and do without escapes")
            option["pattern"] = pattern[1:-1]
        elif bound is not NoDecode:
            raise ValueError(f"Nix has no word for {bound!r}")
    if field.default is not None and field.default != {}:
        option["default"] = field.default
    return option


def described() -> dict[str, Any]:
    """`settings` by name, and the names that the module refuses there, by reason."""
    fields = {str(field.validation_alias): field for field in Settings.model_fields.values()}
    secrets = [name for name, field in fields.items() if "SecretStr" in str(field.annotation)]
    systemd = [name for name, field in fields.items() if (field.description or "").startswith("Set by systemd")]
    apart = {*secrets, *systemd, *OF_THE_SOCKET}
    return {
        "settings": {name: option(field) for name, field in fields.items() if name not in apart},
        "secrets": secrets + [name for name in RENAMED if RENAMED[name] in secrets],
        "systemd": systemd,
        "socket": list(OF_THE_SOCKET),
        "renamed": {name: new for name, new in RENAMED.items() if new not in secrets},
    }


def text() -> str:
    return json.dumps(described(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.stdout.write(text())
