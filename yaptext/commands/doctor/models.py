"""Checks of the models: where they lie, whether the hub gives them, whether their files are whole and fit."""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from yaptext.commands.doctor import web
from yaptext.commands.doctor.check import Finding, check, check_each, fail, ok, skip, warn
from yaptext.commands.doctor.deployment import Deployment, Unknown
from yaptext.commands.doctor.host import gib
from yaptext.engine import awq_results, checkpoints, demo
from yaptext.engine.base import Role
from yaptext.engine.hub import cache, hub_token
from yaptext.engine.model_config import context_of
from yaptext.engine.underway import size
from yaptext.engine.weight_files import engine_files
from yaptext.engine.weight_kind import kind_of
from yaptext.errors import SettingsError, StartError, YapError
from yaptext.settings import Settings

_REPO = re.compile(r"[\w.-]+(/[\w.-]+)?")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "spiece.model", "vocab.txt")
_LFS = b"version https://git-lfs"
_MOST_HEADER_BYTES = 2**27
_DTYPE_BYTES = {"F64": 8, "F32": 4, "I64": 8, "I32": 4, "BF16": 2, "F16": 2}
_DEMO_BYTES = 270_000_000
Place = Literal["folder", "cache", "hub", "demo", "shelf"]


@dataclass(frozen=True, slots=True)
class Model:
    """What serves a role. `source` is as it was named, `folder` where its files lie, if they do. `config` is its
    config.json. `weights_bytes` is the size of its weight files; None: not known."""

    role: Role
    variable: str
    source: str
    place: Place
    folder: Path | None = None
    config: dict[str, Any] | None = None
    weights_bytes: int | None = None

    @property
    def known_config(self) -> dict[str, Any]:
        """Raises `Unknown`."""
        if self.config is None:
            demo_waits = "the demo model is converted at the first start"
            raise Unknown(demo_waits if self.place == "demo" else f"the config of {self.source} is not here")
        return self.config


def model(seen: Deployment, role: Role) -> Model:
    """Raises `Unknown` if none is named, and `StartError` if the one that is named cannot be a model."""
    return seen.once(("model", role), lambda: _find(seen, role))


def _find(seen: Deployment, role: Role) -> Model:
    settings = seen.settings
    if checkpoints.wants_demo(settings):
        folder = seen.machine.path(demo.place(settings.state))
        found = folder if os.path.exists(folder / "config.json") else None
        return Model(role, "CHAT_MODEL", demo.NAME, "demo", found, _config(found), _size(found) or _DEMO_BYTES)
    awq, plain = getattr(settings, f"awq_{role}_model"), getattr(settings, f"{role}_model")
    variable = f"AWQ_{role.upper()}_MODEL" if awq else f"{role.upper()}_MODEL"
    source: str | None = awq or plain
    if source is None:
        raise Unknown(f"{role.upper()}_MODEL is not set, and DEPLOY_MODELS={settings.deploy_models} needs it")
    if not awq and settings.quantization_of(role) in ("auto", "awq"):
        made = awq_results.finished(seen.state, source)
        if made is not None:
            return Model(role, variable, source, "shelf", made.folder, _config(made.folder), _size(made.folder))
    if source.startswith((".", "/", "~")) or os.path.isdir(source):
        folder = seen.machine.path(source)
        if not os.path.isdir(folder):
            raise StartError(f"{variable}={source} is not a folder")
        return Model(role, variable, source, "folder", folder, _config(folder), _size(folder))
    if _REPO.fullmatch(source) is None:
        raise StartError(f"{variable}={source!r} is neither a folder nor a hub id (owner/name)")
    folder_in_cache = _snapshot(seen, source)
    if folder_in_cache is not None:
        config, size = _config(folder_in_cache), _size(folder_in_cache)
        return Model(role, variable, source, "cache", folder_in_cache, config, size)
    return Model(role, variable, source, "hub", None, *_remote(seen, source))


def _snapshot(seen: Deployment, source: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source, "config.json", cache_dir=seen.hub_cache)
    return Path(found).parent if isinstance(found, str) else None


