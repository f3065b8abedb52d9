"""Checks of the service that runs: ready, of this version, its key, its engines and its room."""

from __future__ import annotations

from typing import Any

from yaptext.commands.doctor import network, web
from yaptext.commands.doctor.check import Finding, check, fail, ok, skip, warn
from yaptext.commands.doctor.deployment import Deployment, Unknown
from yaptext.errors import SettingsError

_LOG = "journalctl -u yap-text -n 50 (or the terminal it runs in)"
_RESTART = "systemctl restart yap-text (or stop and start it)"


@check("service.ready", needs=("settings.valid",))
def ready(seen: Deployment) -> Finding:
    where = network.base(seen)
    answer = network.ready(seen)
    if answer.status is None:
        if "refused" in answer.failure.lower():
            return skip(f"no service listens at {where}")
        held = "; yap-text.socket keeps clients waiting until the service runs" if seen.socket is not None else ""
        return fail(f"{where}/readyz: {answer.failure}{held}", f"{_LOG}, then {_RESTART}")
    if not network.is_ours(answer):
        return skip(f"what answers at {where} is not this service: network.port")
    state = answer.json["status"]
    if answer.status == 200:
        return ok(f"{where} is {state}")
    if state in ("starting", "draining"):
        return warn(f"{where} is {state}", f"wait, then check again; if nothing changes: {_LOG}")
    why = answer.json.get("reason") or answer.json.get("message") or ""
    return fail(f"{where} is {state}" + (f": {why}" if why else ""), f"{_LOG}, then {_RESTART}")


_ANSWERED = ("service.ready",)


def _status(seen: Deployment) -> web.Answer:
    key = seen.key
    if key is None:
        raise Unknown("this user may not read the key (sudo yap-text doctor)")
    url = f"{network.base(seen)}/status"
    return seen.once("status", lambda: web.get(url, {"X-API-Key": key}))


def _facts(seen: Deployment) -> dict[str, Any]:
    """The answer of /status. Raises `Unknown`."""
    answer = _status(seen)
    if answer.status != 200 or not isinstance(answer.json, dict):
        raise Unknown(f"/status: {answer.failure or f'status {answer.status}'}")
    return answer.json


@check("service.key", needs=_ANSWERED)
def key(seen: Deployment) -> Finding:
    answer = _status(seen)
    if answer.status == 200:
        return ok("the service accepts the key of these settings")
    if answer.status == 401:
        if seen.settings.own_key is None:
            return skip("these settings name no key of their own")
        return fail("the service refuses the key of these settings: it was started with another", _RESTART)
    if answer.status == 503:
        return skip("it does not answer yet")
    if answer.status == 403:
        return skip("the service does not answer to this host name")
    if answer.status == 429:
        return warn("the service makes this address wait: too many wrong keys came from it", "wait a minute")
    return fail(f"/status: {answer.failure or f'status {answer.status}'}", _LOG)


@check("service.version", needs=("service.key",))
def version(seen: Deployment) -> Finding:
    runs = _facts(seen).get("version")
    if runs != seen.machine.version:
        return warn(f"{runs} runs, and this is {seen.machine.version}", _RESTART)
    return ok(f"{runs} runs")


@check("service.engines", needs=("service.key",))
def engines(seen: Deployment) -> Finding:
    facts = _facts(seen)
    if not facts.get("healthy", True):
        return fail(
            f"an engine does not answer: {facts.get('silence') or facts.get('status')}", f"{_LOG}, then {_RESTART}"
        )
    if facts.get("lacking"):
        return warn(f"degraded, decisions are no: {facts['lacking']}", _LOG)
    told = [
        f"{role}: {engine.get('model')} ({engine.get('quantization')})"
        for role, engine in facts.get("engines", {}).items()
    ]
    return ok("; ".join(told) or "they answer")


@check("service.room", needs=("service.key",))
def room(seen: Deployment) -> Finding:
    facts = _facts(seen)
    connections = facts.get("connections", {})
    told = f"{connections.get('active')} of {connections.get('max')} connections, {facts.get('sessions')} sessions"
    if tokens := facts.get("session_tokens"):
        told += f", {tokens} tokens a session as measured"
    if connections.get("at_capacity"):
        by = connections.get("limited_by") or "MAX_CONCURRENT_CONNECTIONS"
        return warn(f"full, by {by}: {told}", "see capacity.sessions; add a machine, or raise the limit that is named")
    return ok(told)


@check("service.sessions", needs=("service.key",))
def sessions(seen: Deployment) -> Finding:
    facts = _facts(seen)
    if facts.get("session_file_failing"):
        return fail("the session file cannot be written: new turns are lost at a restart", "df -h; yap-text sessions")
    reload = facts.get("reload")
    if isinstance(reload, dict) and reload.get("ok") is False:
        return warn(
            "the last reload was refused: the old keys and personas stay in use",
            "correct what the journal names; systemctl reload yap-text",
        )
    return ok("the session file and the last reload are in order")


@check("service.settings", needs=("service.key",))
def settings(seen: Deployment) -> Finding:
    """Whether it runs with what these settings say."""
    facts = _facts(seen)
    try:
        asked = seen.settings.deploy_models
    except SettingsError:
        return skip("the settings are wrong")
    if facts.get("deploy_models") != asked:
        return warn(f"it runs with DEPLOY_MODELS={facts.get('deploy_models')}, the settings say {asked}", _RESTART)
    return ok(f"DEPLOY_MODELS={asked}, as these settings say")
