"""Which checkpoint serves a role, what kind of weights it holds, and why it was chosen or is missing."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import structlog

from yaptext.engine import awq_results, download, header
from yaptext.engine import hub as hubs
from yaptext.engine.base import Role
from yaptext.engine.codec import HubCodec
from yaptext.engine.template import template_file
from yaptext.errors import StartError, StartRefused, YapError
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


FAILED = "failed.json"
"""In the row of a model on the shelf: the quantizer's last attempt, if it failed."""
QUANTIZE_LOG = "journalctl -u yap-text-quantize"


@dataclass(frozen=True, slots=True)
class FailedAttempt:
    """What the quantizer could not make. `wanted` is what was to be made, of which source and by which code;
    `failed_at` is UTC (ISO 8601)."""

    wanted: dict[str, Any]
    reason: str
    exit_status: int
    failed_at: str


def wants_demo(settings: Settings) -> bool:
    """True where no model is named at all."""
    named = (settings.chat_model, settings.tool_model, settings.awq_chat_model, settings.awq_tool_model)
    return not any(named)


def choose(settings: Settings, role: Role, demo: Path | None = None) -> Checkpoint:
    """The checkpoint for `role`; `demo` is the folder of the embedded model where that is to serve.

    Raises `StartRefused` where no model is named for a deployed role, there is none of that name, or its weights are
    not what `QUANTIZATION` asks for; `StartError` where it cannot be read now.
    """
    if demo is not None:
        return _best_of(settings, role, str(demo), "no model is configured: the embedded demo model serves")
    awq = settings.awq_chat_model if role == "chat" else settings.awq_tool_model
    plain = settings.chat_model if role == "chat" else settings.tool_model
    name = role.upper()
    if awq:
        checkpoint = _describe(settings, role, awq, f"AWQ_{name}_MODEL")
        if checkpoint.kind != "awq":
            raise StartRefused(f"AWQ_{name}_MODEL={awq} has {checkpoint.kind} weights: name it in {name}_MODEL")
        return checkpoint
    if not plain:
        raise StartRefused(
            f"{name}_MODEL is not set, and DEPLOY_MODELS={settings.deploy_models} needs it "
            f"(AWQ_{name}_MODEL does as well)"
        )
    return _best_of(settings, role, plain, f"{name}_MODEL")


def _best_of(settings: Settings, role: Role, source: str, reason: str) -> Checkpoint:
    """The quantizer's finished result for `source` where AWQ may be served, else `source` itself."""
    wanted = settings.quantization_of(role)
    found = awq_results.finished(settings.state, source) if wanted in ("auto", "awq") else None
    if found is not None:
        reason += f"; a finished AWQ folder for {Path(source).name}"
        source = str(found.folder)
    return _describe(settings, role, source, reason)


def _describe(settings: Settings, role: Role, source: str, reason: str) -> Checkpoint:
    config = read_config(settings, source)
    kind = _kind_at_hub(settings, source, config)
    wanted = settings.quantization_of(role)
    if wanted == "gptq" and role == "tool" and kind == "float" and settings.tool_quantization is None:
        wanted = "auto"  # as the guide has it: GPTQ is about the chat model
    if wanted == "awq" and kind == "float":
        raise StartRefused(f"QUANTIZATION=awq, but {source} has float weights: {_why_no_awq(settings, source)}")
    if wanted in ("awq", "gptq") and kind != wanted:
        raise StartRefused(
            f"QUANTIZATION={wanted}, but {source} has {kind} weights: name a {wanted.upper()} checkpoint"
        )
    if wanted in ("none", "fp8") and kind not in ("float", "fp8"):
        raise StartRefused(f"QUANTIZATION={wanted}, but {source} has {kind} weights: use QUANTIZATION=auto")
    online = kind == "float" and wanted in ("auto", "fp8")
    if online and not settings.on_cuda:
        online = False
        if wanted == "fp8":
            reason += "; FP8 weights need CUDA: float weights serve"
    return Checkpoint(source, "fp8" if online else kind, context_of(config), reason, online_fp8=online)


