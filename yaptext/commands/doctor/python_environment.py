"""Checks of the Python environment: the lock, torch's build, plugins, and variables that change what is loaded."""

from __future__ import annotations

import re
from pathlib import Path

from yaptext.commands.doctor.check import Finding, check, fail, ok, skip, warn
from yaptext.commands.doctor.deployment import Deployment
from yaptext.commands.doctor.machine import canonical

_PINNED = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)", re.MULTILINE)
_CHECKOUT = Path(__file__).parents[3]
_PLUGINS = {"yaptext_cpu_awq", "yaptext_orphan", "yaptext_fault"}
_SHOWN = 6
_LEAST_PYTHON = (3, 11)
_SET_BY_US = {
    "VLLM_LOGGING_CONFIG_PATH",
    "VLLM_NO_USAGE_STATS",
    "VLLM_CPU_OMP_THREADS_BIND",
    "VLLM_ENABLE_V1_MULTIPROCESSING",
}
"""The service sets these itself (engine/vllm/environment.py)."""
_HARMLESS = {"VLLM_ATTENTION_BACKEND", "VLLM_CACHE_ROOT", "VLLM_CONFIG_ROOT", "VLLM_ASSETS_CACHE", "VLLM_DO_NOT_TRACK"}
_CHANGING = {
    "VLLM_PLUGINS": "the plugins of Yap Text may not be loaded",
    "VLLM_TARGET_DEVICE": "it is for building vLLM",
    "VLLM_USE_V1": "vLLM has one engine now",
    "VLLM_USE_MODELSCOPE": "models would come from another hub",
}
_PRELOADS = ("tcmalloc", "jemalloc", "mimalloc", "iomp5")
"""What vLLM's guide for CPUs itself preloads, and allocators."""


def lock_of(seen: Deployment) -> tuple[str, dict[str, str]] | None:
    """The lock that this environment was installed from, and its versions by name. None: it is unknown."""
    machine = seen.machine
    variant = "cuda" if "vllm" in machine.packages() and "vllm-cpu" not in machine.packages() else "cpu"
    places = (machine.prefix / "lock.txt", machine.prefix / "built.txt", _CHECKOUT / f"nix/lock/serve-{variant}.txt")
    for place in places:
        if place.is_file():
            pins = dict(_PINNED.findall(place.read_text(encoding="utf-8")))
            return str(place), {canonical(name): version for name, version in pins.items()}
    return None


@check("python.version")
def version(seen: Deployment) -> Finding:
    told = ".".join(map(str, seen.machine.python))
    if seen.machine.python < _LEAST_PYTHON:
        return fail(
            f"Python {told}; {_LEAST_PYTHON[0]}.{_LEAST_PYTHON[1]} is needed", "make serve, which brings its own"
        )
    lock = lock_of(seen)
    wanted = re.search(r"CPython ([0-9.]+)", Path(lock[0]).read_text(encoding="utf-8")) if lock else None
    if wanted and wanted[1] != told:
        return warn(f"Python {told}; the lock is for {wanted[1]}", "make serve, which brings its own")
    return ok(f"Python {told} in {seen.machine.prefix}")


@check("python.packages")
def packages(seen: Deployment) -> Finding:
    lock = lock_of(seen)
    if lock is None:
        return skip("no lock beside this environment: what should be installed is not known")
    place, pins = lock
    installed = seen.machine.packages()
    missing = sorted(name for name in pins if name not in installed)
    other = sorted(
        f"{name} {installed[name]} (locked: {pins[name]})"
        for name in pins
        if installed.get(name, pins[name]) != pins[name]
    )
    if missing or other:
        told = [f"missing: {_some(missing)}"] if missing else []
        told += [f"of another version: {_some(other)}"] if other else []
        remedy = (
            f"rm -rf {seen.machine.prefix}; make serve"
            if _is_checkout(seen)
            else "make install, or install from the lock"
        )
        return fail("; ".join(told), remedy)
    return ok(f"the {len(pins)} packages of {place}")


def _is_checkout(seen: Deployment) -> bool:
    return seen.machine.prefix.is_relative_to(_CHECKOUT)


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


