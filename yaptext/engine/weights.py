"""Which checkpoint serves a role, what kind of weights it holds, and why it was chosen."""

from __future__ import annotations

import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import structlog

from yaptext.engine import shelf
from yaptext.engine.base import Role
from yaptext.errors import SettingsError, StartError, YapError
from yaptext.settings import Settings

_log = structlog.get_logger(__name__)
_HUB_TIMEOUT_S = 5
Kind = Literal["float", "fp8", "awq", "gptq", "other"]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`source` is a hub id or a folder. `context` is the model's own longest sequence in tokens.
    `online_fp8` says that float weights are to be quantized while they load."""

    source: str
    kind: Kind
    context: int
    reason: str
    online_fp8: bool = False


def wants_demo(settings: Settings) -> bool:
    """True where no model is named at all."""
    named = (settings.chat_model, settings.tool_model, settings.awq_chat_model, settings.awq_tool_model)
    return not any(named)


def choose(settings: Settings, role: Role, demo: Path | None = None) -> Checkpoint:
    """The checkpoint for `role`; `demo` is the folder of the embedded model where that is to serve.

    Raises `StartError` where no model is named for a deployed role, it cannot be read, or its weights are
    not what `QUANTIZATION` asks for.
    """
    if demo is not None:
        return _best_of(settings, str(demo), "no model is configured: the embedded demo model serves")
    awq = settings.awq_chat_model if role == "chat" else settings.awq_tool_model
    plain = settings.chat_model if role == "chat" else settings.tool_model
    name = role.upper()
    if awq:
        checkpoint = _describe(settings, awq, f"AWQ_{name}_MODEL")
        if checkpoint.kind != "awq":
            raise StartError(f"AWQ_{name}_MODEL={awq} has {checkpoint.kind} weights: name it in {name}_MODEL")
        return checkpoint
    if not plain:
        raise StartError(
            f"{name}_MODEL is not set, and DEPLOY_MODELS={settings.deploy_models} needs it "
            f"(AWQ_{name}_MODEL does as well)"
        )
    return _best_of(settings, plain, f"{name}_MODEL")


def _best_of(settings: Settings, source: str, reason: str) -> Checkpoint:
    """The quantizer's finished result for `source` where AWQ may be served, else `source` itself."""
    found = shelf.finished(settings.state, source) if settings.quantization in ("auto", "awq") else None
    if found is not None:
        reason += f"; a finished AWQ folder for {Path(source).name}"
        source = str(found.folder)
    return _describe(settings, source, reason)


def _describe(settings: Settings, source: str, reason: str) -> Checkpoint:
    config = read_config(settings, source)
    kind = kind_of(source, config)
    wanted = settings.quantization
    if wanted == "awq" and kind == "float":
        raise StartError(
            f"QUANTIZATION=awq, but {source} has float weights: no finished AWQ folder lies in "
            f"{settings.state / 'awq'}. Run `yap-text quantize`, or name an AWQ checkpoint in AWQ_CHAT_MODEL or "
            "AWQ_TOOL_MODEL"
        )
    if wanted in ("awq", "gptq") and kind != wanted:
        raise StartError(f"QUANTIZATION={wanted}, but {source} has {kind} weights: name a {wanted.upper()} checkpoint")
    if wanted in ("none", "fp8") and kind not in ("float", "fp8"):
        raise StartError(f"QUANTIZATION={wanted}, but {source} has {kind} weights: use QUANTIZATION=auto")
    online = kind == "float" and wanted in ("auto", "fp8")
    if online and not settings.on_cuda:
        online = False
        if wanted == "fp8":
            reason += "; FP8 weights need CUDA: float weights serve"
    text = config.get("text_config") or config
    context = int(text.get("max_position_embeddings") or 8192)
    return Checkpoint(source, "fp8" if online else kind, context, reason, online_fp8=online)


def kind_of(source: str, config: dict[str, Any]) -> Kind:
    """What kind of weights a checkpoint holds: its config decides; where that says nothing, its name does."""
    method = (config.get("quantization_config") or {}).get("quant_method", "")
    for kind in ("awq", "gptq", "fp8"):
        if kind in method:
            return kind
    if method:
        return "other"  # quantized in a way of its own: the engine reads the config, too
    name = Path(source).name.lower() if Path(source).exists() else source.lower()
    if "gptq" in name:
        return "gptq"
    return "awq" if "awq" in name else "float"


def version(checkpoint: Checkpoint) -> str | None:
    """Which state of a checkpoint is on this disk: a word over a folder's content, or a hub model's commit."""
    if shelf.is_folder(checkpoint.source):
        return shelf.content(Path(checkpoint.source))
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(checkpoint.source, "config.json")
    return Path(found).parent.name if isinstance(found, str) else None


def read_config(settings: Settings, source: str) -> dict[str, Any]:
    """The config.json of a folder or hub model. Raises `StartError`, and `SettingsError` as `hub_token` does."""
    folder = Path(source)
    try:
        if folder.is_dir():
            path = folder / "config.json"
        elif source.startswith((".", "/", "~")):
            raise StartError(f"{source} is not a folder")
        else:
            from huggingface_hub import hf_hub_download  # heavy, and only hub models need it

            logging.getLogger("huggingface_hub").handlers.clear()  # ours, at the root, writes its lines already
            path = Path(hf_hub_download(source, "config.json", token=hub_token(settings)))
        config = json.loads(path.read_text(encoding="utf-8"))
    except YapError:
        raise
    except Exception as error:  # the hub client raises dozens of types; all mean the same here
        detail = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise StartError(f"cannot read the config of {source}: {detail}") from error
    if not isinstance(config, dict):
        raise StartError(f"the config.json of {source} is not an object")
    return config


def leave_hub_if_down(settings: Settings) -> None:
    """Where a hub model is wanted and the hub does not answer, this process and its engines take what is in the cache.
    Else the client would ask again for 23 s a file, and longer where the connection hangs."""
    named = (settings.awq_chat_model or settings.chat_model, settings.awq_tool_model or settings.tool_model)
    ids = [source for source in named if source and not shelf.is_folder(source) and source[0] not in "./~"]
    if not ids:
        return
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return
    try:
        status = get_session().get(f"{constants.ENDPOINT}/api/models/{ids[0]}", timeout=_HUB_TIMEOUT_S).status_code
        if status < 500:
            return
        failure = f"status {status}"
    except Exception as error:  # dozens of types, as below
        failure = type(error).__name__
    _log.warning("hub.down", hub=constants.ENDPOINT, failure=failure, hint="models come from the cache")
    constants.HF_HUB_OFFLINE = True
    os.environ["HF_HUB_OFFLINE"] = "1"


def hub_token(settings: Settings) -> str | None:
    """`HF_TOKEN` as it may go into a header: an error of the client would quote any other. Raises `SettingsError`."""
    token = settings.hf_token.get_secret_value().strip() if settings.hf_token else ""
    if token and not re.fullmatch(r"[!-~]+", token):
        raise SettingsError("HF_TOKEN=(hidden) is not allowed: a token is one word of printable ASCII")
    return token or None
