"""Each fault that an operator meets, made in the container: what systemd, the journal and a client then show, what must
hold, and that the service serves again once the cause is mended.

    python tests/systemd/faults.py [--only NAME,...] [--out FOLDER]

writes FOLDER/NN-NAME.txt; only the names of these files tell what was done.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
from systemd.container import Container
from systemd.service import SETTINGS, boxed, engine_pid, install, show

SEEN = """
import asyncio, contextlib, json, sys, time, urllib.error, urllib.request, websockets
port, command, key = sys.argv[1:]

def get():
    address = f"http://127.0.0.1:{port}/readyz"
    print("$ curl -i -m 5", address)
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            print(answer.status, answer.read().decode())
    except urllib.error.HTTPError as answer:
        print(answer.code, answer.read().decode())
    except OSError as error:
        reason = getattr(error, "reason", error)
        print("no answer within 5 s" if isinstance(reason, TimeoutError) else reason)

async def talk():
    said, begun = [], time.monotonic()
    def tell(text):
        print(f"  {time.monotonic() - begun:5.1f} s  {text}")
    try:
        socket = await websockets.connect(f"ws://127.0.0.1:{port}/ws", additional_headers={"X-API-Key": key},
                                          proxy=None, open_timeout=5)
    except websockets.InvalidStatus as error:
        return tell(f"refused: HTTP {error.response.status_code} {error.response.body.decode()}")
    except TimeoutError:
        return tell("no answer within 5 s")
    except (OSError, websockets.InvalidHandshake) as error:
        return tell(f"not connected: {error}")
    tell("connected")
    tokens, running = 0, None
    start = {"type": "start", "session_id": "bob", "user_utterance": "Tell me a long story."}
    try:
        with contextlib.suppress(websockets.ConnectionClosed):  # what it said before that can be read
            await socket.send(json.dumps(start | {"sampling": {"max_tokens": 150 if command else 5}}))
        while True:
            frame = json.loads(await asyncio.wait_for(socket.recv(), 100))
            if frame["type"] == "token":
                tokens += 1
                if tokens == 1:
                    tell("token ...")
                    if command:
                        begun = time.monotonic()
                        running = await asyncio.create_subprocess_shell(command)
                continue
            if frame["type"] in ("error", "done"):
                shown = {name: frame[name] for name in ("type", "error_code", "message", "retry_after_ms",
                                                        "finish_reason", "cancelled") if name in frame}
                tell(json.dumps(shown))
            else:
                tell(frame["type"])
            if frame["type"] == "done" and not command:
                await socket.close()
                break
    except websockets.ConnectionClosed:
        tell(f"the socket closes: {socket.close_code} {socket.close_reason}")
    except TimeoutError:
        tell("nothing more within 100 s")
    if running:
        await running.wait()

if command:
    print("a WebSocket that was open, in the middle of a reply:")
else:
    get()
    print("a new WebSocket:")
asyncio.run(talk())
"""
KEPT = """
import asyncio, json, sys, websockets
async def main():
    url = "ws://127.0.0.1:8000/ws"
    async with websockets.connect(url, additional_headers={"X-API-Key": sys.argv[1]}, proxy=None) as socket:
        await socket.send('{"type": "get_session", "session_id": "ada"}')
        print(await socket.recv())
asyncio.run(main())
"""
HOLDER = """
import http.server
http.server.HTTPServer(("127.0.0.1", 8000), http.server.SimpleHTTPRequestHandler).serve_forever()
"""
FORGET_NEWER = """
import contextlib, sqlite3
with contextlib.closing(sqlite3.connect("/var/lib/private/yap-text/sessions.db", isolation_level=None)) as database:
    database.execute("DELETE FROM session WHERE CAST(body AS TEXT) LIKE ?", ['%"version":2%'])
