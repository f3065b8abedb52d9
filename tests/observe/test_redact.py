"""observe/redact.py in an engine's process: a child that reads vllm_logging.json and nothing else of ours."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

_PROGRAM = """
import json, logging, logging.config, multiprocessing, sys, threading
from importlib import resources

def engine():
    logging.config.dictConfig(json.loads((resources.files("yaptext.observe") / "vllm_logging.json").read_text()))
    log = logging.getLogger("vllm.v1.engine.core")
    for event in ("EngineCore failed to start.", "EngineCore encountered a fatal error."):
        try:
            raise RuntimeError("marked words")
        except RuntimeError:
            log.exception(event)
    try:
        raise OSError(28, "No space left on device")
    except OSError:
        log.exception("disk")
    logging.getLogger("vllm.logging_utils.dump_input").error("Dumping scheduler output: %s", "marked words")
    never = "Task exception was never retrieved\\nfuture: <Task exception=%r>"
    logging.getLogger("asyncio").error(never, "marked words", exc_info=ValueError("marked words"))
    logging.getLogger("a.library").info("marked words")
    logging.getLogger("a.library").warning("odd")
    thread = threading.Thread(target=lambda: [][0] + "marked words")
    thread.start()
    thread.join()
    raise ValueError("marked words")

if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=engine)
    process.start()
    process.join()
"""


@pytest.mark.subprocess
@pytest.mark.parametrize("words", ["", "1"])
def test_an_engines_process_tells_faults_without_their_words(tmp_path: Any, words: str) -> None:
    """But those of its start, and those about the machine. What other libraries warn of, and what Python prints of its
    end, are lines like the others."""
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM)
    command = [sys.executable, str(program)]
    environment = {"YAPTEXT_LOG_WORDS": words, "PYTHONPATH": ":".join(sys.path)}
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stderr
    lines = [json.loads(line) for line in told.splitlines() if not line.startswith("Process ")]
    said = {line["event"]: line.get("exception", [{}])[0].get("exc_value") for line in lines}
    kept = "marked words" if words else "(held back: LOG_TEXT=0)"
    assert said.pop("thread.crashed") == ("list index out of range" if words else kept)
    never = "Task exception was never retrieved"
    assert said == {
        "odd": None,
        never + "\nfuture: <Task exception='marked words'>" * bool(words): kept,
        "EngineCore failed to start.": "marked words",
        "EngineCore encountered a fatal error.": kept,
        "disk": "[Errno 28] No space left on device",
        "process.crashed": kept,
    } | ({"Dumping scheduler output: marked words": None} if words else {})
