"""`llm` by Datasette: the models are in a file of its own, `extra-openai-models.yaml`, the key in its key store."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ["LLM_USER_PATH"] = os.environ["HOME"]  # of this test alone

import told
from told import BASE_URL, INSTRUCTIONS, KEY, LONG, MOST, OSLO, RESULT, SAID, ask, tell

FILE = f"""
- model_id: yap
  model_name: chat
  api_base: {BASE_URL}
  api_key_name: yap
  supports_tools: true
"""


def model() -> Any:
    import llm

    Path(os.environ["LLM_USER_PATH"], "extra-openai-models.yaml").write_text(FILE)
    found: Any = llm.get_model("yap")
    found.key = KEY
    return found


def conversation() -> None:
    talk = model().conversation()
    for said in SAID:
        response = talk.prompt(said, system=INSTRUCTIONS, max_tokens=MOST)
        pieces = list(response)
        usage = response.usage()
        details = (usage.details or {}).get("prompt_tokens_details") or {}
        tell(
            "turn",
            said=said,
            text=response.text(),
            pieces=sum(map(bool, pieces)),
            finish=response.response_json["finish_reason"],
            cached=details.get("cached_tokens", 0),
            usage=usage,
        )


def tool() -> None:
    def get_weather(place: str) -> str:
        """The weather of a place."""
        tell("calls", calls=[("call", "get_weather", f'{{"place": "{place}"}}')], finish="tool_calls", text="")
        return RESULT

    chain = model().conversation().chain(ask(OSLO), tools=[get_weather], options={"max_tokens": MOST})
    text = chain.text()
    tell("turn", result=RESULT, text=text, finish="stop")


def barge_in() -> None:
    """Ctrl-C on the command."""
    Path(os.environ["LLM_USER_PATH"], "extra-openai-models.yaml").write_text(FILE)
    command = [sys.executable, "-m", "llm", "-m", "yap", "--key", KEY, "--system", INSTRUCTIONS]
    # `llm` adds to the prompt what it reads from a pipe.
    options: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([*command, ask(LONG)], text=True, **options) as running:
        assert running.stdout is not None
        heard = running.stdout.read(8)
        running.send_signal(signal.SIGINT)
        running.wait()
    tell("closed", heard=heard)
    told.wait_for_test()
    said = subprocess.run([*command, "-o", "max_tokens", str(MOST), SAID[0]], text=True, check=True, **options)
    tell("turn", said=SAID[0], text=said.stdout, finish="stop")


def failing() -> None:
    try:
        model().prompt("hi").text()
    except Exception as error:
        told.tell_error(error)


told.run(globals())