"""
ENV = "/etc/yap-text/yap-text.env"
API_KEY = "/etc/yap-text/api-key"
SESSIONS = "/var/lib/private/yap-text/sessions.db"
LOG = "/var/log/private/yap-text/yap-text.log"
_OF_THE_SCENE = re.compile(r"^Notice: journal has been rotated|Failed to kill control group .*Input/output error")


class Scene:
    """An installed service and its operator, who breaks it, looks, and mends it."""

    def __init__(self, box: Container, code: Path, out: Path | None) -> None:
        self.box, self.code, self.out = box, code, out
        self.number = 0
        self.port = 8000
        self._since = ""
        install(box)
        # The key of the client, whatever becomes of the file.
        self.key = box.run("cat", API_KEY).strip()
        box.run("cp", "-p", API_KEY, "/var/backups/api-key")
        self._env = box.run("cat", ENV) + SETTINGS + "SESSION_STORE=sqlite:sessions.db\n"
        self.settings()
        self.wrong: list[str] = []
        """What did not hold."""
        self.box.run("systemctl", "enable", "yap-text")
        self.start()
        box.run("sh", "-c", f"YAP_TEXT_API_KEY={self.key} yap-text warmup --session ada 'My name is Ada.'")
        self.serves()

    def sh(self, command: str, *, check: bool = True) -> str:
        return self.box.run("sh", "-c", command, check=check, timeout=400)

    def write(self, path: str, text: str | bytes) -> None:
        """In place, as an editor does."""
        data = text.encode() if isinstance(text, str) else text
        octal = "".join(f"\\{byte:03o}" for byte in data)
        self.sh(f"printf '{octal}' > {path}")

    def settings(self, *lines: str) -> None:
        """yap-text.env has these besides what it always has."""
        self.write(ENV, self._env + "".join(f"{line}\n" for line in lines))

    def forget(self) -> None:
        """Empties the journal: what is seen of a fault is of no other."""
        self.sh("journalctl -q --rotate; journalctl -q --vacuum-time=1ms")

    def begin(self) -> None:
        """`events` are those from here on."""
        self._since = self.sh("date +@%s.%6N").strip()

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = self.sh(f"journalctl -u yap-text -o cat --no-pager --since={self._since}").splitlines()
        events = [json.loads(line) for line in lines if line.startswith("{")]
        return [event for event in events if event["event"] == name]

    def until(self, command: str, seconds: float = 60) -> None:
        self.sh(f"for i in $(seq {round(seconds * 5)}); do {command} && exit 0; sleep 0.2; done; exit 1")

    def until_event(self, name: str) -> dict[str, Any]:
        for _ in range(300):
            if found := self.events(name):
                return found[-1]
            time.sleep(0.2)
        raise AssertionError(f"no {name} in a minute:\n{self.sh('journalctl -u yap-text -n 30 -o cat')}")

    def check(self, holds: bool, what: str) -> None:
        """Notes what does not hold, and goes on: the next fault is worth seeing all the same."""
        if not holds:
            self.wrong.append(f"{self.number} {what}")
            print(f"   WRONG: {what}", flush=True)

    def start(self) -> None:
        """What an operator does once the cause is mended, or thinks so."""
        self.begin()
        self.sh("systemctl reset-failed yap-text.service yap-text.socket; systemctl start yap-text", check=False)

    def restart(self) -> None:
        self.begin()
        self.sh("systemctl restart yap-text", check=False)

    def stop(self) -> None:
        """With the socket: a client that waits there would start the service again."""
        self.sh("systemctl stop yap-text.socket yap-text")

    def reboot(self, meanwhile: Callable[[], None] | None = None) -> None:
        self.begin()
        self.box.power_off()
        if meanwhile is not None:
            meanwhile()
        self.box.boot()

    def opens(self) -> None:
        """The cause is mended: the service goes as far as its engines. `serves` sees the rest, for several faults."""
        self.begin()
        self.sh("systemctl reset-failed yap-text.service yap-text.socket; systemctl start --no-block yap-text")
        self.until("systemctl show -P StatusText yap-text | grep -qE 'Opening|Serving'")

    def serves(self) -> None:
        """The service answers, and what was said before the first fault is there."""
        if self.sh("systemctl show -P ActiveState yap-text").strip() in ("inactive", "failed"):
            self.start()
        self.until("systemctl -q is-active yap-text", 120)
        status = show(self.box, "StatusText")["StatusText"]
        self.check("Serving on" in status, f"serves, but StatusText is {status!r}")
        told = json.loads(self.sh(f"KEY={self.key} sh /opt/client /opt/kept.py"))
        kept = told.get("history") or [{"content": None}]
        self.check(kept[0]["content"] == "My name is Ada.", f"the kept session is {told}")

    def mend(self) -> None:
        """Whatever was done to files that every fault shares."""
        self.box.empty_disk()
        self.settings()
        self.sh(f"rm -rf {API_KEY}; install -m 600 /var/backups/api-key {API_KEY}")
        self.sh("rm -rf /etc/systemd/system/yap-text.socket.d")
        self.sh("systemctl daemon-reload")

    def talk(self) -> str:
        """What a client sees that comes now."""
        return self._client("")

    def during(self, command: str) -> str:
        """What a client sees whose reply is half spoken when the command runs."""
        return self._client(command)

    def look(self, name: str, *, socket: bool = False, before: str = "") -> str:
        """What an operator sees now; `before` is what a client saw."""
        parts = []
        units = ["yap-text", "yap-text.socket"] if socket else ["yap-text"]
        for unit in units:
            parts.append(self._shown(f"systemctl status {unit} --no-pager -l"))
        parts.append(self._shown("journalctl -u yap-text -o cat -n 20 --no-pager"))
        parts.append(before + self.talk())
        text = "\n".join(parts)
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / f"{self.number:02}-{name}.txt").write_text(text)
        return text

    def refuses(self, name: str, *words: str, status: int = 2, reboot: bool = True) -> None:
        """The start ended: one critical line with every word, which `systemctl status` shows, too. After a reboot it is
        the same."""
        event = self.until_event("start.failed")
        self.until("! systemctl -q is-active yap-text")
        self.until(f"test $(systemctl show -P ExecMainStatus yap-text) = {status}", 10)
        text = self.look(name)
        self.check(event["level"] == "critical" and event["exit_status"] == status, f"{name}: {event}")
        for word in words:
            self.check(word in event["reason"], f"{name}: no {word!r} in {event['reason']!r}")
        self.check("The start failed: " in text, f"{name}: no reason in the status")
        self.check("start.failed" in text, f"{name}: no start.failed in the last lines")
        self._stays_down(name, status)
        if not reboot:
            return
        self.reboot()
        again = self.until_event("start.failed")
        self.check(again["reason"] == event["reason"], f"{name}: after a reboot it is {again['reason']!r}")
        self._stays_down(name, status)

    def _stays_down(self, name: str, status: int) -> None:
        """With status 2 nothing starts it again, neither systemd nor a client; with 75 systemd does."""
        state = "failed" if status == 2 else "activating"
        self.until(f"test $(systemctl show -P ActiveState yap-text) = {state}", 20)
        socket = show(self.box, "ActiveState", unit="yap-text.socket")["ActiveState"]
        self.check((socket == "inactive") == (status == 2), f"{name}: the socket is {socket}")
        if status == 2:
            self.check("Connection refused" in self.talk(), f"{name}: a client is not refused")

    def _shown(self, command: str) -> str:
        lines = self.sh(f"{command} 2>/dev/null", check=False).splitlines(keepends=True)
        # Of `forget` and of this container's control groups: no operator sees those.
        return f"$ {command}\n" + "".join(line for line in lines if not _OF_THE_SCENE.search(line))

    def _client(self, command: str) -> str:
        return self.sh(f"KEY={self.key} sh /opt/client /opt/seen.py {self.port} {shlex.quote(command)}")


class Fault(NamedTuple):
    number: int
    name: str
    make: Callable[[Scene], None]
    is_quick: bool


FAULTS: list[Fault] = []


def fault(number: int, *, quick: bool = False) -> Callable[[Callable[[Scene], None]], Callable[[Scene], None]]:
    """Registers one; a quick one is made at every run of the tests."""

    def register(make: Callable[[Scene], None]) -> Callable[[Scene], None]:
        FAULTS.append(Fault(number, make.__name__.replace("_", "-"), make, quick))
        return make

    return register


def make(scene: Scene, fault: Fault) -> list[str]:
    """Makes the fault and mends it; returns what did not hold."""
    scene.number, scene.wrong = fault.number, []
    scene.forget()
    try:
        fault.make(scene)
    except (AssertionError, subprocess.TimeoutExpired) as error:
        scene.check(False, f"{type(error).__name__}: {error}")
    finally:
        scene.mend()
    return scene.wrong


# Settings


@fault(1, quick=True)
def wrong_value(scene: Scene) -> None:
    scene.settings("CHAT_MAX_OUT=many")
    scene.restart()
    scene.refuses("wrong-value", "CHAT_MAX_OUT='many'")
    scene.settings()
    scene.opens()


@fault(3, quick=True)
def settings_in_conflict(scene: Scene) -> None:
    scene.settings("CHAT_GPU_FRAC=0.70", "TOOL_GPU_FRAC=0.40")
    scene.restart()
    scene.refuses("settings-in-conflict", "CHAT_GPU_FRAC", "TOOL_GPU_FRAC", "0.98")
    scene.settings()
    scene.opens()


@fault(4, quick=True)
def missing_folder(scene: Scene) -> None:
    scene.settings("CHAT_MODEL=/srv/models/impish-12b", "TOOL_MODEL=/srv/models/impish-12b")
    scene.restart()
    scene.refuses("missing-folder", "_MODEL", "/srv/models/impish-12b")
    scene.settings()
    scene.opens()


@fault(5, quick=True)
def closed_folder(scene: Scene) -> None:
    scene.sh("mkdir -p /srv/models /home/ada")
    scene.sh("cp -r /var/lib/private/yap-text/demo/Smol* /srv/models/own; chmod 700 /srv/models/own")
    scene.settings("CHAT_MODEL=/srv/models/own", "TOOL_MODEL=/srv/models/own")
    scene.restart()
    scene.refuses("closed-folder", "_MODEL", "/srv/models/own")
    scene.forget()
    scene.sh("mv /srv/models/own /home/ada/own; chmod 755 /home/ada/own")
    scene.settings("CHAT_MODEL=/home/ada/own", "TOOL_MODEL=/home/ada/own")
    scene.start()
    scene.refuses("folder-below-home", "_MODEL", "/home", "ProtectHome")
    scene.sh("rm -r /home/ada")
    scene.settings()
    scene.opens()


@fault(6, quick=True)
def hub_down(scene: Scene) -> None:
    scene.settings("CHAT_MODEL=SicariusSicariiStuff/Impish_Nemo_12B", "TOOL_MODEL=MadeAgents/Hammer2.1-1.5b")
    scene.stop()
    scene.begin()
    scene.sh("systemctl start --no-block yap-text")
    scene.refuses("hub-down", "_MODEL", status=75)
    scene.stop()
    scene.settings()
    scene.opens()


# Keys

KEYS: dict[str, Callable[[str], bytes]] = {
    "quotes": lambda key: f'"{key}"\n'.encode(),
    "name": lambda key: f"YAP_TEXT_API_KEY={key}\n".encode(),
    "two-lines": lambda key: f"{key}\n{key[::-1]}\n".encode(),
    "not-text": lambda key: b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
}
"""Forms of the key file that end the start."""
KEYS_THAT_SERVE: dict[str, Callable[[str], bytes]] = {
    "bom": lambda key: f"\ufeff{key}\n".encode(),
    "crlf": lambda key: f"{key}\r\n".encode(),
    "trailing-spaces": lambda key: f"{key}   \t\n\n".encode(),
    "empty": lambda key: b"",
}


@fault(9, quick=True)
def key_file(scene: Scene) -> None:
    scene.stop()
    for name, form in KEYS.items():
        scene.forget()
        scene.write(API_KEY, form(scene.key))
        scene.start()
        scene.refuses(f"key-file-{name}", "YAP_TEXT_API_KEY", "api-key", reboot=False)
    scene.check(scene.key not in scene.sh("journalctl --no-pager"), "the key is in the journal")
    scene.sh(f"rm {API_KEY}")
    _without_credential(scene, "key-file-missing")
    scene.sh(f"ln -s /etc/yap-text/secret/key {API_KEY}")
    _without_credential(scene, "key-file-unreadable")
    scene.forget()
    scene.sh(f"rm {API_KEY}; cp -p /var/backups/api-key {API_KEY}; chmod 600 /etc/yap-text/keys")
    scene.start()
    scene.refuses("keys-unreadable", "YAP_TEXT_KEY_FILE", "Permission denied", reboot=False)
    scene.sh("chmod 644 /etc/yap-text/keys")
    scene.opens()


def _without_credential(scene: Scene, name: str) -> None:
    """systemd itself cannot start the process, and tries again."""
    scene.forget()
    scene.begin()
    scene.sh("systemctl start --no-block yap-text")
    scene.until("test $(systemctl show -P SubState yap-text) = auto-restart", 20)
    text = scene.look(name)
    scene.check("status=243/CREDENTIALS" in text, f"{name}: no word of credentials")
    # Between two tries: while one is under way there is no status.
    scene.until("test $(systemctl show -P ExecMainStatus yap-text) = 243", 20)
    scene.stop()


# The session file


@fault(18, quick=True)
def session_file_foreign(scene: Scene) -> None:
    """Another program's database, and a file that is none."""
    scene.stop()
    scene.sh(f"mkdir -p /var/backups/kept; mv {SESSIONS}* /var/backups/kept")
    other = f"import sqlite3; sqlite3.connect('{SESSIONS}').execute('create table notes (text)')"
    scene.sh(f'python3 -c "{other}"; chown --reference=/var/lib/private/yap-text {SESSIONS}')
    scene.start()
    scene.refuses("session-file-foreign", "SESSION_STORE", "another program's database")
    scene.forget()
    scene.write(SESSIONS, "notes of the day\n")
    scene.start()
    scene.refuses("session-file-no-database", "SESSION_STORE", "no database", reboot=False)
    scene.sh(f"rm {SESSIONS}*; mv /var/backups/kept/* /var/lib/private/yap-text/")
    scene.opens()