def _why_no_awq(settings: Settings, source: str) -> str:
    """What became of the AWQ weights of a float model, and what to do. Under systemd another unit makes them, in a
    state folder that is not the administrator's own: a command run by hand would write elsewhere."""
    failed = failed_attempt(settings.state, source)
    if failed is not None:
        log = QUANTIZE_LOG if is_unit(settings) else "run `yap-text quantize --again`"
        return f"quantizing it failed at {failed.failed_at}: {failed.reason}. The whole log: {log}"
    lacking = f"no finished AWQ folder lies in {settings.state / 'awq'}"
    other = "name an AWQ checkpoint in AWQ_CHAT_MODEL or AWQ_TOOL_MODEL"
    if is_unit(settings):
        return f"{lacking}. The unit yap-text-quantize has to make it; why it did not: {QUANTIZE_LOG}. Or {other}"
    return f"{lacking}. Run `yap-text quantize`, or {other}"


def is_unit(settings: Settings) -> bool:
    """True in a unit of systemd, which says where its state folder is."""
    return settings.state_directory is not None


def failed_attempt(state: Path, source: str) -> FailedAttempt | None:
    """Why there are no AWQ weights of the float model `source`, if the quantizer wrote it down. An attempt at other
    weights in the same folder does not count, nor does a file that cannot be read."""
    try:
        content = json.loads((awq_results.row(state, source) / FAILED).read_text(encoding="utf-8"))
        wanted, reason, status = content["wanted"], content["reason"], content["exit_status"]
        found = FailedAttempt(wanted, str(reason), int(status), str(content["failed_at"]))
        then = wanted["source"]["content"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if not awq_results.is_folder(source) or then == awq_results.content(Path(source)) else None


def kind_of(source: str, config: dict[str, Any], cache: Path | None = None) -> Kind:
    """What kind of weights a checkpoint holds: its config decides; if that says nothing, its tensors do, and if none
    are on this disk, whole words of its name. `cache` is the hub client's. Raises nothing: whatever is broken is
    found by what reads it."""
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict):
        quantization = {}
    method = quantization.get("quant_method")
    if method == "compressed-tensors":
        return _compressed(quantization)
    for kind in ("awq", "gptq", "fp8"):
        if kind in str(method):
            return kind
    if method or quantization.get("load_in_4bit") or quantization.get("load_in_8bit"):
        return "other"  # quantized in a way of its own: the engine reads the config, too
    words = re.split(r"[^a-z0-9]+", Path(source).name.lower())
    by_name: Kind = "gptq" if "gptq" in words else "awq" if "awq" in words else "float"
    return _kind_of_tensors(_on_disk(source, cache), by_name)


def _kind_at_hub(settings: Settings, source: str, config: dict[str, Any]) -> Kind:
    """The same for a model that may not be on this disk yet. If its name alone says that it is quantized, the index of
    its weights is fetched, if it has one."""
    cache = hubs.cache(settings)
    kind = kind_of(source, config, cache)
    if kind == "float" or config.get("quantization_config") or _on_disk(source, cache) is not None:
        return kind
    with suppress(Exception):  # the hub client raises dozens of types; most models of one file have no index
        _read_json(settings, source, header.INDEX)
    return kind_of(source, config, cache)


def _on_disk(source: str, cache: Path | None) -> Path | None:
    """Where the files of a model lie. Nothing is fetched."""
    if awq_results.is_folder(source):
        return Path(source)
    from huggingface_hub import try_to_load_from_cache

    for name in (header.INDEX, header.WHOLE):
        try:
            found = try_to_load_from_cache(source, name, cache_dir=cache)
        except (OSError, ValueError):  # no name that a hub could know
            return None
        if isinstance(found, str):
            return Path(found).parent
    return None


