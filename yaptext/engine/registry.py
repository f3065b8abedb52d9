"""The engines that can serve, by name: a package beside this file, a line here, a parameter of the contract test."""

from __future__ import annotations

from collections.abc import Callable
from pkgutil import resolve_name

from yaptext.engine.base import Engines
from yaptext.settings import Settings

OPENERS = {"vllm": "yaptext.engine.vllm.startup:open_vllm"}
"""By name, so that only the engine that serves is imported: vLLM takes seconds."""


def open_engines(settings: Settings, name: str = "vllm") -> Engines:
    """Opens the deployed engines. Called once, at the start, before there is anything to serve; it blocks for as long
    as weights take. Raises `StartError`; what was already open is then closed."""
    opener: Callable[[Settings], Engines] = resolve_name(OPENERS[name])
    return opener(settings)