# The disk, and files on it


def says_full(text: str) -> bool:
    return "No space left on device" in text or "disk is full" in text


@fault(11)
def disk_full_at_the_first_start(scene: Scene) -> None:
    scene.stop()
    scene.sh("mv /var/lib/private/yap-text/demo /var/backups/demo")
    scene.box.fill_disk()
    scene.begin()
    scene.sh("systemctl start --no-block yap-text")
    scene.refuses("disk-full-at-the-first-start", "No space left on device", status=75, reboot=False)
    scene.box.empty_disk()
    scene.stop()
    scene.sh("rm -rf /var/lib/private/yap-text/demo; mv /var/backups/demo /var/lib/private/yap-text")
    scene.opens()


@fault(11, quick=True)
def disk_full_at_a_restart(scene: Scene) -> None:
    scene.stop()
    scene.box.fill_disk()
    scene.start()
    text = scene.look("disk-full-at-a-restart")
    scene.serves()
    scene.check(says_full(text), "nothing says that the disk is full")
    scene.box.empty_disk()


@fault(18, quick=True)
def session_file_corrupt(scene: Scene) -> None:
    scene.stop()
    scene.sh(f"mkdir -p /var/backups/kept; cp -p {SESSIONS}* /var/backups/kept")
    scene.sh(f"dd if=/dev/urandom of={SESSIONS} bs=1k seek=1 count=7 conv=notrunc 2>/dev/null")
    scene.start()
    text = scene.look("session-file-corrupt")
    scene.check("damaged" in text, "nothing says that it was damaged")
    scene.check(len(scene.events("sessions.damaged")) == 1, "no sessions.damaged")
    scene.stop()
    scene.sh(f"rm {SESSIONS}*; mv /var/backups/kept/* /var/lib/private/yap-text/")
    scene.opens()


