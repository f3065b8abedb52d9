"""Evaluates nix/module.nix on nixpkgs' own lib, and prints a table of what came out:

    python tests/nix/real_lib.py FOLDER     (nixpkgs/lib, or that of nix-community/nixpkgs.lib)

It needs nix-instantiate and no network. What it shows: the real evalModules and types take the module, with these
messages. What it does not show: NixOS. Its options (systemd.services and so on) are declared in tests/nix/nixos.nix,
with types of lib, and so is the way it writes units. Packages are names; nothing is built or booted.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
README = HERE.parents[1] / "nix" / "README.md"
COMMON = (
    """enable = true; package = packages.serve-cpu; settings = { CHAT_MODEL = "a/chat"; TOOL_MODEL = "a/tool"; };"""
)


class Refused(Exception):
    """The evaluation ended with this error."""


def evaluate(lib: Path, expression: str) -> Any:
    scope = f"lib = import {lib}; made = import ./machine.nix {{ inherit lib; }};"
    command = ["nix-instantiate", "--eval", "--strict", "--json", "-E", f"let {scope} in with made; {expression}"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    if done.returncode:
        said = re.search(r"^error: (.*?)(?:\n\n|\n\(use|\Z)", done.stderr, re.DOTALL | re.MULTILINE)
        raise Refused(re.sub(r"\s+", " ", said[1] if said else done.stderr).replace(str(HERE), "."))
    return json.loads(done.stdout)


def configured(more: str) -> str:
    """A machine with these lines of its configuration beside the common ones."""
    return f'with-module [ {{ services.yap-text = {{ {COMMON} }}; }} {{ _file = "configuration.nix"; {more} }} ]'


def line(machine: dict[str, Any], unit: str, *keys: str) -> str:
    lines = machine["units"][unit].splitlines()
    return ", ".join(found for key in keys for found in lines if found.startswith(f"{key}="))


def outcome(machine: dict[str, Any]) -> str:
    said = [f"assertion: {message}" for message in machine["failing"]]
    said += [f"warning: {message}" for message in machine["warnings"]]
    return "; ".join(said) or "well"


def rows(lib: Path) -> list[tuple[str, str, bool]]:
    """What was set, what came out, and whether that is as it should be."""
    made: list[tuple[str, str, bool]] = []

    cases = evaluate(
        lib,
        "builtins.mapAttrs (_: case: (case.expected.text or case.expected) == (case.found.text or case.found)) cases",
    )
    wrong = [name for name, is_right in cases.items() if not is_right]
    made.append(("tests/nix/module.nix", f"{len(cases) - len(wrong)} of {len(cases)} cases hold", not wrong))
    if wrong:
        made.append(("", "not: " + ", ".join(wrong), False))

    found = re.search(r"```nix\n(imports = \[ yap-text\..*?)```", README.read_text(), re.DOTALL)
    assert found is not None
    machine = evaluate(lib, f"machine [ ({{ yap-text, ... }}: {{ {found[1]} }}) ]")
    shown = f"{len(machine['units'])} units; {line(machine, 'yap-text.socket', 'ListenStream')}; "
    shown += f"{line(machine, 'yap-text.service', 'ExecStart', 'MemoryMax')}; {outcome(machine)}"
    made.append(("the example of nix/README.md", shown, outcome(machine) == "well"))

    before = evaluate(lib, configured(""))
    limits = "systemd.services.yap-text.serviceConfig"
    machine = evaluate(lib, configured(f'{limits} = {{ MemoryMax = "40G"; TimeoutStopSec = 90; }};'))
    shown = line(machine, "yap-text.service", "MemoryMax", "TimeoutStopSec", "TimeoutStartSec")
    is_right = shown == "MemoryMax=40G, TimeoutStopSec=90, TimeoutStartSec=3600"
    made.append((f"{limits}.MemoryMax and .TimeoutStopSec", shown, is_right))

    machine = evaluate(lib, configured(f'{limits}.SystemCallFilter = [ "~@clock" ];'))
    filters = line(machine, "yap-text.service", "SystemCallFilter").split(", ")
    made.append(
        (f"{limits}.SystemCallFilter", f"last of {len(filters)}: {filters[-1]}", filters[-1].endswith("=~@clock"))
    )

    machine = evaluate(lib, configured("services.yap-text.port = 9000;"))
    is_triggered = machine["triggers"] != before["triggers"]
    is_same = machine["units"]["yap-text.service"] == before["units"]["yap-text.service"]
    shown = line(machine, "yap-text.socket", "ListenStream")
    shown += "; yap-text-switch.service differs" if is_triggered else "; nothing differs that a switch restarts"
    made.append(("port = 9000", shown, is_triggered and is_same))

    machine = evaluate(lib, configured('services.yap-text.settings.LOG_LEVEL = "debug";'))
    is_same = machine["units"]["yap-text.socket"] == before["units"]["yap-text.socket"]
    shown = "socket as before; yap-text-switch.service differs" if is_same else "the socket differs"
    made.append(('settings.LOG_LEVEL = "debug"', shown, is_same and machine["triggers"] != before["triggers"]))

    for more, expected in (
        ('host = "localhost"', "which is no IP address: write 127.0.0.1"),
        ('host = "[::]"', "write ::, without brackets"),
        ("port = 0", "1 to 65535"),
        ("port = 70000", "16 bit unsigned integer"),
        ('settings.CHAT_MAX_OUT = "many"', "whole number, at least 1, at most 4096"),
        ("settings.CHAT_TOP_P = 1.5", "number, more than 0, at most 1"),
        ('settings.DEPLOY_MODELS = "all"', 'one of "both", "chat", "tool"'),
        ("settings.TOOLS_FILE = ./module.nix", "no path literal"),
        ("settings.NOT_OURS = ./module.nix", "NOT_OURS' is not of type"),
        ("settings.CHAT_MAX_OTU = 100", "Do you mean CHAT_MAX_OUT?"),
        ("settings.GEN_TIMEOUT_S = 100", "is now CHAT_TIMEOUT_S"),
        ('settings.NCCL_DEBUG = "WARN"', "well"),
        ('settings.HF_TOKEN = "hf_x"', "would be readable by every user"),
        ("package = lib.mkForce packages.serve", "hardware.graphics.enable"),
    ):
        try:
            shown = outcome(evaluate(lib, configured(f"services.yap-text.{more};")))
        except Refused as error:
            shown = f"error: {error}"
        made.append((more, shown, expected in shown))

    test = evaluate(lib, "vm-test")
    compile(test["script"], "vm-test.nix", "exec")
    said = {name: outcome(machine) for name, machine in test["machines"].items()}
    shown = ", ".join(f"{name}: {what}" for name, what in said.items()) + "; its script compiles"
    made.append(("nix/vm-test.nix", shown, set(said.values()) == {"well"}))
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lib", type=Path, metavar="FOLDER", help="nixpkgs' lib")
    lib = parser.parse_args().lib.resolve()
    version = subprocess.run(
        ["nix-instantiate", "--eval", "--json", "-E", f"(import {lib}).trivial.release"],
        capture_output=True,
        text=True,
        check=True,
    )
    print(f"nixpkgs' lib {json.loads(version.stdout)}")
    found = rows(lib)
    width = max(len(name) for name, _, _ in found)
    for name, shown, is_right in found:
        print(f"{'ok  ' if is_right else 'NOT '} {name:{width}}  {shown}")
    return 0 if all(is_right for _, _, is_right in found) else 1


if __name__ == "__main__":
    sys.exit(main())