def _config(folder: Path | None) -> dict[str, Any] | None:
    try:
        found = None if folder is None else json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def weight_files(folder: Path) -> list[Path]:
    """Those of the index if there is one; they need not exist."""
    for pattern in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        try:
            index = json.loads((folder / pattern).read_text(encoding="utf-8"))
            return [folder / name for name in sorted(set(index["weight_map"].values()))]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    found = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    whole = [file for file in found if not file.name.startswith("consolidated")]
    return whole or found


def _size(folder: Path | None) -> int | None:
    if folder is None:
        return None
    sizes = [os.stat(file).st_size for file in weight_files(folder) if file.exists()]
    return sum(sizes) or None


# The hub


def _is_offline(seen: Deployment) -> bool:
    return seen.offline or seen.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _endpoint(seen: Deployment) -> str:
    from huggingface_hub import constants

    return str(seen.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def ask_hub(seen: Deployment, path: str) -> web.Answer:
    """Of the hub, once a path. Raises `SettingsError` for a token that cannot be sent."""
    token = hub_token(seen.settings)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return seen.once(("hub", path), lambda: web.get(f"{_endpoint(seen)}/{path}", headers, seen.environ))


def _remote(seen: Deployment, source: str) -> tuple[dict[str, Any] | None, int | None]:
    """Config and bytes of weights of a model that is not on this machine."""
    if _is_offline(seen):
        return None, None
    told = ask_hub(seen, f"api/models/{quote(source)}")
    if told.status != 200 or not isinstance(told.json, dict):
        return None, None
    config = ask_hub(seen, f"{quote(source)}/resolve/main/config.json")
    counts = (told.json.get("safetensors") or {}).get("parameters") or {}
    size = sum(count * _DTYPE_BYTES.get(kind, 1) for kind, count in counts.items() if isinstance(count, int))
    found = config.json if config.status == 200 and isinstance(config.json, dict) else None
    return found, size or None


def hub_models(seen: Deployment) -> Iterator[Model]:
    for role, deployed in (("chat", seen.settings.chat_deployed), ("tool", seen.settings.tool_deployed)):
        if deployed:
            try:
                found = model(seen, role)  # type: ignore[arg-type]
            except (Unknown, YapError):
                continue
            if found.place in ("cache", "hub"):
                yield found


@check_each("models.found", needs=("settings.valid",))
def found(seen: Deployment, role: Role) -> Finding:
    name = f"{role.upper()}_MODEL"
    try:
        one = model(seen, role)
    except SettingsError as error:
        return fail(str(error), "put the token alone into HF_TOKEN, or /etc/yap-text/hf-token")
    except (Unknown, StartError) as error:
        return fail(str(error), f"set {name} (or AWQ_{name}) to a hub id or an absolute path, or set DEPLOY_MODELS")
    if one.place == "demo":
        told = f"no model is named: the demo model {one.source} serves"
        return ok(told if one.folder else f"{told}, converted at the first start (15 s, 270 MB)")
    if one.folder is not None:
        size = f", {gib(one.weights_bytes)}" if one.weights_bytes else ""
        where = {"cache": "in the hub cache", "shelf": f"quantized: {one.folder}"}.get(one.place, "a folder")
        return ok(f"{one.source}: {where}{size}")
    size = f", {gib(one.weights_bytes)} to download" if one.weights_bytes else ""
    if seen.environ.get("HF_HUB_OFFLINE") and _is_offline(seen):
        return fail(f"{one.source} is not in {seen.hub_cache}, and HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE")
    if seen.offline:
        return warn(
            f"{one.source} is not in {seen.hub_cache}; --offline did not ask the hub", "run it without --offline"
        )
    free = seen.machine.disk(seen.machine.existing(seen.hub_cache)).free_bytes
    if one.weights_bytes and free < one.weights_bytes * 1.05:
        remedy = "free some, or set HF_HOME to a folder of a larger disk"
        return fail(f"{one.source} is not downloaded yet{size}, and {gib(free)} are free for {seen.hub_cache}", remedy)
    return ok(f"{one.source} is not downloaded yet{size}: the first start takes it from the hub")


@check("models.hub", needs=("settings.valid",))
def hub(seen: Deployment) -> Finding:
    if seen.offline:
        return skip("--offline")
    named = list(hub_models(seen))
    if not named:
        return skip("no model of the hub is named")
    if _is_offline(seen):
        return skip("HF_HUB_OFFLINE is set: models come from the cache")
    endpoint = _endpoint(seen)
    answer = ask_hub(seen, f"api/models/{quote(named[0].source)}")
    if answer.status is not None and answer.status < 500:
        return ok(f"{endpoint} answers")
    why = answer.failure or f"status {answer.status}"
    proxy = ", ".join(f"{scheme}_proxy" for scheme in web.proxies(seen.environ) if scheme != "no")
    by = f" (by {proxy})" if proxy else ""
    remedy = "set HF_ENDPOINT or HTTPS_PROXY, or HF_HUB_OFFLINE=1 to use the cache alone"
    if all(one.folder is not None for one in named):
        return warn(f"{endpoint}{by}: {why}; models come from the cache", remedy)
    return fail(f"{endpoint}{by}: {why}", remedy)


@check_each("models.access", needs=("models.hub", "models.found.{role}"))
def access(seen: Deployment, role: Role) -> Finding:
    one = model(seen, role)
    if one.place not in ("cache", "hub"):
        return skip("it is a folder of this machine")
    tell = warn if one.folder is not None else fail
    try:
        answer = ask_hub(seen, f"api/models/{quote(one.source)}")
        file = ask_hub(seen, f"{quote(one.source)}/resolve/main/config.json") if answer.status == 200 else answer
    except YapError as error:
        return fail(str(error), "put the token alone into HF_TOKEN, or /etc/yap-text/hf-token")
    has_token = seen.settings.hf_token is not None
    gated = bool(isinstance(answer.json, dict) and answer.json.get("gated"))
    if file.status == 200:
        return ok(f"the hub gives {one.source}" + (", which is gated, for HF_TOKEN" if gated else ""))
    place = "/etc/yap-text/hf-token" if seen.installed else "HF_TOKEN"
    if file.status in (401, 403):
        if not has_token:
            remedy = f"ask for access on its page, and put a token that may read it into {place}"
            return tell(
                f"the hub does not give {one.source} without a token: it is gated, private, or not there", remedy
            )
        return tell(
            f"the hub refuses {one.source} to HF_TOKEN: status {file.status}",
            f"renew the token in {place}, and ask for access",
        )
    if file.status == 404:
        return tell(f"the hub has no {one.source}, or no config.json in it", f"correct {one.variable}")
    if file.status == 429:
        return warn("the hub asks to wait: status 429", f"try it again later, or set a token in {place}")
    return tell(f"the hub answers for {one.source}: {file.failure or f'status {file.status}'}", "try it again later")


@check_each("models.download", needs=("models.hub", "models.found.{role}"))
def to_download(seen: Deployment, role: Role) -> Finding:
    """Of all models together, since one disk takes them."""
    one = model(seen, role)
    if one.place not in ("cache", "hub"):
        return skip("it is a folder of this machine")
    whole, left = _to_download(seen, one.source)
    told = f"{size(left)} of {size(whole)} are to be downloaded" if left else f"all {size(whole)} are in the cache"
    needed = sum(_to_download(seen, source)[1] for source in {other.source for other in hub_models(seen)})
    free = seen.machine.disk(seen.machine.existing(seen.hub_cache)).free_bytes
    if left and needed > free:
        both = f", {size(needed)} with the other model" if needed > left else ""
        remedy = "free some, or set HF_HOME to a folder of a larger disk"
        return fail(f"{told}{both}, and {size(free)} are free for {seen.hub_cache}", remedy)
    return ok(f"{told}, {size(free)} are free" if left else told)


def _to_download(seen: Deployment, source: str) -> tuple[int, int]:
    """Bytes of a hub model, and those of them that a start has to fetch. Raises `Unknown`."""
    listed = ask_hub(seen, f"api/models/{quote(source)}/tree/main?recursive=true").json
    if not isinstance(listed, list):
        raise Unknown(f"the hub did not list the files of {source}")
    files = {
        str(entry.get("path")): entry for entry in listed if isinstance(entry, dict) and entry.get("type") == "file"
    }
    try:
        wanted = engine_files(list(files), lambda path: ask_hub(seen, f"{quote(source)}/resolve/main/{path}").body)
    except LookupError as error:
        raise Unknown(f"{source} {error}") from None
    blobs = seen.hub_cache / f"models--{source.replace('/', '--')}" / "blobs"
    whole = left = 0
    for path in wanted:
        name, bytes_ = (files[path].get("lfs") or files[path]).get("oid"), int(files[path].get("size") or 0)
        part = blobs / f"{name}.incomplete"
        there = bytes_ if os.path.exists(blobs / str(name)) else part.stat().st_size if part.exists() else 0
        whole, left = whole + bytes_, left + max(0, bytes_ - there)
    return whole, left


# Files


_HERE = ("models.found.{role}",)


def _folder(seen: Deployment, role: Role) -> tuple[Model, Path]:
    """Raises `Unknown`."""
    one = model(seen, role)
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
    listed = weight_files(folder)
    if not listed:
        return fail(f"{folder} has neither *.safetensors nor *.bin", again)
    missing = [file.name for file in listed if not file.exists()]
    if missing:
        return fail(f"{folder} lacks {len(missing)} of {len(listed)} weight files: {missing[0]}", again)
    for file in listed:
        if why := _damage(file):
            mend = f"git lfs pull in {folder}" if "Git LFS" in why else again
            return fail(f"{file.name} {why}", mend)
    return ok(f"config, tokenizer and {len(listed)} weight files are whole, {gib(one.weights_bytes or 0)}")


def _damage(file: Path) -> str | None:
    """What is wrong with a file of weights, by its header and size alone."""
    with file.open("rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        begin = opened.read(len(_LFS))
        if begin == _LFS:
            return "is a pointer of Git LFS, not the weights"
        if file.suffix != ".safetensors":
            return None if size else "is empty"
        opened.seek(0)
        length = int.from_bytes(opened.read(8), "little")
        try:
            if not 2 <= length <= min(_MOST_HEADER_BYTES, size):
                raise ValueError
            header = json.loads(opened.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return "has no header of safetensors"
    whole = 8 + length + max(ends, default=0)
    return None if size == whole else f"is cut off: {size} of {whole} bytes" if size < whole else None


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
    one = model(seen, role)
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
        return fail(f"vLLM does not know {', '.join(named)}, which brings code of its own", remedy)
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
        return checkpoints.choose(_named(settings, field, str(folder)), role)
    except StartError as error:
        raise type(error)(str(error).replace(str(folder), one.source)) from None


def _named(settings: Settings, field: str, folder: str) -> Settings:
    return settings.model_copy(update={field: folder})


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
    one = model(seen, role)
    own = context_of(one.known_config)
    wanted = seen.settings.chat_max_model_len if role == "chat" else seen.settings.tool_max_model_len
    name = f"{role.upper()}_MAX_MODEL_LEN"
    used = min(wanted or (8192 if role == "chat" else 4096), own)
    if wanted and wanted > own:
        return warn(f"{name}={wanted}, and the model's own context is {own} tokens, which counts", f"set {name}={own}")
    least = seen.settings.user_utt_max_tokens + (
        seen.settings.chat_max_out if role == "chat" else seen.settings.tool_max_out
    )
    if used < least:
        remedy = "lower USER_UTT_MAX_TOKENS, CHAT_MAX_OUT or TOOL_MAX_OUT, or name a model with a longer context"
        return fail(f"the context is {used} tokens; an utterance and a reply may take {least}", remedy)
    return ok(f"{used} tokens of the model's own {own}")
