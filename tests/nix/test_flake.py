"""The flake itself, evaluated, built and run with tests/stub-nixpkgs in the place of nixpkgs (see rehearse.py)."""

from __future__ import annotations

import json
import os
import re
import shutil
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


@pytest.fixture(scope="module")
def environment() -> Path:
    """The Python of `.#serve-cpu` with the project, built."""
    built = json.loads(nix("build", ".#serve-cpu.environment", "--no-link", "--json"))
    return Path(built[0]["outputs"]["out"])


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


def layers(environment: Path) -> list[Path]:
    """The site-packages of an environment, then those below it."""
    (site,) = environment.glob("lib/python*/site-packages")
    below = site / "below.pth"
    return [site, *layers(Path(re.findall(r"'(.*)'", below.read_text())[0]).parents[2])] if below.exists() else [site]


def test_what_the_wheels_link_to_is_in_them_or_given(environment: Path) -> None:
    """The machine's libraries would hide a lack from the stub: a real nixpkgs gives what the wrapper names, no more."""
    glibc = {"ld-linux-x86-64.so.2", "libc.so.6", "libdl.so.2", "libm.so.6", "libpthread.so.0", "librt.so.1"}
    named = {"libstdc++.so.6", "libgcc_s.so.1", "libz.so.1", "libnuma.so.1"}
    numba = {"libtbb.so.12", "libgomp.so.1.0.0"}  # two of its thread pools, of which it takes what loads
    modules = [path for site in layers(environment) for path in site.rglob("*.so*") if path.is_file()]
    dynamic = subprocess.run(["readelf", "--dynamic", *modules], capture_output=True, text=True, check=False).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))
    assert needed - {path.name for path in modules} - numba == glibc | named


def test_a_program_that_keeps_the_loader_of_its_wheel_fails_the_build() -> None:
    """NixOS has none in /lib64. Here patchelf does nothing."""
    expression = """
      let
        stub = import ./tests/stub-nixpkgs { };
        idle = stub.writeShellApplication { name = "patchelf"; text = ":"; };
        build = import ./nix/python-env.nix {
          pkgs = stub // { patchelf = idle; };
          libraries = "/usr/lib";
          torchIndex = "";
        };
        lock = build.read ./nix/lock/serve-cpu.txt;
      in
      build.environment {
        name = "ninja-alone";
        inherit (lock) python;
        wheels = builtins.filter (wheel: wheel.name == "ninja") lock.wheels;
      }"""
    with pytest.raises(AssertionError, match=r"bin/ninja asks for /lib64/ld-linux-x86-64\.so\.2 instead of "):
        nix("build", "--no-link", "--expr", expression)


def test_scripts_of_the_layers_below_run_with_what_is_above_them(environment: Path) -> None:
    """`vllm` of the base imports wheels of the layer above: in there it has that layer's Python."""
    _, wheels, base = (site.parents[2] for site in layers(environment))
    for layer in (wheels, environment):
        assert {path.name for path in (layer / "bin").iterdir()} > {"vllm", "torchrun", "transformers", "ninja"}
        for script in (layer / "bin").iterdir():
            first = script.read_bytes().partition(b"\n")[0]
            if first.startswith(b"#!") and b"python" in first:
                assert first.decode() == f"#!{layer}/bin/{first.decode().rpartition('/')[2]}", script
    assert (base / "bin" / "vllm").exists()


@pytest.mark.parametrize(("package", "lock"), [("serve", "serve-cuda"), ("serve-cpu", "serve-cpu")])
def test_an_environment_fetches_the_files_of_its_lock_and_no_others(package: str, lock: str) -> None:
    """By name and hash, down to the derivations. The CUDA environment is evaluated, not built."""
    derivations: dict[str, Any] = json.loads(nix("show-derivation", "--recursive", f".#{package}"))
    fetched = {
        derivation["env"]["name"]: derivation["outputs"]["out"]["hash"]
        for derivation in derivations.values()
        if derivation["env"]["name"].endswith((".whl", ".tar.gz"))
    }
    assert fetched == locked(lock) | locked("llmcompressor")


def packages(folder: Path, lock: str, change: tuple[str, str], *attributes: str) -> list[Any]:
    """Attributes of nix/packages.nix, of a checkout whose lock has one thing changed."""
    shutil.copytree(ROOT / "nix", folder / "nix")
    file = folder / "nix" / "lock" / f"{lock}.txt"
    text, count = re.subn(*change, file.read_text(), count=1, flags=re.M)
    assert count == 1
    file.write_text(text)
    pkgs = f"import {ROOT}/tests/stub-nixpkgs {{ config.allowUnfreePredicate = _: true; }}"
    wanted = " ".join(f"p.{attribute}" for attribute in attributes)
    expression = f"let p = import {folder}/nix/packages.nix {{ pkgs = {pkgs}; }}; in [ {wanted} ]"
    return json.loads(nix("eval", "--json", "--expr", expression))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["serve-cuda", "serve-cpu"])
def test_another_pin_of_a_small_wheel_leaves_the_base_as_it_is(name: str, tmp_path: Path) -> None:
    """The gigabytes of torch, CUDA and vLLM are not built again for another websockets; for another vLLM they are."""
    paths = [f"bases.{name}.drvPath", f"environments.{name}.drvPath"]
    now = packages(tmp_path / "now", name, ("^websockets==", "websockets=="), *paths)
    small = packages(tmp_path / "small", name, ("^websockets==[^ ]+", "websockets==0.1"), *paths)
    large = packages(tmp_path / "large", name, ("^(vllm(-cpu)?)==[^ ]+", r"\1==0.1"), *paths)
    assert (small[0] == now[0], small[1] == now[1]) == (True, False)
    assert (large[0] == now[0], large[1] == now[1]) == (False, False)


