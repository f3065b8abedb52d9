"""Checks of the NVIDIA driver and its card, by /proc, /dev and nvidia-smi: torch is not imported."""

from __future__ import annotations

import os
import re

from yaptext.commands.doctor.cards import MIB, card, cards, processes
from yaptext.commands.doctor.check import Finding, check, fail, ok, skip, warn
from yaptext.commands.doctor.deployment import Deployment, Unknown
from yaptext.commands.doctor.machine import Machine

_DRIVERS = {13: (580, 65), 12: (525, 60)}
"""Oldest driver by CUDA's major version (CUDA Toolkit release notes, minor version compatibility)."""
_USUAL_CUDA = 13
_LEAST_CAPABILITY, _BFLOAT_CAPABILITY, _FP8_CAPABILITY = (7, 5), (8, 0), (8, 9)
"""CUDA 13 has no kernels below 7.5; bfloat16 needs 8.0; FP8 arithmetic 8.9."""
_HOT_C = 90


_GPU_VENDOR, _DISPLAY_CLASSES = "0x10de", ("0x0300", "0x0302")


def _pci_cards(machine: Machine) -> list[str]:
    """Addresses of NVIDIA's cards on the PCI bus."""
    return [
        device.name
        for device in sorted(machine.path("/sys/bus/pci/devices").glob("*"))
        if machine.word(device / "vendor") == _GPU_VENDOR
        and (machine.word(device / "class") or "").startswith(_DISPLAY_CLASSES)
    ]


def _version(machine: Machine) -> str | None:
    """Of the driver's kernel module."""
    text = machine.text("/proc/driver/nvidia/version") or ""
    found = re.search(r"Kernel Module\s+(?:for \S+\s+)?([\d.]+)", text)
    return found[1] if found else None


@check("gpu.driver")
def driver(seen: Deployment) -> Finding:
    machine = seen.machine
    loaded = machine.path("/proc/driver/nvidia/version").exists()
    present = _pci_cards(machine)
    if loaded and not seen.on_cuda:
        return skip("YAP_TEXT_DEVICE=cpu: the driver is loaded but not used")
    if loaded:
        return ok(f"NVIDIA kernel module {_version(machine) or 'without a version'}")
    nouveau = machine.path("/sys/module/nouveau").exists()
    install = "apt-get install nvidia-driver (580 or newer), then reboot"
    if nouveau:
        install = f"blacklist nouveau; {install}"
    if seen.on_cuda:
        why = f", and {len(present)} NVIDIA cards are on the bus" if present else ""
        remedy = f"{install}; in a container: docker run --gpus all; or YAP_TEXT_DEVICE=cpu"
        return fail(f"YAP_TEXT_DEVICE=cuda, and no NVIDIA driver is loaded{why}", remedy)
    if present:
        names = ", ".join(present)
        which = "nouveau drives it" if nouveau else "no driver is loaded"
        return warn(f"an NVIDIA card is on the bus ({names}), and {which}: the service runs on CPU", install)
    return skip("no NVIDIA driver: the service runs on CPU")


_DRIVEN = ("gpu.driver",)
_ANSWERED = ("gpu.answers",)


@check("gpu.answers", needs=_DRIVEN)
def answers(seen: Deployment) -> Finding:
    try:
        found = cards(seen)
    except Unknown as error:
        complaint = str(error)
        if "version mismatch" in complaint:
            return fail(complaint, "the driver was upgraded while its kernel module was loaded: reboot")
        if "not installed" in complaint:
            return warn(complaint, "apt-get install nvidia-utils-580 (the driver's own version)")
        return fail(complaint, "dmesg | grep -i -e nvrm -e xid, then reboot")
    if not found:
        return fail("nvidia-smi lists no card", "dmesg | grep -i -e nvrm -e xid; in a container: docker run --gpus all")
    return ok("; ".join(f"{one.number}: {one.name}, {one.total_bytes // MIB} MiB" for one in found))


@check("gpu.driver_version", needs=_DRIVEN)
def driver_version(seen: Deployment) -> Finding:
    version = _version(seen.machine)
    runtime = seen.machine.packages().get("nvidia-cuda-runtime", "")
    major = int(runtime.partition(".")[0]) if runtime[:1].isdigit() else _USUAL_CUDA
    least = _DRIVERS.get(major, _DRIVERS[_USUAL_CUDA])
    if version is None:
        raise Unknown("the driver does not say its version")
    if tuple(map(int, version.split(".")[:2])) < least:
        remedy = f"apt-get install nvidia-driver-{least[0]} (or newer), then reboot"
        return fail(f"driver {version}; the wheels' CUDA {major} needs {least[0]}.{least[1]} or newer", remedy)
    return ok(f"driver {version} is new enough for CUDA {major}")


@check("gpu.devices", needs=_DRIVEN)
def devices(seen: Deployment) -> Finding:
    machine = seen.machine
    names = ["/dev/nvidiactl", "/dev/nvidia-uvm"]
    names += ["/dev/nvidia0"] if not list(machine.path("/dev").glob("nvidia[0-9]*")) else []
    missing = [name for name in names if not machine.path(name).exists()]
    if missing:
        remedy = "nvidia-modprobe -c 0 -u (as root, before the service); in a container: docker run --gpus all"
        return fail(f"{', '.join(missing)} missing: CUDA cannot be opened", remedy)
    shut = [name for name in names if not os.access(machine.path(name), os.R_OK | os.W_OK)]
    if shut:
        return fail(
            f"this user may not open {', '.join(shut)}", "add it to the group of those files (ls -l /dev/nvidia*)"
        )
    return ok("nvidiactl, nvidia-uvm and the card's own node are there")


