"""tools/install.py: what lies where after it, and what it leaves alone. `tests/systemd` boots what it installs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from yaptext import keyfile
from yaptext.settings import variables
from yaptext.tools import install as module
from yaptext.tools.install import InstallError, install, uninstall

REPOSITORY = Path(__file__).parents[2]
COMMAND = Path("/opt/yap-text/bin/yap-text")
UNITS = {
    "yap-text.service",
    "yap-text.socket",
    "yap-text-quantize.service",
    "yap-text-logrotate.service",
    "yap-text-logrotate.timer",
}


class Stage:
    """A root folder that is installed into."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root, self._capsys = root, capsys
        self.units, self.configs = root / "etc/systemd/system", root / "etc/yap-text"
        self.env, self.key = self.configs / "yap-text.env", self.configs / "api-key"

    def install(self, command: Path = COMMAND) -> dict[str, str]:
        """What it said: a word by file name."""
        assert install(self.root, command) == 0
        return self._said()

    def uninstall(self) -> dict[str, str]:
        assert uninstall(self.root) == 0
        return self._said()

    def _said(self) -> dict[str, str]:
        self.printed = self._capsys.readouterr().out
        lines = [line.split() for line in self.printed.splitlines() if f" {self.root}/" in line and "rm -r" not in line]
        return {Path(line[1]).name: line[0] for line in lines}

    def files(self) -> dict[Path, tuple[str, int]]:
        """Text and mode of every file."""
        found = (path for path in self.root.rglob("*") if path.is_file())
        return {path: (path.read_text(), path.stat().st_mode & 0o777) for path in found}


@pytest.fixture
def stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Stage:
    return Stage(tmp_path / "root", capsys)


@pytest.fixture
def templates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of systemd/ that a test may change, as another version would."""
    folder = tmp_path / "templates"
    shutil.copytree(REPOSITORY / "systemd", folder)
    monkeypatch.setattr(module, "_folder", lambda: folder)
    yield folder


def test_it_puts_units_configs_and_secrets_in_place(stage: Stage) -> None:
    """The secrets and the settings are root's alone, not the hashes of keys; the units call the command."""
    said = stage.install()
    assert said == dict.fromkeys([*UNITS, "yap-text.env", "logrotate.conf", "api-key", "hf-token", "keys"], "installed")
    assert {path.name: mode for path, (_, mode) in stage.files().items()} == dict.fromkeys(UNITS, 0o644) | {
        "yap-text.env": 0o600,
        "logrotate.conf": 0o644,
        "api-key": 0o600,
        "hf-token": 0o600,
        "keys": 0o644,
    }
    for unit in UNITS:
        text = (stage.units / unit).read_text()
        assert text == (REPOSITORY / "systemd" / unit).read_text().replace("/usr/local/bin/yap-text ", f"{COMMAND} ")
    assert f"ExecStart={COMMAND} serve\n" in (stage.units / "yap-text.service").read_text()
    assert stage.printed.endswith("Next:\n  systemctl enable --now yap-text\n  journalctl -u yap-text -f\n")


def test_a_second_run_changes_nothing(stage: Stage) -> None:
    """Not a byte, and it says so."""
    stage.install()
    before = stage.files()
    assert set(stage.install().values()) == {"unchanged", "kept"}
    assert stage.files() == before


def test_another_command_updates_the_units_that_call_it(stage: Stage) -> None:
    """A unit is ours: it always follows."""
    stage.install()
    said = stage.install(Path("/srv/yap-text"))
    assert {name for name, word in said.items() if word == "updated"} == {
        "yap-text.service",
        "yap-text-quantize.service",
    }
    assert "ExecStart=/srv/yap-text serve\n" in (stage.units / "yap-text.service").read_text()


