"""The commands of `yap-text`; heavy imports happen inside them."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import resource
import shutil
import signal
import socket
import sys
import textwrap
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from yaptext import __version__
from yaptext.errors import QuantizeError, SettingsError, StartError, YapError
from yaptext.server.access import keyfile
from yaptext.settings import (
    FIRST_PASSED_FD,
    LOOPBACK,
    LogPlaces,
    Settings,
    changes,
    forget_secrets,
    hidden_paths,
    moved_names,
    unknown_names,
    variables,
)

_MOST_STATUS = 600
"""Characters of a reason in STATUS=: systemd drops a message of over 4096 bytes."""
_UVICORN_FAILED = 3
"""The status with which uvicorn ends a start, whatever is wrong."""


def run(arguments: Sequence[str]) -> int:
    """Runs one command; returns the exit status: 2 for what has to be mended, wrong arguments among it, 75 for what may
    pass by itself, 1 for any other failure. An error that has a name is one line on stderr, or one for each thing that
    is wrong; of a service it is one event of the log."""
    parsed = _parser().parse_args(arguments)
    try:
        return int(parsed.command(parsed))
    except YapError as error:
        lines = str(error).splitlines()
        if parsed.command in (_serve, _quantize) and not sys.stderr.isatty():  # a unit's, not a person's
            lines += hidden_paths(str(error))
        if parsed.command is _serve:
            more = _of_doctor() if isinstance(error, SettingsError | StartError) else None
            _tell_operator(lines, error.exit_status, more=more)
        elif parsed.command is _quantize:
            _tell_operator(lines, error.exit_status, "quantize.failed", "Quantizing failed")
        else:
            _tell(lines)
        return error.exit_status
    except KeyboardInterrupt:
        if parsed.command is _quantize:
            _tell_of_interrupt()
        return 130
    except Exception as error:  # the log has its traceback
        from yaptext.observe.systemd import notify

        notify(f"STATUS=It crashed: {type(error).__name__}")
        raise


def _of_doctor() -> str:
    """What else a person can do about a start that fails: the command as it can be run from here."""
    is_here = shutil.which("yap-text") is None and Path(sys.argv[0]).name == "yap-text"
    return f"what is wrong with settings, models and this machine: {sys.argv[0] if is_here else 'yap-text'} doctor"


def _tell(lines: list[str]) -> None:
    for line in lines:
        print(f"yap-text: {line}", file=sys.stderr)


def _tell_operator(
    lines: list[str],
    exit_status: int,
    event: str = "start.failed",
    headline: str = "The start failed",
    *,
    more: str | None = None,
) -> None:
    """Why a unit fails: one event wherever the log goes, and the text that `systemctl status` shows. A person at a
    terminal reads plain lines. `more` says what else there is to read."""
    import structlog

    from yaptext.observe import systemd

    if not structlog.is_configured():  # the settings themselves are wrong
        _start_logs_anyway()
    reason = " | ".join(lines)
    if sys.stderr.isatty():
        _tell([*lines, more] if more else lines)
    else:
        hint = {"hint": more} if more else {}
        structlog.get_logger(__name__).critical(event, reason=reason, exit_status=exit_status, **hint)
    systemd.notify(f"STATUS={headline}: {reason[:_MOST_STATUS]}")


def _tell_of_interrupt() -> None:
    """Ctrl-C, or the same signal from elsewhere: one line, the last of this process."""
    import structlog

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one ends the process at once, without a traceback
    eval("0")  # if the first one came within an eval, Python would end by the signal, and not with 130
    words = "stopped by Ctrl-C (SIGINT); nothing half-made is kept, what was finished before is"
    if sys.stderr.isatty() or not structlog.is_configured():
        _tell([words])
    else:
        structlog.get_logger(__name__).warning("quantize.interrupted", reason=words, exit_status=130)
    logging.disable()  # torch writes figures at its exit, if it was stopped while it was imported


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="yap-text", description="Real-time text inference for voice companions.")
    parser.add_argument("--version", action="version", version=f"yap-text {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser(
        "serve",
        help="serve conversations over /ws",
        description="Serves conversations over /ws. Settings are environment variables:",
        epilog=_settings_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    serve.set_defaults(command=_serve)

    _add_quantize(commands)

    chat = commands.add_parser("chat", help="talk with a running service")
    _client_options(chat)
    chat.add_argument("--tools", metavar="FILE", type=Path, help="JSON list of tools, instead of the service's own")
    chat.add_argument("--await-tools", action="store_true", help="ask for the result of each call")
    chat.add_argument(
        "--tool-command",
        metavar="COMMAND",
        help="run for each call: it gets the call as JSON, and prints the result",
    )
    chat.set_defaults(command=_chat)

    warmup = commands.add_parser("warmup", help="run one turn and print its figures and text as JSON")
    warmup.add_argument("message", nargs="?", default="Who was Alan Turing?")
    warmup.add_argument("--history", metavar="TEXT", help="a transcript, lines that open with User: and Assistant:")
    _client_options(warmup)
    warmup.set_defaults(command=_warmup)

    prompt = commands.add_parser(
        "prompt",
        help="show what models are sent",
        description="Prints the prompt that each model is sent, with its control tokens, and what that was made of. No "
        "engine is opened. Settings such as CHAT_THINKING count. Exit status 1 if a model cannot be used.",
    )
    prompt.add_argument("models", nargs="+", metavar="MODEL", help="a folder or hub id")
    prompt.add_argument("--role", choices=("chat", "tool"), default="chat", help="default: chat")
    prompt.add_argument("--format", choices=("segments", "turns", "bare"), help="default: CHAT_PROMPT_FORMAT")
    prompt.add_argument("--persona-style", metavar="STYLE", help="default: DEFAULT_PERSONA_STYLE")
    prompt.add_argument(
        "--history", metavar="FILE", type=Path, help="a transcript, lines that open with User: and Assistant:"
    )
    prompt.add_argument("--tools", metavar="FILE", type=Path, help="default: TOOLS_FILE")
    prompt.add_argument("--utterance", metavar="TEXT", default="Hello!", help="default: Hello!")
    prompt.add_argument("--json", action="store_true", help="one JSON object a model, one a line")
    prompt.set_defaults(command=_prompt)

    sessions = commands.add_parser(
        "sessions",
        help="show, back up or restore the session file",
        description="Shows the session file of SESSION_STORE: its sessions, its bytes, the oldest and the latest use, "
        "also while a service has it.",
    )
    sessions.set_defaults(command=_sessions, action="show")
    actions = sessions.add_subparsers(metavar="COMMAND")
    backup = actions.add_parser(
        "backup",
        help="copy the sessions into a new file",
        description="Copies every session into a new file of mode 0600, while a service writes them or not. What is "
        "sealed with SESSION_STORE_KEY stays sealed.",
    )
    restore = actions.add_parser(
        "restore",
        help="put the sessions of a backup in place",
        description="Puts the sessions of a backup in place, while no service has the session file. The file before "
        "stays beside it.",
    )
    for name, action in (("backup", backup), ("restore", restore)):
        action.add_argument("file", metavar="FILE", type=Path)
        action.set_defaults(action=name)

    log = commands.add_parser(
        "log",
        help="say why a user's turns were slow",
        description="Says in words why the turns of a session were slow, from the journal of the unit yap-text, or "
        "from the file that YAP_TEXT_LOG_FILE names.",
    )
    log.add_argument("session", metavar="SESSION", help="session_id")
    log.add_argument("--file", metavar="LOG", type=Path, help="the log to read (default: YAP_TEXT_LOG_FILE)")
    log.add_argument("--turns", metavar="N", type=int, default=20, help="how many of the latest (default 20)")
    log.set_defaults(command=_log)

    doctor = commands.add_parser(
        "doctor",
        help="say what is wrong with this machine",
        description="Checks host, card, Python environment, settings, models, keys, network, units and the service "
        "that runs, and says how many sessions fit. Changes nothing. If the units are installed, the settings are "
        "theirs. Exit status 1 if a check failed; a warning is none.",
    )
    doctor.add_argument("--json", action="store_true", help="one JSON object")
    doctor.add_argument("--offline", action="store_true", help="do not ask the hub")
    doctor.add_argument("--shell", action="store_true", help="the settings of this shell, not of the units")
    doctor.set_defaults(command=_doctor)

    from yaptext.bench.options import add_options

    bench = commands.add_parser("bench", help="measure a running service, beside another server if one is named")
    add_options(bench)
    bench.set_defaults(command=_bench)

    key = commands.add_parser("key", help="make API keys").add_subparsers(required=True, metavar="COMMAND")
    new = key.add_parser(
        "new",
        help="print a new key, and add its hash to the key file",
        description="Prints a new key on stdout, this once, and adds a line with its hash to the key file. Without a "
        "file the line is printed on stderr.",
    )
    new.add_argument("name", metavar="NAME", help="what logs call it: letters, digits, '.', '_' and '-'")
    new.add_argument("--file", metavar="PATH", type=Path, help="the key file (default: YAP_TEXT_KEY_FILE)")
    new.set_defaults(command=_key_new)

    install = commands.add_parser("install", help="put the systemd units in place, or remove them")
    install.add_argument("--prefix", metavar="DIR", type=Path, help="write below DIR and run no systemctl")
    install.add_argument("--command", metavar="PATH", type=Path, dest="program", help="what the units run")
    instead = install.add_mutually_exclusive_group()
    instead.add_argument("--rollback", action="store_true", help="go back to the version before, with its units")
    instead.add_argument("--uninstall", action="store_true", help="stop and remove what was put in place")
    install.set_defaults(command=_install)
    return parser


def _add_quantize(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    quantize = commands.add_parser(
        "quantize",
        help="make 4-bit AWQ weights of the deployed models",
        description="Quantizes CHAT_MODEL and TOOL_MODEL to 4-bit AWQ, proves the result and keeps it where `serve` "
        "finds it; with HF_AWQ_PUSH=1 it goes to the hub, too. What is finished already is not done again, nor is what "
        "failed before, until a setting, the model or the code changes.",
        epilog="The result is a folder in STATE/awq/NAME-HASH/, named by its time (UTC); the newest one counts. STATE "
        "is YAP_TEXT_STATE_DIR (default: STATE_DIRECTORY under systemd, else ~/.local/state/yap-text). Exit status: 2 "
        "if something has to be mended, 75 if a later try may do (hub, disk, another job), 130 after Ctrl-C, 1 after a "
        "crash.",
    )
    default = {name: value for name, value, _ in variables()}

    def option(flag: str, metavar: str, name: str, meaning: str, usual: str | None = None) -> None:
        quantize.add_argument(flag, metavar=metavar, help=f"{name}: {meaning} (default: {usual or default[name]})")

    quantize.add_argument("--role", choices=("chat", "tool"), help="this model alone (default: those of DEPLOY_MODELS)")
    option("--calibration", "TEXT", "AWQ_CALIBRATION", "builtin, a .txt or .jsonl file, a folder of them, or hub:NAME")
    option(
        "--samples",
        "N",
        "AWQ_CALIBRATION_SAMPLES",
        "calibration samples, 1 to 4096; up to 4 more are set aside to measure on",
        "128 on CUDA, 8 on CPU",
    )
    option("--tokens", "N", "AWQ_CALIBRATION_TOKENS", "tokens of one sample, 64 to 8192")
    option("--group-size", "N", "AWQ_GROUP_SIZE", "weights that share a scale: auto, 128, 64 or 32")
    option("--quantizer", "LIBRARY", "QUANTIZER", "autoawq, llmcompressor, or auto: autoawq where it is right")
    quantize.add_argument("--force", action="store_true", help="redo what is finished")
    quantize.add_argument("--again", action="store_true", help="try what failed before, although nothing has changed")
    quantize.add_argument("--allow-worse", action="store_true", help="keep a result that plain rounding beats")
    quantize.add_argument("--when-wanted", action="store_true", help="do nothing unless QUANTIZATION=awq asks for it")
    quantize.set_defaults(command=_quantize)


def _client_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", help="address of the service (default: ws://HOST:PORT/ws of the environment)")
    parser.add_argument("--gender", choices=("woman", "man"), help="assistant_gender")
    parser.add_argument("--style", help="persona_style")
    parser.add_argument("--identity", choices=("woman", "man", "non-binary"), help="user_identity")
    parser.add_argument("--session", help="session_id (default: a new one)")


def _settings_help() -> str:
    lines = []
    for name, default, meaning in variables():
        lines.append(f"  {name}" + (f" (default {default})" if default else ""))
        lines.append(
            textwrap.fill(meaning, 90, initial_indent="      ", subsequent_indent="      ", break_on_hyphens=False)
        )
    return "\n".join(lines)


def _start_logs(settings: Settings) -> None:
    """Logs, the supervisor's socket, and a line for each old name that is in use."""
    from yaptext.observe import logs, redact, systemd

    systemd.connect(settings.notify_socket)
    try:
        logs.configure(
            level=settings.log_level,
            format=settings.log_format,
            journald=_is_journal(settings.journal_stream),
            file=settings.log_file,
            text=settings.log_text,
        )
    except OSError as error:
        raise SettingsError(f"YAP_TEXT_LOG_FILE={str(settings.log_file)!r} cannot be written: {error}") from None
    redact.catch_crashes()
    logging.captureWarnings(True)
    for kind in (FutureWarning, DeprecationWarning):  # of torch, vLLM and autoawq, about their own next versions
        warnings.simplefilter("ignore", kind)
    import structlog

    log = structlog.get_logger(__name__)
    for note in moved_names().notes:
        log.warning("setting.moved", note=note)
    for note in unknown_names():
        log.warning("setting.unknown", note=note)


