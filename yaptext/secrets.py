"""Keys and tokens: where the service has them from. No process that it starts inherits them."""

from __future__ import annotations

import ctypes
import itertools
import os
from pathlib import Path

from yaptext.errors import SettingsError
from yaptext.files import read_file

SECRETS = ("YAP_TEXT_API_KEY", "HF_TOKEN", "SESSION_STORE_KEY")
_MOST_SECRET_BYTES = 65_536


def bare(secret: str) -> str:
    """Without the line end, the white space and the byte order mark that editors leave around it."""
    return secret.strip().removeprefix("\ufeff").strip()


def credentials() -> dict[str, str]:
    """Those that systemd passes, by variable name; of the key file the path. Raises `SettingsError` for one that cannot
    be read."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    if not folder:
        return {}
    texts = {name: _text(Path(folder, name)) for name in SECRETS}
    found = {name: text for name, text in texts.items() if text}
    key_file = Path(folder, "YAP_TEXT_KEY_FILE")
    return found | ({key_file.name: str(key_file)} if key_file.is_file() else {})


def _text(file: Path) -> str:
    try:
        if not file.exists():
            return ""
        return bare(read_file(file, _MOST_SECRET_BYTES).decode())
    except OSError as error:
        raise SettingsError(f"{credential(file.name)} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{credential(file.name)} is not UTF-8 text: write the key or token alone") from None


def credential(name: str) -> str:
    """What to call it: the operator knows the file that the unit passes, not the folder that systemd puts it in."""
    file = {"YAP_TEXT_API_KEY": "/etc/yap-text/api-key", "HF_TOKEN": "/etc/yap-text/hf-token"}.get(name)
    return f"the credential {name}{f' (by default the file {file})' if file else ''}"


def forget_secrets() -> None:
    """Takes keys and tokens out of the environment, which processes inherit that are started from here on, and out of
    what /proc/PID/environ shows: the memory that this process was started with, of which a forked one has a copy."""
    entries = ctypes.POINTER(ctypes.c_void_p).in_dll(ctypes.CDLL(None), "environ")
    names = (*SECRETS, "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "HUGGINGFACE_TOKEN")
    for place in itertools.takewhile(bool, map(entries.__getitem__, itertools.count())):
        variable, _, value = ctypes.string_at(place).partition(b"=")
        if os.fsdecode(variable) in names:
            ctypes.memset(place + len(variable) + 1, 0, len(value))
    for name in names:
        os.environ.pop(name, None)
