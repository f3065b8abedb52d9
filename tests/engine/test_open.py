"""open_vllm: which engines a deployment opens, how much of the card each gets, and what a failure leaves open."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

import pytest
from fakes import ScriptedEngine

from yaptext.engine.vllm import startup
from yaptext.engine.vllm.arguments import engine_arguments
from yaptext.engine.vllm.environment import engine_environment
from yaptext.errors import StartError
from yaptext.settings import Settings


class Opened(ScriptedEngine):
    """An engine that was opened without weights, and remembers for what."""

    role = ""
    alone = False
    blocks: int | None = None
    given: int | None = None
    mps_priority = ""

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Opened]:
    """The engines in the order in which they were opened."""
    engines: list[Opened] = []

    def open(settings: Settings, checkpoint: Any, role: str, *, alone: bool, blocks: int | None) -> Opened:
        if "broken" in checkpoint.source or ("full" in checkpoint.source and blocks):
            raise StartError("broken")
        engine = Opened(model=checkpoint.source)
        engine.role, engine.alone, engine.given = role, alone, blocks
        engine.blocks = {"chat": 5000, "tool": 900}[role]
        engine.mps_priority = os.environ["CUDA_MPS_CLIENT_PRIORITY"]
        engines.append(engine)
        return engine

    monkeypatch.setattr(startup.VllmEngine, "open", open)
    for name in ("CUDA_MPS_CLIENT_PRIORITY", *engine_environment(Settings.load(YAP_TEXT_DEVICE="cpu"))):
        monkeypatch.setenv(name, "")
    return engines


def model(folder: Path, name: str) -> str:
    (folder / name).mkdir()
    (folder / name / "config.json").write_text(json.dumps({"max_position_embeddings": 4096}))
    return str(folder / name)


def test_one_checkpoint_is_one_engine(tmp_path: Path, opened: list[Opened]) -> None:
    """Chat and tool share it, and it may have the whole card."""
    one = model(tmp_path, "one")
    engines = startup.open_vllm(Settings.load(CHAT_MODEL=one, TOOL_MODEL=one, YAP_TEXT_DEVICE="cpu"))
    assert engines.chat is engines.tool is opened[0]
    assert [(engine.role, engine.alone) for engine in opened] == [("chat", True)]
    assert list(engines.distinct) == ["chat+tool"]


def test_share_engine_0_opens_two(tmp_path: Path, opened: list[Opened]) -> None:
    """Tool and chat, each with its share."""
    one = model(tmp_path, "one")
    settings = Settings.load(CHAT_MODEL=one, TOOL_MODEL=one, SHARE_ENGINE=0, YAP_TEXT_DEVICE="cpu")
    engines = startup.open_vllm(settings)
    assert engines.chat is not engines.tool
    assert [(engine.role, engine.alone) for engine in opened] == [("tool", False), ("chat", False)]
    assert list(engines.distinct) == ["chat", "tool"]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A CUDA card by name; another name is another card."""
    name = ["H200"]
    monkeypatch.setattr(startup, "gpu_identity", lambda: name)
    return name


def both(folder: Path, chat: str = "chat", tool: str = "tool", **variables: Any) -> Settings:
    """Two models on CUDA, with a state folder in `folder`."""
    for name in (chat, tool):
        if not (folder / name).exists():
            model(folder, name)
    models = {"CHAT_MODEL": str(folder / chat), "TOOL_MODEL": str(folder / tool)}
    return Settings.load(YAP_TEXT_STATE_DIR=folder / "state", **({"YAP_TEXT_DEVICE": "cuda"} | models | variables))


