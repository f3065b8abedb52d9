"""The flake itself, evaluated, built and run with tests/stub-nixpkgs in the place of nixpkgs (see rehearse.py)."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
pytestmark = [pytest.mark.nix, pytest.mark.timeout(1800)]  # the first build of all takes minutes


def nix(*arguments: str) -> str:
    """What `nix` prints, run on this flake and the stub."""
    command = [sys.executable, HERE / "rehearse.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-8000:]
    return done.stdout


def locked(name: str) -> dict[str, str]:
    """The lock's files: sha256 by file name."""
    lines = (ROOT / "nix" / "lock" / f"{name}.txt").read_text().splitlines()
    return {file: sha256 for line in lines for sha256, file in re.findall(r"sha256:(\w+)  # (\S+)$", line)}


@pytest.fixture(scope="module")
def wrapper() -> Path:
    """bin/yap-text of `.#serve-cpu`, built."""
    built = json.loads(nix("build", ".#serve-cpu", "--no-link", "--json"))
    return Path(built[0]["outputs"]["out"]) / "bin" / "yap-text"


@contextmanager
def serving(*command: str, state: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The service as a process group of its own, and its address once it is ready."""
    environment = os.environ | {"PORT": "0", "YAP_TEXT_STATE_DIR": str(state), "LOG_FORMAT": "json"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None
            seen: list[str] = []
            for line in process.stdout:
                seen.append(line)
                if '"server.ready"' in line:
                    yield process, json.loads(line)["url"]
                    break
            else:
                pytest.fail("the service ended before it was ready:\n" + "".join(seen[-30:]))
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def test_the_flake_checks() -> None:
    """Every output evaluates; the environments import the service, and the unit tests pass in the sandbox."""
    nix("flake", "check")


def test_serve_cpu_answers_a_turn_and_stops_when_told(wrapper: Path, state_folder: Path) -> None:
    """Python, wheels, project and wrapper make a service, and SIGTERM ends it with 0."""
    with serving(str(wrapper), "serve", state=state_folder) as (process, url):
        address = url.replace("http", "ws") + "/ws"
        question = [str(wrapper), "warmup", "--url", address, "What is the capital of France?"]
        answer = subprocess.run(question, capture_output=True, text=True, timeout=120, check=False)
        assert answer.returncode == 0, answer.stderr
        assert "Paris" in json.loads(answer.stdout.splitlines()[-1])["text"]
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        assert process.returncode == 0


@pytest.mark.parametrize("app", ["serve-cpu", "quantize-cpu", "install-cpu", "chat", "bench"])
def test_apps_run_their_command(app: str) -> None:
    """`nix run` hands its arguments on."""
    verb = app.removesuffix("-cpu")
    assert f"usage: yap-text {verb}" in nix("run", f".#{app}", "--", "--help")


def test_install_makes_units_that_run_the_package(wrapper: Path, tmp_path: Path) -> None:
    """Of the store, with the units that the package carries."""
    nix("run", ".#install-cpu", "--", "--prefix", str(tmp_path))
    units = tmp_path / "etc/systemd/system"
    kinds = (".service", ".socket", ".timer")
    rendered = {file.name for file in (ROOT / "systemd").iterdir() if file.suffix in kinds}
    assert {unit.name for unit in units.iterdir()} == rendered
    assert f"\nExecStart={wrapper} serve\n" in (units / "yap-text.service").read_text()
    assert f"\nExecStart={wrapper} quantize --when-wanted\n" in (units / "yap-text-quantize.service").read_text()


def test_what_the_wheels_link_to_is_in_them_or_given(wrapper: Path) -> None:
    """The machine's libraries would hide a lack from the stub: a real nixpkgs gives what the wrapper names, no more."""
    built = json.loads(nix("build", ".#serve-cpu.environment", "--no-link", "--json"))
    below = next(Path(built[0]["outputs"]["out"]).glob("lib/python*/site-packages/below.pth")).read_text()
    site = Path(re.findall(r"'(.*)'", below)[0])
    glibc = {"ld-linux-x86-64.so.2", "libc.so.6", "libdl.so.2", "libm.so.6", "libpthread.so.0", "librt.so.1"}
    named = {"libstdc++.so.6", "libgcc_s.so.1", "libz.so.1", "libnuma.so.1"}
    numba = {"libtbb.so.12", "libgomp.so.1.0.0"}  # two of its thread pools, of which it takes what loads
    modules = [path for path in site.rglob("*.so*") if path.is_file()]
    dynamic = subprocess.run(["readelf", "--dynamic", *modules], capture_output=True, text=True, check=False).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))
    assert needed - {path.name for path in modules} - numba == glibc | named


@pytest.mark.parametrize(("package", "lock"), [("serve", "serve-cuda"), ("serve-cpu", "serve-cpu")])
def test_an_environment_fetches_the_files_of_its_lock_and_no_others(package: str, lock: str) -> None:
    """By name and hash, down to the derivations. The CUDA environment is evaluated, not built."""
    derivations: dict[str, Any] = json.loads(nix("show-derivation", "--recursive", f".#{package}"))
    fetched = {
        derivation["env"]["name"]: derivation["outputs"]["out"]["hash"]
        for derivation in derivations.values()
        if derivation["env"]["name"].endswith((".whl", ".tar.gz"))
    }
    assert fetched == locked(lock)


def prepared(**environment: str) -> subprocess.CompletedProcess[str]:
    """What the wrapper of `.#serve` does before it starts the service, then the two variables that it sets."""
    script = (ROOT / "nix" / "driver.sh").read_text() + '\nprintf "%s\\n" "$LD_LIBRARY_PATH" "$TRITON_LIBCUDA_PATH"'
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script, "yap-text", "serve"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"YAP_TEXT_DEVICE": "cuda", "LD_LIBRARY_PATH": "/of/the/wrapper"} | environment,
    )


def test_without_a_driver_it_says_so_in_one_line() -> None:
    """And names the command that needs none."""
    done = prepared(YAP_TEXT_DRIVER_LIB="/nowhere")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "/nowhere" in done.stderr and "nix run .#serve-cpu" in done.stderr


def test_the_driver_of_a_host_comes_alone(tmp_path: Path) -> None:
    """Of the folder that YAP_TEXT_DRIVER_LIB names the service sees the driver's libraries, and no C library."""
    host = tmp_path / "host"
    host.mkdir()
    for name in ("libcuda.so.1", "libnvidia-ml.so.1", "libc.so.6", "libstdc++.so.6"):
        (host / name).touch()
    for _ in range(2):  # a restart finds the links of the start before
        done = prepared(YAP_TEXT_DRIVER_LIB=str(host), CACHE_DIRECTORY=str(tmp_path / "cache"))
        assert done.returncode == 0, done.stderr
        path, triton = done.stdout.splitlines()
        assert path == f"{triton}:/of/the/wrapper"
        assert sorted(file.name for file in Path(triton).iterdir()) == ["libcuda.so.1", "libnvidia-ml.so.1"]