@fault(10)
def disk_full(scene: Scene) -> None:
    scene.serves()
    scene.begin()
    scene.box.fill_disk()
    for _ in range(3):
        scene.talk()
    text = scene.look("disk-full")
    scene.check(says_full(text), "nothing says that the disk is full")
    scene.check("connected" in text, "a client is not served")
    scene.box.empty_disk()
    scene.until_event("sessions.saved")


@fault(12)
def log_deleted(scene: Scene) -> None:
    scene.serves()
    while scene.sh(f"test -s {LOG} || echo missing"):  # after a full disk it is tried every ten seconds
        scene.talk()
    scene.begin()
    scene.sh(f"rm {LOG}")
    scene.talk()
    text = scene.look("log-deleted")
    scene.check("connected" in text, "a client is not served")
    scene.until(f"test -s {LOG}", 20)


# Processes


@fault(13, quick=True)
def engine_killed(scene: Scene) -> None:
    scene.serves()
    scene.begin()
    before = scene.during(f"kill -KILL {engine_pid(scene.box)}")
    scene.until("! systemctl -q is-active yap-text", 20)
    scene.look("engine-killed", before=before)
    scene.check("engine_failed" in before and "1012" in before, before)
    scene.check(scene.until_event("engine.died")["level"] == "critical", "engine.died is not critical")
    scene.serves()
    scene.look("engine-killed-later")


