"""The quantizer's job: from the settings to finished AWQ folders in `STATE/awq`, and on the hub if that is wanted.

Each result is made in a folder of its own whose name begins with a dot, and gets its final name by one rename:
whatever ends a job early leaves what was there before.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ParamSpec

import structlog
from filelock import FileLock, Timeout

from yaptext.engine import awq_results, checkpoints, demo, hub_client
from yaptext.engine.base import Role
from yaptext.engine.weight_kind import kind_of
from yaptext.errors import QuantizeDelayed, QuantizeError, QuantizeRefused, SettingsError, YapError
from yaptext.observe.systemd import notify
from yaptext.quantize import attempt, fault
from yaptext.settings import Settings

P = ParamSpec("P")

_log = structlog.get_logger(__name__)
_RESERVE_BYTES = 64 * 2**20
"""Disk space for the files beside the weights: tokenizer, card, plot."""


@dataclass(frozen=True, slots=True)
class Options:
    """Of the command. `when_wanted` is how the service asks before it starts: it acts under QUANTIZATION=awq alone,
    and any finished result will do. `again` tries what failed before, as `force` does, too. `terminal` says that a
    person watches."""

    force: bool = False
    again: bool = False
    when_wanted: bool = False
    allow_worse: bool = False
    terminal: bool = False


@dataclass(frozen=True, slots=True)
class Task:
    """One float model, and the roles that it serves. `source` is a hub id or a folder, `name` is for people."""

    source: str
    roles: tuple[Role, ...]
    name: str
    demo: bool = False


def run(settings: Settings, options: Options) -> None:
    """Does all work. If there is none, it returns at once and loads nothing heavy. Raises `YapError`."""
    if options.when_wanted and "awq" not in (settings.quantization_of("chat"), settings.quantization_of("tool")):
        _log.info("quantize.not_wanted", reason=f"QUANTIZATION={settings.quantization}")
        return
    begun = time.monotonic()
    wanted = tasks(settings)
    if options.when_wanted:
        wanted = [task for task in wanted if any(settings.quantization_of(role) == "awq" for role in task.roles)]
    todo = [task for task in wanted if _reason(settings, task, options) is not None]
    if options.when_wanted:
        todo = [task for task in todo if not _is_awq(settings, task)]
    for task in wanted:
        if found := _finished(settings, task) if task not in todo else None:
            _log.info("quantize.finished_before", model=task.name, folder=str(found.folder))
    unpushed = todo
    if not options.when_wanted:  # a start of the service waits for no upload of an earlier day
        unpushed = [task for task in wanted if task in todo or not _is_pushed(settings, task)]
    if not settings.hf_awq_push:
        unpushed = []
    if not todo and not unpushed:
        _clear_if_free(settings, wanted)
        return
    if not (options.force or options.again):
        for task in todo:
            failed = awq_results.failed_attempt(settings.state, task.source)
            if failed is not None and attempt.is_same(failed, _wanted(settings, task, options)):
                _clear_if_free(settings, wanted)
                raise attempt.repeated(settings, task.source, task.name, failed)
    with _locked(settings.state), _ended_by_signals() as check_signals:
        clear(settings, wanted)
        if unpushed:
            from yaptext.quantize import hub

            hub.check(settings, [role for task in unpushed for role in task.roles])
        for task in todo:
            if (reason := _reason(settings, task, options)) is None:
                continue  # another job was quicker, and has ended
            _log.info("quantize.begun", model=task.name, roles=task.roles, reason=reason)
            make(settings, task, options, check_signals)
            clear(settings, [task])
        for task in unpushed:
            _push(settings, task)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    _log.info("quantize.done", seconds=round(time.monotonic() - begun, 1), peak_memory_mb=peak, **_gpu_peak(settings))


def tasks(settings: Settings) -> list[Task]:
    """The float models of the deployed roles, each once. A role with an AWQ checkpoint of its own is left out.
    Raises `SettingsError` where a deployed role has no model."""
    found: dict[Path, tuple[str, list[Role]]] = {}  # by row: a folder may be written in several ways
    is_demo = checkpoints.wants_demo(settings)
    deployed: dict[Role, bool] = {"chat": settings.chat_deployed, "tool": settings.tool_deployed}
    for role in [role for role in deployed if deployed[role]]:
        given = settings.awq_chat_model if role == "chat" else settings.awq_tool_model
        model = settings.chat_model if role == "chat" else settings.tool_model
        if given:
            _log.info("quantize.given", role=role, model=given, reason=f"AWQ_{role.upper()}_MODEL")
            continue
        if is_demo:
            model = str(demo.place(settings.state).resolve())  # it may not be there yet, and then has to be found again
        if not model:
            raise SettingsError(
                f"{role.upper()}_MODEL is not set, and DEPLOY_MODELS={settings.deploy_models} needs it to quantize"
            )
        found.setdefault(awq_results.row(settings.state, model), (model, []))[1].append(role)
    return [
        Task(source, tuple(roles), demo.NAME if is_demo else _name(source), is_demo) for source, roles in found.values()
    ]


def _name(source: str) -> str:
    return Path(source).resolve().name if awq_results.is_folder(source) else source


# --- what is there already


def _wanted(settings: Settings, task: Task, options: Options) -> dict[str, Any]:
    """What a job would make, of which source and by which code: what its result's manifest says, and by what a failed
    attempt is recognised."""
    is_folder = awq_results.is_folder(task.source)
    revision = None
    if not is_folder and not task.demo:
        from yaptext.quantize import hub

        revision = hub.cached_revision(task.source, settings)
    content = awq_results.content(Path(task.source)) if is_folder else None
    return {
        "source": {"name": task.name, "revision": revision, "content": content},
        "files": attempt.files(task.source),
        "recipe": _recipe(settings, task),
        "allow_worse": options.allow_worse,
        "made_by": attempt.made_by(on_cuda=settings.on_cuda),
    }


def _recipe(settings: Settings, task: Task) -> dict[str, Any]:
    """What a result depends on besides its source: compared with its manifest's."""
    from yaptext.dialogue.tools import ToolSet
    from yaptext.quantize import calibration

    tools = hashlib.sha256(ToolSet.from_file(settings.tools_file).key).hexdigest()[:16]
    return {
        "roles": list(task.roles),
        "quantizer": settings.quantizer,
        "group_size": settings.awq_group_size,
        "tokens": settings.awq_calibration_tokens,
        "samples": settings.calibration_samples,
        "text": calibration.fingerprint(settings),
        "prompts": settings.chat_prompt_format if "chat" in task.roles else None,
        "tools": tools if "tool" in task.roles else None,
    }


