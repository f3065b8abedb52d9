"""The NixOS module's list of settings, nix/README.md's example, and nix/vm-test.nix as far as no nixpkgs is needed.

The module's units and assertions are the flake's check `module` (tests/nix/module.nix).
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from yaptext.settings.table import setting

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
needs_nix = [
    pytest.mark.nix,
    pytest.mark.skipif(not shutil.which("nix-instantiate"), reason="needs nix-instantiate"),
]


def generator() -> Any:
    """nix/settings.py, which stands outside the package."""
    spec = importlib.util.spec_from_file_location("nix_settings", ROOT / "nix" / "settings.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def evaluate(expression: str) -> Any:
    """In the scope of tests/nix/machine.nix."""
    command = [
        "nix-instantiate",
        "--eval",
        "--strict",
        "--json",
        "-E",
        f"with import ./machine.nix {{ }}; {expression}",
    ]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def example() -> str:
    """The configuration of nix/README.md, a module."""
    found = re.search(
        r"```nix\n(imports = \[ yap-text\.nixosModules\.default \];\n.*?)```",
        (ROOT / "nix" / "README.md").read_text(),
        re.S,
    )
    assert found is not None
    return "{ yap-text, ... }: {\n" + found[1] + "}"


def test_the_options_are_those_of_the_settings_class() -> None:
    """nix/settings.json is what nix/settings.py makes; `make units` writes it."""
    assert (ROOT / "nix" / "settings.json").read_text() == generator().text()


def test_a_pattern_that_nix_cannot_match_is_refused() -> None:
    """Not silently another one: POSIX has no `\\d`, and builtins.match takes the whole text."""
    made = generator()
    for pattern in (r"^\d+$", "[0-9]+"):
        field = setting("X", "1", "A number.", pattern=pattern)
        field.annotation = str
        with pytest.raises(ValueError, match="Nix cannot match"):
            made.option(field)


class TestInNix:
    pytestmark = needs_nix

    def test_the_example_of_the_readme_is_a_machine_that_is_well(self) -> None:
        """It evaluates, asserts nothing and warns of nothing."""
        machine = evaluate(f"machine [ ({example()}) ]")
        assert machine["failing"] == machine["warnings"] == []
        assert "ListenStream=0.0.0.0:8000" in machine["units"]["yap-text.socket"]

    def test_the_machine_of_the_vm_test_evaluates_with_each_specialisation(self) -> None:
        """And its script is Python that names those."""
        test = evaluate("vm-test")
        script = test["script"]
        compile(script, "vm-test.nix", "exec")
        assert set(re.findall(r'"/specialisation/(\w+)"', script)) == set(test["machines"]) - {"base"}
        assert [(name, made["failing"], made["warnings"]) for name, made in sorted(test["machines"].items())] == [
            (name, [], []) for name in ("address", "base", "setting", "waiting")
        ]
        assert "ListenStream=[::1]:9000" in test["machines"]["address"]["units"]["yap-text.socket"]
