"""observe/logs.py: one line an event, the same fields whoever logs, and no key in any of them."""

from __future__ import annotations

import io
import itertools
import json
import logging
import logging.config
import threading
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from datetime import UTC, datetime, timedelta
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import structlog

from yaptext.observe import expected, logs, redact

SECRET = "hunter2"
NOISY = ("uvicorn", "uvicorn.error", "uvicorn.access", "httpx", "asyncio", "vllm")


class Stderr(io.StringIO):
    """A stderr that is a terminal or not, and can be read back. Handlers take the one that is there when they are
    made, which for the tests is this one."""

    terminal = False

    def isatty(self) -> bool:
        return self.terminal

    def configure(self, level: str = "info", format: str = "json", journald: bool = False) -> None:
        with redirect_stderr(self):
            logs.configure(level=level, format=format, journald=journald)

    def line(self) -> str:
        """The one line that was written since the last look."""
        text = self.getvalue()
        self.truncate(self.seek(0))
        assert text.count("\n") == 1 and text.endswith("\n"), text
        return text

    def event(self) -> dict[str, Any]:
        """That line, read as JSON."""
        found: dict[str, Any] = json.loads(self.line())
        return found


@pytest.fixture
def stderr(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stderr]:
    """A stderr of the test's own; afterwards logging is as it was."""
    vllm = logging.getLogger("vllm")
    loggers = [logging.getLogger(), vllm, *map(logging.getLogger, NOISY)]
    before = [(logger, logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    vllm.handlers[:], vllm.propagate = [], True  # an import of vLLM in this process sets these
    for name in ("YAPTEXT_LOG_FORMAT", "YAPTEXT_LOG_PRIORITY", redact.WORDS, expected.LEVEL):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(redact, "is_serving", False)
    yield Stderr()
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
    for logger, handlers, level, propagate in before:
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


# Lines


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error", "critical"])
@pytest.mark.parametrize("source", [structlog.get_logger, logging.getLogger])
def test_every_line_is_json_with_level_logger_and_time(stderr: Stderr, level: str, source: Callable[..., Any]) -> None:
    """structlog's loggers and the standard library's write the same fields."""
    stderr.configure("debug")
    getattr(source("some.where"), level)("turn.finished")
    event = stderr.event()
    when = datetime.fromisoformat(event.pop("timestamp"))
    assert event == {"event": "turn.finished", "level": level, "logger": "some.where"}
    assert when.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - when) < timedelta(minutes=1)


def test_fields_stand_beside_the_event(stderr: Stderr) -> None:
    """Numbers stay numbers, and what is bound to the context is on every line."""
    stderr.configure()
    structlog.contextvars.bind_contextvars(connection=7)
    structlog.get_logger("here").info("turn.finished", ttft_ms=1.5, reason=None, names=["a"], where=resources)
    event = stderr.event()
    assert (event["ttft_ms"], event["reason"], event["names"], event["connection"]) == (1.5, None, ["a"], 7)
    assert "module" in event["where"]


def test_a_line_begins_with_its_event_and_its_level(stderr: Stderr) -> None:
    """`systemctl status` shows the beginning of a line, however many fields there are."""
    stderr.configure()
    structlog.contextvars.bind_contextvars(connection=7)
    structlog.get_logger("here").info("turn.finished", ttft_ms=1.5)
    assert list(stderr.event())[:2] == ["event", "level"]
    logging.getLogger("there").error("odd")
    assert list(stderr.event())[:2] == ["event", "level"]


def test_a_message_of_many_lines_is_one_line(stderr: Stderr) -> None:
    """Also text beyond ASCII, and with arguments to fill in."""
    stderr.configure()
    logging.getLogger("here").warning("%s\n%d \u2028 %s", "one", 2, "naïve 🫠")
    assert stderr.event()["event"] == "one\n2 \u2028 naïve 🫠"


def test_what_is_below_the_level_is_not_logged(stderr: Stderr) -> None:
    """LOG_LEVEL counts for all loggers alike."""
    stderr.configure("warning")
    structlog.get_logger("here").info("quiet")
    logging.getLogger("there").info("quiet")
    assert stderr.getvalue() == ""


@pytest.mark.parametrize("name", ["uvicorn", "uvicorn.error", "uvicorn.access", "httpx", "asyncio"])
def test_noisy_loggers_warn_only_and_in_our_form(stderr: Stderr, name: str) -> None:
    """What libraries say of every request is not said; their warnings are lines like ours."""
    logging.getLogger(name).addHandler(logging.StreamHandler(stderr))
    stderr.configure("debug")
    logging.getLogger(name).info("GET /")
    assert stderr.getvalue() == ""
    logging.getLogger(name).warning("odd")
    assert stderr.event()["logger"] == name


def test_configuring_again_replaces(stderr: Stderr) -> None:
    """A line is never written twice, and an earlier priority prefix is gone."""
    stderr.configure(journald=True)
    stderr.configure()
    logging.getLogger("here").info("once")
    assert stderr.event()["event"] == "once"


@pytest.mark.parametrize(
    ("level", "priority"), [("debug", 7), ("info", 6), ("warning", 4), ("error", 3), ("critical", 2)]
)
def test_under_journald_each_line_has_its_priority(stderr: Stderr, level: str, priority: int) -> None:
    """`<N>` before the line, as syslog numbers them."""
    stderr.configure("debug", journald=True)
    getattr(logging.getLogger("here"), level)("hello")
    assert stderr.line().startswith(f"<{priority}>{{")
    structlog.get_logger("there").info("hello")
    line = stderr.line()
    assert line.startswith("<6>")
    assert json.loads(line[3:])["event"] == "hello"


def test_a_level_of_ones_own_has_the_priority_of_info(stderr: Stderr) -> None:
    """Libraries may log at levels that have no name here."""
    stderr.configure("debug", journald=True)
    logging.getLogger("here").log(25, "hello")
    assert stderr.line().startswith("<6>{")


@pytest.mark.parametrize(
    ("format", "terminal", "is_json"),
    [("auto", False, True), ("auto", True, False), ("json", True, True), ("console", False, False)],
)
def test_a_terminal_gets_a_readable_form(stderr: Stderr, format: str, terminal: bool, is_json: bool) -> None:
    """`auto` looks at stderr; a form that is asked for is given anywhere. Colors are for terminals."""
    stderr.terminal = terminal
    stderr.configure(format=format)
    structlog.get_logger("here").info("turn.finished", ttft_ms=1.5)
    line = stderr.line()
    assert line.startswith("{") == is_json
    assert all(word in line for word in ("turn.finished", "here", "info", "ttft_ms", "1.5"))
    assert ("\x1b[" in line) == (terminal and not is_json)


# Keys


def say(message: str, *arguments: Any, **fields: Any) -> None:
    structlog.get_logger("here").warning(message, *arguments, **fields)


def fail(text: str) -> None:
    raise RuntimeError(text)


def crash(logger: Any, text: str = f"no GET /ws?api_key={SECRET}") -> None:
    """Logs an exception that has the text, with a cause that has it too."""
    utterance = "what I said in " + "confidence"
    try:
        try:
            fail(text)
        except RuntimeError as error:
            raise ValueError(text) from error
    except ValueError:
        logger.exception("turn.crashed")
    assert utterance


WAYS: dict[str, Callable[[], Any]] = {
    "event": lambda: say(f"GET /ws?api_key={SECRET}"),
    "event, among others": lambda: say(f"GET /ws?a=1&api_key={SECRET}&b=2 and /ws?api_key={SECRET}"),
    "field": lambda: say("x", url=f"/ws?api_key={SECRET}"),
    "ticket": lambda: say(f"GET /ws?ticket={SECRET}&b=2", url=f"/ws?TICKET={SECRET}"),
    "upper case": lambda: say("x", url=f"/ws?API_KEY={SECRET}", env=f"YAP_TEXT_API_KEY={SECRET}"),
    "beyond ASCII": lambda: say(f"GET /ws?api_key=schlüssel-{SECRET}", url=f"/ws?api_key=🔑{SECRET}&b=2"),
    "quoted": lambda: say(f'"GET /ws?api_key={SECRET}" 101'),
    "quoted field": lambda: say("x", request=f'"/ws?api_key={SECRET}"', other=f"'/ws?api_key={SECRET}'"),
    "nested field": lambda: say("x", scope={"headers": [("referer", f"/ws?api_key={SECRET}")]}),
    "object": lambda: say("x", error=ValueError(f"/ws?api_key={SECRET}")),
    "uvicorn's access line": lambda: logging.getLogger("uvicorn.error").warning(
        '%s - "WebSocket %s" [accepted]', "127.0.0.1:4", f"/ws?api_key={SECRET}"
    ),
    "uvicorn's refusal": lambda: logging.getLogger("uvicorn.error").warning(
        '%s - "WebSocket %s" %d', "127.0.0.1:4", f"/ws?x=1&api_key={SECRET}&y=2", 403
    ),
    "arguments that are a dict": lambda: logging.getLogger("a").warning("%(u)s", {"u": f"/ws?api_key={SECRET}"}),
    "a traceback of ours": lambda: crash(structlog.get_logger("here")),
    "a traceback of uvicorn's": lambda: crash(logging.getLogger("uvicorn.error")),
    "a stack": lambda: say(f"/ws?api_key={SECRET}", stack_info=True),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("journald", [False, True])
def test_no_key_reaches_a_json_line(stderr: Stderr, way: str, journald: bool) -> None:
    """Whoever wrote the line and wherever in it the key stood; the line is still one of JSON."""
    stderr.configure(journald=journald)
    WAYS[way]()
    line = stderr.line().removeprefix("<4>").removeprefix("<3>")
    assert "***" in line
    assert SECRET not in line
    assert json.loads(line)["level"] in ("warning", "error")


@pytest.mark.parametrize("way", WAYS)
def test_no_key_reaches_the_console(stderr: Stderr, way: str) -> None:
    """Also the readable form, tracebacks included, hides it."""
    stderr.configure(format="console")
    WAYS[way]()
    assert "***" in stderr.getvalue()
    assert SECRET not in stderr.getvalue()


def test_only_the_key_is_hidden(stderr: Stderr) -> None:
    """What stands around it is what an operator needs."""
    stderr.configure()
    say(f'1.2.3.4 - "WebSocket /ws?a=1&api_key={SECRET}&b=2" [accepted]', url=f"/ws?api_key={SECRET}", other="api_key")
    event = stderr.event()
    assert event["event"] == '1.2.3.4 - "WebSocket /ws?a=1&api_key=***&b=2" [accepted]'
    assert (event["url"], event["other"]) == ("/ws?api_key=***", "api_key")


@pytest.mark.parametrize("format", ["json", "console"])
@pytest.mark.parametrize("source", [structlog.get_logger, logging.getLogger])
def test_tracebacks_tell_where_but_not_what_was_said(stderr: Stderr, format: str, source: Callable[..., Any]) -> None:
    """Local variables hold utterances and prompts: functions and files are named, their values are not."""
    stderr.configure(format=format)
    crash(source("here"), "why")
    text = stderr.getvalue()
    assert all(word in text for word in ("ValueError", "RuntimeError", "why", "fail", "crash", "test_logs.py"))
    assert "in confidence" not in text


# The engines' processes


@pytest.mark.parametrize("journald", [False, True])
def test_engine_processes_write_the_same_lines(stderr: Stderr, journald: bool) -> None:
    """vllm_logging.json, which they read, leads to the formatter that the service chose."""
    stderr.configure(journald=journald)
    config = json.loads((resources.files("yaptext.observe") / "vllm_logging.json").read_text())
    with redirect_stderr(stderr):
        logging.config.dictConfig(config)
    logging.getLogger("vllm.core").info("quiet")
    logging.getLogger("vllm.core").warning("GET /ws?api_key=%s", SECRET)
    line = stderr.line()
    assert line.startswith("<4>") == journald
    event = json.loads(line.removeprefix("<4>"))
    assert (event["event"], event["logger"]) == ("GET /ws?api_key=***", "vllm.core")


def as_vllm(stderr: Stderr) -> None:
    """Logging as vLLM sets it up, in the service's process and in the engines'."""
    config = json.loads((resources.files("yaptext.observe") / "vllm_logging.json").read_text())
    with redirect_stderr(stderr):
        logging.config.dictConfig(config)


EXPECTED = ("vllm.v1.worker.cpu_worker", "%s is not found in LD_PRELOAD. For best performance, ...", "libtcmalloc")


@pytest.mark.parametrize("journald", [False, True])
def test_a_warning_that_is_expected_is_a_line_of_debug(stderr: Stderr, journald: bool) -> None:
    """In the engines' processes as well: `journalctl -p warning` does not show it."""
    stderr.configure("debug", journald=journald)
    as_vllm(stderr)
    name, *said = EXPECTED
    logging.getLogger(name).warning(*said)
    line = stderr.line()
    assert line.startswith("<7>") == journald
    event = json.loads(line.removeprefix("<7>"))
    assert (event["level"], event["logger"]) == ("debug", name) and event["event"].startswith("libtcmalloc is not")


@pytest.mark.parametrize("level", ["info", "warning", "error"])
def test_an_expected_warning_is_not_logged_where_debug_is_not(stderr: Stderr, level: str) -> None:
    """LOG_LEVEL counts for what the line is here."""
    stderr.configure(level)
    as_vllm(stderr)
    name, *said = EXPECTED
    logging.getLogger(name).warning(*said)
    assert stderr.getvalue() == ""


@pytest.mark.parametrize(
    ("name", "level", "said"),
    [
        ("vllm.v1.worker.cpu_worker", "warning", ["The CPU is on fire."]),
        ("vllm.v1.worker.cpu_worker", "warning", ["It said: libtcmalloc is not found in LD_PRELOAD"]),
        ("vllm.elsewhere", "warning", ["libtcmalloc is not found in LD_PRELOAD"]),
        ("vllm.v1.worker.cpu_worker", "error", ["libtcmalloc is not found in LD_PRELOAD"]),
    ],
    ids=["another message", "another beginning", "another logger", "an error"],
)
def test_any_other_warning_stays_one(stderr: Stderr, name: str, level: str, said: list[str]) -> None:
    """Logger and beginning are known, and the level is that of a warning, or nothing changes."""
    stderr.configure()
    as_vllm(stderr)
    getattr(logging.getLogger(name), level)(*said)
    assert stderr.event()["level"] == level


def test_an_expected_warning_has_one_level_wherever_it_goes(stderr: Stderr, tmp_path: Path) -> None:
    """On stderr and in the log file."""
    file = tmp_path / "log"
    with redirect_stderr(stderr):
        logs.configure(level="debug", format="json", journald=False, file=file)
    name, *said = EXPECTED
    logger = logging.getLogger(name)
    logger.handlers.clear()
    logger.warning(*said)
    for handler in logging.getLogger().handlers:
        handler.close()
    assert stderr.event()["level"] == json.loads(file.read_text())["level"] == "debug"


def test_a_warning_whose_arguments_do_not_fit_ends_nothing(stderr: Stderr) -> None:
    """The handler says so, as of any other logger."""
    stderr.configure()
    logger = logging.getLogger(EXPECTED[0])
    with redirect_stderr(stderr):
        logger.warning("%d", "words")
    assert (stderr.event()["event"], stderr.getvalue()) == ("log.failed", "")


def test_an_engine_process_without_word_from_the_service_writes_json(stderr: Stderr) -> None:
    """The formatter needs no `configure` in its own process."""
    record = logging.LogRecord("vllm", logging.ERROR, __file__, 1, "%s", ("hello",), None)
    assert json.loads(logs.formatter().format(record))["event"] == "hello"


def test_a_rotation_loses_and_doubles_no_line(stderr: Stderr, tmp_path: Path) -> None:
    """The log file is moved away again and again while lines are written; every line is in one of the files."""
    path = tmp_path / "yap-text.log"
    with redirect_stderr(stderr):
        logs.configure(level="info", format="console", journald=False, file=path)
    done = threading.Event()

    def rotate() -> None:
        for number in itertools.count():
            if path.exists():
                path.rename(tmp_path / f"yap-text.log.{number}")
            if done.is_set():
                return

    rotation = threading.Thread(target=rotate)
    rotation.start()
    log = structlog.get_logger("test")
    for number in range(3000):
        log.info("line.written", number=number)
    done.set()
    rotation.join()
    for handler in logging.getLogger().handlers:
        handler.close()
    lines = [json.loads(line) for file in tmp_path.iterdir() for line in file.read_text().splitlines()]
    assert sorted(line["number"] for line in lines if line["event"] == "line.written") == list(range(3000))
    assert len(list(tmp_path.iterdir())) > 1
    opened = [line for line in lines if line["event"] == "log.file_opened"]
    assert opened and {line["file"] for line in opened} == {str(path)}


def test_a_start_repeats_what_it_warned_of_once(stderr: Stderr) -> None:
    """Of this service; the words of a library may be anybody's."""
    stderr.configure()
    structlog.get_logger("a").warning("setting.unknown", note="CHAT_MAX_OTU is not known")
    structlog.get_logger("a").info("server.settings", note="nothing")
    logging.getLogger("library").warning("hello")
    structlog.get_logger("a").error("sessions.not_read", file="/a", error="disk is full")  # STATUS= has that live
    structlog.get_logger("a").error("sessions.damaged", file="/a", error="no header", hint="a new file was begun")
    for number in range(20):
        structlog.get_logger("a").warning("pending.full", limit=number)
    first, second, third, *more = logs.attention()
    assert first == "setting.unknown: CHAT_MAX_OTU is not known"
    assert second == "sessions.damaged: a new file was begun no header (file=/a)"
    assert third == "pending.full: limit=0" and len(more) == 5
    structlog.get_logger("a").warning("pending.full")
    assert logs.attention() == []


def test_a_log_file_that_cannot_be_written_is_known(stderr: Stderr) -> None:
    """For STATUS=."""
    with redirect_stderr(stderr):
        logs.configure(level="info", format="json", journald=False, file=Path("/dev/full"))
    assert logs.file_failure() is None
    structlog.get_logger("a").info("hello")
    assert logs.file_failure() == "The log file /dev/full cannot be written: No space left on device."
    for handler in logging.getLogger().handlers:
        handler.close()