def _reason(settings: Settings, task: Task, options: Options) -> str | None:
    """Why the task has to be done; None if a finished result is good enough."""
    found = _finished(settings, task)
    if found is None:
        return "no finished result"
    if options.force:
        return "--force"
    if options.when_wanted:
        return None  # an update of the service must not cost its next start an hour
    then, now = found.manifest.get("recipe", {}), _recipe(settings, task)
    # A setting that the manifest of an earlier version lacks did not exist then.
    changed = [name for name in now if name in then and then[name] != now[name]]
    if changed:
        return ", ".join(f"{name} was {then[name]}, is {now[name]}" for name in changed)
    if not awq_results.is_folder(task.source):
        from yaptext.quantize import hub

        revision = hub.cached_revision(task.source, settings)
        if revision is not None and revision != found.manifest["source"]["revision"]:
            return f"made of revision {found.manifest['source']['revision']}, the newest seen is {revision}"
    return None


def _finished(settings: Settings, task: Task) -> awq_results.Finished | None:
    return awq_results.finished(settings.state, task.source)


def _is_awq(settings: Settings, task: Task) -> bool:
    """The service takes an AWQ checkpoint in CHAT_MODEL or TOOL_MODEL, too: there is nothing to do for it."""
    from yaptext.quantize import hub

    if task.demo:
        return False
    if kind_of(task.source, hub.peek_config(task.source, settings), hub_client.cache(settings)) != "awq":
        return False
    _log.info("quantize.given", model=task.name, reason="it has AWQ weights already")
    return True


