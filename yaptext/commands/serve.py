"""`yap-text serve`: the service, from its settings to its exit status."""

from __future__ import annotations

import argparse
import os
import resource
import signal
import socket
import textwrap
from contextlib import suppress
from pathlib import Path

from yaptext.commands import startup_logs
from yaptext.errors import YapError
from yaptext.secrets import forget_secrets
from yaptext.settings import FIRST_PASSED_FD, LOOPBACK, Settings
from yaptext.settings.changes import changes
from yaptext.settings.table import variables

_UVICORN_FAILED = 3
"""The status with which uvicorn ends a start, whatever is wrong."""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    serve = commands.add_parser(
        "serve",
        help="serve conversations over /ws",
        description="Serves conversations over /ws. Settings are environment variables:",
        epilog=_settings_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    serve.set_defaults(command=run)


def run(_: argparse.Namespace) -> int:
    settings = Settings.load(serving=True)
    if not settings.reloads:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
    # No prompt, reply or key in a core file, the engines' included. One byte is less than a file may be, and for a core
    # that is piped to a program the one limit that counts (core(5)).
    least = 1 if resource.getrlimit(resource.RLIMIT_CORE)[1] else 0
    resource.setrlimit(resource.RLIMIT_CORE, (least, least))
    startup_logs.start(settings)
    _warn_of(settings)
    changed = changes(settings)
    forget_secrets()
    import structlog

    from yaptext.engine import registry
    from yaptext.engine.base import Engines
    from yaptext.server.app import create_app
    from yaptext.server.lifecycle import Lifecycle
    from yaptext.server.process import Server

    def open_logged(settings: Settings) -> Engines:
        structlog.get_logger(__name__).info("server.settings", **changed._asdict())
        return registry.open_engines(settings)

    lifecycle = Lifecycle()
    app = create_app(settings, open_engines=open_logged, lifecycle=lifecycle)
    server = Server(app, settings, lifecycle)
    try:
        server.run()
    except SystemExit as ended:
        if ended.code != _UVICORN_FAILED:  # a signal
            raise
        raise YapError("the start crashed; the log has the traceback") from None
    return server.exit_status


def _settings_help() -> str:
    lines = []
    for name, default, meaning in variables():
        lines.append(f"  {name}" + (f" (default {default})" if default else ""))
        lines.append(
            textwrap.fill(meaning, 90, initial_indent="      ", subsequent_indent="      ", break_on_hyphens=False)
        )
    return "\n".join(lines)


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
