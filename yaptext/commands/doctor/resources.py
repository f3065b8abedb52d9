"""How much of the machine this process, or the unit, may use."""

from __future__ import annotations

import re
from pathlib import Path

from yaptext.commands.doctor.deployment import Deployment, Unknown
from yaptext.commands.doctor.machine import Machine

GIB = 2**30


def cpu_flags(machine: Machine) -> set[str]:
    """Of the first processor, as /proc/cpuinfo has them."""
    found = re.search(r"^flags\s*:(.*)$", machine.text("/proc/cpuinfo") or "", re.MULTILINE)
    return set(found[1].split()) if found else set()


def cores(machine: Machine) -> float:
    """Processors that this process may use, by its affinity and by the quota of its control group."""
    quota = None
    for folder in _cgroups(machine):
        words = (machine.word(f"{folder}/cpu.max") or "").split()
        if len(words) == 2 and words[0].isdigit():
            quota = min(quota or 1e9, int(words[0]) / int(words[1]))
    return min(machine.cores, quota) if quota else machine.cores


def memory_bytes(machine: Machine) -> dict[str, int]:
    """/proc/meminfo in bytes. Raises `Unknown`."""
    found = re.findall(r"^(\w+):\s+(\d+) kB$", machine.text("/proc/meminfo") or "", re.MULTILINE)
    if not found:
        raise Unknown("/proc/meminfo cannot be read")
    return {name: int(amount) * 1024 for name, amount in found}


def _cgroups(machine: Machine) -> list[str]:
    """The folders of this process's control group, from its own up to the root (version 2)."""
    for line in (machine.word("/proc/self/cgroup") or "").splitlines():
        if line.startswith("0::"):
            own = Path("/sys/fs/cgroup", line.removeprefix("0::").lstrip("/"))
            return [str(folder) for folder in (own, *own.parents) if folder.is_relative_to("/sys/fs/cgroup")]
    return ["/sys/fs/cgroup"]


def memory_limit(seen: Deployment) -> int | None:
    """Bytes that the unit, or this process's control group, may take; None is no limit."""
    if seen.installed is not None:
        return seen.installed.memory_limit()
    limits = [seen.machine.word(f"{folder}/memory.max") for folder in _cgroups(seen.machine)]
    limits.append(seen.machine.word("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
    found = [int(limit) for limit in limits if limit and limit.isdigit() and int(limit) < 2**60]
    return min(found, default=None)


def killed(machine: Machine) -> int:
    """Processes of this control group that the kernel has ended for lack of memory."""
    found = re.search(r"^oom_kill (\d+)$", machine.word(f"{_cgroups(machine)[0]}/memory.events") or "", re.MULTILINE)
    return int(found[1]) if found else 0


def gib(amount: float) -> str:
    return f"{amount / GIB:.1f} GiB"


def mib(amount: float) -> str:
    return f"{amount / 2**20:.0f} MiB"
