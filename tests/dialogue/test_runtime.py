"""dialogue/runtime.py: what is warm before the first user comes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import structlog
from fakes import Script, ScriptedCodec, ScriptedEngine

from yaptext.dialogue import warming
from yaptext.dialogue.runtime import Runtime
from yaptext.dialogue.tools import ToolSet
from yaptext.engine.base import Engines
from yaptext.settings import Settings


class Counting(ScriptedEngine):
    """Notes how many streams there are when each one begins."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.together: list[int] = []

    async def clock(self) -> None:
        self.together.append(self.running)
        await asyncio.sleep(0)


@pytest.mark.parametrize(("device", "most"), [("cpu", 1), ("cuda", 80)])
async def test_priming_meets_every_kernel_on_cuda(device: str, most: int) -> None:
    """Decisions and replies in batches up to the largest class, and replies without each part of the sampling; on CPU,
    which compiles nothing, one of each."""
    chat, tool = Counting(), Counting()
    chat.chat, tool.decision = Script(pace=chat.clock), Script(("[]",), pace=tool.clock)
    settings = Settings.load(YAP_TEXT_DEVICE=device)
    runtime = await Runtime.open(settings, Engines(chat, tool), ToolSet.from_file(None))
    await warming.prime(runtime)
    assert max(chat.together) == max(tool.together) == most
    sampled = [sampling for _, sampling, _ in chat.requests]
    assert all(sampling.seed is not None for sampling in sampled), "as in every turn"
    off = {
        "greedy": any(s.temperature == 0 for s in sampled),
        "top_k": any(s.top_k == 0 and s.top_p < 1 for s in sampled),
        "top_p": any(s.top_k > 0 and s.top_p == 1 for s in sampled),
        "both": any(s.top_k == 0 and s.top_p == 1 for s in sampled),
        "min_p": any(s.min_p == 0 for s in sampled),
        "penalty": any(s.repetition_penalty == 1 for s in sampled),
    }
    assert set(off.values()) == {device == "cuda"}
    assert len({tuple(prompt) for prompt, _, _ in tool.requests}) == 1, "the fixed tool prompt"


async def test_what_prompts_are_made_of_is_one_line_for_each_role(capsys: pytest.CaptureFixture[str]) -> None:
    """With a warning where it is not what was asked for, or where the parts do not fit together into the context."""
    with structlog.testing.capture_logs() as lines:
        await Runtime.open(
            Settings.load(), Engines(chat=ScriptedEngine(), tool=ScriptedEngine()), ToolSet.from_file(None)
        )
    facts = {"exact": True, "prefix_stable": True, "thinking": "none", "event": "prompt.taken", "log_level": "info"}
    assert [line for line in lines if line["event"] == "prompt.taken"] == [
        {"role": "chat", "format": "segments", **facts},
        {"role": "tool", "format": "instruction", **facts},
    ]
    with structlog.testing.capture_logs() as lines:
        narrow = ScriptedEngine(codec=ScriptedCodec(template="none", max_model_len=1200))
        await Runtime.open(
            Settings.load(DEPLOY_MODELS="chat"), Engines(chat=narrow, tool=None), ToolSet.from_file(None)
        )
    warnings = {line["event"]: line for line in lines if line["log_level"] == "warning"}
    assert set(warnings) == {"prompt.fallback", "prompt.narrow"}
    assert warnings["prompt.fallback"]["reason"] == "the model has no chat template"
    assert warnings["prompt.narrow"]["room"] < warnings["prompt.narrow"]["wanted"]
