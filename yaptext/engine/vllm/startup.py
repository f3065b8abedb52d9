"""The start of a deployment's engines: their checkpoints are chosen, downloaded, opened."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import structlog

from yaptext.engine import checkpoints, demo
from yaptext.engine.base import Engines, Role
from yaptext.engine.offline import leave_hub_if_down
from yaptext.engine.vllm import arguments, environment, kv_blocks, launch
from yaptext.engine.vllm.engine import VllmEngine
from yaptext.errors import StartError
from yaptext.observe.systemd import notify
from yaptext.settings import Settings

_log = structlog.get_logger(__name__)


def open_vllm(settings: Settings) -> Engines:
    """Opens the deployed engines: at once on CPU, and on CUDA if an earlier start has measured how many blocks of KV
    cache each gets. Else one after the other, since each measures free GPU memory while it opens.

    Blocks. Raises `StartError`; what was already open is then closed.
    """
    os.environ.update(environment.engine_environment(settings))
    environment.leave_fixed_caches()
    leave_hub_if_down(settings)
    is_demo = checkpoints.wants_demo(settings)
    folder = demo.folder(settings.state) if is_demo else None
    optional = settings.tool_optional and settings.chat_deployed
    lacking: list[StartError] = []
    chosen: dict[Role, checkpoints.Checkpoint] = {}
    try:
        if settings.tool_deployed:
            chosen["tool"] = checkpoints.choose(settings, "tool", folder)
    except StartError as error:
        if not optional:
            raise
        lacking.append(error)
    if settings.chat_deployed:
        chosen["chat"] = checkpoints.choose(settings, "chat", folder)
    for role, checkpoint in chosen.items():
        _log.info(
            "weights.chosen", role=role, model=checkpoint.source, weights=checkpoint.kind, reason=checkpoint.reason
        )
    if is_demo:
        _log.warning(
            "demo.serving", model=demo.NAME, hint="no model is configured; set CHAT_MODEL and TOOL_MODEL for real use"
        )
    _bring(settings, chosen, lacking if optional else None)
    awq = all(checkpoint.kind == "awq" for checkpoint in chosen.values())
    shared = len(chosen) == 2 and chosen["chat"].source == chosen["tool"].source and settings.share_engine
    if shared:
        del chosen["tool"]
    opened = _open_all(settings, chosen, lacking if optional else None)
    if lacking:
        _log.warning("tool.lacking", error=str(lacking[0]), hint="TOOL_OPTIONAL=1: every decision is no")
    return Engines(
        chat=opened.get("chat"),
        tool=opened.get("chat" if shared else "tool"),
        awq=awq,
        demo=is_demo,
        lacking=str(lacking[0])[:200] if lacking else None,
    )


def _bring(settings: Settings, chosen: dict[Role, checkpoints.Checkpoint], lacking: list[StartError] | None) -> None:
    """Downloads what engines will open. `lacking` takes the reason why the tool model, which then is not chosen, cannot
    be had; None if that ends the start."""
    if lacking is None or "tool" not in chosen:
        checkpoints.bring(settings, chosen)
        return
    checkpoints.bring(settings, {role: checkpoint for role, checkpoint in chosen.items() if role != "tool"})
    try:
        checkpoints.bring(settings, {"tool": chosen["tool"]})
    except StartError as error:
        lacking.append(error)
        del chosen["tool"]


def _open_all(
    settings: Settings, chosen: dict[Role, checkpoints.Checkpoint], lacking: list[StartError] | None
) -> dict[Role, VllmEngine]:
    """`lacking` takes the reason why the tool engine cannot open; None where that ends the start."""
    begun = time.monotonic()
    alone = len(chosen) == 1

    def opener(
        role: Role, blocks: int | None, lacking: list[StartError] | None = None
    ) -> Callable[[], VllmEngine | None]:
        def open() -> VllmEngine | None:
            try:
                return _timed(settings, chosen[role], role, alone=alone, blocks=blocks)
            except StartError as error:
                if lacking is None or role != "tool":
                    raise
                lacking.append(error)
                return None

        return open

    if not settings.on_cuda:  # the size of the KV cache is a setting there
        opened = launch.at_once({role: opener(role, None, lacking) for role in chosen})
    else:
        sizes = kv_blocks.Sizes(settings.state / "kv_blocks.json", _measured_for(settings, chosen, alone=alone))
        opened = {}
        if known := sizes.recall():
            try:
                opened = launch.at_once({role: opener(role, known.get(role)) for role in chosen})
            except StartError as error:
                _log.warning("engines.reopening", error=str(error), hint="one by one: sizes of an earlier start failed")
                sizes.forget()
        if not opened:
            opened = launch.in_turn({role: opener(role, None, lacking) for role in chosen})
            if len(opened) == len(chosen):
                sizes.remember({role: engine.blocks for role, engine in opened.items()})
    _log.info("engines.opened", seconds=round(time.monotonic() - begun, 1), roles=list(opened))
    return opened


def _timed(
    settings: Settings, checkpoint: checkpoints.Checkpoint, role: Role, *, alone: bool, blocks: int | None
) -> VllmEngine:
    begun = time.monotonic()
    _log.info("engine.opening", role=role, model=checkpoint.source)
    notify(f"STATUS=Opening the {role} engine: {checkpoint.source}")
    # For NVIDIA's MPS, where that runs: of two engines the chat engine stands back. Its process takes the environment
    # along as it starts, and the next engine opens after that.
    os.environ["CUDA_MPS_CLIENT_PRIORITY"] = "1" if role == "chat" and not alone else "0"
    engine = VllmEngine.open(settings, checkpoint, role, alone=alone, blocks=blocks)
    _log.info(
        "engine.opened",
        role=role,
        model=checkpoint.source,
        seconds=round(time.monotonic() - begun, 1),
        max_model_len=engine.codec.max_model_len,
        block_size=engine.codec.block_size,
        blocks=engine.blocks,
    )
    return engine


def _measured_for(settings: Settings, chosen: dict[Role, checkpoints.Checkpoint], *, alone: bool) -> dict[str, Any]:
    """Everything that decides how many blocks an engine gets on a card, as plain data."""
    engines = {
        role: arguments.engine_arguments(settings, checkpoint, role, alone=alone)
        | {"hf_token": None, "version": checkpoints.version(checkpoint)}
        for role, checkpoint in chosen.items()
    }
    return {"engines": engines, "card": gpu_identity()}


def gpu_identity() -> list[Any]:
    """vLLM's version, the card's name and its bytes. Raises `StartError` where there is no card."""
    try:
        import vllm
        from vllm.platforms import current_platform

        return [vllm.__version__, current_platform.get_device_name(), current_platform.get_device_total_memory()]
    except Exception as error:  # the driver's, or none at all
        raise StartError(f"no CUDA card answers: {str(error) or type(error).__name__}") from error