@fault(14)
def engine_stopped(scene: Scene) -> None:
    scene.restart()
    scene.until_event("sessions.rewarmed")  # an idle engine: one with prompts to compute is given more time
    scene.begin()
    scene.sh(f"kill -STOP {engine_pid(scene.box)}")
    scene.until_event("engine.silent")
    scene.look("engine-stopped")
    scene.until("! systemctl -q is-active yap-text", 120)
    scene.look("engine-stopped-afterwards")
    scene.serves()
    scene.look("engine-stopped-later")


@fault(15)
def service_killed(scene: Scene) -> None:
    scene.serves()
    scene.begin()
    before = scene.during("kill -KILL $(systemctl show -P MainPID yap-text)")
    scene.look("service-killed", before=before)
    scene.serves()
    scene.look("service-killed-later")


@fault(16)
def stop_in_mid_turn(scene: Scene) -> None:
    scene.serves()
    scene.begin()
    before = scene.during("systemctl stop yap-text.socket yap-text")
    scene.look("stop-in-mid-turn", before=before)
    scene.check('"done"' in before and "going_away" in before and "1012" in before, before)
    ended = show(scene.box, "Result", "ExecMainStatus")
    scene.check(ended == {"Result": "success", "ExecMainStatus": "0"}, str(ended))
    scene.opens()


