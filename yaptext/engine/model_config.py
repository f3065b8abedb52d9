"""A model's configuration, its tokenizer included, as a folder or the hub has it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from yaptext.engine import awq_results, hub_client
from yaptext.engine.codec import HubCodec
from yaptext.engine.offline import why_away
from yaptext.engine.template import template_file
from yaptext.errors import StartError, StartRefused, YapError
from yaptext.settings import Settings

_CONTEXT_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "max_target_positions",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
_SCALED_ALREADY = ("su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling", "default", "mrope")


def open_codec(settings: Settings, source: str, *, max_model_len: int | None = None, block_size: int = 1) -> HubCodec:
    """The tokenizer and template of a folder or hub model, without an engine. `max_model_len` is in tokens, by
    default the model's own. Raises `StartError`."""
    from transformers import AutoTokenizer

    config: dict[str, Any] = {}
    generation: dict[str, Any] = {}
    if not awq_results.is_folder(source) or (Path(source) / "config.json").exists():
        config = read_config(settings, source)
        generation = _generation_config(settings, source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, token=hub_client.hub_token(settings))
    except Exception as error:  # of dozens of types, as the hub client's below
        raise start_error_of(error)(f"cannot read the tokenizer of {source}: {_detail(error)}") from error
    ends = [(config.get("text_config") or config).get("eos_token_id"), generation.get("eos_token_id")]
    return HubCodec(
        tokenizer,
        max_model_len=max_model_len or context_of(config),
        block_size=block_size,
        template=None if tokenizer.chat_template else template_file(source),
        end_ids=[token for found in ends for token in ([found] if isinstance(found, int) else found or [])],
    )


def context_of(config: dict[str, Any]) -> int:
    """The model's own longest sequence in tokens, as vLLM finds it (0.32: `derive_max_model_len_and_key` and
    `_get_and_verify_max_len`), but 8192 if the config does not say."""
    text = config
    for nested in ("thinker_config", "text_config", "llm_config", "language_config"):
        text = text[nested] if isinstance(text.get(nested), dict) else text
    found = [value for key in _CONTEXT_KEYS if isinstance(value := text.get(key), int) and value > 0]
    own = text.get("model_max_length")
    longest = own if isinstance(own, int) and own > 0 else min(found, default=8192)
    rope = text.get("rope_parameters") or text.get("rope_scaling")
    if isinstance(rope, dict) and "gemma3" not in str(config.get("model_type")):
        kind, factor = rope.get("rope_type", rope.get("type", "default")), rope.get("factor")
        if kind not in _SCALED_ALREADY and isinstance(factor, int | float):
            longest = int(longest * factor)
    return longest


def read_config(settings: Settings, source: str) -> dict[str, Any]:
    """The config.json of a folder or hub model. Raises `StartError`, and `SettingsError` as `hub_token` does."""
    try:
        config = read_json(settings, source, "config.json")
    except YapError:
        raise
    except Exception as error:  # the hub client raises dozens of types; all mean the same here
        where = f"{source}{setting_of(settings, source)}"
        known, unit = settings.hf_token is not None, hub_client.is_unit(settings)
        line = hub_client.access_line(error, source, where, known=known, is_unit=unit)
        raise start_error_of(error)(line or f"cannot read the config of {where}: {_detail(error)}") from error
    if not isinstance(config, dict):
        raise StartRefused(f"the config.json of {source} is not an object")
    return config


def read_json(settings: Settings, source: str, name: str) -> Any:
    """One file of a folder or hub model. Raises `StartError`, `SettingsError`, `OSError`, `ValueError` and what the hub
    client raises."""
    folder = Path(source)
    if folder.is_dir():
        return json.loads((folder / name).read_text(encoding="utf-8"))
    if os.path.isfile(source):
        raise StartRefused(f"{source} is a file{setting_of(settings, source)}: name its folder, {folder.parent}")
    if source.startswith((".", "/", "~")):
        closed = _closed(folder)
        raise StartRefused(f"{source} is not a folder{setting_of(settings, source)}{f': {closed}' if closed else ''}")
    from huggingface_hub import hf_hub_download  # heavy, and only hub models need it

    hub_client.prepare(settings)
    return json.loads(
        Path(hf_hub_download(source, name, token=hub_client.hub_token(settings))).read_text(encoding="utf-8")
    )


def _generation_config(settings: Settings, source: str) -> dict[str, Any]:
    try:
        found = read_json(settings, source, "generation_config.json")
    except Exception:  # most models without one are served all the same
        return {}
    return found if isinstance(found, dict) else {}


def setting_of(settings: Settings, source: str) -> str:
    """Which variables name a model, in brackets."""
    names = ("AWQ_CHAT_MODEL", "AWQ_TOOL_MODEL", "CHAT_MODEL", "TOOL_MODEL")
    found = [name for name in names if getattr(settings, name.lower()) == source]
    return f" ({', '.join(found)})" if found else ""


def _detail(error: Exception) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError):
        return f"it is not in the cache, and {why_away()}"
    if isinstance(error, PermissionError) and error.filename and (told := _closed(Path(os.fsdecode(error.filename)))):
        return told
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _closed(path: Path) -> str | None:
    """The first part of a path, from its root on, that this process may not read, and how to open it."""
    for part in [*reversed(path.absolute().parents), path]:
        if not os.path.lexists(part):
            return None
        if not os.access(part, os.R_OK | os.X_OK if part.is_dir() else os.R_OK):
            how = f"chmod {'o+rx' if part.is_dir() else 'o+r'} {part}"
            return f"{part} is closed to the user of this process; to open it to all: {how}"
    return None


def start_error_of(error: Exception) -> type[StartError]:
    """What a file that cannot be read is raised as: `StartRefused` if a later start would meet it again."""
    return StartRefused if stays(error) else StartError


def stays(error: Exception) -> bool:
    """Whether a file that cannot be read now cannot be read later either. The hub has no such model, or not for this
    token; the folder has no such file; what is read is no JSON: that stays. A hub, a network or a disk that fails may
    be back."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError):  # not in the cache, and the hub did not answer
        return False
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code == 401:
        return True
    hubs = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError)
    lasting = (*hubs, FileNotFoundError, NotADirectoryError, PermissionError, ValueError)
    return isinstance(error, lasting)
