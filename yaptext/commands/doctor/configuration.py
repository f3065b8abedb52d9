"""Checks of the settings: what `Settings` refuses, slips in names, files that settings name, what has no effect."""

from __future__ import annotations

from pathlib import Path

from yaptext.commands.doctor.check import Finding, check, fail, ok, skip, warn
from yaptext.commands.doctor.deployment import ENV_FILE, Deployment
from yaptext.dialogue import persona
from yaptext.dialogue.tools import ToolSet
from yaptext.errors import SettingsError
from yaptext.settings import Settings
from yaptext.settings.changes import changes
from yaptext.settings.hidden import HIDDEN
from yaptext.settings.old_names import moved_names
from yaptext.settings.slips import unknown_names

_SHOWN = 500
"""Characters of one refusal, which ends with the meaning of the variable."""


def where(seen: Deployment) -> str:
    """Where a setting is changed."""
    return f"edit {ENV_FILE}, then systemctl restart yap-text" if seen.installed else "change it in this shell"


@check("settings.valid")
def valid(seen: Deployment) -> Finding:
    if seen.loaded is not None:
        source = f"{ENV_FILE} and {seen.installed.path}" if seen.installed else "the environment of this shell"
        told = changes(seen.loaded).settings
        told.pop("YAP_TEXT_DEVICE", None)  # what `auto` means here
        return ok(f"{len(told)} differ from their defaults, from {source}")
    if seen.refusals:
        lines = " | ".join(line[:_SHOWN] for line in seen.refusals)
        return fail(lines, f"{where(seen)}; yap-text serve --help lists every setting")
    names = ", ".join(map(str, seen.closed))
    return warn(f"this user may not read {names}: some settings of the unit are not known", "sudo yap-text doctor")


@check("settings.names")
def names(seen: Deployment) -> Finding:
    unknown = unknown_names(seen.environ)
    moved = moved_names(seen.environ).notes
    if unknown or moved:
        return warn("; ".join([*unknown, *moved]), f"correct the names; {where(seen)}")
    return ok("no variable is a misspelling or an old name")


@check("settings.effects", needs=("settings.valid",))
def effects(seen: Deployment) -> Finding:
    """What is allowed, and hardly meant."""
    told = list(_without_effect(seen.settings, seen.settings.model_fields_set, is_unit=seen.installed is not None))
    if told:
        return warn("; ".join(told), where(seen))
    return ok("no setting is without effect")


def _without_effect(settings: Settings, given: set[str], *, is_unit: bool) -> list[str]:
    told = []
    if not settings.on_cuda:
        for field, name in _ON_CUDA_ONLY.items():
            if field in given and getattr(settings, field) != Settings.model_fields[field].default:
                told.append(f"{name} has no effect on CPU")
        if settings.kv_dtype == "int8_per_token_head":
            told.append("KV_DTYPE=int8 ends the start on CPU: use auto or fp8")
    elif {"cpu_kv_cache_mb", "cpu_threads"} & given:
        told.append("CPU_KV_CACHE_MB and CPU_THREADS have no effect on CUDA")
    for role in ("chat", "tool"):
        plain, awq = getattr(settings, f"{role}_model"), getattr(settings, f"awq_{role}_model")
        if plain and awq:
            told.append(f"{role.upper()}_MODEL has no effect beside AWQ_{role.upper()}_MODEL")
    if settings.deploy_models == "chat" and (settings.tool_model or settings.awq_tool_model):
        told.append("DEPLOY_MODELS=chat has no use for the tool model that is named")
    if settings.deploy_models == "tool" and (settings.chat_model or settings.awq_chat_model):
        told.append("DEPLOY_MODELS=tool has no use for the chat model that is named")
    if settings.hf_awq_push and not (settings.hf_awq_chat_repo or settings.hf_awq_tool_repo):
        told.append("HF_AWQ_PUSH=1 without HF_AWQ_CHAT_REPO or HF_AWQ_TOOL_REPO ends the quantizer")
    if settings.hf_awq_push and settings.hf_token is None:
        told.append("HF_AWQ_PUSH=1 needs a token that may write (HF_TOKEN)")
    if settings.session_store_key is not None and settings.session_file is None:
        told.append("SESSION_STORE_KEY has no effect with SESSION_STORE=memory")
    if is_unit and {"host", "port"} & given:
        told.append("HOST and PORT have no effect: yap-text.socket has the address (systemctl edit yap-text.socket)")
    return told


_ON_CUDA_ONLY = {
    "chat_gpu_frac": "CHAT_GPU_FRAC",
    "tool_gpu_frac": "TOOL_GPU_FRAC",
    "cuda_graphs": "CUDA_GRAPHS",
    "attention_backend": "VLLM_ATTENTION_BACKEND",
}


@check("settings.tools", needs=("settings.valid",))
def tools(seen: Deployment) -> Finding:
    named = seen.settings.tools_file
    file = None if named is None else seen.machine.path(named)
    try:
        found = ToolSet.from_file(file)
    except SettingsError as error:
        return fail(str(error), f"correct {named}, or unset TOOLS_FILE for the five built-in tools")
    return ok(f"{len(found.tools)} tools of {named or 'this package'}")


@check("settings.personas", needs=("settings.valid",))
def personas(seen: Deployment) -> Finding:
    settings = seen.settings
    try:
        persona.use_folder(None if settings.personas_dir is None else seen.machine.path(settings.personas_dir))
        persona.check_style(settings.default_persona_style)
    except SettingsError as error:
        return fail(str(error), "correct that file, PERSONAS_DIR or DEFAULT_PERSONA_STYLE")
    return ok(f"{len(persona.styles())} styles; {settings.default_persona_style} is the default")


@check("settings.hidden_paths", needs=("settings.valid",))
def hidden_paths(seen: Deployment) -> Finding:
    """What the unit does not see."""
    if seen.installed is None:
        return skip("no unit runs it")
    if (seen.installed.value("ProtectHome") or "no") not in ("yes", "true", "1", "on", "tmpfs"):
        return ok("the unit sees /home")
    told = []
    for field, info in Settings.model_fields.items():
        text = str(getattr(seen.settings, field) or "").removeprefix("sqlite:")
        folder = next((folder for folder in HIDDEN if text.startswith("/") and Path(text).is_relative_to(folder)), None)
        if folder:
            told.append(f"{info.validation_alias} is below {folder}")
    if told:
        found = f"{'; '.join(told)}, which the unit does not see (ProtectHome=yes)"
        return fail(found, f"move it, for example to /srv, and {where(seen)}")
    return ok("no setting names a path below /home or /root")


@check("settings.log_file", needs=("settings.valid",))
def log_file(seen: Deployment) -> Finding:
    file = seen.settings.log_file
    if file is None:
        return skip("YAP_TEXT_LOG_FILE is not set")
    if seen.installed is not None:
        if not Path(file).is_relative_to("/var/log/yap-text"):
            remedy = "set YAP_TEXT_LOG_FILE=/var/log/yap-text/yap-text.log"
            return fail(f"the unit may not write to {file} (ProtectSystem=strict)", remedy)
    elif not seen.machine.may_write(file.parent):
        return fail(f"this user may not write to {file.parent}", "set YAP_TEXT_LOG_FILE to a file of another folder")
    return ok(str(file))