def clear(settings: Settings, tasks: list[Task]) -> None:
    """Deletes what killed jobs left: unfinished folders of any model, and results that a newer one has replaced.
    The caller holds the lock."""
    for leftover in _leftovers(settings, tasks):
        shutil.rmtree(leftover, ignore_errors=True)


def _clear_if_free(settings: Settings, tasks: list[Task]) -> None:
    if _leftovers(settings, tasks):
        with suppress(YapError), _locked(settings.state):  # what is there may be the work of another job
            clear(settings, tasks)


def _leftovers(settings: Settings, tasks: list[Task]) -> list[Path]:
    leftovers = list((settings.state / "awq").glob("*/.partial-*"))
    for task in tasks:
        if found := _finished(settings, task):
            leftovers += [result for result in found.folder.parent.glob("[0-9]*") if result != found.folder]
    return leftovers


# --- making one


def make(settings: Settings, task: Task, options: Options, check_signals: Callable[[], None]) -> None:
    """Quantizes one model and stores the result. Raises `YapError`; nothing incomplete is left, and a failure
    that would come again is remembered."""
    row = awq_results.row(settings.state, task.source)
    wanted = _wanted(settings, task, options)  # as it is now: files may change in the hours until the end
    attempt.forget(row)
    partial = row / f".partial-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    try:
        partial.mkdir(parents=True)
        fill(settings, task, options, partial, wanted, check_signals)
        for path in [*partial.rglob("*"), partial]:
            sync(path)
        result = partial.rename(awq_results.next_result(row))
        sync(row)
        sync(row.parent)
    except Exception as error:  # autoawq, torch and the writers raise what they like
        check_signals()  # a library may have made another error of one
        failure = error if isinstance(error, YapError) else fault.named(error, task.name, row)
        if type(failure) is QuantizeError:
            _log.exception("quantize.crashed", model=task.name)
        elif failure is not error:
            _log.info("quantize.stopped", model=task.name, error=str(error)[:300], exc_info=error)
        if isinstance(failure, QuantizeError) and not isinstance(failure, QuantizeDelayed):
            attempt.remember(row, wanted, failure)
        if failure is error:
            raise
        raise failure from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _log.info("quantize.kept", model=task.name, folder=str(result))