@check("python.torch")
def torch(seen: Deployment) -> Finding:
    installed = seen.machine.packages()
    build = installed.get("torch")
    if build is None:
        return fail("torch is not installed", "make serve, which sets the environment up")
    if "vllm" in installed and "vllm-cpu" in installed:
        return fail(
            "vllm and vllm-cpu are both installed: they are one package twice", "rm -rf the environment; make serve"
        )
    is_cpu = build.endswith("+cpu") or ("vllm-cpu" in installed)
    if seen.on_cuda and is_cpu:
        remedy = "make ENV=serve-cuda serve, or YAP_TEXT_DEVICE=cpu"
        return fail(f"torch {build} is the CPU build, and the engines are to run on CUDA", remedy)
    if not seen.on_cuda and not is_cpu:
        remedy = "make ENV=serve-cpu serve; if there is a card, repair its driver: gpu.driver"
        return fail(f"torch {build} is the CUDA build, and the engines are to run on CPU", remedy)
    return ok(f"torch {build} for {'CUDA' if seen.on_cuda else 'CPU'}")


@check("python.plugins")
def plugins(seen: Deployment) -> Finding:
    lacking = sorted(_PLUGINS - seen.machine.plugins())
    if lacking:
        return fail(f"vLLM does not find {', '.join(lacking)}", "make serve")
    return ok(f"vLLM finds {len(_PLUGINS)} plugins of this package")


@check("python.vllm_variables")
def vllm_variables(seen: Deployment) -> Finding:
    named = sorted(name for name in seen.environ if name.startswith("VLLM_") and name not in _HARMLESS)
    if seen.environ.get("VLLM_PLUGINS") is not None and not set(seen.environ["VLLM_PLUGINS"].split(",")) >= _PLUGINS:
        return fail("VLLM_PLUGINS leaves plugins of Yap Text out", "unset VLLM_PLUGINS")
    told = [
        f"{name}: {_CHANGING.get(name, 'the service sets it itself')}"
        for name in named
        if name in {*_CHANGING, *_SET_BY_US}
    ]
    told += [
        f"{name}: vLLM reads it, and no test of Yap Text sets it"
        for name in named
        if name not in {*_CHANGING, *_SET_BY_US}
    ]
    if told:
        return warn("; ".join(told[:_SHOWN]), f"unset {' '.join(named)}")
    return ok("none that changes what the service does")


@check("python.path_variables")
def path_variables(seen: Deployment) -> Finding:
    if home := seen.environ.get("PYTHONHOME"):
        return fail(f"PYTHONHOME={home}: Python takes its library from there", "unset PYTHONHOME")
    if path := seen.environ.get("PYTHONPATH"):
        version = ".".join(map(str, seen.machine.python))
        installed = seen.machine.prefix / f"lib/python{version}/site-packages"
        shadowing = [
            f"{folder}/{name}"
            for folder in path.split(":")
            for name in ("torch", "vllm", "transformers", "yaptext")
            if folder and (seen.machine.path(folder) / name).is_dir() and (installed / name).is_dir()
        ]
        if shadowing:
            found = f"PYTHONPATH puts {', '.join(shadowing)} before the installed packages"
            return fail(found, "unset PYTHONPATH")
        return warn(f"PYTHONPATH={path}: its modules come before the installed ones", "unset PYTHONPATH")
    return ok("neither PYTHONPATH nor PYTHONHOME is set")


@check("python.loader_variables")
def loader_variables(seen: Deployment) -> Finding:
    preloaded = [name for name in re.split(r"[:\s]+", seen.environ.get("LD_PRELOAD", "")) if name]
    missing = [name for name in preloaded if "/" in name and not seen.machine.path(name).exists()]
    if missing:
        return warn(f"LD_PRELOAD names {', '.join(missing)}, which does not exist", "unset LD_PRELOAD")
    if odd := [name for name in preloaded if not any(known in name for known in _PRELOADS)]:
        return warn(f"LD_PRELOAD={':'.join(odd)} is loaded into every process", "unset LD_PRELOAD")
    for folder in seen.environ.get("LD_LIBRARY_PATH", "").split(":"):
        place = seen.machine.path(folder) if folder else None
        own = place is not None and place.is_relative_to(seen.machine.prefix)
        if place is not None and not own and (found := next(iter(sorted(place.glob("libcud*rt.so*"))), None)):
            remedy = "unset LD_LIBRARY_PATH: the wheels bring their own CUDA"
            return warn(f"LD_LIBRARY_PATH has another CUDA before that of the wheels: {found}", remedy)
    return ok("no library is loaded instead of those of the wheels")