def _start_logs_anyway() -> None:
    """As far as the environment alone lets it."""
    from yaptext.observe import logs, systemd

    places = LogPlaces.find()
    systemd.connect(places.notify_socket)
    with suppress(OSError):  # of the file: stderr has the log by then
        logs.configure(
            level="info", format=places.format, journald=_is_journal(places.journal_stream), file=places.file
        )


def _warn_of(settings: Settings) -> None:
    """What an operator will hardly have meant."""
    import structlog

    log = structlog.get_logger(__name__)
    if settings.leaves_default_key:
        log.warning(
            "key.default",
            hint="The credential YAP_TEXT_API_KEY holds no key, so the public default key yap_token counts: every "
            "program on this host can use the service. Write a key to /etc/yap-text/api-key and restart.",
        )
    if settings.listen_fds and settings.listen_pid == os.getpid():
        with socket.socket(fileno=os.dup(FIRST_PASSED_FD)) as held:
            host, port = held.getsockname()[:2]
        names = (host, "localhost") if host in LOOPBACK else (host,)
        asked = {"host": f"HOST={settings.host}"} if settings.host not in names else {}
        asked |= {"port": f"PORT={settings.port}"} if settings.port != port else {}
        if ignored := [text for field, text in asked.items() if field in settings.model_fields_set]:
            held_by = f"yap-text.socket holds {host}:{port}; for another address: systemctl edit yap-text.socket"
            log.warning("setting.ignored", note=f"{' and '.join(ignored)} without effect: {held_by}")
    elif _is_the_unit():
        log.warning(
            "socket.missing",
            note=f"systemd passed no socket, so HOST={settings.host} and PORT={settings.port} count, and a restart "
            "closes the port. After a change of yap-text.socket: systemctl restart yap-text.socket yap-text",
        )


