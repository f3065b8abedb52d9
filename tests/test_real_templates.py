"""Real vLLM on the demo's weights under the templates and habits of other people's models: one engine, whose tokenizer
calls another token its end, dressed in four templates."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from conftest import MemorySocket, talking
from made import TEMPLATES
from transformers import AutoTokenizer

from yaptext.engine.codec import HubCodec

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(600)]
_MARKS = {
    "<reponame>": "<think>",
    "<file_sep>": "</think>",
    "<filename>": "<\uff5cUser\uff5c>",
    "<gh_stars>": "<\uff5cAssistant\uff5c>",
}
PERSONA = {"persona_text": "You are Ann, a kind companion who answers in one short sentence. " * 6}
FRANCE = "What is the capital of France?"


@pytest.fixture(scope="module")
def folder(state_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many finetunes are: trained on ChatML, with the end of the base model in every config. Some of its unused
    tokens have the names of control tokens that are not marked special."""
    from yaptext.engine import demo

    made = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(demo.folder(state_folder), made)
    for name in ("config.json", "generation_config.json"):
        config = json.loads((made / name).read_text())
        (made / name).write_text(json.dumps(config | {"eos_token_id": 0}))
    names = json.loads((made / "tokenizer_config.json").read_text())
    (made / "tokenizer_config.json").write_text(json.dumps(names | {"eos_token": "<|endoftext|>", "pad_token": None}))
    tokenizer = json.loads((made / "tokenizer.json").read_text(encoding="utf-8"))
    for token in tokenizer["added_tokens"]:
        if token["content"] in _MARKS:
            word = _MARKS[token["content"]]
            tokenizer["model"]["vocab"][word] = tokenizer["model"]["vocab"].pop(token["content"])
            token |= {"content": word, "special": False}
    (made / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return made


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def engine(folder: Path) -> AsyncIterator[Any]:
    import os

    from yaptext.engine.registry import open_engines
    from yaptext.settings import Settings

    with pytest.MonkeyPatch.context() as environment:
        for name, value in os.environ.items():
            environment.setenv(name, value)
        opened = open_engines(
            Settings.load(
                CHAT_MODEL=str(folder), DEPLOY_MODELS="chat", YAP_TEXT_DEVICE="cpu", YAP_TEXT_STATE_DIR=str(folder)
            )
        ).chat
        assert opened is not None
        yield opened
        await opened.aclose()


def dressed(engine: Any, folder: Path, template: str) -> Any:
    """The engine with another template."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATES[template].replace("<s>", "")
    other = copy.copy(engine)
    own = engine.codec
    other.codec = HubCodec(tokenizer, max_model_len=own.max_model_len, block_size=own.block_size, end_ids=own.end_ids)
    return other


async def turn(socket: MemorySocket, utterance: str, **fields: Any) -> dict[str, Any]:
    """The `done` of a turn with its text."""
    before = len(socket.of("done"))
    socket.start(utterance, **PERSONA, **fields)
    done = await socket.until("done", before + 1)
    return done | {"text": socket.of("final")[-1]["normalized_text"]}


async def test_a_reply_ends_with_its_template_whatever_the_config_calls_its_end(engine: Any) -> None:
    """Without that the model speaks the user's next line, up to the limit."""
    assert engine.codec.end_ids == [0]
    async with talking(engine, DEPLOY_MODELS="chat", CHAT_TEMPERATURE="0", CHAT_MAX_OUT="60") as talk:
        done = await turn(talk.socket(), FRANCE)
        assert "Paris" in done["text"] and done["finish_reason"] == "stop"
        assert "user" not in done["text"] and "<|" not in done["text"]
        assert talk.runtime.prompt_facts["chat"] == {
            "format": "segments", "exact": True, "prefix_stable": True, "thinking": "none",
        }  # fmt: skip


@pytest.mark.parametrize("template", ["no system role", "for tools alone", "strict alternation"])
@pytest.mark.parametrize("format", ["segments", "turns"])
async def test_a_warmed_prefix_is_found_under_any_template(
    engine: Any, folder: Path, template: str, format: str
) -> None:
    """All of it in whole blocks, and the reply is of the persona that was warmed."""
    variables = {"DEPLOY_MODELS": "chat", "CHAT_TEMPERATURE": "0", "CHAT_MAX_OUT": "12", "CHAT_PROMPT_FORMAT": format}
    history = "User: Hello, I am Bob.\nAssistant: Hello Bob! How are you today?\n" * 4
    async with talking(dressed(engine, folder, template), **variables) as talk:
        assert talk.runtime.prompts is not None and talk.runtime.prompts.format == format
        socket = talk.socket()
        socket.say("warm_history", history_text=f"{history}User: {template}\nAssistant: {format}", **PERSONA)
        warmed = await socket.until("warmed")
        assert warmed["prefix_stable"] and warmed["prefix_tokens"] > 100
        done = await turn(socket, FRANCE, history_text=f"{history}User: {template}\nAssistant: {format}")
        assert done["usage"]["cached_tokens"] >= warmed["prefix_tokens"]


async def test_tools_are_described_wherever_the_template_puts_them(engine: Any, folder: Path) -> None:
    """Here before the last message of the user, so that nothing of them can be a learned beginning."""
    variables = {"DEPLOY_MODELS": "tool", "TOOL_HARD_TIMEOUT_MS": "60000"}
    tool = dressed(engine, folder, "brackets with tools")
    asked: list[str] = []
    streamed = tool.stream

    def stream(prompt: Any, sampling: Any, **options: Any) -> Any:
        asked.append(tool.codec.show(prompt))
        return streamed(prompt, sampling, **options)

    tool.stream = stream
    async with talking(tool, tool, **variables) as talk:
        socket = talk.socket()
        socket.start("Set a timer for ten minutes.")
        decision = await socket.until("toolcall")
        assert "reason" not in decision
        assert '"name": "set_timer"' in asked[-1] and '"name": "search_web"' in asked[-1]
        assert talk.runtime.prompt_facts["tool"]["format"] == "template"


async def test_thinking_is_silent_and_counted(engine: Any, folder: Path) -> None:
    """A template that opens the thinking: these weights never end it, so nothing is ever spoken."""
    variables = {"DEPLOY_MODELS": "chat", "CHAT_MAX_OUT": "5", "CHAT_THINKING_MAX_OUT": "20", "CHAT_TEMPERATURE": "0"}
    async with talking(dressed(engine, folder, "thinking without a switch"), **variables) as talk:
        socket = talk.socket()
        done = await turn(socket, FRANCE)
        assert (done["text"], socket.of("token")) == ("", [])
        assert done["usage"]["reasoning_tokens"] == done["usage"]["completion_tokens"] > 0
        assert done["timings"]["ttft_ms"] is None
        assert talk.runtime.prompt_facts["chat"]["thinking"] == "always"


async def test_a_switch_leaves_no_thinking(engine: Any, folder: Path) -> None:
    """The prompt ends after an empty thinking, and nothing of the reply is taken for one. (What these weights say after
    tokens that they never met is little: here they end at once.)"""
    variables = {"DEPLOY_MODELS": "chat", "CHAT_MAX_OUT": "12", "CHAT_TEMPERATURE": "0"}
    async with talking(dressed(engine, folder, "thinking with a switch"), **variables) as talk:
        done = await turn(talk.socket(), FRANCE)
        assert (done["usage"]["reasoning_tokens"], done["finish_reason"]) == (0, "stop")
        assert talk.runtime.reasoning is None and done["usage"]["completion_tokens"] > 0
        assert talk.runtime.prompt_facts["chat"]["thinking"] == "off"


async def test_thinking_that_cannot_be_parsed_ends_the_start(engine: Any, folder: Path) -> None:
    """By the model's name, with the setting that allows it."""
    from yaptext.errors import StartError

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATES["chatml"] + "{% if add_generation_prompt %}[THINK]{% endif %}"
    other = copy.copy(engine)
    other.codec = HubCodec(tokenizer, max_model_len=8192, block_size=32)
    with pytest.raises(StartError, match=r"thinks before it speaks, .*REASONING_PARSER=none"):
        async with talking(other, DEPLOY_MODELS="chat"):
            pass
    async with talking(other, DEPLOY_MODELS="chat", REASONING_PARSER="none", CHAT_MAX_OUT="4") as talk:
        assert (await turn(talk.socket(), FRANCE))["usage"]["reasoning_tokens"] == 0


async def test_weights_of_llm_compressor_answer(state_folder: Path, tmp_path: Path) -> None:
    """Its 4 bits with zero points, in `compressed-tensors`, as vLLM's own project writes AWQ."""
    from compressed import compress

    from yaptext.engine import demo
    from yaptext.engine.registry import open_engines
    from yaptext.settings import Settings

    packed = compress(demo.folder(state_folder), tmp_path / "packed")
    variables = {"DEPLOY_MODELS": "chat", "CHAT_TEMPERATURE": "0", "CHAT_MAX_OUT": "16"}
    opened = open_engines(
        Settings.load(CHAT_MODEL=str(packed), YAP_TEXT_DEVICE="cpu", YAP_TEXT_STATE_DIR=str(tmp_path), **variables)
    ).chat
    assert opened is not None
    try:
        async with talking(opened, **variables) as talk:
            socket = talk.socket()
            socket.start(FRANCE)
            await socket.until("done")
            assert "Paris" in socket.of("final")[0]["normalized_text"]
    finally:
        await opened.aclose()
