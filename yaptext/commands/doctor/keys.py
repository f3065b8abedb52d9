"""Checks of keys and tokens: who may use them, who may read them, and whether the key file parses."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

from yaptext.commands.doctor.check import Finding, check, fail, ok, skip, warn
from yaptext.commands.doctor.deployment import ENV_FILE, Deployment
from yaptext.errors import SettingsError
from yaptext.secrets import SECRETS
from yaptext.server.access import keyfile
from yaptext.settings import DEFAULT_API_KEY, LOOPBACK

_FEW_CHARACTERS = 16
_VALID = ("settings.valid",)
NEW_KEY = "openssl rand -base64 32 > /etc/yap-text/api-key, then systemctl restart yap-text"


@check("keys.own", needs=_VALID)
def own(seen: Deployment) -> Finding:
    host, _ = seen.address
    key = seen.key
    remedy = NEW_KEY if seen.installed else "export YAP_TEXT_API_KEY=$(openssl rand -base64 32)"
    if key is None:
        return skip("this user may not read the key (sudo yap-text doctor)")
    if seen.settings.own_key is None:
        return ok("the key file has the only keys: the default key is off")
    if key == DEFAULT_API_KEY:
        if host not in LOOPBACK:
            return fail(f"the service listens on {host} with the default key, which is public", remedy)
        if seen.installed is not None:
            return warn("the default key is in use: every program on this machine can use the service", remedy)
        return ok("the default key, on loopback only")
    if len(key) < _FEW_CHARACTERS:
        return warn(f"the key has {len(key)} characters: it can be guessed", remedy)
    return ok(f"a key of {len(key)} characters")


@check("keys.file", needs=_VALID)
def file(seen: Deployment) -> Finding:
    named = seen.settings.key_file
    if named is None:
        return skip("YAP_TEXT_KEY_FILE is not set")
    path = seen.machine.path(named)
    try:
        found = keyfile.read(path, keyfile.NO_LIMITS)
    except SettingsError as error:
        return fail(str(error), f"correct that line, or create the file: yap-text key new NAME --file {named}")
    if not found and seen.settings.api_key.get_secret_value() == DEFAULT_API_KEY:
        return fail(
            f"{named} has no key, and there is no other: no client can connect", f"yap-text key new NAME --file {named}"
        )
    is_credential = seen.installed is not None and "YAP_TEXT_KEY_FILE" in seen.installed.credentials()
    if seen.installed is not None and not is_credential and not path.stat().st_mode & stat.S_IROTH:
        return fail(f"the unit's own user may not read {named}", f"chmod 644 {named}: it holds hashes")
    return ok(f"{len(found)} keys in {named}")


@check("keys.modes")
def modes(seen: Deployment) -> Finding:
    told, commands = [], []
    for path, most in _files(seen):
        try:
            mode = stat.S_IMODE(seen.machine.path(path).stat().st_mode)
        except OSError:
            continue
        if mode & ~most:
            told.append(f"{path} has mode {mode:04o}")
            commands.append(f"chmod {most:o} {path}")
    if told:
        return warn(f"other users may read or write secrets: {', '.join(told)}", "; ".join(commands))
    return ok("no other user may read secrets, or write the key file")


def _files(seen: Deployment) -> Iterator[tuple[Path, int]]:
    """Each file, and the mode that it may have at most."""
    folder = Path("/etc/yap-text")
    secret = {folder / "api-key", folder / "hf-token"}
    if seen.installed is not None:
        secret |= {Path(path) for name, path in seen.installed.credentials().items() if name in SECRETS}
        if seen.env_file is not None and set(SECRETS) & seen.env_file.values.keys():
            secret.add(Path(ENV_FILE))
    for path in sorted(secret):
        yield path, 0o600
    key_file = seen.loaded.key_file if seen.loaded is not None else None
    yield key_file or folder / "keys", 0o644
    if seen.loaded is not None and (sessions := seen.loaded.session_file) is not None:
        yield sessions, 0o600
