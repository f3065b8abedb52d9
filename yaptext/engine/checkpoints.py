"""Which checkpoint serves a role, by the settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from yaptext.engine import awq_results, download, download_plan, hub_client, weight_files
from yaptext.engine.base import Role
from yaptext.engine.model_config import context_of, read_config, setting_of
from yaptext.engine.offline import why_away
from yaptext.engine.weight_kind import Kind, kind_at_hub
from yaptext.errors import StartError, StartRefused
from yaptext.settings import Settings

QUANTIZE_LOG = "journalctl -u yap-text-quantize"


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
    kind = kind_at_hub(settings, source, config)
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
    failed = awq_results.failed_attempt(settings.state, source)
    if failed is not None:
        log = QUANTIZE_LOG if hub_client.is_unit(settings) else "run `yap-text quantize --again`"
        return f"quantizing it failed at {failed.failed_at}: {failed.reason}. The whole log: {log}"
    lacking = f"no finished AWQ folder lies in {settings.state / 'awq'}"
    other = "name an AWQ checkpoint in AWQ_CHAT_MODEL or AWQ_TOOL_MODEL"
    if hub_client.is_unit(settings):
        return f"{lacking}. The unit yap-text-quantize has to make it; why it did not: {QUANTIZE_LOG}. Or {other}"
    return f"{lacking}. Run `yap-text quantize`, or {other}"


def version(checkpoint: Checkpoint) -> str | None:
    """Which state of a checkpoint is on this disk: a word over a folder's content, or a hub model's commit."""
    if awq_results.is_folder(checkpoint.source):
        return awq_results.content(Path(checkpoint.source))
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(checkpoint.source, "config.json")
    return Path(found).parent.name if isinstance(found, str) else None


def bring(settings: Settings, chosen: Mapping[Role, Checkpoint]) -> None:
    """Downloads what the chosen checkpoints lack, so that engines find it in the cache: with progress, which they would
    not tell. Raises `StartError` with the model and what to do."""
    sources = list(dict.fromkeys(one.source for one in chosen.values() if not awq_results.is_folder(one.source)))
    if not sources:
        return
    from huggingface_hub import constants

    hub = hub_client.Hub(settings, StartRefused, StartError)
    labels = {source: f"{source}{setting_of(settings, source)}" for source in sources}
    if constants.HF_HUB_OFFLINE:
        for source in sources:
            if lacking := weight_files.lacking_in_cache(hub, source):
                of = f"{len(lacking)} files of {labels[source]}, among them {lacking[0]}"
                raise StartError(f"{hub.cache} lacks {of}, and {why_away()}")
        return
    plans = []
    for source in sources:
        find = partial(download_plan.plan, hub, source, weight_files.engine_files, label=labels[source])
        plans.append(hub.ask(source, "read", find, label=labels[source]))
    download.bring(hub, plans)