def test_the_key_is_a_fresh_one_and_stays(stage: Stage, tmp_path: Path) -> None:
    """Nobody serves the default key, and no run replaces a key that clients have."""
    stage.install()
    key = stage.key.read_text()
    assert len(key.strip()) >= 32
    assert install(tmp_path / "other", COMMAND) == 0
    assert (tmp_path / "other/etc/yap-text/api-key").read_text() != key
    stage.key.write_text("mine\n")
    (stage.configs / "hf-token").write_text("hf_mine\n")
    assert stage.install()["api-key"] == "kept"
    assert stage.key.read_text() == "mine\n" and (stage.configs / "hf-token").read_text() == "hf_mine\n"


@pytest.mark.parametrize("name", ["yap-text.env", "logrotate.conf"])
@pytest.mark.parametrize("edit", ["# mine\n{}", "{}# mine\n"])
def test_an_edited_config_is_kept(stage: Stage, templates: Path, name: str, edit: str) -> None:
    """As long as the template is the same there is nothing more to say; a newer one lies beside it, once."""
    stage.install()
    config = stage.configs / name
    edited = edit.replace("{}", config.read_text())
    config.write_text(edited)
    assert stage.install()[name] == "kept" and not config.with_name(f"{name}.new").exists()
    (templates / name).write_text("# the next version\n")
    said = stage.install()
    assert said[name] == "kept" and said[f"{name}.new"] == "installed"
    assert "edited; today's template is" in stage.printed
    assert config.read_text() == edited
    assert config.with_name(f"{name}.new").read_text().startswith("# the next version\n")
    assert stage.install()[f"{name}.new"] == "unchanged"


def test_a_config_of_somebody_else_is_kept(stage: Stage) -> None:
    """One that this command never wrote counts as edited."""
    stage.configs.mkdir(parents=True)
    stage.env.write_text("CHAT_MAX_OUT=5\n")
    assert stage.install()["yap-text.env"] == "kept"
    assert stage.env.read_text() == "CHAT_MAX_OUT=5\n"


def test_a_config_that_nobody_edited_follows_its_template(stage: Stage, templates: Path) -> None:
    """So that an update reaches who never touched it."""
    stage.install()
    (templates / "yap-text.env").write_text("# the next version\n")
    assert stage.install()["yap-text.env"] == "updated"
    assert stage.env.read_text().startswith("# the next version\n")


def test_uninstall_removes_what_was_put_there_and_leaves_what_is_yours(stage: Stage) -> None:
    """Keys and edited configs stay, and the command that removes them is told."""
    stage.install()
    with stage.env.open("a") as env:
        env.write("CHAT_MAX_OUT=5\n")
    (stage.root / "var/lib/yap-text").mkdir(parents=True)
    said = stage.uninstall()
    assert said == dict.fromkeys([*UNITS, "logrotate.conf", "hf-token", "keys"], "removed") | {"yap-text": "kept"}
    assert {path.name for path in stage.files()} == {"yap-text.env", "api-key"}
    assert f"rm -r {stage.configs} {stage.root}/var/lib/yap-text\n" in stage.printed
    assert stage.uninstall() == {"yap-text": "kept"}


def test_uninstall_leaves_named_keys(stage: Stage) -> None:
    """The hashes are all that is left of them."""
    stage.install()
    keyfile.add("phone-app", stage.configs / "keys")
    assert "keys" not in stage.uninstall()
    assert "phone-app sha256:" in (stage.configs / "keys").read_text()
    assert stage.install()["keys"] == "kept"


def test_uninstall_of_nothing_says_nothing(stage: Stage) -> None:
    """And fails not."""
    assert stage.uninstall() == {} and stage.printed == ""


