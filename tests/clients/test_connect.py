"""The examples of "Connect": what a user copies gets an answer."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest
from clients.conftest import KEY, ROOT, VENV, scripted

pytestmark = [pytest.mark.clients, pytest.mark.subprocess]
PAGE = ROOT / "yaptext" / "server" / "openai" / "README.md"
_CONNECT = re.compile(r"^## Connect\n(.*?)(?=^## |\Z)", re.M | re.S)
_EXAMPLE = re.compile(r"^### ([^\n]+)$.*?^```(\w+)\n(.*?)^```", re.M | re.S)
EXAMPLES = {
    name: (language, text)
    for section in _CONNECT.findall(PAGE.read_text(encoding="utf-8"))
    for name, language, text in _EXAMPLE.findall(section)
}


def test_there_is_an_example_for_each_client() -> None:
    """Those that the other tests run, and curl."""
    chat = {"curl", "openai", "LiteLLM", "llm", "LiveKit Agents", "Pipecat"}
    responses = {"openai, responses", "openai, a socket of responses"}
    responses |= {"LiveKit Agents, responses", "Pipecat, responses"}
    assert set(EXAMPLES) == chat | responses


@pytest.mark.parametrize("name", EXAMPLES)
async def test_each_example_gets_an_answer(name: str, tmp_path: Path) -> None:
    """Unchanged, except for the address and the key."""
    language, text = EXAMPLES[name]
    assert "//127.0.0.1:8000/v1" in text and text.count("yap_token") == 1
    shell = ("/bin/bash", "-euo", "pipefail", "-c") if language == "bash" else (str(VENV / "bin" / "python"), "-c")
    async with scripted() as target:
        text = text.replace("//127.0.0.1:8000", target.http.removeprefix("http:")).replace("yap_token", KEY)
        environment = target.environment(tmp_path)
        del environment["OPENAI_BASE_URL"], environment["OPENAI_API_KEY"]
        process = await asyncio.create_subprocess_exec(
            *shell,
            text,
            env=environment,
            cwd=tmp_path,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await asyncio.wait_for(process.communicate(), 120)
    print(out.decode(), err.decode())
    assert process.returncode == 0
    if name == "curl":
        assert out.decode().endswith("data: [DONE]\n\n")
    else:
        assert "Hello there." in out.decode()