@fault(17)
def three_restarts(scene: Scene) -> None:
    scene.serves()
    scene.begin()
    for _ in range(3):
        scene.sh("systemctl restart --no-block yap-text; sleep 6")
    scene.look("three-restarts")
    scene.serves()
    scene.look("three-restarts-later")
    scene.check(show(scene.box, "NRestarts")["NRestarts"] == "0", "systemd has restarted it, too")


# Whatever takes a whole start to see


@fault(2)
def misspelt_name(scene: Scene) -> None:
    scene.settings("CHAT_MAX_OTU=100")
    scene.restart()
    text = scene.look("misspelt-name")
    scene.check("CHAT_MAX_OTU" in text, "the name is not in the last lines")
    notes = [event["note"] for event in scene.events("setting.unknown")]
    scene.check(notes == ["CHAT_MAX_OTU is not known; do you mean CHAT_MAX_OUT?"], str(notes))
    scene.settings()
    scene.opens()


@fault(9)
def key_file_that_serves(scene: Scene) -> None:
    scene.settings("YAP_TEXT_KEY_FILE=")  # with named keys the default key would not count
    for name, form in KEYS_THAT_SERVE.items():
        scene.forget()
        scene.write(API_KEY, form(scene.key))
        scene.restart()
        text = scene.look(f"key-file-{name}")
        scene.check(("authentication_failed" in text) == (name == "empty"), f"{name}: another answer to a client")
        if name == "empty":
            scene.check(
                "key.default" in text or "default key" in text, f"{name}: nothing says that the default key counts"
            )
    scene.write(API_KEY, f"{scene.key}\n")
    scene.sh(f"chmod 000 {API_KEY}")  # systemd reads it as root
    scene.restart()
    scene.check("connected" in scene.look("key-file-mode-000"), "mode 000 matters")


# The port


@fault(7)
def port_taken(scene: Scene) -> None:
    scene.stop()
    scene.sh("KEY= setsid sh /opt/client /opt/holder.py > /dev/null 2>&1 & sleep 2")
    scene.begin()
    scene.sh("systemctl start yap-text", check=False)
    text = scene.look("port-taken", socket=True)
    scene.check("Address already in use" in text, "nothing says that the port is taken")
    scene.sh("kill $(ps -eo pid,args | awk '/[h]older.py/ {print $1}')")
    scene.opens()


@fault(8)
def socket_edited(scene: Scene) -> None:
    scene.serves()
    folder = "/etc/systemd/system/yap-text.socket.d"
    scene.sh(f"mkdir -p {folder}")
    scene.write(f"{folder}/override.conf", "[Socket]\nListenStream=\nListenStream=127.0.0.1:9000\n")
    scene.sh("systemctl daemon-reload")  # as `systemctl edit` does
    scene.restart()
    scene.port = 9000
    try:
        scene.look("socket-edited", socket=True)
        scene.sh("systemctl restart yap-text.socket yap-text")  # as the service says
        text = scene.look("socket-edited-mended", socket=True)
    finally:
        scene.port = 8000
    scene.check("Serving on 127.0.0.1:9000" in text and "connected" in text, text)
    scene.stop()
    scene.sh(f"rm -r {folder}; systemctl daemon-reload")
    scene.opens()


