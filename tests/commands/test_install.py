"""commands/install/: what lies where after it, and what it leaves alone. `tests/systemd` boots what it installs."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from yaptext.commands.install import host, unit_command
from yaptext.commands.install import templates as rendered
from yaptext.commands.install.files import InstallError
from yaptext.commands.install.installation import install, rollback, uninstall
from yaptext.server.access import keyfile
from yaptext.settings.table import variables

REPOSITORY = Path(__file__).parents[2]
COMMAND = Path("/opt/yap-text/bin/yap-text")
UNITS = {
    "yap-text.service",
    "yap-text.socket",
    "yap-text-quantize.service",
    "yap-text-uvm.service",
    "yap-text-mps.service",
    "yap-text-logrotate.service",
    "yap-text-logrotate.timer",
}


class Stage:
    """A root folder that is installed into."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root, self._capsys = root, capsys
        self.units, self.configs = root / "etc/systemd/system", root / "etc/yap-text"
        self.env, self.key = self.configs / "yap-text.env", self.configs / "api-key"

    def install(self, command: Path | None = COMMAND) -> dict[str, str]:
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
    monkeypatch.setattr(rendered, "folder", lambda: folder)
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
    monkeypatch.setattr(unit_command, "__file__", "/opt/venv/lib/unit_command.py")
    monkeypatch.setattr(rendered, "folder", lambda: REPOSITORY / "systemd")
    install(stage.root)
    assert "ExecStart=/opt/venv/bin/yap-text serve\n" in (stage.units / "yap-text.service").read_text()
    monkeypatch.setattr(sys, "base_prefix", "/home/me/.pyenv")
    with pytest.raises(InstallError, match=r"/home/me/\.pyenv is below /home"):
        install(stage.root)