def _kind_of_tensors(folder: Path | None, by_name: Kind) -> Kind:
    """By the tensors of an index or of one file. AWQ and GPTQ both have `qweight`, packed along the outputs or along
    the inputs: only its file tells them apart, and without it the name does."""
    try:
        places = header.places(folder) if folder is not None else {}
        packed = next((name for name in places if name.endswith(".qweight")), None)
        if any(name.endswith(".g_idx") for name in places):
            return "gptq"
    except (OSError, ValueError):
        return by_name
    if not places:
        return by_name
    try:
        if packed is not None:
            scales = packed.removesuffix("qweight") + "scales"
            outputs = header.tensors(places[scales])[scales].shape[-1]
            return "gptq" if header.tensors(places[packed])[packed].shape[-1] == outputs else "awq"
        first = header.tensors(next(iter(places.values())))
        return "fp8" if any(tensor.dtype.startswith("F8_") for tensor in first.values()) else "float"
    except (OSError, ValueError, LookupError):
        return "float" if packed is None else "gptq" if by_name == "gptq" else "awq"


def _compressed(quantization: dict[str, Any]) -> Kind:
    """What llm-compressor made: 4-bit whole numbers are its AWQ (and GPTQ, which is served alike)."""
    groups = quantization.get("config_groups")
    schemes = [group.get("weights") or {} for group in groups.values()] if isinstance(groups, dict) else []
    if schemes and all((scheme.get("num_bits"), scheme.get("type")) == (4, "int") for scheme in schemes):
        return "awq"
    if schemes and all((scheme.get("num_bits"), scheme.get("type")) == (8, "float") for scheme in schemes):
        return "fp8"
    return "other"


def open_codec(settings: Settings, source: str, *, max_model_len: int | None = None, block_size: int = 1) -> HubCodec:
    """The tokenizer and template of a folder or hub model, without an engine. Raises `StartError`."""
    from transformers import AutoTokenizer

    config: dict[str, Any] = {}
    generation: dict[str, Any] = {}
    if not awq_results.is_folder(source) or (Path(source) / "config.json").exists():
        config = read_config(settings, source)
        generation = _generation_config(settings, source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, token=hubs.hub_token(settings))
    except Exception as error:  # of dozens of types, as the hub client's below
        raise _unread(error)(f"cannot read the tokenizer of {source}: {_detail(error)}") from error
    ends = [(config.get("text_config") or config).get("eos_token_id"), generation.get("eos_token_id")]
    return HubCodec(
        tokenizer,
        max_model_len=max_model_len or context_of(config),
        block_size=block_size,
        template=None if tokenizer.chat_template else template_file(source),
        end_ids=[token for found in ends for token in ([found] if isinstance(found, int) else found or [])],
    )


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


def version(checkpoint: Checkpoint) -> str | None:
    """Which state of a checkpoint is on this disk: a word over a folder's content, or a hub model's commit."""
    if awq_results.is_folder(checkpoint.source):
        return awq_results.content(Path(checkpoint.source))
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(checkpoint.source, "config.json")
    return Path(found).parent.name if isinstance(found, str) else None


def read_config(settings: Settings, source: str) -> dict[str, Any]:
    """The config.json of a folder or hub model. Raises `StartError`, and `SettingsError` as `hub_token` does."""
    try:
        config = _read_json(settings, source, "config.json")
    except YapError:
        raise
    except Exception as error:  # the hub client raises dozens of types; all mean the same here
        where = f"{source}{_setting_of(settings, source)}"
        known, unit = settings.hf_token is not None, is_unit(settings)
        line = hubs.access_line(error, source, where, known=known, is_unit=unit)
        raise _unread(error)(line or f"cannot read the config of {where}: {_detail(error)}") from error
    if not isinstance(config, dict):
        raise StartRefused(f"the config.json of {source} is not an object")
    return config


def _setting_of(settings: Settings, source: str) -> str:
    """Which variables name a model, in brackets."""
    names = ("AWQ_CHAT_MODEL", "AWQ_TOOL_MODEL", "CHAT_MODEL", "TOOL_MODEL")
    found = [name for name in names if getattr(settings, name.lower()) == source]
    return f" ({', '.join(found)})" if found else ""