# Versions


@fault(19)
def update(scene: Scene) -> None:
    scene.serves()
    _replace_code(scene, "0.2.0", 2)
    scene.begin()
    before = scene.during("systemctl restart yap-text")
    scene.look("update", before=before)
    versions = [event["version"] for event in scene.events("server.ready")]
    scene.check(versions == ["0.2.0"], f"{versions} is ready")
    scene.serves()
    _go_back(scene)


@fault(20)
def downgrade(scene: Scene) -> None:
    """The newer version has kept a session of its own, and has a setting that this one does not know."""
    _replace_code(scene, "0.2.0", 2)
    scene.restart()
    scene.sh(f"YAP_TEXT_API_KEY={scene.key} yap-text warmup --session eve 'My name is Eve.'")
    scene.settings("CHAT_STYLE=brief")
    _replace_code(scene, "0.1.0", 1)
    scene.restart()
    text = scene.look("downgrade")
    scene.check("sessions.unreadable" in text or "CHAT_STYLE" in text, "nothing says what this version does not know")
    others = [event["of_other_versions"] for event in scene.events("sessions.unreadable")]
    scene.check(bool(others) and others[-1] >= 1, f"{others} of other versions")
    _go_back(scene)


def _go_back(scene: Scene) -> None:
    """Leaves nothing of the newer version behind."""
    _replace_code(scene, "0.1.0", 1)
    scene.stop()
    scene.sh("python3 /opt/forget_newer.py")
    scene.settings()
    scene.opens()


def _replace_code(scene: Scene, version: str, form: int) -> None:
    """Puts a version in place, with its form of the rows in the session file; what runs goes on with its own."""
    new, old = scene.code / "new", scene.code / "old"
    shutil.copytree(scene.code / "yaptext", new)
    for name, pattern, text in (
        ("build.py", '^RELEASE = ".*"', f'RELEASE = "{version}"'),
        ("store/base.py", r"^_VERSION = \d+", f"_VERSION = {form}"),
    ):
        changed, count = re.subn(pattern, text, (new / name).read_text(), flags=re.MULTILINE)
        assert count == 1, f"{name} has no {pattern}"
        (new / name).write_text(changed)
    (scene.code / "yaptext").rename(old)
    new.rename(scene.code / "yaptext")
    shutil.rmtree(old)


# The machine


@fault(21, quick=True)
def reboot(scene: Scene) -> None:
    scene.serves()
    scene.reboot()
    scene.look("reboot")
    scene.serves()


@fault(21, quick=True)
def reboot_on_a_full_disk(scene: Scene) -> None:
    scene.serves()
    scene.reboot(meanwhile=scene.box.fill_disk)
    text = scene.look("reboot-on-a-full-disk")
    scene.serves()
    scene.check(says_full(text), "nothing says that the disk is full")
    scene.box.empty_disk()


@contextmanager
def scene(out: Path | None = None) -> Iterator[Scene]:
    files = {
        "/opt/seen.py": SEEN,
        "/opt/kept.py": KEPT,
        "/opt/holder.py": HOLDER,
        "/opt/forget_newer.py": FORGET_NEWER,
        # The minute that is shipped: what is seen of a silent engine before the watchdog ends the service is seen here.
        "/etc/systemd/system/yap-text.service.d/test.conf": "[Service]\nWatchdogSec=60\n",
    }
    with boxed(files) as (box, code):
        yield Scene(box, code, out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [fault.name for fault in FAULTS]
    parser.add_argument("--only", metavar="NAME,...", default=",".join(names), help="default: %(default)s")
    parser.add_argument("--out", metavar="FOLDER", type=Path)
    parsed = parser.parse_args()
    only = parsed.only.split(",")
    if unknown := set(only) - set(names):
        parser.error(f"no such fault: {', '.join(sorted(unknown))}")
    with scene(parsed.out) as made:
        wrong = []
        for fault in FAULTS:
            if fault.name in only:
                begun = time.monotonic()
                wrong += make(made, fault)
                print(f"{fault.number:2} {fault.name}: {time.monotonic() - begun:.0f} s", flush=True)
        made.wrong = []
        made.serves()
        wrong += made.wrong
    print(*wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
