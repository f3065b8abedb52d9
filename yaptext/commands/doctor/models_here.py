"""Checks of the models whose files are on this machine."""

from __future__ import annotations

import ast
import json
from importlib.util import find_spec
from pathlib import Path

from yaptext.commands.doctor.check import Finding, check_each, fail, ok, skip, warn
from yaptext.commands.doctor.deployment import Deployment, Unknown
from yaptext.commands.doctor.model_source import Model, model_of, weight_files
from yaptext.commands.doctor.resources import gib
from yaptext.engine import awq_results, checkpoints, header
from yaptext.engine.base import Role
from yaptext.engine.hub_client import cache
from yaptext.engine.model_config import context_of
from yaptext.engine.weight_kind import kind_of
from yaptext.errors import StartError

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "spiece.model", "vocab.txt")
_HERE = ("models.found.{role}",)


def _folder(seen: Deployment, role: Role) -> tuple[Model, Path]:
    """Raises `Unknown`."""
    one = model_of(seen, role)
    if one.folder is None:
        raise Unknown(f"{one.source} is not on this machine yet")
    return one, one.folder


@check_each("models.files", needs=_HERE)
def files(seen: Deployment, role: Role) -> Finding:
    one, folder = _folder(seen, role)
    again = (
        f"hf download {one.source} --force-download" if one.place == "cache" else f"copy the model to {folder} again"
    )
    if one.config is None:
        return fail(f"{folder / 'config.json'} is missing or no JSON object", again)
    if not any((folder / name).exists() for name in _TOKENIZERS):
        return fail(f"{folder} has no tokenizer: none of {', '.join(_TOKENIZERS)}", again)
    try:
        listed = weight_files(folder)
    except LookupError as error:
        return fail(f"{folder} {error}", again)
    for file in listed:
        try:
            if file.suffix == ".safetensors":
                header.tensors(file)
            elif header.is_pointer(file):
                raise header.LfsPointer
            elif not file.stat().st_size:
                raise header.BrokenFile("is empty")
        except header.BrokenFile as error:
            mend = f"git lfs pull in {folder}" if isinstance(error, header.LfsPointer) else again
            return fail(f"{file.name} {error}", mend)
    return ok(f"config, tokenizer and {len(listed)} weight files are complete, {gib(one.weights_bytes or 0)}")


@check_each("models.template", needs=_HERE)
def template(seen: Deployment, role: Role) -> Finding:
    one, folder = _folder(seen, role)
    if (folder / "chat_template.jinja").exists() or (folder / "chat_template.json").exists():
        return ok("it has a chat template")
    try:
        named = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
    except (OSError, ValueError, AttributeError):
        named = None
    if named:
        return ok("it has a chat template")
    if role == "chat" and seen.settings.chat_prompt_format == "bare":
        return ok("it has no chat template, and CHAT_PROMPT_FORMAT=bare needs none")
    remedy = f"name an instruction-tuned model in {one.variable}; what it is sent: yap-text prompt {one.source}"
    return warn(f"{one.source} has no chat template: prompts are plain text (bare)", remedy)


@check_each("models.architecture", needs=_HERE)
def architecture(seen: Deployment, role: Role) -> Finding:
    """By the text of vLLM's registry: importing it would import torch."""
    one = model_of(seen, role)
    named = one.known_config.get("architectures") or []
    known = seen.once("architectures", lambda: _architectures(seen.machine.vllm))
    if not known:
        return skip("vLLM is not installed, or has another registry")
    if not named:
        return warn(
            "its config.json names no architecture", f"name a model in {one.variable} whose config has architectures"
        )
    if supported := [name for name in named if name in known]:
        return ok(f"vLLM knows {supported[0]}")
    if (one.known_config.get("auto_map") or {}).get("AutoConfig"):
        remedy = f"name another model in {one.variable}: code of a model is never run (trust_remote_code)"
        return fail(f"vLLM does not know {', '.join(named)}, which needs code of its own", remedy)
    remedy = f"name a model in {one.variable} of an architecture that vLLM lists"
    return warn(f"vLLM does not list {', '.join(named)}; it may run by its transformers backend", remedy)