def test_an_environment_takes_the_python_of_its_lock(tmp_path: Path) -> None:
    """Which its first line names. One that nixpkgs does not have is an error that says so."""
    change = ("CPython 3[.][0-9]+ ", "CPython 3.12 ")
    version = "environments.serve-cuda.python.pythonVersion"
    assert packages(tmp_path / "other", "serve-cuda", change, version) == ["3.12"]
    with pytest.raises(AssertionError, match=r"serve-cuda\.txt is for CPython 3\.10, which this nixpkgs does not have"):
        packages(tmp_path / "gone", "serve-cuda", (change[0], "CPython 3.10 "), version)


@pytest.mark.parametrize(("nvcc", "found"), [("13.0.88", True), ("13.5.37", False)])
def test_vllm_finds_nvcc_if_it_is_of_the_release_of_the_headers(nvcc: str, found: bool, tmp_path: Path) -> None:
    """Of another release it compiles nothing for FlashInfer, which vLLM would then choose."""
    lock = (ROOT / "nix/lock/serve-cuda.txt").read_text()
    assert "\nnvidia-cuda-runtime==13.0." in lock
    change = ("^nvidia-cuda-nvcc==[^ ]+", f"nvidia-cuda-nvcc=={nvcc}")
    (text,) = packages(tmp_path, "serve-cuda", change, "packages.serve.application")
    assert ("export CUDA_HOME=" in text) == ('export PATH="$CUDA_HOME/bin:$PATH"' in text) == found


def test_the_overlay_asks_for_consent_to_nvidias_licence() -> None:
    """The package for CUDA is unfree on any other nixpkgs than the flake's own; the one for CPUs is free."""
    stub = "import ./tests/stub-nixpkgs"
    apply = f"""overlay:
      let
        of = pkgs: overlay pkgs pkgs;
        asked = of ({stub} {{ }});
        given = of ({stub} {{ config.allowUnfreePredicate = package: package.name == "yap-text"; }});
      in
      {{
        refused = !(builtins.tryEval asked.yap-text.outPath).success;
        inherit (given.yap-text) meta cuda;
        cpu = asked.yap-text-cpu.meta;
      }}"""
    made = json.loads(nix("eval", "--json", ".#overlays.default", "--apply", apply))
    assert made["refused"] and made["cuda"]
    assert made["meta"]["mainProgram"] == made["cpu"]["mainProgram"] == "yap-text"
    assert [license["free"] for license in made["meta"]["license"]] == [True, False]
    assert [license["free"] for license in made["cpu"]["license"]] == [True]


def test_the_checks_are_tests_of_the_packages() -> None:
    """`passthru.tests`, for `nix build .#serve.tests.NAME`."""
    apply = "packages: builtins.mapAttrs (_: package: builtins.attrNames (package.tests or { })) packages"
    made = json.loads(nix("eval", "--json", ".#packages.x86_64-linux", "--apply", apply))
    assert made["serve-cpu"] == ["imports", "module", "programs", "unit-tests", "units"]
    assert made["serve"] == ["imports", "programs"]


PREPARED = ("LD_LIBRARY_PATH", "TRITON_LIBCUDA_PATH", "FLASHINFER_EXTRA_LDFLAGS")


def prepared(**environment: str) -> subprocess.CompletedProcess[str]:
    """What the wrapper of `.#serve` does before it starts the service, then the variables that it sets."""
    script = (ROOT / "nix" / "driver.sh").read_text() + "".join(f'\necho "${name}"' for name in PREPARED)
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script, "yap-text", "serve"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"YAP_TEXT_DEVICE": "cuda", "LD_LIBRARY_PATH": "/of/the/wrapper"} | environment,
    )


def test_without_a_driver_it_says_so_in_one_line() -> None:
    """And names the command that needs none. systemd tries again, but not if the folder that is named lacks it."""
    named = prepared(YAP_TEXT_DRIVER_LIB="/nowhere")
    assert named.returncode == 2 and named.stderr.count("\n") == 1
    assert "/nowhere" in named.stderr and "nix run .#serve-cpu" in named.stderr
    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("this machine has a driver")
    for device in ("auto", "cuda"):
        done = prepared(YAP_TEXT_DEVICE=device)
        assert done.returncode == 75 and done.stderr.count("\n") == 1
        assert "nix run .#serve-cpu" in done.stderr


def test_the_driver_of_a_host_comes_alone(tmp_path: Path) -> None:
    """Of the folder that YAP_TEXT_DRIVER_LIB names the service sees the driver's libraries, and no C library."""
    host = tmp_path / "host"
    host.mkdir()
    for name in ("libcuda.so.1", "libnvidia-ml.so.1", "libc.so.6", "libstdc++.so.6"):
        (host / name).touch()
    for _ in range(2):  # a restart finds the links of the start before
        done = prepared(YAP_TEXT_DRIVER_LIB=str(host), CACHE_DIRECTORY=str(tmp_path / "cache"))
        assert done.returncode == 0, done.stderr
        path, triton, flags = done.stdout.splitlines()
        assert (path, flags) == (f"{triton}:/of/the/wrapper", f"-L{triton}")
        files = sorted(file.name for file in Path(triton).iterdir())
        assert files == ["libcuda.so", "libcuda.so.1", "libnvidia-ml.so.1"]
        assert (Path(triton) / "libcuda.so").resolve() == host / "libcuda.so.1"
