"""engine/registry.py: every engine is found by its name."""

from __future__ import annotations

import sys
from pkgutil import resolve_name
from types import ModuleType

import pytest

from yaptext.engine import registry
from yaptext.engine.base import Engines
from yaptext.settings import Settings


def test_an_engine_is_imported_when_it_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no earlier: to import vLLM takes seconds, which no other engine has to pay."""
    opened = Engines(chat=None, tool=None)
    package = ModuleType("an_engine")
    package.open = lambda settings: opened  # type: ignore[attr-defined]
    monkeypatch.setattr(registry, "OPENERS", registry.OPENERS | {"another": "an_engine:open"})
    with pytest.raises(ImportError):
        registry.open_engines(Settings.load(), "another")
    monkeypatch.setitem(sys.modules, "an_engine", package)
    assert registry.open_engines(Settings.load(), "another") is opened


@pytest.mark.parametrize("name", registry.OPENERS)
def test_every_engine_is_there(name: str) -> None:
    """Its package has the function that the registry names."""
    assert callable(resolve_name(registry.OPENERS[name]))