def _detail(error: Exception) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError):
        return f"it is not in the cache, and {_why_away()}"
    if isinstance(error, PermissionError) and error.filename and (told := _closed(Path(os.fsdecode(error.filename)))):
        return told
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _why_away() -> str:
    """Why the hub is not asked, and what to do."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE and not _left:
        return "HF_HUB_OFFLINE is set. Unset it, or copy the model into the cache"
    return f"the hub {hubs.endpoint()} does not answer. Check the network"


def _closed(path: Path) -> str | None:
    """The first part of a path, from its root on, that this process may not read, and how to open it."""
    for part in [*reversed(path.absolute().parents), path]:
        if not os.path.lexists(part):
            return None
        if not os.access(part, os.R_OK | os.X_OK if part.is_dir() else os.R_OK):
            how = f"chmod {'o+rx' if part.is_dir() else 'o+r'} {part}"
            return f"{part} is closed to the user of this process; to open it to all: {how}"
    return None


def _unread(error: Exception) -> type[StartError]:
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


def _read_json(settings: Settings, source: str, name: str) -> Any:
    """One file of a folder or hub model. Raises `StartError`, `SettingsError`, `OSError`, `ValueError` and what the hub
    client raises."""
    folder = Path(source)
    if folder.is_dir():
        return json.loads((folder / name).read_text(encoding="utf-8"))
    if os.path.isfile(source):
        raise StartRefused(f"{source} is a file{_setting_of(settings, source)}: name its folder, {folder.parent}")
    if source.startswith((".", "/", "~")):
        closed = _closed(folder)
        raise StartRefused(f"{source} is not a folder{_setting_of(settings, source)}{f': {closed}' if closed else ''}")
    from huggingface_hub import hf_hub_download  # heavy, and only hub models need it

    hubs.prepare(settings)
    return json.loads(Path(hf_hub_download(source, name, token=hubs.hub_token(settings))).read_text(encoding="utf-8"))


def _generation_config(settings: Settings, source: str) -> dict[str, Any]:
    try:
        found = _read_json(settings, source, "generation_config.json")
    except Exception:  # most models without one are served all the same
        return {}
    return found if isinstance(found, dict) else {}


def leave_hub_if_down(settings: Settings) -> None:
    """Where a hub model is wanted and the hub does not answer, this process and its engines take what is in the cache.
    Else the client would ask again for 23 s a file, and longer where the connection hangs."""
    named = (settings.awq_chat_model or settings.chat_model, settings.awq_tool_model or settings.tool_model)
    ids = [source for source in named if source and not awq_results.is_folder(source) and source[0] not in "./~"]
    if not ids:
        return
    from huggingface_hub import constants, get_session

    _left.clear()
    if constants.HF_HUB_OFFLINE:
        return
    try:
        status = get_session().get(f"{constants.ENDPOINT}/api/models/{ids[0]}", timeout=_HUB_TIMEOUT_S).status_code
        if status < 500:
            return
        failure = f"status {status}"
    except Exception as error:  # dozens of types, as below
        failure = type(error).__name__
    _log.warning("hub.down", hub=hubs.endpoint(), failure=failure, hint="models come from the cache")
    constants.HF_HUB_OFFLINE = True
    os.environ["HF_HUB_OFFLINE"] = "1"
    _left.append(failure)


_left: list[str] = []
"""Why this process left the hub. Without a reason, HF_HUB_OFFLINE is the user's own."""


def bring(settings: Settings, chosen: Mapping[Role, Checkpoint]) -> None:
    """Downloads what the chosen checkpoints lack, so that engines find it in the cache: with progress, which they would
    not tell. Raises `StartError` with the model and what to do."""
    sources = list(dict.fromkeys(one.source for one in chosen.values() if not awq_results.is_folder(one.source)))
    if not sources:
        return
    from huggingface_hub import constants

    hub = hubs.Hub(settings, StartRefused, StartError)
    labels = {source: f"{source}{_setting_of(settings, source)}" for source in sources}
    if constants.HF_HUB_OFFLINE:
        for source in sources:
            if lacking := download.weights_lacking_in_cache(hub, source):
                of = f"{len(lacking)} files of {labels[source]}, among them {lacking[0]}"
                raise StartError(f"{hub.cache} lacks {of}, and {_why_away()}")
        return
    plans = []
    for source in sources:
        find = partial(download.plan, hub, source, download.engine_files, label=labels[source])
        plans.append(hub.ask(source, "read", find, label=labels[source]))
    download.bring(hub, plans)
