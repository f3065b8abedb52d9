"""commands/chat.py: a conversation in the terminal, with tools that are run or answered by the user."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import service
from fakes import Script, ScriptedEngine

from yaptext.engine.base import Engines

TOOLS = [{"name": "lamp", "description": "Switches a lamp."}]


class Deciding(ScriptedEngine):
    """Calls the lamp once for each utterance."""

    def stream(self, prompt: Any, sampling: Any, **options: Any) -> Any:
        if sampling.json_schema is not None:
            done = "lamp" not in sampling.json_schema or "returned:" in self.decode(prompt)
            self.decision = Script(("[]",) if done else ('[{"name":"lamp","arguments":{}}]',))
        return super().stream(prompt, sampling, **options)


async def talk(engine: ScriptedEngine, folder: Path, said: str, *arguments: str) -> str:
    """What the terminal shows."""
    file = folder / "tools.json"
    await asyncio.to_thread(file.write_text, json.dumps(TOOLS))
    async with service(Engines(chat=engine, tool=engine)) as running:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "yaptext", "chat", "--url", running.ws, "--tools", str(file), *arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=dict(os.environ),
        )
        async with asyncio.timeout(60):
            shown, _ = await process.communicate(said.encode())
        assert process.returncode == 0
    return shown.decode()


@pytest.mark.parametrize(
    ("arguments", "said", "result"),
    [
        (["--tool-command", "cat; echo ' is on'"], "Lights!\n", "is on"),
        (["--tool-command", "exit 3"], "Lights!\n", "The tool failed with status 3."),
        (["--await-tools"], "Lights!\nbroken bulb\n", "broken bulb"),
    ],
)
async def test_a_tools_result_comes_from_a_command_or_the_user(
    tmp_path: Path, arguments: list[str], said: str, result: str
) -> None:
    """The call is shown, its result goes into the prompt of the reply, and the reply is shown."""
    engine = Deciding()
    shown = await talk(engine, tmp_path, said, *arguments)
    assert "[tool: lamp({})" in shown and "Hello there." in shown
    replies = [ids for ids, sampling, priority in engine.requests if sampling.json_schema is None and priority == 1]
    assert result in engine.decode(replies[-1])


async def test_without_asking_the_reply_comes_at_once(tmp_path: Path) -> None:
    """As the guide has it."""
    engine = Deciding()
    shown = await talk(engine, tmp_path, "Lights!\n")
    assert "[tool: lamp({})" in shown and "Hello there." in shown
    assert "returned" not in engine.decode(engine.requests[-1][0])
