"""What nvidia-smi says of the cards."""

from __future__ import annotations

import re
from typing import NamedTuple

from yaptext.commands.doctor.deployment import Deployment, Unknown
from yaptext.commands.doctor.machine import Machine, Ran

MIB = 2**20
_CARD = "index,uuid,name,driver_version,memory.total,memory.free,compute_cap,compute_mode,persistence_mode"
_HEALTH = "index,mig.mode.current,ecc.errors.uncorrected.volatile.total,temperature.gpu"
_SLOWED = ("clocks_event_reasons.hw_slowdown", "clocks_throttle_reasons.hw_slowdown")
"""Today's name, and the one that older drivers know."""
_ANCESTORS = 8


class Card(NamedTuple):
    """One row of nvidia-smi."""

    number: int
    uuid: str
    name: str
    total_bytes: int
    free_bytes: int
    capability: tuple[int, ...]
    compute_mode: str
    persistence: str
    health: dict[str, str]


class Process(NamedTuple):
    """What has memory of a card."""

    pid: int
    name: str
    used: str
    is_ours: bool


def cards(seen: Deployment) -> list[Card]:
    """Every card of the machine. Raises `Unknown` if nvidia-smi does not answer."""
    return seen.once("cards", lambda: _cards(seen.machine))


def _cards(machine: Machine) -> list[Card]:
    ran = _query(machine, _CARD)
    if not ran.is_ok:
        raise Unknown(f"nvidia-smi: {ran.complaint}")
    health = {row[0]: dict(zip(_HEALTH.split(","), row, strict=False)) for row in _rows(_query(machine, _HEALTH).out)}
    for name in _SLOWED:
        if (told := _query(machine, f"index,{name}")).is_ok:
            for index, slowed in _rows(told.out):
                health.setdefault(index, {})["slowed"] = slowed
            break
    found = []
    for row in _rows(ran.out):
        index, uuid, name, _, total, free, capability, mode, persistence = row[:9]
        memory, version = (_bytes(total), _bytes(free)), tuple(map(int, re.findall(r"\d+", capability)))
        found.append(Card(int(index), uuid, name, *memory, version, mode, persistence, health.get(index, {})))
    return found


def _query(machine: Machine, fields: str) -> Ran:
    return machine.run(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"])


def _bytes(mib: str) -> int:
    return int(mib) * MIB if mib.isdigit() else 0


def _rows(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split(",")] for line in table.splitlines() if "," in line]


def card(seen: Deployment) -> Card:
    """The one that the engines use. Raises `Unknown`."""
    found = cards(seen)
    visible = seen.environ.get("CUDA_VISIBLE_DEVICES")
    first = None if visible is None else visible.split(",")[0].strip()
    for one in found:
        if first is None or first == str(one.number) or (first.startswith("GPU-") and one.uuid.startswith(first)):
            return one
    if len(found) == 1 and first is not None and first.startswith("MIG-"):
        return found[0]
    raise Unknown("CUDA_VISIBLE_DEVICES names no card: gpu.visible" if found else "nvidia-smi lists no card")


def processes(seen: Deployment) -> list[Process]:
    """Of every card."""
    return seen.once("processes", lambda: _processes(seen.machine))


def _processes(machine: Machine) -> list[Process]:
    query = "--query-compute-apps=pid,process_name,used_memory"
    ran = machine.run(["nvidia-smi", query, "--format=csv,noheader,nounits"])
    return [
        Process(int(row[0]), row[1].split("/")[-1][:40], row[-1], _is_ours(machine, int(row[0])))
        for row in _rows(ran.out)
        if len(row) >= 3 and row[0].isdigit()
    ]


def _is_ours(machine: Machine, pid: int) -> bool:
    """Whether it is a service of ours or one of its engines: by its command, or those of its parents."""
    for _ in range(_ANCESTORS):
        command = machine.word(f"/proc/{pid}/cmdline") or ""
        if re.search(r"yap-?text\0(serve|quantize)", command):
            return True
        parent = re.search(r"^PPid:\s*(\d+)$", machine.word(f"/proc/{pid}/status") or "", re.MULTILINE)
        if parent is None or (pid := int(parent[1])) <= 1:
            return False
    return False