@check("gpu.library", needs=_DRIVEN)
def library(seen: Deployment) -> Finding:
    found = seen.machine.library("libcuda.so.1")
    if found is None:
        remedy = "apt-get install libcuda1 of the driver's version; with Nix set YAP_TEXT_DRIVER_LIB to its folder"
        return warn("libcuda.so.1 is in none of the loader's usual folders", remedy)
    return ok(str(found))


@check("gpu.visible", needs=_ANSWERED)
def visible(seen: Deployment) -> Finding:
    found = cards(seen)
    chosen = seen.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        one = card(seen)
    except Unknown:
        remedy = "unset CUDA_VISIBLE_DEVICES, or set it to the index of nvidia-smi -L"
        return fail(f"CUDA_VISIBLE_DEVICES={chosen!r} names none of the {len(found)} cards", remedy)
    more = f"; of {len(found)} cards it uses this one" if len(found) > 1 else ""
    return ok(f"{one.number}: {one.name}{more}")


@check("gpu.capability", needs=("gpu.visible",))
def capability(seen: Deployment) -> Finding:
    one = card(seen)
    told = f"{one.name} has compute capability {'.'.join(map(str, one.capability))}"
    if one.capability < _LEAST_CAPABILITY:
        return fail(
            f"{told}; CUDA 13 and vLLM need 7.5 or newer", "use a newer card (T4 and later), or YAP_TEXT_DEVICE=cpu"
        )
    if one.capability < _BFLOAT_CAPABILITY:
        return warn(f"{told}: no bfloat16", "use AWQ or GPTQ weights, which have float16: QUANTIZATION=awq")
    if one.capability < _FP8_CAPABILITY and seen.loaded is not None and seen.loaded.kv_dtype == "fp8":
        return warn(f"{told}: FP8 arithmetic needs 8.9", "set KV_DTYPE=auto")
    return ok(told)


@check("gpu.mig", needs=("gpu.visible",))
def mig(seen: Deployment) -> Finding:
    one = card(seen)
    chosen = seen.environ.get("CUDA_VISIBLE_DEVICES", "")
    if one.health.get("mig.mode.current") != "Enabled":
        return ok("MIG is off")
    if not chosen.startswith("MIG-"):
        remedy = "set CUDA_VISIBLE_DEVICES to one MIG-... of nvidia-smi -L"
        return warn("MIG is on, and no slice is chosen: CUDA takes the first, which has a part of the memory", remedy)
    return ok("MIG is on, and one slice is chosen")


@check("gpu.compute_mode", needs=("gpu.visible",))
def compute_mode(seen: Deployment) -> Finding:
    one = card(seen)
    remedy = f"nvidia-smi -i {one.number} -c DEFAULT"
    if one.compute_mode == "Prohibited":
        return fail("the card's compute mode is Prohibited: no process may use it", remedy)
    if one.compute_mode == "Exclusive_Process" and not seen.environ.get("CUDA_MPS_PIPE_DIRECTORY"):
        return warn("the card's compute mode is Exclusive_Process: a second engine process is refused", remedy)
    return ok(f"compute mode {one.compute_mode}")


@check("gpu.persistence", needs=("gpu.visible",))
def persistence(seen: Deployment) -> Finding:
    if card(seen).persistence == "Disabled":
        remedy = "nvidia-smi -pm 1, or systemctl enable --now nvidia-persistenced"
        return warn("persistence mode is off: the driver unloads between starts, which costs seconds", remedy)
    return ok("persistence mode is on")


@check("gpu.health", needs=("gpu.visible",))
def health(seen: Deployment) -> Finding:
    one = card(seen)
    errors = one.health.get("ecc.errors.uncorrected.volatile.total", "")
    heat = one.health.get("temperature.gpu", "")
    if errors.isdigit() and int(errors):
        remedy = f"nvidia-smi -i {one.number} -q -d ECC,ROW_REMAPPER; reset or reboot; if they return, replace the card"
        return fail(f"{errors} memory errors of the card that ECC could not correct", remedy)
    if one.health.get("slowed") == "Active" or (heat.isdigit() and int(heat) >= _HOT_C):
        return warn(
            f"the card slows itself down ({heat} C)", "check its cooling and power: nvidia-smi -q -d PERFORMANCE"
        )
    return ok(f"no uncorrected memory errors, {heat or '?'} C")


@check("gpu.processes", needs=("gpu.visible",))
def other_processes(seen: Deployment) -> Finding:
    found = processes(seen)
    others = [one for one in found if not one.is_ours]
    if others:
        listed = ", ".join(f"{one.name} (process {one.pid}, {one.used} MiB)" for one in others[:5])
        remedy = "stop them, or leave room for them: CHAT_GPU_FRAC, TOOL_GPU_FRAC"
        return warn(f"others use the card: {listed}", remedy)
    return ok(f"{len(found)} processes of this service" if found else "no other process uses the card")
