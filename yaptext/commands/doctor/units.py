"""Checks of systemd: the units that are installed, what they read, how they are, and why they failed."""

from __future__ import annotations

import re
from pathlib import Path

from yaptext.commands.doctor import unit_file
from yaptext.commands.doctor.check import Finding, check, fail, ok, skip, warn
from yaptext.commands.doctor.deployment import ENV_FILE, Deployment, Unknown
from yaptext.commands.doctor.unit_file import QUANTIZE, SERVICE, SOCKET, UNITS

_RENDERED_COMMAND = "/usr/local/bin/yap-text"
_LEAST_VERSION = 247
"""The first with LoadCredential=."""
_PROPERTIES = (
    "Id,LoadState,ActiveState,SubState,Result,ExecMainStatus,NRestarts,StatusText,NeedDaemonReload,UnitFileState"
)
_INSTALL = "yap-text install (as root), then systemctl daemon-reload"
_MEANINGS = {
    "1": "a crash",
    "2": "settings or models must be corrected",
    "75": "it may pass by itself: hub, driver, disk or port",
    "203": "the command of the unit cannot be run",
    "226": "systemd could not set the unit's folders up",
    "243": "a credential's file is missing",
}


def _packaged(name: str) -> str | None:
    """The unit as this package has it: inside, or beside it in a checkout."""
    package = Path(__file__).parents[2]
    for folder in (package / "systemd", package.parent / "systemd"):
        if (folder / name).is_file():
            return (folder / name).read_text(encoding="utf-8")
    return None


def states(seen: Deployment) -> dict[str, dict[str, str]]:
    """Properties by unit. Raises `Unknown`."""
    return seen.once("states", lambda: _states(seen))


def _states(seen: Deployment) -> dict[str, dict[str, str]]:
    ran = seen.machine.run(["systemctl", "show", *UNITS, f"--property={_PROPERTIES}"])
    if not ran.is_ok:
        raise Unknown(f"systemctl show: {ran.complaint}")
    found = [dict(re.findall(r"^(\w+)=(.*)$", block, re.MULTILINE)) for block in ran.out.split("\n\n")]
    return {block["Id"]: block for block in found if "Id" in block}


def _state(seen: Deployment, name: str) -> dict[str, str]:
    if (found := states(seen).get(name)) is None:
        raise Unknown(f"systemctl does not know {name}")
    return found


def _reason(state: dict[str, str]) -> str:
    """Why a unit failed, with its own status text if there is one."""
    status = state.get("ExecMainStatus", "0")
    meaning = f" ({_MEANINGS[status]})" if status in _MEANINGS else ""
    told = f"result {state.get('Result', '?')}, exit status {status}{meaning}"
    return f"{told}: {state['StatusText']}" if state.get("StatusText") else told


@check("systemd.units")
def units(seen: Deployment) -> Finding:
    if seen.installed is None:
        return skip("no unit is installed, or --shell was given")
    missing = [name for name in UNITS if unit_file.read(seen.machine, name) is None]
    if missing:
        return fail(f"{', '.join(missing)} missing beside {seen.installed.path}", _INSTALL)
    return ok(f"{len(UNITS)} units in {seen.installed.path.parent}")


_INSTALLED = ("systemd.units",)


@check("systemd.running", needs=_INSTALLED)
def running(seen: Deployment) -> Finding:
    if not seen.machine.path("/run/systemd/system").is_dir():
        return skip("systemd does not run this machine")
    ran = seen.machine.run(["systemctl", "--version"])
    number = re.search(r"systemd (\d+)", ran.out)
    if number is None:
        return fail(f"systemctl --version: {ran.complaint}", "apt-get install systemd")
    version = int(number[1])
    if version < _LEAST_VERSION:
        return fail(
            f"systemd {version}; LoadCredential= needs {_LEAST_VERSION}", "upgrade to Debian 12, Ubuntu 22.04 or RHEL 9"
        )
    return ok(f"systemd {version}")


_RUNNING = ("systemd.running",)


@check("systemd.unit_texts", needs=_INSTALLED)
def unit_texts(seen: Deployment) -> Finding:
    """Whether they are those of this version."""
    old = []
    for name in UNITS:
        unit, ours = unit_file.read(seen.machine, name), _packaged(name)
        if unit is None or ours is None:
            raise Unknown(f"this package does not bring {name}")
        if str(unit.path.resolve()).startswith("/nix/store"):
            return skip("they are rendered by Nix")
        command = (unit_file.read(seen.machine, SERVICE) or unit).value("ExecStart") or _RENDERED_COMMAND
        if unit.text != ours.replace(f"{_RENDERED_COMMAND} ", f"{command.split()[0]} "):
            old.append(name)
    if old:
        found = f"{', '.join(old)} differ from those of {seen.machine.version}"
        return warn(found, f"{_INSTALL}; your own changes belong in systemctl edit")
    return ok(f"those of {seen.machine.version}")


@check("systemd.command", needs=_INSTALLED)
def command(seen: Deployment) -> Finding:
    assert seen.installed is not None
    line = seen.installed.value("ExecStart") or ""
    program = line.lstrip("-+!@:").split(" ")[0]
    if not program or not seen.machine.path(program).exists():
        return fail(
            f"the unit runs {program or 'nothing'}, which does not exist",
            "make install, or yap-text install --command PATH",
        )
    ran = seen.machine.run([program, "--version"])
    version = ran.out.strip().removeprefix("yap-text").strip()
    if not ran.is_ok:
        return fail(f"{program} --version: {ran.complaint}", "make install")
    if version != seen.machine.version:
        remedy = "make install, then systemctl restart yap-text; or run the doctor of that command"
        return warn(f"the unit runs {version}, and this is {seen.machine.version}", remedy)
    return ok(f"{program} is {version}")