def _architectures(package: Path | None) -> set[str]:
    if package is None:
        spec = find_spec("vllm")
        package = None if spec is None or spec.origin is None else Path(spec.origin).parent
    try:
        tree = (
            ast.parse((package / "model_executor/models/registry.py").read_text(encoding="utf-8")) if package else None
        )
    except (OSError, SyntaxError):
        return set()
    names: set[str] = set()
    for node in tree.body if tree else []:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id in _SERVED and isinstance(node.value, ast.Dict):  # type: ignore[attr-defined]
            names |= {key.value for key in node.value.keys if isinstance(key, ast.Constant)}  # type: ignore[attr-defined,misc]
    return names


_SERVED = (
    "_TEXT_GENERATION_MODELS",
    "_MULTIMODAL_MODELS",
    "_TRANSFORMERS_SUPPORTED_MODELS",
    "_TRANSFORMERS_BACKEND_MODELS",
)


def checkpoint(seen: Deployment, role: Role) -> checkpoints.Checkpoint:
    """What the service itself would choose. Raises `StartError` with its reason, and `Unknown`."""
    return seen.once(("checkpoint", role), lambda: _checkpoint(seen, role))


def _checkpoint(seen: Deployment, role: Role) -> checkpoints.Checkpoint:
    one, folder = _folder(seen, role)
    settings = seen.settings
    if one.place == "demo":
        return checkpoints.choose(settings, role, folder)
    if kind_of(one.source, one.known_config, cache(settings)) != kind_of(str(folder), one.known_config):
        raise Unknown("its config names no quantization, and its name does")
    field = one.variable.lower()
    try:
        return checkpoints.choose(settings.model_copy(update={field: str(folder)}), role)
    except StartError as error:
        raise type(error)(str(error).replace(str(folder), one.source)) from None


@check_each("models.quantization", needs=_HERE)
def quantization(seen: Deployment, role: Role) -> Finding:
    one, _ = _folder(seen, role)
    one.known_config  # noqa: B018 raises
    try:
        chosen = checkpoint(seen, role)
    except StartError as error:
        failed = awq_results.failed_attempt(seen.state, one.source)
        if failed is not None and failed.reason not in str(error):
            again = checkpoints.QUANTIZE_LOG if seen.installed else "yap-text quantize --again"
            return fail(f"{error}. Quantizing it failed at {failed.failed_at}: {failed.reason}", again)
        wanted = f"{role.upper()}_QUANTIZATION" if getattr(seen.settings, f"{role}_quantization") else "QUANTIZATION"
        return fail(str(error), f"set {wanted}=auto, or name a checkpoint of that kind in {one.variable}")
    online = ", made FP8 as they load" if chosen.online_fp8 else ""
    wanted = seen.settings.quantization_of(role)
    if wanted == "fp8" and not seen.on_cuda:
        return warn("FP8 weights need CUDA: float weights serve", "set QUANTIZATION=auto")
    return ok(f"{'float' if chosen.online_fp8 else chosen.kind} weights{online}, by QUANTIZATION={wanted}")


@check_each("models.context", needs=_HERE)
def context(seen: Deployment, role: Role) -> Finding:
    one = model_of(seen, role)
    own = context_of(one.known_config)
    wanted = seen.settings.chat_max_model_len if role == "chat" else seen.settings.tool_max_model_len
    name = f"{role.upper()}_MAX_MODEL_LEN"
    used = min(wanted or (8192 if role == "chat" else 4096), own)
    if wanted and wanted > own:
        return warn(f"{name}={wanted}, and the model's own context is {own} tokens, which applies", f"set {name}={own}")
    least = seen.settings.user_utt_max_tokens + (
        seen.settings.chat_max_out if role == "chat" else seen.settings.tool_max_out
    )
    if used < least:
        remedy = "lower USER_UTT_MAX_TOKENS, CHAT_MAX_OUT or TOOL_MAX_OUT, or name a model with a longer context"
        return fail(f"the context is {used} tokens; an utterance and a reply may take {least}", remedy)
    return ok(f"{used} tokens of the model's own {own}")
