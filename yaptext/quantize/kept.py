"""What of the float model's folder goes along with the quantized weights, byte for byte, and what does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import structlog

_log = structlog.get_logger(__name__)
KEPT_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
)
"""Kept byte for byte: transformers writes some tokenizers back as others than it read (NFC, another split)."""
TEMPLATES = "additional_chat_templates"
"""A folder beside the template: one more for each use, as `tool_use.jinja`. Tokenizers read it."""


def copy_kept(source: Path, target: Path) -> None:
    """Copies the files that are kept into `target`. What a backend wrote there under their names goes: a generation
    config is written for models that have none."""
    for name in KEPT_FILES:
        (target / name).unlink(missing_ok=True)
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    shutil.rmtree(target / TEMPLATES, ignore_errors=True)
    for file in sorted((source / TEMPLATES).glob("*.jinja")):
        (target / TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(file, target / TEMPLATES / file.name)


def leave_out_code(source: Path, target: Path, model: str) -> None:
    """Says which code of the source is left out, and takes its names out of the config of `target`.

    Nothing here runs such code: what was measured is the class of transformers, and so is what vLLM serves. A config
    that named files which are not there would stop a loader that trusts code. tokenizer_config.json keeps every byte.
    """
    left_out = sorted({*code(source / "config.json"), *code(source / "tokenizer_config.json")})
    if left_out:
        _log.info("quantize.left_out", model=model, code=left_out, reason="no code of a model is run")
    config = _object(target / "config.json")
    if config.pop("auto_map", None) is not None:
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def code(file: Path) -> list[str]:
    """The code that `auto_map` of a config names: `x.py`, or `owner/name/x.py` of another repository."""
    named = _object(file).get("auto_map")
    found: list[str] = []
    for classes in named.values() if isinstance(named, dict) else ():
        for one in classes if isinstance(classes, list) else [classes]:  # a tokenizer's slow and fast one, or null
            if isinstance(one, str):
                repository, _, name = one.rpartition("--")
                module = name.rpartition(".")[0].replace(".", "/")
                found.append(f"{repository}/{module}.py".lstrip("/"))
    return sorted(set(found))


def _object(file: Path) -> dict[str, Any]:
    """Empty for a file that is missing, or holds no object."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
