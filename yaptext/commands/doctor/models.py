"""Checks of where models come from: a folder, the cache, the hub."""

from __future__ import annotations

import os
from urllib.parse import quote

from yaptext.commands.doctor import web
from yaptext.commands.doctor.check import Finding, check, check_each, fail, ok, skip, warn
from yaptext.commands.doctor.deployment import Deployment, Unknown
from yaptext.commands.doctor.model_source import ask_hub, endpoint, hub_models, is_offline, model_of
from yaptext.commands.doctor.resources import gib
from yaptext.engine.base import Role
from yaptext.engine.underway import size
from yaptext.engine.weight_files import engine_files
from yaptext.errors import SettingsError, StartError, YapError


@check_each("models.found", needs=("settings.valid",))
def found(seen: Deployment, role: Role) -> Finding:
    name = f"{role.upper()}_MODEL"
    try:
        one = model_of(seen, role)
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
    if seen.environ.get("HF_HUB_OFFLINE") and is_offline(seen):
        return fail(f"{one.source} is not in {seen.hub_cache}, and HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE")
    if seen.offline:
        return warn(
            f"{one.source} is not in {seen.hub_cache}; --offline did not ask the hub", "run it without --offline"
        )
    free = seen.machine.disk(seen.machine.existing(seen.hub_cache)).free_bytes
    if one.weights_bytes and free < one.weights_bytes * 1.05:
        remedy = "free some, or set HF_HOME to a folder of a larger disk"
        return fail(f"{one.source} is not downloaded yet{size}, and {gib(free)} are free for {seen.hub_cache}", remedy)
    return ok(f"{one.source} is not downloaded yet{size}: the first start downloads it")


@check("models.hub", needs=("settings.valid",))
def hub(seen: Deployment) -> Finding:
    if seen.offline:
        return skip("--offline")
    named = list(hub_models(seen))
    if not named:
        return skip("no model of the hub is named")
    if is_offline(seen):
        return skip("HF_HUB_OFFLINE is set: models come from the cache")
    address = endpoint(seen)
    answer = ask_hub(seen, f"api/models/{quote(named[0].source)}")
    if answer.status is not None and answer.status < 500:
        return ok(f"{address} answers")
    why = answer.failure or f"status {answer.status}"
    proxy = ", ".join(f"{scheme}_proxy" for scheme in web.proxies(seen.environ) if scheme != "no")
    by = f" (by {proxy})" if proxy else ""
    remedy = "set HF_ENDPOINT or HTTPS_PROXY, or HF_HUB_OFFLINE=1 to use the cache alone"
    if all(one.folder is not None for one in named):
        return warn(f"{address}{by}: {why}; models come from the cache", remedy)
    return fail(f"{address}{by}: {why}", remedy)


@check_each("models.access", needs=("models.hub", "models.found.{role}"))
def access(seen: Deployment, role: Role) -> Finding:
    one = model_of(seen, role)
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
        return ok(f"the hub serves {one.source}" + (", which is gated, for HF_TOKEN" if gated else ""))
    place = "/etc/yap-text/hf-token" if seen.installed else "HF_TOKEN"
    if file.status in (401, 403):
        if not has_token:
            remedy = f"ask for access on its page, and put a token that may read it into {place}"
            return tell(
                f"the hub does not serve {one.source} without a token: it is gated, private, or not there", remedy
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
    one = model_of(seen, role)
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