def _is_the_unit() -> bool:
    """Whether this is systemd's yap-text.service, which comes with a socket."""
    with suppress(OSError):
        return Path("/proc/self/cgroup").read_text().rstrip().endswith("/yap-text.service")
    return False


def _serve(_: argparse.Namespace) -> int:
    settings = Settings.load(serving=True)
    if not settings.reloads:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
    # No prompt, reply or key in a core file, the engines' included. One byte is less than a file may be, and for a core
    # that is piped to a program the one limit that counts (core(5)).
    least = 1 if resource.getrlimit(resource.RLIMIT_CORE)[1] else 0
    resource.setrlimit(resource.RLIMIT_CORE, (least, least))
    _start_logs(settings)
    _warn_of(settings)
    changed = changes(settings)
    forget_secrets()
    import structlog

    from yaptext.engine.base import Engines
    from yaptext.server.app import create_app, open_vllm
    from yaptext.server.lifecycle import Lifecycle, Server

    def open_engines(settings: Settings) -> Engines:
        structlog.get_logger(__name__).info("server.settings", **changed._asdict())
        return open_vllm(settings)

    lifecycle = Lifecycle()
    app = create_app(settings, open_engines=open_engines, lifecycle=lifecycle)
    server = Server(app, settings, lifecycle)
    try:
        server.run()
    except SystemExit as ended:
        if ended.code != _UVICORN_FAILED:  # a signal
            raise
        raise YapError("the start crashed; the log has the traceback") from None
    return server.exit_status


