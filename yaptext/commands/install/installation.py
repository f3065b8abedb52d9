"""The steps of an installation, a rollback and an uninstallation."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from pathlib import Path

from yaptext.commands.install import files, templates
from yaptext.commands.install.files import InstallError
from yaptext.commands.install.host import Host
from yaptext.commands.install.unit_command import command_of_units
from yaptext.commands.install.versions import BUILT, Versions

_STARTED = (
    "yap-text.socket",
    "yap-text.service",
    "yap-text-quantize.service",
    "yap-text-mps.service",
    "yap-text-logrotate.timer",
)
_NO_KEYS = "# NAME sha256:HASH [LIMIT=N ...], as `yap-text key new NAME --file` adds them\n"
_KEPT_FOLDERS = (
    "var/lib/yap-text",
    "var/lib/private/yap-text",
    "var/cache/yap-text",
    "var/cache/private/yap-text",
    "var/log/yap-text",
    "var/log/private/yap-text",
    "var/log/yap-text-mps",
    "var/log/private/yap-text-mps",
    "var/lib/yap-text-logrotate",
)


def install(prefix: Path | None = None, command: Path | None = None) -> int:
    """Installs what is missing or old, and prints one line per file. `command` is what the units run."""
    host = Host(prefix)
    host.check()
    versions = Versions.around(host, Path(sys.prefix)) if command is None else None
    command = command_of_units(host, command)
    if versions is not None:
        command = Path(templates.COMMAND)
        if host.link.exists() and not host.link.is_symlink():
            raise InstallError(f"{host.link} is in the way: move it away, or choose another command (--command PATH)")
    for template in (templates.folder() / "yap-text.env", templates.folder() / "logrotate.conf"):
        files.put_config(
            host.configs / template.name, template.read_text(), 0o600 if template.suffix == ".env" else 0o644
        )
    files.put_once(host.configs / "api-key", secrets.token_urlsafe(32) + "\n", "a new key")
    files.put_once(host.configs / "hf-token", "", "empty")
    files.put_once(host.configs / "keys", _NO_KEYS, "none yet", 0o644)  # hashes, which the service's user reads
    texts = {unit.name: unit.read_text().replace(f"{templates.COMMAND} ", f"{command} ") for unit in templates.units()}
    changed = files.put_all({host.units / name: text for name, text in texts.items()}, 0o644)
    if command.is_relative_to("/nix/store"):
        files.link(host.nix_root, Path(*command.parts[:4]), "so that Nix's garbage collector leaves the command")
    if versions is not None:
        changed |= versions.switch(Path(sys.prefix).name)
        changed |= files.link(host.link, versions.command)
    if changed:
        host.systemctl("daemon-reload")
        if host.systemctl("is-active", "yap-text.service") == "active":
            print("The running service is unchanged; to start the new version: systemctl restart yap-text")
    if versions is not None:
        versions.prune()
        told = f"Current version: {versions.current.readlink()}."
        if versions.previous.is_symlink():
            told += f" Previous version: {versions.previous.readlink()} (yap-text install --rollback)."
        print(told)
    if not host.is_staged and not os.access("/usr/sbin/logrotate", os.X_OK):
        print("There is no /usr/sbin/logrotate: a YAP_TEXT_LOG_FILE would grow without limit. The journal needs none.")
    print("Next:\n  systemctl enable --now yap-text\n  journalctl -u yap-text -f")
    return 0


def rollback(prefix: Path | None = None) -> int:
    """Runs `yap-text install` of the previous version, which installs its own units and makes itself the current
    one."""
    host = Host(prefix)
    host.check()
    versions = Versions.installed(host)
    if versions is None or not (versions.previous / BUILT).is_file():
        raise InstallError("there is no previous version: a second `make install` keeps the first")
    sys.stdout.flush()
    command = versions.previous.resolve() / "bin/yap-text"
    options = ["--prefix", str(prefix)] if prefix else []
    return subprocess.run([command, "install", *options], check=False).returncode


def uninstall(prefix: Path | None = None) -> int:
    """Stops and removes what `install` installed, and prints what stays and how to remove it."""
    host = Host(prefix)
    host.check()
    versions = Versions.installed(host)
    installed = [name for name in _STARTED if (host.units / name).exists()]
    if installed:
        host.systemctl("stop", *installed)
        host.systemctl("disable", *installed)
    for unit in templates.units():
        files.remove(host.units / unit.name)
    host.systemctl("daemon-reload")
    for name in ("yap-text.env", "yap-text.env.new", "logrotate.conf", "logrotate.conf.new"):
        config = host.configs / name
        if config.exists() and not files.is_edited(config.read_text()):
            files.remove(config)
    for name in ("hf-token", "keys"):
        secret = host.configs / name
        if secret.exists() and secret.read_text().strip() in ("", _NO_KEYS.strip()):
            files.remove(secret)
    files.remove(host.nix_root)
    if versions is not None:
        for link in (host.link, versions.current, versions.previous):
            files.remove(link)
        for folder in versions.made():
            versions.remove(folder)
        if not any(versions.folder.iterdir()):
            versions.folder.rmdir()
    if host.configs.is_dir() and not any(host.configs.iterdir()):
        host.configs.rmdir()
    kept = [host.configs, *(host.root / folder for folder in _KEPT_FOLDERS), *host.units.glob("yap-text*.d")]
    kept = [path for path in kept if path.exists() or path.is_symlink()]
    for path in kept:
        files.tell("kept", path)
    if kept:
        print(f"Your settings, keys, models and logs were kept. To remove them:\n  rm -r {' '.join(map(str, kept))}")
    return 0