@check("systemd.drop_ins", needs=_INSTALLED)
def drop_ins(seen: Deployment) -> Finding:
    found = [unit for name in UNITS if (unit := unit_file.read(seen.machine, name)) is not None]
    if closed := [str(path) for unit in found for path in unit.closed]:
        return warn(f"this user may not read {', '.join(closed)}", "sudo yap-text doctor")
    for unit in found:
        if len(addresses := unit.values("ListenStream")) > 1:
            remedy = "systemctl edit yap-text.socket: an empty ListenStream= before yours clears the first"
            return warn(f"{unit.name} listens on {' and '.join(addresses)}", remedy)
        if len(commands := unit.values("ExecStart")) > 1:
            remedy = f"systemctl edit {unit.name}: an empty ExecStart= before yours clears the first"
            return fail(f"{unit.name} has {len(commands)} commands, which systemd refuses", remedy)
    names = [str(path) for unit in found for path in unit.drop_ins]
    return ok(", ".join(names) if names else "none")


@check("systemd.env_file", needs=_INSTALLED)
def env_file(seen: Deployment) -> Finding:
    path = seen.machine.path(ENV_FILE)
    if path in seen.closed:
        return warn(f"this user may not read {ENV_FILE}: the unit's settings are not known", "sudo yap-text doctor")
    if seen.env_file is None:
        if path.exists():
            return fail(f"{ENV_FILE} cannot be read", f"make it a plain file of root: ls -l {ENV_FILE}")
        return ok(f"there is no {ENV_FILE}: every setting has its default")
    parsed = seen.env_file
    if parsed.faults:
        remedy = (
            "NAME=value lines in plain UTF-8; remove a byte order mark with: sed -i '1s/^\\xEF\\xBB\\xBF//' " + ENV_FILE
        )
        return fail(f"{ENV_FILE}: {'; '.join(parsed.faults)}", remedy)
    if parsed.oddities:
        return warn(f"{ENV_FILE}: {'; '.join(parsed.oddities)}", f"sed -i 's/\\r$//' {ENV_FILE}")
    return ok(f"{len(parsed.values)} settings in {ENV_FILE}")


@check("systemd.credentials", needs=_INSTALLED)
def credentials(seen: Deployment) -> Finding:
    assert seen.installed is not None
    named = seen.installed.credentials()
    missing = []
    for name, file in named.items():
        try:
            if not seen.machine.path(file).exists():
                missing.append(f"{file} ({name})")
        except OSError:  # in a folder that this user may not enter
            continue
    if missing:
        return fail(
            f"{', '.join(missing)} does not exist: the start ends with status 243",
            f"yap-text install, or touch the file: {file}",
        )
    return ok(", ".join(named.values()) or "none")


@check("systemd.reload", needs=_RUNNING)
def reload(seen: Deployment) -> Finding:
    stale = [name for name, state in states(seen).items() if state.get("NeedDaemonReload") == "yes"]
    if stale:
        return warn(
            f"{', '.join(stale)} changed since systemd read it",
            "systemctl daemon-reload, then systemctl restart yap-text",
        )
    return ok("systemd has read the units as they are")


@check("systemd.service", needs=_RUNNING)
def service(seen: Deployment) -> Finding:
    return _found(seen, SERVICE, "journalctl -u yap-text -n 50; correct what it names, then systemctl restart yap-text")


@check("systemd.quantize", needs=_RUNNING)
def quantize(seen: Deployment) -> Finding:
    state = _state(seen, QUANTIZE)
    if state.get("ActiveState") == "failed":
        return warn(f"{QUANTIZE} failed: {_reason(state)}", "journalctl -u yap-text-quantize -n 50")
    return ok(f"{state.get('ActiveState', '?')} ({state.get('SubState', '?')})")


@check("systemd.socket", needs=_RUNNING)
def socket(seen: Deployment) -> Finding:
    return _found(seen, SOCKET, "systemctl reset-failed yap-text.socket, then systemctl start yap-text.socket")


def _found(seen: Deployment, name: str, remedy: str) -> Finding:
    state = _state(seen, name)
    active = state.get("ActiveState", "?")
    told = f"{active} ({state.get('SubState', '?')})"
    if active == "failed":
        return fail(f"{name} failed: {_reason(state)}", remedy)
    # Starts in a row that failed. Between them a unit under systemd before 254 is in start-pre for the most part.
    restarts = state.get("NRestarts") or "0"
    if active == "activating" and (state.get("SubState") == "auto-restart" or restarts != "0"):
        return fail(f"{name} fails and is tried again ({restarts} times so far): {_reason(state)}", remedy)
    if active == "inactive":
        last = "" if state.get("Result", "success") == "success" else f"; last time {_reason(state)}"
        return warn(f"{name} is stopped{last}", f"systemctl enable --now {name.removesuffix('.service')}")
    if re.search("Started after the (death|end) of", state.get("StatusText", "")):
        return warn(f"{told}, {state['StatusText']}", "journalctl -u yap-text -p warning")
    return ok(f"{told}, {state['StatusText']}" if state.get("StatusText") else told)


@check("systemd.enabled", needs=_RUNNING)
def enabled(seen: Deployment) -> Finding:
    off = [name for name in (SERVICE, SOCKET) if _state(seen, name).get("UnitFileState") == "disabled"]
    if off:
        return warn(f"{' and '.join(off)} will not start at boot", "systemctl enable yap-text")
    return ok("it starts at boot")
