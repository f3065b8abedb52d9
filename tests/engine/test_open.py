"""open_engines: which engines a deployment opens, how much of the card each gets, and what a failure leaves open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fakes import ScriptedEngine

from yaptext.engine import vllm
from yaptext.errors import StartError
from yaptext.settings import Settings


class Opened(ScriptedEngine):
    """An engine that was opened without weights, and remembers for what."""

    role = ""
    alone = False


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Opened]:
    """The engines in the order in which they were opened."""
    engines: list[Opened] = []

    def open(settings: Settings, checkpoint: Any, role: str, *, alone: bool) -> Opened:
        if "broken" in checkpoint.source:
            raise StartError("broken")
        engine = Opened(model=checkpoint.source)
        engine.role, engine.alone = role, alone
        engines.append(engine)
        return engine

    monkeypatch.setattr(vllm.VllmEngine, "open", open)
    for name in vllm._environment(Settings.load(YAP_TEXT_DEVICE="cpu")):
        monkeypatch.setenv(name, "")
    return engines


def model(folder: Path, name: str) -> str:
    (folder / name).mkdir()
    (folder / name / "config.json").write_text(json.dumps({"max_position_embeddings": 4096}))
    return str(folder / name)


def test_one_checkpoint_is_one_engine(tmp_path: Path, opened: list[Opened]) -> None:
    """Chat and tool share it, and it may have the whole card."""
    one = model(tmp_path, "one")
    engines = vllm.open_engines(Settings.load(CHAT_MODEL=one, TOOL_MODEL=one, YAP_TEXT_DEVICE="cpu"))
    assert engines.chat is engines.tool is opened[0]
    assert [(engine.role, engine.alone) for engine in opened] == [("chat", True)]
    assert list(engines.distinct) == ["chat+tool"]


def test_share_engine_0_opens_two(tmp_path: Path, opened: list[Opened]) -> None:
    """Tool first, then chat, each with its share."""
    one = model(tmp_path, "one")
    settings = Settings.load(CHAT_MODEL=one, TOOL_MODEL=one, SHARE_ENGINE=0, YAP_TEXT_DEVICE="cpu")
    engines = vllm.open_engines(settings)
    assert engines.chat is not engines.tool
    assert [(engine.role, engine.alone) for engine in opened] == [("tool", False), ("chat", False)]
    assert list(engines.distinct) == ["chat", "tool"]


@pytest.mark.parametrize("role", ["chat", "tool"])
def test_one_role_opens_one_engine(tmp_path: Path, opened: list[Opened], role: str) -> None:
    """The other role's model is not even looked at."""
    variables = {f"{role.upper()}_MODEL": model(tmp_path, "one"), "DEPLOY_MODELS": role}
    engines = vllm.open_engines(Settings.load(YAP_TEXT_DEVICE="cpu", **variables))
    assert list(engines.distinct) == [role]
    assert [(engine.role, engine.alone) for engine in opened] == [(role, True)]


def test_the_arguments_follow_the_device(tmp_path: Path) -> None:
    """Prompts are whole steps on CPU, chunks on CUDA; the context is the model's own where that is less."""
    from yaptext.engine.weights import choose

    one = model(tmp_path, "one")
    for device, chunked in (("cpu", False), ("cuda", True)):
        settings = Settings.load(CHAT_MODEL=one, YAP_TEXT_DEVICE=device, DEPLOY_MODELS="chat")
        arguments = vllm._arguments(settings, choose(settings, "chat"), "chat", alone=True)
        assert arguments["max_model_len"] == 4096
        assert arguments["enable_chunked_prefill"] is chunked
        assert (arguments["max_num_batched_tokens"] >= 4096) is not chunked
        assert arguments.get("gpu_memory_utilization") == (0.9 if chunked else None)


def test_int8_kv_is_refused_on_cpu(tmp_path: Path) -> None:
    """It starts there and gives garbage."""
    from yaptext.engine.weights import choose

    settings = Settings.load(
        CHAT_MODEL=model(tmp_path, "one"), YAP_TEXT_DEVICE="cpu", DEPLOY_MODELS="chat", KV_DTYPE="int8_per_token_head"
    )
    with pytest.raises(StartError, match="KV_DTYPE=int8"):
        vllm._arguments(settings, choose(settings, "chat"), "chat", alone=True)
