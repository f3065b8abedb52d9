"""The package without extras: the client, on nothing but the dependencies that pyproject.toml names."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import files
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
ONLY = """
import runpy, sys

allowed = {*sys.stdlib_module_names, "yaptext", *sys.argv[1].split(",")}

class Others:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in allowed:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Others())
sys.argv[:2] = ["yap-text"]
"""
pytestmark = pytest.mark.subprocess


def run_on_dependencies(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    names = ",".join(Requirement(line).name for line in listed)
    command = [sys.executable, "-c", ONLY + code, names, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_the_client_and_the_frames_import_nothing_else() -> None:
    ended = run_on_dependencies("import yaptext.client.sync, yaptext.wire.asyncapi; print('there')")
    assert ended.stdout == "there\n", ended.stderr


def test_it_weighs_under_5_mb_and_runs_alone(tmp_path: Path) -> None:
    """The wheel as it is built, unpacked, with the two packages that it depends on and nothing else in reach."""
    built = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")]
    subprocess.run(built, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = (tmp_path / "dist").iterdir()
    target = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
        weight = sum(member.file_size for member in archive.infolist())
    for name in ("msgspec", "websockets"):
        parts = [part for part in files(name) or [] if part.suffix != ".pyc"]
        assert parts
        weight += sum(Path(str(part.locate())).stat().st_size for part in parts)
        (target / name).symlink_to(Path(str(parts[0].locate())).parents[len(parts[0].parts) - 1] / name)
    assert 1_000_000 < weight < 5_000_000
    assert wheel.stat().st_size < 1_000_000
    code = "import sys, yaptext.client.sync; print(yaptext.__file__, *sys.modules)"
    command = [sys.executable, "-S", "-c", code]
    ended = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(target)}, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 0, ended.stderr
    where, *modules = ended.stdout.split()
    assert where.startswith(str(target))
    assert not {module.partition(".")[0] for module in modules} & {"vllm", "torch", "starlette", "pydantic", "uvicorn"}


def test_a_command_that_needs_more_names_the_extra() -> None:
    ended = run_on_dependencies("runpy.run_module('yaptext', run_name='__main__')", "chat")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == (
        "yap-text: there is no Python package pydantic. The package alone is the client; "
        "pip install 'yaptext[serve]' brings what the commands need.\n"
    )