def test_cuda_measures_once(tmp_path: Path, opened: list[Opened], card: list[str]) -> None:
    """The first start measures each engine's blocks; the next of the same deployment gives them back to it. Whatever
    decides them makes a start the first one again."""
    startup.open_vllm(both(tmp_path))
    assert [(engine.role, engine.given) for engine in opened] == [("tool", None), ("chat", None)]
    for change in ({}, {"LOG_LEVEL": "error"}):
        opened.clear()
        startup.open_vllm(both(tmp_path, **change))
        assert {engine.role: engine.given for engine in opened} == {"chat": 5000, "tool": 900}
    for change in ({"CHAT_GPU_FRAC": 0.6}, {"MAX_NUM_SEQS": 64}, {"KV_DTYPE": "fp8"}, {"DEPLOY_MODELS": "chat"}):
        opened.clear()
        startup.open_vllm(both(tmp_path, **change))
        assert {engine.given for engine in opened} == {None}, change
    startup.open_vllm(both(tmp_path))
    opened.clear()
    card[0] = "H100"
    startup.open_vllm(both(tmp_path))
    assert {engine.given for engine in opened} == {None}
    (tmp_path / "chat/model.safetensors").write_bytes(b"new")
    opened.clear()
    startup.open_vllm(both(tmp_path))
    assert {engine.given for engine in opened} == {None}


@pytest.mark.parametrize("kept", ["", "[]", "{}", '{"blocks": 1}'])
def test_a_damaged_note_of_sizes_is_none(tmp_path: Path, opened: list[Opened], card: list[str], kept: str) -> None:
    """What it would have told is measured again."""
    startup.open_vllm(both(tmp_path))
    (note,) = (tmp_path / "state").glob("*.json")
    note.write_text(kept)
    opened.clear()
    startup.open_vllm(both(tmp_path))
    assert {engine.given for engine in opened} == {None}


def test_sizes_that_do_not_fit_are_forgotten(tmp_path: Path, opened: list[Opened], card: list[str]) -> None:
    """The start goes on one engine after the other, and measures again."""
    startup.open_vllm(both(tmp_path, chat="full"))
    first = [*opened]
    startup.open_vllm(both(tmp_path, chat="full"))
    assert [(engine.role, engine.given) for engine in opened[2:]] == [("tool", 900), ("tool", None), ("chat", None)]
    assert [engine.closed for engine in opened] == [False, False, True, False, False]
    assert len(first) == 2


def test_an_optional_tool_engine_may_be_lacking(tmp_path: Path, opened: list[Opened], card: list[str]) -> None:
    """Chat serves, and the reason is kept; whether its weights are not there or it does not open, on either device."""
    (tmp_path / "empty").mkdir()
    for device in ("cpu", "cuda"):
        for tool in ("broken", "empty"):
            given = {"TOOL_OPTIONAL": 1, "YAP_TEXT_DEVICE": device}
            engines = startup.open_vllm(both(tmp_path, tool=tool, **given))
            assert engines.tool is None and engines.chat is opened[-1] and not opened[-1].closed
            assert engines.lacking and tool in engines.lacking + "broken"
            with pytest.raises(StartError):
                startup.open_vllm(both(tmp_path, tool=tool, YAP_TEXT_DEVICE=device))
            with pytest.raises(StartError):
                startup.open_vllm(both(tmp_path, tool=tool, DEPLOY_MODELS="tool", **given))
    with pytest.raises(StartError):
        startup.open_vllm(both(tmp_path, chat="broken", TOOL_OPTIONAL=1))
    assert opened[-1].role == "tool" and opened[-1].closed


@pytest.mark.parametrize("role", ["chat", "tool"])
def test_one_role_opens_one_engine(tmp_path: Path, opened: list[Opened], role: str) -> None:
    """The other role's model is not even looked at."""
    variables = {f"{role.upper()}_MODEL": model(tmp_path, "one"), "DEPLOY_MODELS": role}
    engines = startup.open_vllm(Settings.load(YAP_TEXT_DEVICE="cpu", **variables))
    assert list(engines.distinct) == [role]
    assert [(engine.role, engine.alone) for engine in opened] == [(role, True)]


def test_the_arguments_follow_the_device(tmp_path: Path) -> None:
    """Prompts are whole steps on CPU, chunks on CUDA; the context is the model's own where that is less."""
    from yaptext.engine.checkpoints import choose

    one = model(tmp_path, "one")
    for device, chunked in (("cpu", False), ("cuda", True)):
        settings = Settings.load(CHAT_MODEL=one, YAP_TEXT_DEVICE=device, DEPLOY_MODELS="chat")
        arguments = engine_arguments(settings, choose(settings, "chat"), "chat", alone=True)
        assert arguments["max_model_len"] == 4096
        assert arguments["enable_chunked_prefill"] is chunked
        assert (arguments["max_num_batched_tokens"] >= 4096) is not chunked
        assert arguments.get("gpu_memory_utilization") == (0.9 if chunked else None)
        assert arguments.get("block_size") == (None if chunked else 32)


