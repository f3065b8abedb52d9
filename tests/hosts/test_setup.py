"""nix/lock/uv.sh, which sets environments up: which uv, which Python, which registries, and what a host lacks.

What is run is the script itself; uv, pip and the C library's tools are stand-ins on PATH that say what a host would.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.subprocess
ROOT = Path(__file__).resolve().parents[2]


class Host:
    """A folder of programs, which is all that is on PATH but the plain tools, and a checkout with two locks."""

    TOOLS = ("awk", "basename", "bash", "cat", "cmp", "cp", "env", "flock", "grep", "ls", "mkdir", "rm", "sed")

    def __init__(self, folder: Path) -> None:
        self.programs, self.checkout = folder / "bin", folder / "checkout"
        self.programs.mkdir()
        for tool in self.TOOLS:
            (self.programs / tool).symlink_to(f"/usr/bin/{tool}")
        locks = self.checkout / "nix" / "lock"
        locks.mkdir(parents=True)
        (locks / "uv.sh").write_text((ROOT / "nix/lock/uv.sh").read_text())
        (locks / "uv.txt").write_text("uv==1\n")
        self.program("uname", "echo Linux x86_64")
        self.program("getconf", "echo glibc 2.36")
        self.program("ldconfig", "echo libnuma.so.1")
        self.program("gcc", "exit 0")
        self.program("uv", 'case "$1" in --version) echo uv 0.13.9 ;; esac')
        self.program("python3", "exit 1")
        self.program("apt-get", "exit 1")

    def program(self, name: str, script: str) -> None:
        """`name` on PATH; an empty script takes it away."""
        (self.programs / name).unlink(missing_ok=True)
        if script:
            (self.programs / name).write_text(f"#!/bin/bash\n{script}\n")
            (self.programs / name).chmod(0o755)

    def run(self, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["/bin/bash", "-euo", "pipefail", "-c", f". nix/lock/uv.sh\n{script}"],
            cwd=self.checkout,
            # /usr/sbin is looked into for ldconfig, after PATH.
            env={"PATH": str(self.programs), **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def complaint(self, script: str, **environment: str) -> str:
        """The one line that it ends with."""
        ended = self.run(script, **environment)
        assert ended.returncode == 1 and ended.stdout == "" and ended.stderr.count("\n") == 1, ended
        return ended.stderr.strip()


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


# --- what a host lacks


def test_a_host_with_everything_needs_nothing(host: Host) -> None:
    """For each build."""
    for env in ("serve-cpu", "serve-cuda", "audit"):
        ended = host.run(f"needs {env}")
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("manager", "env", "program", "script", "line"),
    [
        ("apt-get", "serve-cpu", "ldconfig", "echo libc.so.6", "needs libnuma: apt-get install libnuma1"),
        ("dnf", "serve-cpu", "ldconfig", "echo libc.so.6", "needs libnuma: dnf install numactl-libs"),
        ("apt-get", "serve-cuda", "gcc", "", "with its headers: apt-get install gcc libc6-dev"),
        ("apt-get", "serve-cuda", "gcc", "exit 1", "with its headers: apt-get install gcc libc6-dev"),
        ("dnf", "serve-cuda", "gcc", "", "with its headers: dnf install gcc"),
        ("apt-get", "audit", "uname", "echo Linux aarch64", "Linux on x86_64; this is Linux aarch64"),
        ("apt-get", "audit", "getconf", "echo glibc 2.31", "glibc 2.34 or newer; this is glibc 2.31"),
        ("apk", "audit", "getconf", "exit 1", "glibc 2.34 or newer; this is another C library"),
    ],
)
def test_what_is_missing_is_one_line_with_its_package(
    host: Host, manager: str, env: str, program: str, script: str, line: str
) -> None:
    """In the words of the package manager at hand."""
    host.program("apt-get", "")
    host.program(manager, "exit 1")
    host.program(program, script)
    assert line in host.complaint(f"needs {env}")


# --- uv


def test_uv_of_path_is_taken_if_it_is_new_enough(host: Host) -> None:
    """Any from 0.8 on."""
    for version in ("0.8.0", "0.13.9 (x86_64-unknown-linux-gnu)", "1.0.0"):
        host.program("uv", f"echo 'uv {version}'")
        assert host.run('use_uv; echo "$UV"').stdout == f"{host.programs}/uv\n"


@pytest.mark.parametrize("present", ["", "echo uv 0.7.22"])
def test_else_the_pinned_one_is_installed_by_any_python_with_venv(host: Host, present: str) -> None:
    """With its hash, once."""
    host.program("uv", present)
    venv = 'mkdir -p "$3/bin"; cp "$0" "$3/bin/python"'
    log = host.checkout / "pip.log"
    host.program("python3.11", f'case "$1 $2" in "-m venv") {venv} ;; "-m pip") echo "$@" >> {log} ;; esac')
    for _ in range(2):
        ended = host.run('use_uv; echo "$UV"')
        assert ended.stdout.splitlines()[-1] == f"{host.checkout}/.venv/uv/bin/uv", ended
    installs = [line for line in log.read_text().splitlines() if "install" in line]
    assert len(installs) == 1 and "--require-hashes" in installs[0] and installs[0].endswith("-r nix/lock/uv.txt")


def test_neither_uv_nor_a_python_with_venv_is_one_line(host: Host) -> None:
    """With the package."""
    host.program("uv", "")
    assert host.complaint("use_uv").endswith("apt-get install python3-venv")


# --- registries


def test_uv_takes_what_pip_is_configured_for(host: Host) -> None:
    """The environment before the files, `install` before `global`; lists in uv's own form."""
    host.program(
        "python3",
        """cat << 'END'
:env:.find-links='/a b'
global.cert='/c.pem'
global.extra-index-url='\\nfile:///d\\nfile:///e'
global.find-links='/never'
global.index-url='https://never.invalid/simple'
global.proxy='proxy.invalid:3128'
install.index-url='https://user:secret@own.invalid/simple'
END""",
    )
    names = "UV_FIND_LINKS UV_DEFAULT_INDEX SSL_CERT_FILE ALL_PROXY extra_indexes"
    said = host.run(f'use_uv; for name in {names}; do echo "${{!name:-}}"; done').stdout.splitlines()
    assert said == [
        "/a,b",
        "https://user:secret@own.invalid/simple",
        "/c.pem",
        "http://proxy.invalid:3128",
        "file:///d file:///e",
    ]


