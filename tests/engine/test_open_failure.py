"""engine/vllm/open_failure.py: the reason of an engine that does not open."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from pydantic import BaseModel, model_validator

from yaptext.engine.vllm import open_failure


class Strict(BaseModel):
    """A config of the kind that vLLM's are."""

    length: int

    @model_validator(mode="after")
    def _fits(self) -> Strict:
        if self.length > 10:
            raise ValueError("User-specified length (12) is greater than 10.\nTo allow this, do that.")
        return self


@pytest.mark.parametrize(
    ("length", "reason"),
    [(12, "User-specified length (12) is greater than 10."), ("x", "Input should be a valid integer, unable to parse")],
)
def test_what_pydantic_found_is_the_reason(length: object, reason: str) -> None:
    """Not the link that its text ends in."""
    with pytest.raises(ValueError) as caught:
        Strict(length=length)  # type: ignore[arg-type]
    assert open_failure.reason(caught.value).startswith(reason)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("out of memory\nand much more"), "out of memory"),
        (RuntimeError("\n  late  \n"), "late"),
        (KeyError(), "KeyError"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (RuntimeError("x" * 1000), "x" * 400),
    ],
)
def test_of_any_other_error_the_first_line_is_the_reason(error: Exception, reason: str) -> None:
    """And its type, if it says nothing."""
    assert open_failure.reason(error) == reason


def test_the_engines_process_leaves_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's error in the service only says that there is one; the file goes when the engine is open."""
    logger = logging.getLogger("vllm.v1.engine.core")
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.setattr(logger, "handlers", [logging.NullHandler()])
    monkeypatch.setattr(logger, "filters", [])
    with open_failure.noted() as note:
        assert os.environ[open_failure.VARIABLE] == str(note)
        open_failure.register()
        logger.info("all is well")
        assert open_failure.reason(RuntimeError("See root cause above"), note) == "See root cause above"
        try:
            raise ValueError("No valid attention backend")
        except ValueError:
            logger.exception("EngineCore failed to start.")
        assert open_failure.reason(RuntimeError("See root cause above"), note) == "No valid attention backend"
    assert not Path(note).exists()


@pytest.mark.engine
def test_a_real_engine_that_fails_in_its_process_gives_the_reason(state_folder: Path, tmp_path: Path) -> None:
    """Weights that do not fit their config fail in the engine's process, after the service has started it."""
    import json
    import shutil

    from yaptext.engine import demo
    from yaptext.engine.registry import open_engines
    from yaptext.errors import StartError
    from yaptext.settings import Settings

    folder = tmp_path / "model"
    shutil.copytree(demo.folder(state_folder), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 2048}))
    settings = Settings.load(
        CHAT_MODEL=str(folder), DEPLOY_MODELS="chat", YAP_TEXT_DEVICE="cpu", YAP_TEXT_STATE_DIR=tmp_path
    )
    with pytest.raises(StartError) as caught:
        open_engines(settings)
    message = str(caught.value)
    assert "the chat engine cannot open" in message
    assert "root cause" not in message
    assert "core proc" not in message, message