def _quantize(parsed: argparse.Namespace) -> int:
    flags = {
        "DEPLOY_MODELS": parsed.role,
        "AWQ_CALIBRATION": parsed.calibration,
        "AWQ_CALIBRATION_SAMPLES": parsed.samples,
        "AWQ_CALIBRATION_TOKENS": parsed.tokens,
        "AWQ_GROUP_SIZE": parsed.group_size,
        "QUANTIZER": parsed.quantizer,
    }
    settings = Settings.load(**{name: value for name, value in flags.items() if value is not None})
    _start_logs(settings)
    import structlog

    from yaptext.quantize import job

    options = job.Options(
        force=parsed.force,
        again=parsed.again,
        when_wanted=parsed.when_wanted,
        allow_worse=parsed.allow_worse,
        terminal=settings.log_format != "json" and sys.stderr.isatty(),
    )
    try:
        job.run(settings, options)
    except YapError:
        raise
    except Exception as error:
        structlog.get_logger(__name__).exception("quantize.crashed")
        raise QuantizeError(f"it crashed: {type(error).__name__}; the log has the traceback") from error
    return 0


def _is_journal(stream: str | None) -> bool:
    """JOURNAL_STREAM is inherited by shells too: it counts where stderr is that very stream."""
    if stream is None:
        return False
    status = os.fstat(sys.stderr.fileno())
    return stream == f"{status.st_dev}:{status.st_ino}"


