"""Run nix on this flake with tests/stub-nixpkgs in the place of nixpkgs: no binary cache, no network in any build.

    python tests/nix/rehearse.py flake check
    python tests/nix/rehearse.py run .#serve-cpu
    python tests/nix/rehearse.py --wheels serve-cuda build .#serve

Needs nix 2.8 or newer, git, gcc, patchelf, bash-static and, to run this, a Python with pip and setuptools. A lock that
is built needs its own Python: PYTHON311 or PYTHON312 names it, or it is found on PATH or beside this one. The store is
.venv/nix, so that a second run builds only what changed; --fresh begins with an empty one. The wheels, which pip
fetches, are in .venv/wheelhouse.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / ".venv" / "nix"
WHEELHOUSE = ROOT / ".venv" / "wheelhouse"
SANDBOX = ROOT / "tests" / "nix" / "sandbox.sh"
STUB = ["--no-write-lock-file", "--impure", "--override-input", "nixpkgs", "path:./tests/stub-nixpkgs"]


def fill(environments: Sequence[str]) -> None:
    """Lets pip fetch the files of the locks that the wheelhouse lacks. Nix checks their hashes once more."""
    for name in environments:
        lines = (ROOT / "nix" / "lock" / f"{name}.txt").read_text().splitlines()
        version = re.findall(r"CPython (3\.\d+) ", lines[0])[0]
        absent = [line for line in lines if "==" in line and not (WHEELHOUSE / line.rpartition("# ")[2]).exists()]
        wheels = [line for line in absent if line.endswith(".whl")]
        archives = [line for line in absent if not line.endswith(".whl")]
        if wheels:
            print(f"{name}: fetching {len(wheels)} wheels", file=sys.stderr)
            download(wheels, "--only-binary=:all:", f"--python-version={version}")
        if archives:
            print(f"{name}: fetching {len(archives)} source archives", file=sys.stderr)
            # pip asks a source archive for its name even where it only fetches it: hence setuptools.
            download(archives, "--no-binary=:all:", "--no-build-isolation")


def download(lines: Sequence[str], *options: str) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as requirements:
        requirements.write("\n".join(lines))
        requirements.flush()
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        command += ["--require-hashes", "--progress-bar=off", f"--dest={WHEELHOUSE}", *options]
        subprocess.run([*command, f"--requirement={requirements.name}"], check=True)


def python(version: str) -> Path | None:
    """The interpreter by the path where its own files are: one that a link or a shim of a version manager leads to."""
    beside = Path(sys.base_prefix).parent.glob(f"*{version}*/bin/python{version}")
    for name in (os.environ.get("PYTHON" + version.replace(".", "")), sys.executable, f"python{version}", *beside):
        if not name or not shutil.which(name):
            continue
        question = "import sys; print(sys.base_prefix)"
        asked = subprocess.run([name, "-c", question], capture_output=True, text=True, check=False)
        found = Path(asked.stdout.strip(), "bin", f"python{version}")
        if asked.returncode == 0 and found.exists():
            return found
    return None


def environment() -> dict[str, str]:
    """A store of its own, nothing from outside, and builds that see the machine's tools, the wheels and no more."""
    pythons = {version: found for version in ("3.11", "3.12") if (found := python(version))}
    paths = ["/bin", "/lib", "/usr", "/etc/alternatives", f"/wheelhouse={WHEELHOUSE.resolve()}"]
    paths += [str(found.parents[1]) for found in pythons.values() if not found.is_relative_to("/usr")]
    config = {
        "experimental-features": "nix-command flakes",
        "substituters": "",
        "flake-registry": "",
        "build-users-group": "",
        "sandbox": "true",
        "sandbox-paths": " ".join(paths),
        "pre-build-hook": str(SANDBOX),
        "warn-dirty": "false",
    }
    return (
        os.environ
        | {
            "NIX_CONFIG": "\n".join(f"{name} = {value}" for name, value in config.items()),
            "NIX_STORE_DIR": str(HOME / "store"),
            "NIX_STATE_DIR": str(HOME / "state"),
            "NIX_LOG_DIR": str(HOME / "log"),
            "NIX_REMOTE": "",
            "XDG_CACHE_HOME": str(HOME / "cache"),
        }
        | {"PYTHON" + version.replace(".", ""): str(found) for version, found in pythons.items()}
    )


def empty() -> None:
    """Deletes the store, whose folders are read-only."""
    for folder, _, _ in os.walk(HOME):
        os.chmod(folder, 0o700)
    shutil.rmtree(HOME, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="begin with an empty store")
    parser.add_argument("--wheels", action="append", metavar="LOCK", help="fetch these (default: what the tests build)")
    parser.add_argument("nix", nargs=argparse.REMAINDER, help="arguments of nix")
    arguments = parser.parse_args()
    if arguments.fresh:
        empty()
    WHEELHOUSE.mkdir(parents=True, exist_ok=True)
    fill(arguments.wheels or ["serve-cpu", "test", "llmcompressor"])
    words = arguments.nix
    end = words.index("--") if "--" in words else len(words)
    command = ["nix", *words[:end], *STUB, *words[end:]]
    return subprocess.run(command, cwd=ROOT, env=environment(), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