class Versioned:
    """What `make install` leaves below its PREFIX, in the root of a stage: an environment a version."""

    def __init__(self, stage: Stage, prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._runtime, self.prefix, self._monkeypatch = stage, prefix, monkeypatch
        self.folder = stage.root / prefix.relative_to("/")
        self.link = stage.root / "usr/local/bin/yap-text"

    def build(self, name: str, *, stamp: str = "built.txt") -> Path:
        for folder in (self.prefix / name, self.folder / name):
            (folder / "bin").mkdir(parents=True)
            (folder / "bin/yap-text").write_text("#!/bin/sh\n")
            (folder / stamp).touch()
        return self.folder / name

    def install(self, name: str) -> dict[str, str]:
        """As that version's own command does."""
        if not (self.prefix / name).exists():
            self.build(name)
        self._monkeypatch.setattr(sys, "prefix", str(self.prefix / name))
        self._monkeypatch.setattr(sys, "executable", str(self.prefix / name / "bin/python"))
        self._monkeypatch.setattr(sys, "base_prefix", "/usr")
        file = self.prefix / name / "lib/yaptext/commands/install/unit_command.py"
        self._monkeypatch.setattr(unit_command, "__file__", str(file))
        return self._runtime.install(None)

    @property
    def links(self) -> dict[str, str]:
        return {link.name: str(link.readlink()) for link in self.folder.iterdir() if link.is_symlink()}

    @property
    def folders(self) -> set[str]:
        return {folder.name for folder in self.folder.iterdir() if not folder.is_symlink()}


@pytest.fixture
def versions(stage: Stage, tmp_path: Path, templates: Path, monkeypatch: pytest.MonkeyPatch) -> Versioned:
    return Versioned(stage, tmp_path / "opt", monkeypatch)


def test_a_version_becomes_current_and_the_one_before_is_kept(stage: Stage, versions: Versioned) -> None:
    """The units run one path, which leads to whatever is current; two versions stay, and the same one twice is one."""
    versions.install("a")
    assert versions.link.readlink() == versions.prefix / "current/bin/yap-text"
    assert "ExecStart=/usr/local/bin/yap-text serve\n" in (stage.units / "yap-text.service").read_text()
    assert versions.links == {"current": "a"}
    said = versions.install("b")
    assert said["current"] == "updated" and said["previous"] == "installed"
    assert versions.links == {"current": "b", "previous": "a"}
    assert "Current version: b. Previous version: a (yap-text install --rollback).\n" in stage.printed
    assert set(versions.install("b").values()) == {"unchanged", "kept"}
    assert versions.links == {"current": "b", "previous": "a"}
    said = versions.install("c")
    assert said["a"] == "removed" and versions.folders == {"b", "c"}
    assert versions.links == {"current": "c", "previous": "b"}
    assert versions.install("b") and versions.links == {"current": "b", "previous": "c"}


def test_a_version_that_runs_is_not_removed(stage: Stage, versions: Versioned) -> None:
    """Nobody restarted the service since: its next engine process starts from there."""
    versions.install("a")
    versions.install("b")
    argv = [str(versions.folder / "a/bin/python"), "60"]
    with subprocess.Popen(argv, executable=shutil.which("sleep")) as service:
        while not Path(f"/proc/{service.pid}/cmdline").read_bytes():
            pass  # the kernel writes it a moment after exec has begun
        said = versions.install("c")
        service.kill()
    assert said["a"] == "kept" and versions.folders == {"a", "b", "c"}
    assert versions.install("c")["a"] == "removed"


def test_a_version_that_cannot_be_removed_is_no_failure(
    versions: Versioned, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The switch is made. The next one tries again."""
    versions.install("a")
    versions.install("b")

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    assert versions.install("c")["a"] == "kept" and "Read-only file system" in stage.printed
    assert versions.links == {"current": "c", "previous": "b"}


def test_what_is_not_ours_below_the_prefix_stays(stage: Stage, versions: Versioned) -> None:
    """A checkout may be the PREFIX. What is unfinished is left to the `make install` that builds it."""
    (versions.folder / "yaptext").mkdir(parents=True)
    versions.build("part", stamp="built.txt.part")
    for name in "abc":
        versions.install(name)
    assert versions.folders == {"yaptext", "part", "b", "c"}
    stage.uninstall()
    assert versions.folders == {"yaptext"} and versions.links == {}


@pytest.mark.parametrize("failing", ["units", "link"])
def test_a_full_disk_leaves_the_version_before(
    stage: Stage, versions: Versioned, templates: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """Units and links alike: the service would start what it started with."""
    versions.install("a")
    before, links = stage.files(), versions.links
    for unit in UNITS:
        (templates / unit).write_text("[Unit]\n# the next version\n")
    versions.build("b")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full_at_the_last(file: int, _: int) -> None:
        if ".timer" in os.readlink(f"/proc/self/fd/{file}"):
            full()

    if failing == "units":
        monkeypatch.setattr(os, "fchmod", full_at_the_last)
    else:
        monkeypatch.setattr(Path, "symlink_to", full)
    with pytest.raises(InstallError, match="cannot be written: No space left on device"):
        versions.install("b")
    assert versions.links == links
    if failing == "units":
        after = {path: text for path, text in stage.files().items() if path in before}
        assert after == before and not list(stage.root.rglob("*.part"))


def test_a_file_in_the_way_of_the_command_is_refused(stage: Stage, versions: Versioned) -> None:
    """Before anything is written; a link is replaced."""
    versions.link.parent.mkdir(parents=True)
    versions.link.write_text("#!/bin/sh\n")
    with pytest.raises(InstallError, match=r"usr/local/bin/yap-text is in the way"):
        versions.install("a")
    assert not stage.units.exists()
    versions.link.unlink()
    versions.link.symlink_to("/opt/yap-text/.venv/serve-cpu/bin/yap-text")
    assert versions.install("a")["yap-text"] == "updated"


def test_rollback_runs_the_install_of_the_version_before(stage: Stage, versions: Versioned, tmp_path: Path) -> None:
    """So that its own units and links come back, by its own code; a rollback of a rollback goes forward."""
    with pytest.raises(InstallError, match="there is no previous version"):
        rollback(stage.root)
    versions.install("a")
    with pytest.raises(InstallError, match="there is no previous version"):
        rollback(stage.root)
    versions.install("b")
    command = versions.folder / "a/bin/yap-text"
    command.write_text(f'#!/bin/sh\necho "$0" "$@" > {tmp_path}/ran\nexit 3\n')
    command.chmod(0o755)
    assert rollback(stage.root) == 3
    assert (tmp_path / "ran").read_text() == f"{command} install --prefix {stage.root}\n"


def test_uninstall_removes_the_versions(stage: Stage, versions: Versioned) -> None:
    """Both, their links, and the folder when nothing else is in it."""
    versions.install("a")
    versions.install("b")
    said = stage.uninstall()
    assert said["a"] == said["b"] == said["current"] == said["previous"] == "removed"
    assert not versions.folder.exists() and not versions.link.is_symlink()


def test_a_command_of_ones_own_is_no_version(stage: Stage, versions: Versioned) -> None:
    """`--command` names what the units run, and moves no link."""
    versions.install("a")
    stage.install(COMMAND)
    assert versions.links == {"current": "a"}
    assert f"ExecStart={COMMAND} serve\n" in (stage.units / "yap-text.service").read_text()


PYTHON = """#!/bin/bash
# A Python for `make install`, as far as it is asked.
case "$2" in
    *base_prefix*) echo {base} ;;
    *version_info*) echo 3.11 ;;