def fill(
    settings: Settings,
    task: Task,
    options: Options,
    partial: Path,
    wanted: dict[str, Any],
    check_signals: Callable[[], None],
) -> None:
    """Makes the result in `partial`. The source of `wanted` is completed as soon as it is known."""
    os.environ.update(_environment(settings))
    from yaptext.dialogue.tools import ToolSet
    from yaptext.quantize import backends, calibration, checkpoint, hub, kept, model_card, plan, verify
    from yaptext.quantize.progress import Progress

    begun = time.monotonic()
    notify(f"STATUS=Preparing {task.name}.")
    tools = ToolSet.from_file(settings.tools_file)
    corpus = calibration.read(settings)
    if task.demo:
        folder, revision = demo.folder(settings.state), None
        backend = backends.choose(settings, hub.peek_config(str(folder), settings))
    else:
        config = hub.peek_config(task.source, settings)
        if not awq_results.is_folder(task.source):
            wanted["source"]["revision"] = hub.cached_revision(task.source, settings)
        kind = kind_of(task.source, config, hub_client.cache(settings))
        if kind != "float":
            made = "quantized" if kind == "other" else kind
            raise QuantizeRefused(f"{task.source} has {made} weights already: AWQ is made of float weights, name those")
        if config.get("quantization_config"):
            ignored = "the quantization_config of its config.json names no quant_method, and its weights are float"
            _log.warning("quantize.config_ignored", model=task.name, reason=ignored)
        with _named(task):
            backend = backends.choose(settings, config)
        folder, revision = hub.download(task.source, settings, progress=lambda done, total: check_signals())
    wanted["source"] |= {"revision": revision, "content": None if revision else awq_results.content(folder)}
    wanted["files"] = attempt.files(task.source)
    if not task.demo:
        checkpoint.check(folder, task.source)
    with _named(task):
        planned = plan.plan(folder, settings.awq_group_size, backend.kept)
    free, needed = shutil.disk_usage(partial).free, planned.awq_bytes + _RESERVE_BYTES
    if free < needed:
        raise QuantizeDelayed(
            f"{task.name} needs {needed // 10**6} MB in {partial.parent}, and {free // 10**6} MB are free"
        )
    samples = asyncio.run(_samples(settings, task, folder, corpus, tools))
    _log.info(
        "quantize.planned",
        model=task.name,
        backend=backend.name,
        layers=planned.layers,
        group_size=planned.group_size,
        float_mb=planned.float_bytes // 10**6,
        awq_mb=planned.awq_bytes // 10**6,
        samples=len(samples.calibration),
        tokens=settings.awq_calibration_tokens,
        **samples.made_of,
    )
    progress, on_cuda = Progress(options.terminal), settings.on_cuda

    def checked(tell: Callable[P, None]) -> Callable[P, None]:
        def done(*args: P.args, **kwargs: P.kwargs) -> None:
            check_signals()
            tell(*args, **kwargs)

        return done

    with _named(task):
        with progress.measuring(task.name, "before it is quantized") as tell:
            reference = verify.Reference(
                folder,
                samples.held_out,
                planned.group_size,
                on_cuda=on_cuda,
                kept=backend.kept,
                done=checked(tell),
            )
        with progress.layers(task.name) as tell_layer:
            done = checked(tell_layer)
            backend.quantize(folder, partial, samples.calibration, planned.group_size, on_cuda=on_cuda, done=done)
        kept.leave_out_code(folder, partial, task.name)
        with progress.measuring(task.name, "after it was quantized") as tell:
            report = reference.compare(partial, checked(tell))
    figures = {"kl": report.awq.kl, "rounding_kl": report.rounding.kl, "perplexity": report.awq.perplexity}
    _log.info("quantize.verified", model=task.name, float_perplexity=report.float_.perplexity, **figures)
    if not report.worthwhile and not options.allow_worse:
        raise QuantizeRefused(
            f"AWQ is no better than plain rounding for {task.name}: KL {report.awq.kl} against {report.rounding.kl}; "
            "nothing was kept. More calibration text may help; --allow-worse keeps it"
        )
    manifest: dict[str, Any] = {
        "source": wanted["source"],
        "recipe": wanted["recipe"],
        "settings": {"bits": 4, "group_size": planned.group_size, "tokens": settings.awq_calibration_tokens},
        "calibration": {
            "text": calibration.label(settings),
            "samples": len(samples.calibration),
            "made_of": samples.made_of,
        },
        "made_by": wanted["made_by"],
        "backend": backend.name,
        "verification": report.as_data(),
    }
    model_card.write(partial, folder, manifest, report)
    manifest["seconds"] = round(time.monotonic() - begun, 1)
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    manifest["files"] = {
        file.relative_to(partial).as_posix(): {"size": file.stat().st_size, "sha256": _sha256(file)} for file in files
    }
    for path in partial.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes for its user alone
    (partial / awq_results.MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    if options.terminal:
        print(f"\n{model_card.table(report)}\n")


async def _samples(settings: Settings, task: Task, folder: Path, corpus: Any, tools: Any) -> Any:
    from transformers import AutoTokenizer

    from yaptext.engine.codec import HubCodec
    from yaptext.quantize import calibration, checkpoint

    try:  # without False, code that lies beside a tokenizer is offered to be run, at a prompt
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        if (refused := checkpoint.needs_code(folder, task.source)) is not None:
            raise refused from error
        raise
    codec = HubCodec(tokenizer, max_model_len=2**31, block_size=1)
    samples = await calibration.samples(settings, codec, corpus, task.roles, tools)
    checkpoint.check_tokens(folder, task.source, [*samples.calibration, *samples.held_out], tokenizer)
    return samples


@contextmanager
def _named(task: Task) -> Iterator[None]:
    """What is refused inside names its model: there may be two."""
    try:
        yield
    except QuantizeRefused as error:
        if task.name in str(error):
            raise
        raise QuantizeRefused(f"{task.name}: {error}") from error


def _environment(settings: Settings) -> dict[str, str]:
    """What torch, transformers and the bars of autoawq read, before they are imported."""
    values = {"TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    if not settings.on_cuda:
        values["CUDA_VISIBLE_DEVICES"] = ""  # autoawq uses a GPU if it sees one
    return values


def _gpu_peak(settings: Settings) -> dict[str, int]:
    if not settings.on_cuda:
        return {}
    import torch

    return {"peak_gpu_memory_mb": torch.cuda.max_memory_allocated() // 2**20}


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- pushing


def _receipt(settings: Settings, task: Task, role: Role) -> Path:
    """Where it is written down that the newest result has been pushed for a role."""
    return awq_results.row(settings.state, task.source) / f"pushed-{role}.json"


def _target(settings: Settings, role: Role) -> dict[str, str | None]:
    repo = settings.hf_awq_chat_repo if role == "chat" else settings.hf_awq_tool_repo
    return {"repo": repo, "branch": settings.hf_awq_branch}


def _is_pushed(settings: Settings, task: Task) -> bool:
    found = _finished(settings, task)
    for role in task.roles:
        try:
            receipt = json.loads(_receipt(settings, task, role).read_text(encoding="utf-8"))
            pushed = found is not None and receipt["result"] == found.folder.name
            if not pushed or receipt["to"] != _target(settings, role):
                return False
        except (OSError, ValueError, KeyError, TypeError):
            return False
    return True


def _push(settings: Settings, task: Task) -> None:
    from yaptext.quantize import hub

    found = _finished(settings, task)
    if found is None:
        raise QuantizeDelayed(f"the finished folder of {task.name} is no longer in {settings.state / 'awq'}")
    for role in task.roles:
        notify(f"STATUS=Pushing {task.name} to {_target(settings, role)['repo']}.")
        pushed = hub.upload(found.folder, role, settings)
        receipt = {"result": found.folder.name, "to": _target(settings, role), "revision": pushed.revision}
        try:
            _receipt(settings, task, role).write_text(json.dumps(receipt), encoding="utf-8")
        except OSError as error:
            raise fault.kind_of_disk(error)(f"{task.name} was pushed, but this cannot be recorded: {error}") from error


# --- one at a time


@contextmanager
def _locked(state: Path) -> Iterator[None]:
    """Locks `STATE/awq` for this job. Raises `QuantizeDelayed` with the other one's process id, and what
    `fault.kind_of_disk` says if nothing can be written."""
    file = state / "awq" / "lock"
    lock = FileLock(file, blocking=False, mode=0o644)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        file.write_text(f"process {os.getpid()}, since {datetime.now(UTC).isoformat(timespec='seconds')}\n")
    except Timeout:
        raise QuantizeDelayed(f"another job is using {file.parent}: {file.read_text().strip()[:200]}") from None
    except OSError as error:
        lock.release()
        raise fault.kind_of_disk(error)(f"cannot write to {file.parent}: {error}") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _ended_by_signals() -> Iterator[Callable[[], None]]:
    """SIGTERM ends the job as Ctrl-C does, by an exception: incomplete results are removed, which no second signal
    interrupts. Yields what raises the same wherever it is called after the signal: in the threads of a download, for
    which the exception waits, and where a library has swallowed it."""
    endings = {signal.SIGTERM: SystemExit(128 + signal.SIGTERM), signal.SIGINT: KeyboardInterrupt()}
    came: list[int] = []
    unraisable = sys.unraisablehook

    def swallowed(told: sys.UnraisableHookArgs) -> None:
        """Python prints what a destructor raises. One of ours is raised again soon."""
        if not any(told.exc_value is ending for ending in endings.values()):
            unraisable(told)

    def check() -> None:
        if came:
            raise endings[signal.Signals(came[0])]

    def end(number: int, _: object) -> None:
        if not came:
            came.append(number)
            check()

    heard = [number for number in endings if signal.getsignal(number) != signal.SIG_IGN]  # as a shell has it for `&`
    before = {number: signal.signal(number, end) for number in heard}
    sys.unraisablehook = swallowed
    try:
        yield check
    except Exception:
        check()  # a library may have made another error of one
        raise
    finally:
        sys.unraisablehook = unraisable
        for number, handler in before.items():  # everything is removed: a second signal ends the process at once
            signal.signal(number, signal.SIG_DFL if came else handler)
