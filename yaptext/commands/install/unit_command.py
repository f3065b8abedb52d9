"""Chooses the command that the units run, and refuses one that a unit could not run."""

from __future__ import annotations

import os
import re
import stat
import sys
from pathlib import Path

from yaptext.commands.install.files import InstallError
from yaptext.commands.install.host import Host
from yaptext.settings.hidden import HIDDEN


def command_of_units(host: Host, chosen: Path | None) -> Path:
    """The command of the units. Raises if a unit could not run it."""
    command = Path(os.path.abspath(chosen or Path(sys.executable).with_name("yap-text")))
    if not re.fullmatch(r"[\w./+@-]+", str(command), re.ASCII):
        raise InstallError(f"{command} cannot be used in a unit: a path without spaces is needed (--command PATH)")
    places = [command, command.resolve()]
    if chosen is None:
        places += [Path(sys.prefix), Path(sys.base_prefix).resolve(), Path(__file__).resolve()]
    for place in places:
        for hidden in HIDDEN:
            if place.is_relative_to(hidden):
                raise InstallError(
                    f"{place} is below {hidden}, which units do not see (ProtectHome=yes): put the checkout and its "
                    "Python elsewhere, for example in /opt, and install from there; or name a command (--command PATH)"
                )
    if not host.is_staged:
        if not os.access(command, os.X_OK) or command.is_dir():
            raise InstallError(f"{command} is not a command: name one with --command PATH")
        for place in places:
            check_open(place)
    return command


def check_open(place: Path) -> None:
    """Raises if the service's own user could not read `place`."""
    for path in (*reversed(place.parents), place):
        needed = stat.S_IXOTH if path.is_dir() else stat.S_IROTH
        if not path.stat().st_mode & needed:
            raise InstallError(
                f"other users cannot read {path}, and the service runs as a user of its own: chmod o+rx {path}"
            )