esac
"""
UV = """#!/bin/bash
# A uv for `make install`: a venv of one file, wheels that are one, and a yap-text that says who runs.
case "$1 $2" in
    "--version "*) echo uv 9.9.9 ;;
    "venv "*)
        mkdir -p "${{@: -1}}"/{{bin,lib}}
        cp {python} "${{@: -1}}/bin/python"
        ;;
    "pip install")
        [[ $* != *--dry-run* ]] || exit 0
        echo "$UV_LINK_MODE" "$@" >> {log}
        [ ! -e {full} ] || {{ echo "error: No space left on device"; exit 1; }}
        given="$*" # ... --python VENV ...
        given=${{given#*--python }}
        venv=${{given%% *}}
        if [[ $* == *--target* ]]; then # llm-compressor's folder
            given=${{given#*--target }}
            mkdir -p "${{given%% *}}"
            exit 0
        fi
        if [[ $* == *require-hashes* ]]; then
            echo wheel > "$venv/lib/wheel"
            printf '#!%s/bin/python\\n' "$venv" > "$venv/bin/tool"
        else
            mkdir -p "$venv/lib/python3.11/site-packages/yaptext"
            printf '#!/bin/sh\\necho installed by "$0" "$@"\\n' > "$venv/bin/yap-text"
            chmod +x "$venv/bin/yap-text"
        fi
        ;;
    "python find") [ -e {brought} ] && echo {brought} ;;
    "python install") cp {python} {brought}; echo "$UV_PYTHON_INSTALL_DIR" >> {log} ;;
esac
"""


class Made:
    """`make install` with a uv and a Python that do in no time what takes minutes."""

    def __init__(self, folder: Path, base: str = "/usr") -> None:
        self.prefix, self.full, self._log = folder / "opt", folder / "full", folder / "uv.log"
        self._programs, self._python, brought = folder / "programs", folder / "python", folder / "brought"
        self._programs.mkdir(exist_ok=True)
        uv = self._programs / "uv"
        uv.write_text(UV.format(python=self._python, log=self._log, full=self.full, brought=brought))
        self._python.write_text(PYTHON.format(base=base))
        for program in (uv, self._python):
            program.chmod(0o755)

    def make(self, target: str = "install", **variables: str) -> subprocess.CompletedProcess[str]:
        self._log.write_text("")
        given = {"PYTHON": self._python, "PREFIX": self.prefix, "ENV": "serve-cpu", "ARGS": "--some"} | variables
        command = ["make", "-s", target, *(f"{name}={value}" for name, value in given.items())]
        environment = os.environ | {"PATH": f"{self._programs}:{os.environ['PATH']}"}
        return subprocess.run(
            command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False, timeout=120
        )

    @property
    def uv(self) -> str:
        return self._log.read_text()

    @property
    def folders(self) -> list[Path]:
        return sorted(folder for folder in self.prefix.iterdir())


@pytest.mark.subprocess
def test_make_install_builds_a_version_and_runs_its_own_install(tmp_path: Path) -> None:
    """Complete, not editable, named by version, commit and contents; a second run finds it there."""
    made = Made(tmp_path)
    done = made.make()
    (version,) = made.folders
    assert re.fullmatch(r"\d+\.\d+\.\d+(-[0-9a-f]{7,}(-dirty)?)?-[0-9a-f]{8}", version.name)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"installed by {version}/bin/yap-text install --some\n")
    assert (version / "built.txt").read_text() == (REPOSITORY / "nix/lock/serve-cpu.txt").read_text()
    assert "--require-hashes" in made.uv and "--editable" not in made.uv
    assert made.uv.startswith("copy ")  # uv's cache may be another user's
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    (told,) = version.glob("lib/*/site-packages/yaptext/commit.txt")
    assert told.read_text().startswith(asked.stdout.strip())
    again = made.make()
    assert again.stdout == f"installed by {version}/bin/yap-text install --some\n" and made.uv == ""


@pytest.mark.subprocess
def test_make_install_takes_the_wheels_of_a_version_with_the_same_lock(tmp_path: Path) -> None:
    """As hard links; scripts name their own environment, and those of the other version stay as they are."""
    made = Made(tmp_path)
    made.make()
    (one,) = made.folders
    one = one.rename(made.prefix / "0.0.1")
    (one / "bin/tool").write_text(f"#!{one}/bin/python\n")
    assert made.make().returncode == 0
    one, two = made.folders
    assert "--require-hashes" not in made.uv and "--no-index" in made.uv
    assert (one / "lib/wheel").samefile(two / "lib/wheel")
    assert (two / "bin/tool").read_text() == f"#!{two}/bin/python\n"
    assert (one / "bin/tool").read_text() == f"#!{one}/bin/python\n"
    assert not (one / "bin/yap-text").samefile(two / "bin/yap-text")


@pytest.mark.subprocess
def test_a_make_install_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """On a full disk what it built goes, so that there is room again; what a kill leaves goes with the next run."""
    made = Made(tmp_path)
    killed = made.prefix / "0.0.1"
    killed.mkdir(parents=True)
    (killed / "built.txt.part").touch()
    made.full.touch()
    done = made.make()
    assert done.returncode != 0 and "No space left on device" in done.stdout + done.stderr
    assert "installed by" not in done.stdout
    assert made.folders == []
    made.full.unlink()
    assert made.make().returncode == 0


@pytest.mark.subprocess
def test_a_second_make_install_at_once_is_refused(tmp_path: Path) -> None:
    """It would build at the same path."""
    made = Made(tmp_path)
    made.prefix.mkdir()
    held = os.open(made.prefix, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    done = made.make()
    os.close(held)
    assert done.returncode != 0 and "another make install" in done.stderr and made.folders == []


@pytest.mark.subprocess
def test_make_install_refuses_what_the_units_could_not_see(tmp_path: Path) -> None:
    """Before it builds for minutes."""
    done = Made(tmp_path, base="/home/me/python").make()
    assert done.returncode != 0 and "/home/me/python is below a home folder" in done.stderr
    done = Made(tmp_path).make(PREFIX="/home/me/yap-text")
    assert done.returncode != 0 and "/home/me/yap-text is below a home folder" in done.stderr


@pytest.mark.subprocess
def test_a_python_that_uv_brings_is_part_of_the_version(tmp_path: Path) -> None:
    """It would be below a home folder otherwise, and would stay when the version goes."""
    made = Made(tmp_path)
    done = made.make(PYTHON="")
    (version,) = made.folders
    assert done.returncode == 0, done.stderr
    assert made.uv.splitlines()[0] == f"{version}/python"
    one = version.rename(made.prefix / "0.0.1")
    (one / "python").mkdir()
    (one / "python/cpython").symlink_to(one / "python/cpython-3.11")  # as uv leaves it
    made.make(PYTHON="")
    assert [path.name for path in made.folders] == ["0.0.1", version.name]
    assert (one / "python/cpython").is_symlink() and not (version / "python/cpython").is_symlink()


@pytest.mark.subprocess
def test_make_rollback_runs_the_previous_version(tmp_path: Path) -> None:
    """By its own command, which works where the current one does not."""
    made = Made(tmp_path)
    assert "no previous version" in made.make("rollback").stderr
    made.make()
    (version,) = made.folders
    (made.prefix / "previous").symlink_to(version.name)
    assert made.make("rollback").stdout == f"installed by {made.prefix}/previous/bin/yap-text install --some\n"


def test_a_machine_without_systemd_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what to do instead."""
    monkeypatch.setattr(host, "has_systemd", lambda: False)
    for verb in (install, uninstall, rollback):
        with pytest.raises(InstallError, match="yap-text serve"):
            verb()


def test_another_user_than_root_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a file is touched."""
    monkeypatch.setattr(host, "has_systemd", lambda: True)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for verb in (install, uninstall, rollback):
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
        unit_command.check_open(command)


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
