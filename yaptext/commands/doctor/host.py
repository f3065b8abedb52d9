"""Checks of the host: system, processor, memory, limits, disks and clock."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

from yaptext.commands.doctor.check import Finding, check, fail, ok, skip, warn
from yaptext.commands.doctor.deployment import Deployment
from yaptext.commands.doctor.resources import GIB, cores, cpu_flags, gib, killed, memory_bytes, memory_limit, mib

_LEAST_GLIBC = (2, 34)
"""What the wheels of the locks are built for (manylinux_2_34)."""
_LEAST_KERNEL = (4, 18)
_LEAST_RAM_BYTES = 3 * GIB
"""A service on CPU with the demo model takes 2 GB."""
_LEAST_SHM_BYTES = 64 * 2**20
_LEAST_STATE_BYTES, _LEAST_CACHE_BYTES, _LEAST_TMP_BYTES = 2 * GIB, 5 * GIB, GIB
_WRITTEN_AT = 1_767_225_600
"""2026-01-01: no clock of a machine that runs this code is before it."""
_FAR_AHEAD_S = 20 * 365 * 86_400
_OWN_FILES = 100


@check("host.os")
def system(seen: Deployment) -> Finding:
    machine = seen.machine
    release = dict(re.findall(r'^(\w+)="?([^"\n]*)"?$', machine.text("/etc/os-release") or "", re.MULTILINE))
    name = release.get("PRETTY_NAME", "no /etc/os-release")
    if machine.system != "Linux x86_64":
        return fail(f"{machine.system} ({name}): the wheels are for Linux x86_64", "use a Linux x86-64 machine")
    return ok(f"{name}, {machine.system}")


@check("host.glibc")
def glibc(seen: Deployment) -> Finding:
    name, version = seen.machine.libc
    least = ".".join(map(str, _LEAST_GLIBC))
    if name != "glibc":
        remedy = f"use a system with glibc {least} or newer (Debian 12, Ubuntu 22.04, RHEL 9); Alpine has musl"
        return fail("the C library is not glibc: the wheels need it", remedy)
    if _numbers(version) < _LEAST_GLIBC:
        remedy = "upgrade to Debian 12, Ubuntu 22.04, RHEL 9 or newer"
        return fail(f"glibc {version}; the wheels need {least} or newer", remedy)
    return ok(f"glibc {version}")


@check("host.kernel")
def kernel(seen: Deployment) -> Finding:
    release = seen.machine.word("/proc/sys/kernel/osrelease") or ""
    if not release:
        return warn("/proc/sys/kernel/osrelease cannot be read", "mount -t proc proc /proc")
    if _numbers(release) < _LEAST_KERNEL:
        return warn(f"kernel {release}; kernels older than 4.18 were never tested", "upgrade the kernel")
    return ok(f"kernel {release}")


@check("host.cpu")
def cpu(seen: Deployment) -> Finding:
    text = seen.machine.text("/proc/cpuinfo") or ""
    model = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    name = model[1] if model else "a processor without a name"
    flags = cpu_flags(seen.machine)
    if not flags:
        return warn("/proc/cpuinfo names no flags", "mount -t proc proc /proc")
    has = [word for word, flag in _EXTENSIONS.items() if flag in flags]
    found = f"{name}: {', '.join(has) or 'neither AVX2 nor AVX-512'}"
    if "avx2" not in flags:
        if seen.on_cuda:
            return warn(f"{found}; some wheels expect AVX2", "if a process ends with SIGILL, use a newer processor")
        return fail(f"{found}; vLLM on CPU needs AVX2", "a virtual machine: set its CPU type to host; else a newer CPU")
    if not seen.on_cuda and "avx512f" not in flags:
        remedy = "a processor with AVX-512 (and AMX) answers faster; in a virtual machine set the CPU type to host"
        return warn(f"{found}; without AVX-512 AWQ weights run at the speed and memory of float", remedy)
    return ok(found)


_EXTENSIONS = {"AVX2": "avx2", "AVX-512": "avx512f", "AVX-512 BF16": "avx512_bf16", "AMX": "amx_tile"}


@check("host.cores")
def processors(seen: Deployment) -> Finding:
    usable = cores(seen.machine)
    threads = seen.loaded.cpu_threads if seen.loaded is not None and not seen.on_cuda else 1
    if usable < 2:
        remedy = "give the machine, container or unit (CPUQuota=, cpuset) two processors or more"
        return warn(f"{usable:g} processor may be used: the service and its engine share it", remedy)
    if threads > usable:
        return warn(f"CPU_THREADS={threads}, and {usable:g} processors may be used", f"set CPU_THREADS={int(usable)}")
    return ok(f"{usable:g} processors may be used")


@check("host.memory")
def memory(seen: Deployment) -> Finding:
    found = memory_bytes(seen.machine)
    total, free = found.get("MemTotal", 0), found.get("MemAvailable", 0)
    told = f"{gib(total)} of memory, {gib(free)} available"
    if total < _LEAST_RAM_BYTES:
        return fail(f"{told}; the demo model alone takes 2 GiB", "use a machine with at least 4 GiB")
    if free < GIB:
        return warn(told, "see what takes it: ps aux --sort=-rss | head")
    return ok(told)


@check("host.swap")
def swap(seen: Deployment) -> Finding:
    found = memory_bytes(seen.machine)
    total, free = found.get("SwapTotal", 0), found.get("SwapFree", 0)
    if not total:
        return ok("no swap")
    used = total - free
    if used > max(GIB, total / 2):
        remedy = "the machine lacks memory: see free -h; after that swapoff -a && swapon -a"
        return warn(f"{gib(used)} of {gib(total)} swap are in use: engines stall while they are read back", remedy)
    return ok(f"{gib(used)} of {gib(total)} swap are in use")


@check("host.memory_limit")
def limit(seen: Deployment) -> Finding:
    found = memory_limit(seen)
    where = "MemoryMax= of the unit" if seen.installed is not None else "the control group"
    ended = killed(seen.machine)
    if found is not None and found < _LEAST_RAM_BYTES:
        remedy = "systemctl edit yap-text: raise MemoryMax=" if seen.installed else "docker run --memory, or MemoryMax="
        return fail(f"{where} allows {gib(found)}; the demo model alone takes 2 GiB", remedy)
    if ended:
        return warn(
            f"the kernel has killed {ended} processes here for lack of memory",
            "journalctl -k | grep -i 'out of memory'; then raise the limit or choose smaller models",
        )
    return ok(f"{where} allows {gib(found)}" if found is not None else "no memory limit")


@check("host.overcommit")
def overcommit(seen: Deployment) -> Finding:
    mode = seen.machine.word("/proc/sys/vm/overcommit_memory")
    if mode == "2":
        return warn(
            "vm.overcommit_memory=2: engines reserve far more address space than they use, and may be refused it",
            "sysctl vm.overcommit_memory=0",
        )
    return ok(f"vm.overcommit_memory={mode or 'unknown'}")


@check("host.libnuma")
def libnuma(seen: Deployment) -> Finding:
    if seen.on_cuda:
        return skip("only the CPU build needs it")
    if found := seen.machine.library("libnuma.so.1"):
        return ok(str(found))
    if seen.machine.path("/etc/NIXOS").exists():
        return skip("on NixOS the package brings it")
    remedy = "apt-get install libnuma1, or dnf install numactl-libs"
    return fail("libnuma.so.1 is missing: vLLM's CPU build does not load without it", remedy)


@check("host.compiler")
def compiler(seen: Deployment) -> Finding:
    if not seen.on_cuda:
        return skip("only CUDA needs one")
    path = seen.environ.get("PATH", "/usr/local/bin:/usr/bin:/bin")
    names = [seen.environ["CC"]] if seen.environ.get("CC") else ["gcc", "clang", "cc"]
    places = [seen.machine.path(folder) / name for folder in path.split(":") if folder for name in names]
    found = next((place for place in places if place.exists()), None)
    if found is None:
        remedy = "apt-get install gcc libc6-dev, or dnf install gcc"
        return fail(f"there is no {' or '.join(names)} on PATH: Triton compiles its launchers with it", remedy)
    return ok(str(found))


@check("host.open_files")
def open_files(seen: Deployment) -> Finding:
    settings = seen.settings
    connections = settings.max_connections(awq=True)
    needed = _OWN_FILES + connections + settings.max_pending_handshakes
    hard, where = seen.machine.open_files[1], "ulimit -Hn"
    if seen.installed is not None:
        words = (seen.installed.value("LimitNOFILE") or "524288").split(":")
        hard, where = (int(words[-1]) if words[-1].isdigit() else 2**30), "LimitNOFILE="
    if 0 <= hard < needed:
        return warn(
            f"{where} is {hard}; {connections} connections and {settings.max_pending_handshakes} handshakes need "
            f"{needed}",
            f"ulimit -n {needed} before the start (limits.conf), or systemctl edit yap-text: LimitNOFILE=",
        )
    return ok(f"{where} is {'unlimited' if hard < 0 else hard}, {needed} are needed")


@check("host.shm")
def shm(seen: Deployment) -> Finding:
    path = seen.machine.path("/dev/shm")
    if not path.is_dir():
        return fail(
            "there is no /dev/shm: processes of the engines share memory there", "mount -t tmpfs tmpfs /dev/shm"
        )
    disk = seen.machine.disk(path)
    if disk.free_bytes < _LEAST_SHM_BYTES:
        return warn(
            f"/dev/shm has {mib(disk.free_bytes)} free of {mib(disk.total_bytes)}",
            "docker run --shm-size=1g, or mount -o remount,size=1G /dev/shm",
        )
    return ok(f"/dev/shm has {mib(disk.free_bytes)} free")


def _folder(seen: Deployment, folder: Path, least: int, variable: str, what: str) -> Finding:
    place = seen.machine.existing(folder)
    try:
        disk = seen.machine.disk(place)
    except OSError as error:
        return fail(f"{folder} cannot be read: {error.strerror}", f"set {variable} to a folder of a disk that works")
    if disk.read_only:
        return fail(f"{folder} is on a read-only disk", f"mount -o remount,rw, or set {variable} to another folder")
    if os.path.exists(place) and not os.path.isdir(place):
        return fail(f"{place} is not a folder", f"remove that file, or set {variable} to another folder")
    # The unit has a user of its own, for which systemd makes the folders.
    if seen.installed is None and not seen.machine.may_write(folder):
        return fail(
            f"this user may not write to {folder}", f"chown it to this user, or set {variable} to another folder"
        )
    if disk.free_bytes < least:
        remedy = f"free some, or set {variable} to a folder of a larger disk"
        return warn(f"{gib(disk.free_bytes)} are free for {folder}; {what}", remedy)
    return ok(f"{folder}: {gib(disk.free_bytes)} free")


@check("host.state_folder")
def state_folder(seen: Deployment) -> Finding:
    what = "a converted or quantized model takes some GiB"
    return _folder(seen, seen.settings.state, _LEAST_STATE_BYTES, "YAP_TEXT_STATE_DIR", what)


@check("host.cache_folder")
def cache_folder(seen: Deployment) -> Finding:
    return _folder(seen, seen.hub_cache, _LEAST_CACHE_BYTES, "HF_HOME", "models are downloaded there")


@check("host.tmp_folder")
def tmp_folder(seen: Deployment) -> Finding:
    folder = Path(seen.environ.get("TMPDIR") or "/tmp")
    return _folder(seen, folder, _LEAST_TMP_BYTES, "TMPDIR", "kernels are compiled there")


@check("host.clock")
def clock(seen: Deployment) -> Finding:
    now = seen.machine.now
    told = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now))
    if not _WRITTEN_AT <= now < _WRITTEN_AT + _FAR_AHEAD_S:
        remedy = "timedatectl set-ntp true, or date -s"
        return fail(f"the clock says {told}: the hub's certificates and the age of sessions will be wrong", remedy)
    return ok(told)


def _numbers(version: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