def _log(parsed: argparse.Namespace) -> int:
    from yaptext.commands.log import log

    return log(parsed.session, file=parsed.file or Settings.load().log_file, turns=max(1, parsed.turns))


def _address(parsed: argparse.Namespace) -> tuple[str, str]:
    settings = Settings.load()
    return parsed.url or f"ws://{settings.host}:{settings.port}/ws", settings.api_key.get_secret_value()


def _chat(parsed: argparse.Namespace) -> int:
    from yaptext.commands.chat import Tools, chat

    url, key = _address(parsed)
    try:
        given = json.loads(parsed.tools.read_text(encoding="utf-8")) if parsed.tools else None
    except (OSError, ValueError) as error:
        raise SettingsError(f"--tools {parsed.tools} cannot be read: {error}") from None
    tools = Tools(given, parsed.tool_command, parsed.await_tools)
    return asyncio.run(chat(url, key, session=parsed.session, persona=_persona(parsed), tools=tools))


def _warmup(parsed: argparse.Namespace) -> int:
    from yaptext.commands.warmup import warmup

    url, key = _address(parsed)
    return asyncio.run(
        warmup(url, key, parsed.message, session=parsed.session, history=parsed.history, persona=_persona(parsed))
    )


def _prompt(parsed: argparse.Namespace) -> int:
    from yaptext.commands.prompt import Options, prompt

    options = Options(
        role=parsed.role,
        format=parsed.format,
        persona_style=parsed.persona_style,
        history=parsed.history,
        tools=parsed.tools,
        utterance=parsed.utterance,
        as_json=parsed.json,
    )
    logging.disable(logging.WARNING)  # of the hub client and transformers, about files that many models lack
    try:
        return prompt(Settings.load(), parsed.models, options)
    finally:
        logging.disable(logging.NOTSET)


def _sessions(parsed: argparse.Namespace) -> int:
    from yaptext.commands import sessions

    settings = Settings.load()
    if parsed.action == "backup":
        return sessions.back_up(settings, parsed.file)
    if parsed.action == "restore":
        return sessions.restore(settings, parsed.file)
    return sessions.show(settings)


def _doctor(parsed: argparse.Namespace) -> int:
    from yaptext.commands.doctor import command

    return command.doctor(as_json=parsed.json, offline=parsed.offline, shell=parsed.shell)


def _bench(parsed: argparse.Namespace) -> int:
    from yaptext.bench.command import bench

    return bench(parsed, *_address(parsed))


def _persona(parsed: argparse.Namespace) -> dict[str, str]:
    fields = {
        "assistant_gender": parsed.gender,
        "persona_style": parsed.style,
        "user_identity": parsed.identity,
    }
    return {name: value for name, value in fields.items() if value}


def _key_new(parsed: argparse.Namespace) -> int:
    path = parsed.file or Settings.load().key_file
    key, line = keyfile.add(parsed.name, path)
    told = f"added to {path}; a running service is told by SIGHUP" if path else f"the line for the key file: {line}"
    print(f"yap-text: {told}", file=sys.stderr)
    print(key)
    return 0


def _install(parsed: argparse.Namespace) -> int:
    from yaptext.commands.install import install, rollback, uninstall

    if parsed.rollback:
        return rollback(parsed.prefix)
    return uninstall(parsed.prefix) if parsed.uninstall else install(parsed.prefix, parsed.program)
