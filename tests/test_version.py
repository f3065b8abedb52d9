"""build.py: the commit of the code that runs, and where it is told."""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path

import httpx
import pytest
from conftest import service
from fakes import ScriptedEngine
from prometheus_client.parser import text_string_to_metric_families

import yaptext
from yaptext import build
from yaptext.build import RELEASE, Build, find
from yaptext.engine.base import Engines

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.invalid", "-c", "commit.gpgsign=false")
    return subprocess.check_output(["git", "-C", str(folder), *identity, *arguments], text=True).strip()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The package's folder in a checkout of one commit."""
    package = tmp_path / "checkout" / "yaptext"
    package.mkdir(parents=True)
    (package / "code.py").write_text("1")
    git(package.parent, "init", "--quiet")
    git(package.parent, "add", ".")
    git(package.parent, "commit", "--quiet", "--message", "one")
    return package


@pytest.mark.subprocess
def test_a_checkout_has_the_version_of_its_commit(package: Path) -> None:
    """Whatever tags there are; a tracked file that was edited makes it dirty, a new one does not."""
    commit = git(package.parent, "rev-parse", "HEAD")
    git(package.parent, "tag", "v9")
    (package / "new.py").touch()
    assert find(package) == Build(f"{RELEASE}+g{commit[:7]}", commit)
    (package / "code.py").write_text("22")
    assert find(package) == Build(f"{RELEASE}+g{commit[:7]}.dirty", commit)


@pytest.mark.subprocess
def test_a_worktree_has_the_version_of_its_own_commit(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its `.git` is a file. A repository that the environment names is another one."""
    other = package.parents[1] / "worktree"
    git(package.parent, "worktree", "add", "--quiet", str(other))
    git(other, "commit", "--quiet", "--allow-empty", "--message", "two")
    monkeypatch.setenv("GIT_DIR", str(package.parent / ".git"))
    found = find(other / "yaptext").commit
    monkeypatch.delenv("GIT_DIR")
    assert found == git(other, "rev-parse", "HEAD") != git(package.parent, "rev-parse", "HEAD")


@pytest.mark.subprocess
def test_another_repository_around_is_not_asked(package: Path) -> None:
    """An environment in somebody's checkout holds the package, and is not that checkout's code."""
    inside = package / "lib" / "yaptext"
    inside.mkdir(parents=True)
    assert find(inside) == Build(RELEASE, None)
    (inside.parent / ".git").mkdir()  # of nothing
    assert find(inside) == Build(RELEASE, None)


def test_without_git_the_commit_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No failure, no output."""
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", "/nowhere")
    assert find(tmp_path / "yaptext") == Build(RELEASE, None)


@pytest.mark.subprocess
def test_a_start_does_not_wait_for_a_git_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk that does not answer, for example."""
    (tmp_path / ".git").mkdir()
    hangs = tmp_path / "git"
    hangs.write_text("#!/bin/sh\nexec sleep 60\n")
    hangs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(build, "GIT_WITHIN_S", 0.1)
    begun = time.monotonic()
    assert find(tmp_path / "yaptext") == Build(RELEASE, None)
    assert time.monotonic() - begun < 30


@pytest.mark.parametrize(
    ("written", "found"),
    [
        (COMMIT, Build(f"{RELEASE}+g0123456", COMMIT)),
        (f"{COMMIT}-dirty\n", Build(f"{RELEASE}+g0123456.dirty", COMMIT)),
        ("", Build(RELEASE, None)),
        ("$(rm -rf /)", Build(RELEASE, None)),
        (None, Build(RELEASE, None)),
    ],
)
def test_a_package_of_the_flake_carries_its_commit(tmp_path: Path, written: str | None, found: Build) -> None:
    """In commit.txt, as the flake calls it. A wheel has no such file."""
    if written is not None:
        (tmp_path / "commit.txt").write_text(written)
    assert find(tmp_path) == found


def test_the_release_is_that_of_the_package() -> None:
    """pyproject.toml has it for pip."""
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert f'\nversion = "{RELEASE}"\n' in project


def test_the_package_knows_its_version_and_invents_no_other_name() -> None:
    """`__version__` is found when it is asked for."""
    assert yaptext.__version__ == build.build().version
    assert re.fullmatch(rf"{re.escape(RELEASE)}(\+g[0-9a-f]{{7}}(\.dirty)?)?", yaptext.__version__)
    with pytest.raises(AttributeError, match="no attribute 'versoin'"):
        yaptext.versoin  # noqa: B018


async def test_status_and_metrics_tell_version_and_commit() -> None:
    """`server.ready` has them, too (tests/server/test_door.py)."""
    engine, found = ScriptedEngine(), build.build()
    async with service(Engines(chat=engine, tool=engine)) as running:
        async with httpx.AsyncClient(base_url=running.http, trust_env=False) as client:
            status = (await client.get("/status", headers={"X-API-Key": "yap_token"})).json()
            metrics = (await client.get("/metrics")).text
    assert (status["version"], status["commit"]) == found
    (info,) = [f for f in text_string_to_metric_families(metrics) if f.name == "yaptext_build_info"]
    (sample,) = info.samples
    assert sample.labels == {"version": found.version, "commit": found.commit or "unknown"} and sample.value == 1
