"""The embedded model from float to AWQ to an answer: autoawq, the measurement and vLLM, all real."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from yaptext.dialogue.chat_prompt import ChatPrompts, Limits
from yaptext.engine import awq_results, demo
from yaptext.engine.base import Sampling
from yaptext.engine.registry import open_engines
from yaptext.settings import Settings

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1500)]


GIVEN = {"DEPLOY_MODELS": "chat", "YAP_TEXT_DEVICE": "cpu"}


@pytest.fixture
def source(state_folder: Path, tmp_path: Path) -> Path:
    """The float model, of which a result lies on the shelf of `tmp_path`."""
    folder = demo.folder(state_folder)
    subprocess.run(
        [sys.executable, "-m", "yaptext", "quantize", "--samples", "4", "--tokens", "256"],
        env=os.environ | GIVEN | {"CHAT_MODEL": str(folder), "YAP_TEXT_STATE_DIR": str(tmp_path), "LOG_FORMAT": "json"},
        check=True,
    )
    return folder


async def test_the_demo_is_quantized_and_served(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearer to float than rounding, well under half its size, and vLLM answers from the result."""
    for name, value in os.environ.items():
        monkeypatch.setenv(name, value)  # so that what vLLM is told does not outlive it
    found = awq_results.finished(tmp_path, str(source))
    assert found is not None
    figures = found.manifest["verification"]
    assert figures["awq"]["kl"] < 0.75 * figures["rounding"]["kl"]
    assert figures["awq_bytes"] < 0.5 * figures["float_bytes"]

    settings = Settings.load(**GIVEN, CHAT_MODEL=str(source), YAP_TEXT_STATE_DIR=tmp_path, QUANTIZATION="awq")
    engines = open_engines(settings)
    assert engines.awq and engines.chat is not None
    try:
        prompts = await ChatPrompts.open(engines.chat.codec, "segments", Limits.of(settings))
        prompt = await prompts.turn("You are helpful.", [], "What is the capital of France?", "Monday, 12:00")
        said = [delta.text async for delta in engines.chat.stream(prompt, Sampling(max_tokens=24))]
    finally:
        await engines.chat.aclose()
    assert "Paris" in "".join(said)