def test_only_the_tool_engine_waits_for_a_token_before_the_next_step(tmp_path: Path) -> None:
    """Chat replies are long, and computed ahead as vLLM does by itself."""
    from yaptext.engine.checkpoints import choose

    settings = both(tmp_path)
    ahead = {
        role: engine_arguments(settings, choose(settings, role), role, alone=False).get("async_scheduling")
        for role in ("chat", "tool")
    }
    assert ahead == {"chat": None, "tool": False}


def test_under_mps_the_chat_engine_stands_back(tmp_path: Path, opened: list[Opened], card: list[str]) -> None:
    """Of two engines, one by one and at once; alone it has nobody to stand back for."""
    for _ in range(2):
        startup.open_vllm(both(tmp_path))
        assert {engine.role: engine.mps_priority for engine in opened} == {"chat": "1", "tool": "0"}
        opened.clear()
    startup.open_vllm(both(tmp_path, DEPLOY_MODELS="chat"))
    assert [engine.mps_priority for engine in opened] == ["0"]


def test_a_step_on_cuda_is_small_for_chat_and_one_graph(tmp_path: Path) -> None:
    """512 tokens for chat and 2,048 for tool, unless one setting says so for both, or one for each."""
    from yaptext.engine.checkpoints import choose

    def arguments(role: Literal["chat", "tool"], **variables: Any) -> dict[str, Any]:
        settings = both(tmp_path, **variables)
        return engine_arguments(settings, choose(settings, role), role, alone=False)

    def tokens(**variables: Any) -> tuple[int, int]:
        found = [arguments(role, **variables)["max_num_batched_tokens"] for role in ("chat", "tool")]
        return found[0], found[1]

    assert tokens() == (512, 2048)
    assert tokens(MAX_NUM_BATCHED_TOKENS=1024) == (1024, 1024)
    assert tokens(MAX_NUM_BATCHED_TOKENS=1024, CHAT_MAX_NUM_BATCHED_TOKENS=256) == (256, 1024)
    assert tokens(TOOL_MAX_NUM_BATCHED_TOKENS=4096) == (512, 4096)
    assert arguments("chat")["compilation_config"] == {"cudagraph_mode": "FULL"}
    for other in ({"CUDA_GRAPHS": "auto"}, {"ENFORCE_EAGER": 1}, {"YAP_TEXT_DEVICE": "cpu"}):
        assert "compilation_config" not in arguments("chat", **other)


def test_the_logging_configuration_that_engines_are_given_exists() -> None:
    """vLLM does not start without the file that its variable names."""
    path = engine_environment(Settings.load(YAP_TEXT_DEVICE="cpu"))["VLLM_LOGGING_CONFIG_PATH"]
    assert Path(path).is_file()


@pytest.mark.engine
def test_no_code_of_a_checkpoint_is_run(tmp_path: Path) -> None:
    """Neither does the service ask vLLM for it, nor is it vLLM's default."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    from yaptext.engine.checkpoints import choose

    settings = Settings.load(CHAT_MODEL=model(tmp_path, "one"), YAP_TEXT_DEVICE="cpu", DEPLOY_MODELS="chat")
    arguments = engine_arguments(settings, choose(settings, "chat"), "chat", alone=True)
    assert AsyncEngineArgs(**arguments).trust_remote_code is False


def test_int8_kv_is_refused_on_cpu(tmp_path: Path) -> None:
    """It starts there and gives garbage."""
    from yaptext.engine.checkpoints import choose

    settings = Settings.load(
        CHAT_MODEL=model(tmp_path, "one"), YAP_TEXT_DEVICE="cpu", DEPLOY_MODELS="chat", KV_DTYPE="int8_per_token_head"
    )
    with pytest.raises(StartError, match="KV_DTYPE=int8"):
        engine_arguments(settings, choose(settings, "chat"), "chat", alone=True)