def test_variables_of_uv_come_before_pips(host: Host) -> None:
    """Whoever sets them knows uv."""
    host.program("python3", "echo \"global.find-links='/a'\"; echo \"global.index-url='https://never.invalid'\"")
    given = {"UV_FIND_LINKS": "/mine", "UV_DEFAULT_INDEX": "https://mine.invalid"}
    said = host.run('use_uv; echo "$UV_FIND_LINKS $UV_DEFAULT_INDEX"', **given).stdout
    assert said == "/mine https://mine.invalid\n"


@pytest.mark.parametrize(
    ("lock", "works", "tried"),
    [
        ("torch==2+cpu --hash=sha256:0  # t.whl", "configured", ["configured"]),
        ("torch==2+cpu --hash=sha256:0  # t.whl", "cpu", ["configured", "extra", "cpu"]),
        ("torch==2+cpu --hash=sha256:0  # t.whl", "none", ["configured", "extra", "cpu", "extra cpu"]),
        ("torch==2 --hash=sha256:0  # t.whl", "none", ["configured", "extra"]),
    ],
)
def test_the_nearest_place_that_has_all_wheels_is_taken(host: Host, lock: str, works: str, tried: list[str]) -> None:
    """Extra indexes and PyTorch's only if they are needed; the last is not for CUDA."""
    (host.checkout / "lock.txt").write_text(f"{lock}\n")
    host.program(
        "uv",
        f"""
way="${{UV_INDEX:+extra }}${{UV_TORCH_BACKEND:-}}"; way="${{way% }}"; way="${{way:-configured}}"
case "$*" in *dry-run*) echo "$way" >> tried ;; *) echo "$way" > taken ;; esac
[[ $way == {works} ]]""",
    )
    host.run("UV=uv; extra_indexes=file:///d; add v lock.txt")
    assert (host.checkout / "tried").read_text().splitlines() == tried
    assert (host.checkout / "taken").read_text().strip() == tried[-1]


# --- Python


LIST = """case "$*" in
    *"python list"*) {list} ;;
    *"python install"*) [ {fails} ] && {{ echo "error: no way" >&2; exit 2; }}; : > brought ;;
    *"python find"*) [ -e brought ] && echo /uv/python ;;
esac"""


def python(host: Host, name: str, base: str = "/usr", version: str = "3.11", headers: bool = True) -> str:
    has = "true" if headers else "false"
    script = f'case "$2" in *base_prefix*) echo {base} ;; *version_info*) echo {version} ;; *Python.h*) {has} ;; esac'
    host.program(name, script)
    return f"{host.programs}/{name}"


def listed(host: Host, *found: str, fails: str = "") -> None:
    lines = "; ".join(f"echo 'cpython-3.11 {each}'" for each in found) or "true"
    host.program("uv", LIST.format(list=lines, fails=fails or '""'))


FIND = 'UV=uv; find_python 3.11 {env} || bring_python 3.11; echo "$python"'


def test_a_python_that_is_here_is_taken_else_uv_brings_one(host: Host) -> None:
    """For CUDA one without Python.h does not count."""
    here, bare = python(host, "here"), python(host, "bare", headers=False)
    listed(host, bare, here)
    assert host.run(FIND.format(env="serve-cpu")).stdout == f"{bare}\n"
    assert host.run(FIND.format(env="serve-cuda")).stdout == f"{here}\n"
    listed(host)
    assert host.run(FIND.format(env="serve-cpu")).stdout.splitlines()[-1] == "/uv/python"


def test_units_get_no_python_below_a_home_folder(host: Host) -> None:
    """Found or named."""
    home, here = python(host, "home", base="/home/me/.pyenv"), python(host, "here")
    listed(host, home, here)
    assert host.run(FIND.format(env="x"), OUTSIDE_HOME="1").stdout == f"{here}\n"
    said = host.complaint(FIND.format(env="x"), OUTSIDE_HOME="1", PYTHON=home)
    assert said.startswith("/home/me/.pyenv is below a home folder")


def test_a_named_python_of_another_version_is_refused(host: Host) -> None:
    """With both versions; one that fits comes before any that is found."""
    listed(host, python(host, "here"))
    said = host.complaint(FIND.format(env="x"), PYTHON=python(host, "other", version="3.13"))
    assert said.startswith("the lock is for Python 3.11; ") and " is 3.13: " in said
    mine = python(host, "mine")
    assert host.run(FIND.format(env="x"), PYTHON=mine).stdout == f"{mine}\n"


def test_a_python_that_cannot_be_had_ends_with_the_package(host: Host) -> None:
    """After uv's own reason."""
    listed(host, fails="1")
    ended = host.run(FIND.format(env="x"))
    reason, line = ended.stderr.splitlines()
    assert ended.returncode == 1 and reason == "error: no way"
    assert "apt-get install python3.11, or make PYTHON=/path/to/python3.11" in line
