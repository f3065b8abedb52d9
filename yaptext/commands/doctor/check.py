"""Checks by name: what one found, the registry, and a run of them all."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from yaptext.commands.doctor.deployment import Deployment, Unknown
from yaptext.engine.base import Role

Status = Literal["ok", "warn", "fail", "skip"]
WITHIN_S = 9.0
"""All checks together: one that has not ended by then has failed."""
GROUPS = ("host", "gpu", "python", "settings", "models", "capacity", "keys", "network", "systemd", "service")
"""In the order of the report."""
FAILED, SKIPPED = "failed", "was skipped"
"""Ends of the reasons of checks that were not asked, since one that they need failed or was skipped."""
ROLES: tuple[Role, ...] = ("chat", "tool")


class Finding(NamedTuple):
    """What a check found, in one line. `remedy` is the command or setting that mends it."""

    status: Status
    found: str
    remedy: str | None = None


def ok(found: str) -> Finding:
    return Finding("ok", found)


def skip(found: str) -> Finding:
    return Finding("skip", found)


def warn(found: str, remedy: str) -> Finding:
    return Finding("warn", found, remedy)


def fail(found: str, remedy: str) -> Finding:
    return Finding("fail", found, remedy)


class Check(Protocol):
    """One question about a deployment. It never prints, and changes nothing on the machine."""

    def __call__(self, seen: Deployment, /) -> Finding: ...


class RoleCheck(Protocol):
    """The same about one of the two models."""

    def __call__(self, seen: Deployment, role: Role, /) -> Finding: ...


@dataclass(frozen=True, slots=True)
class Registered:
    """`name` is `group.check`, and `group.check.role` for a check of one model. `needs` are names of other checks:
    if one of them failed or was skipped, this one is skipped."""

    name: str
    needs: tuple[str, ...]
    run: Check

    @property
    def group(self) -> str:
        return self.name.partition(".")[0]


class Result(NamedTuple):
    name: str
    finding: Finding


registry: dict[str, Registered] = {}


def check(name: str, *, needs: Sequence[str] = ()) -> Callable[[Check], Check]:
    """Registers a check."""

    def register(run: Check) -> Check:
        _add(name, needs, run)
        return run

    return register


def check_each(name: str, *, needs: Sequence[str] = ()) -> Callable[[RoleCheck], RoleCheck]:
    """Registers a check once per role. `{role}` in `needs` is the role."""

    def register(run: RoleCheck) -> RoleCheck:
        for role in ROLES:
            _add(f"{name}.{role}", [need.format(role=role) for need in needs], _of_role(run, role))
        return run

    return register


def _of_role(run: RoleCheck, role: Role) -> Check:
    def run_one(seen: Deployment, /) -> Finding:
        deployed = seen.settings.chat_deployed if role == "chat" else seen.settings.tool_deployed
        if not deployed:
            return skip(f"DEPLOY_MODELS={seen.settings.deploy_models} has no {role} model")
        return run(seen, role)

    return run_one


def _add(name: str, needs: Iterable[str], run: Check) -> None:
    if name in registry:
        raise ValueError(f"there are two checks of the name {name}")
    registry[name] = Registered(name, tuple(needs), run)


def registered() -> list[Registered]:
    """In the order of the report: by group, and in a group as they stand in its module."""
    return sorted(registry.values(), key=lambda one: GROUPS.index(one.group))


def run_all(seen: Deployment, only: Iterable[str] = (), *, within_s: float = WITHIN_S) -> list[Result]:
    """Runs every check, or `only` those and what they need, each in a thread of its own. Never raises: a check that
    does has failed with the exception's type."""
    wanted = _with_needs(set(only)) if only else set(registry)
    chosen = [one for one in registered() if one.name in wanted]
    ends: dict[str, Future[Finding]] = {one.name: Future() for one in chosen}
    for one in chosen:  # daemons: one that hangs in a name look-up does not hold the process
        threading.Thread(target=_run, args=(one, seen, ends), name=one.name, daemon=True).start()
    deadline = time.monotonic() + within_s
    return [Result(one.name, _end_of(ends[one.name], deadline, within_s)) for one in chosen]


def _with_needs(names: set[str]) -> set[str]:
    found = set(names)
    while more := {need for name in found for need in registry[name].needs} - found:
        found |= more
    return found


def _run(one: Registered, seen: Deployment, ends: dict[str, Future[Finding]]) -> None:
    try:
        lacking = [need for need in one.needs if ends[need].result().status == "fail"]
        away = [need for need in one.needs if ends[need].result().status == "skip"]
        if lacking or away:
            reason = f"{lacking[0]} {FAILED}" if lacking else f"{away[0]} {SKIPPED}"
            ends[one.name].set_result(skip(reason))
            return
        finding = one.run(seen)
    except Unknown as reason:
        finding = skip(str(reason))
    except Exception as error:  # a fault of the check, reported as one
        finding = fail(
            f"the check itself crashed: {type(error).__name__}",
            f"report it with the output of: yap-text doctor ({one.name})",
        )
    ends[one.name].set_result(finding)


def _end_of(end: Future[Finding], deadline: float, within_s: float) -> Finding:
    try:
        return end.result(timeout=max(0.0, deadline - time.monotonic()))
    except TimeoutError:
        return fail(
            f"no answer within {within_s:g} s: TimeoutError",
            "a disk, a name server or a driver hangs: dmesg | tail; yap-text doctor --offline leaves the network out",
        )