def test_a_command_in_the_nix_store_outlives_the_garbage_collector(stage: Stage) -> None:
    """A root of the collector names the package that the units run; it goes with them."""
    root = stage.root / "nix/var/nix/gcroots/yap-text"
    for package in ("/nix/store/aaa-yap-text", "/nix/store/bbb-yap-text"):
        stage.install(Path(package, "bin/yap-text"))
        assert str(root.readlink()) == package
    stage.uninstall()
    assert not root.is_symlink()


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("/home/me/yap-text/bin/yap-text", "below /home, which units do not see"),
        ("/root/yap-text/bin/yap-text", "below /root, which units do not see"),
        ("/opt/yap text/bin/yap-text", "without spaces"),
        ("/opt/%h/yap-text", "without spaces"),
    ],
)
def test_a_command_that_no_unit_could_run_is_refused(stage: Stage, command: str, told: str) -> None:
    """Before anything is written."""
    with pytest.raises(InstallError, match=told):
        install(stage.root, Path(command))
    assert not stage.root.exists()


def test_the_command_of_this_environment_is_the_default(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """yap-text beside the Python that runs; where that lies in a home, units would not see it."""
    monkeypatch.setattr(sys, "executable", "/opt/venv/bin/python")
    for name in ("prefix", "base_prefix"):
        monkeypatch.setattr(sys, name, "/opt/venv")
    monkeypatch.setattr(module, "__file__", "/opt/venv/lib/install.py")
    monkeypatch.setattr(module, "_folder", lambda: REPOSITORY / "systemd")
    install(stage.root)
    assert "ExecStart=/opt/venv/bin/yap-text serve\n" in (stage.units / "yap-text.service").read_text()
    monkeypatch.setattr(sys, "base_prefix", "/home/me/.pyenv")
    with pytest.raises(InstallError, match=r"/home/me/\.pyenv is below /home"):
        install(stage.root)


def test_a_machine_without_systemd_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what to do instead."""
    monkeypatch.setattr(module, "_has_systemd", lambda: False)
    for verb in (install, uninstall):
        with pytest.raises(InstallError, match="yap-text serve"):
            verb()


def test_another_user_than_root_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a file is touched."""
    monkeypatch.setattr(module, "_has_systemd", lambda: True)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for verb in (install, uninstall):
        with pytest.raises(InstallError, match="sudo"):
            verb()


def test_a_folder_that_cannot_be_written_is_named(stage: Stage) -> None:
    """In one line, with the reason."""
    stage.units.parent.mkdir(parents=True)
    stage.units.write_text("a file in the way\n")
    with pytest.raises(InstallError, match=r"etc/systemd/system/yap-text\S+ cannot be written: "):
        install(stage.root, COMMAND)


def test_a_place_that_is_closed_to_the_service_is_named(tmp_path: Path) -> None:
    """It runs as a user of its own, which comes through no folder of mode 0700."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    command = closed / "yap-text"
    command.touch(mode=0o755)
    with pytest.raises(InstallError, match="chmod o\\+rx"):
        module._check_open(command)


def test_the_template_names_variables_that_exist_by_their_defaults() -> None:
    """Every line can be uncommented as it stands, and a default in it is the true one."""
    known = {variable.name: variable.default for variable in variables()}
    lines = (REPOSITORY / "systemd/yap-text.env").read_text().splitlines()
    pairs = [line[1:].split("=", 1) for line in lines if line.startswith("#") and line[1:2].isupper()]
    assert len(pairs) > 10
    for name, value in pairs:
        assert name in known
        assert not known[name] or float_or_text(value) == float_or_text(known[name]), name
    assert all(line.startswith("#") or not line for line in lines)


def float_or_text(value: str) -> float | str:
    try:
        return float(value)
    except ValueError:
        return value


@pytest.mark.subprocess
def test_a_wheel_carries_the_units(tmp_path: Path) -> None:
    """What `systemd/` holds, where an installed package looks for it."""
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, f"--wheel-dir={tmp_path}", REPOSITORY], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        carried = {
            Path(name).name: archive.read(name).decode()
            for name in archive.namelist()
            if name.startswith("yaptext/systemd/")
        }
    assert carried == {file.name: file.read_text() for file in (REPOSITORY / "systemd").iterdir()}
