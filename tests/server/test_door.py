"""server/app.py: which pages and names get an answer, whose address counts, and what a caller without a key costs."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest
import structlog
import websockets
from conftest import Running, service
from fakes import Gate, Script, ScriptedEngine
from structlog.testing import capture_logs

from yaptext import __version__
from yaptext.engine.base import Engines
from yaptext.errors import SettingsError
from yaptext.observe import logs
from yaptext.server.access.sparing import Shown, Sparing
from yaptext.server.lifecycle import Lifecycle
from yaptext.server.process import Server
from yaptext.settings import Settings
from yaptext.settings.old_names import moved_names
from yaptext.wire import asyncapi


def scripted() -> Engines:
    engine = ScriptedEngine()
    return Engines(chat=engine, tool=engine)


def client_of(running: Running) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=running.http, trust_env=False)


async def first_frame(running: Running, key: str, origin: str | None) -> dict[str, Any]:
    async with running.connect(key, origin=origin) as socket:
        with suppress(websockets.ConnectionClosed):
            await socket.send('{"type":"ping"}')
        frame: dict[str, Any] = json.loads(await socket.recv())
        return frame


# --- whose address counts


@pytest.mark.parametrize("own_name", [{}, {"FORWARDED_ALLOW_IPS": "*"}])
async def test_a_guesser_on_this_host_cannot_change_its_address(
    own_name: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """X-Forwarded-For counts from nobody unless TRUSTED_PROXIES says so, whatever uvicorn itself would read."""
    settings = {"YAP_TEXT_API_KEY": "own", "FAILED_KEYS_PER_MINUTE": "3"}
    loaded = Settings.load(PORT=0, **settings)
    for name, value in own_name.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Settings, "load", lambda **_: loaded)
    async with service(scripted()) as running, client_of(running) as client:
        found = [
            await client.get("/status", headers={"X-API-Key": "wrong", "X-Forwarded-For": f"192.0.2.{number}"})
            for number in range(6)
        ]
        assert [answer.status_code for answer in found] == [401] * 3 + [429] * 3


async def test_a_trusted_proxy_names_the_client() -> None:
    """Each client of it is counted by itself, and not on this host for `/metrics`. Other proxies' word is nothing."""
    settings = {"YAP_TEXT_API_KEY": "own", "FAILED_KEYS_PER_MINUTE": 1, "TRUSTED_PROXIES": "127.0.0.0/8, ::1"}
    async with service(scripted(), **settings) as running, client_of(running) as client:

        async def ask(path: str, address: str) -> int:
            return (await client.get(path, headers={"X-API-Key": "wrong", "X-Forwarded-For": address})).status_code

        assert [await ask("/status", "192.0.2.1") for _ in range(2)] == [401, 429]
        assert await ask("/status", "192.0.2.2") == 401
        assert await ask("/metrics", "192.0.2.3") == 401
        assert await ask("/status", "192.0.2.1, 192.0.2.4") == 401, "the last that is no proxy of ours"


@pytest.mark.parametrize("header", ["X-Forwarded-For", "Forwarded", "Via"])
async def test_metrics_need_a_key_through_a_proxy_on_this_host(header: str) -> None:
    """Also through one that nobody named: what calls for others says so."""
    async with service(scripted()) as running, client_of(running) as client:
        assert (await client.get("/metrics")).status_code == 200
        assert (await client.get("/metrics", headers={header: "for=192.0.2.1"})).status_code == 401
        key = {header: "for=192.0.2.1", "X-API-Key": "yap_token"}
        assert (await client.get("/metrics", headers=key)).status_code == 200


@pytest.mark.parametrize(
    ("proxies", "peer", "client", "scheme"),
    [
        (None, "127.0.0.1", "127.0.0.1", "ws"),
        ("10.0.0.0/8", "127.0.0.1", "127.0.0.1", "ws"),
        ("10.0.0.0/8", "10.1.2.3", "192.0.2.1", "wss"),
        ("10.0.0.0/8", "::ffff:10.1.2.3", "192.0.2.1", "wss"),
        ("2001:db8::1, 127.0.0.1", "2001:db8::1", "192.0.2.1", "wss"),
        ("2001:db8::1, 127.0.0.1", "127.0.0.1", "192.0.2.1", "wss"),
    ],
)
async def test_client_and_scheme_come_from_trusted_proxies_alone(
    proxies: str | None, peer: str, client: str, scheme: str
) -> None:
    """Both headers, and IPv4 addresses also as a socket for both kinds writes them."""
    seen: dict[str, Any] = {}

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        seen.update(scope)

    settings = Settings.load(PORT=0) if proxies is None else Settings.load(PORT=0, TRUSTED_PROXIES=proxies)
    config = Server(inner, settings, Lifecycle()).config
    config.load()
    headers = [(b"x-forwarded-for", b"192.0.2.1"), (b"x-forwarded-proto", b"https")]
    scope = {"type": "websocket", "scheme": "ws", "client": (peer, 1), "headers": headers}
    await config.loaded_app(scope, None, None)
    assert (seen["client"][0], seen["scheme"]) == (client, scheme)


@pytest.mark.parametrize("value", ["*", "proxy.example.com", "10.0.0.1/8", "10.0.0.0/33", "127.0.0.1;::1"])
def test_a_proxy_that_is_no_address_ends_the_start(value: str) -> None:
    """In one line that names it."""
    with pytest.raises(SettingsError, match="TRUSTED_PROXIES=") as caught:
        Settings.load(TRUSTED_PROXIES=f"127.0.0.1, {value}")
    assert repr(value) in str(caught.value) and "\n" not in str(caught.value)


def test_uvicorns_own_name_of_the_setting_still_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one note."""
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "127.0.0.1,::1")
    assert Settings.load().proxies == ["127.0.0.1/32", "::ffff:127.0.0.1/128", "::1/128"]
    assert moved_names().notes == ["FORWARDED_ALLOW_IPS is now TRUSTED_PROXIES"]


# --- which pages


@pytest.mark.parametrize(
    ("origin", "welcome"),
    [
        (None, True),
        ("http://localhost", True),
        ("http://localhost:3000", True),
        ("https://LOCALHOST:8443", True),
        ("http://127.0.0.1:8000", True),
        ("http://[::1]:5173", True),
        ("https://evil.example", False),
        ("http://localhost.evil.example", False),
        ("http://127.0.0.1.evil.example:80", False),
        ("http://localhost:80@evil.example", False),
        ("ftp://localhost", False),
        ("null", False),
        ("file://", False),
        ("", False),
    ],
)
async def test_with_the_default_key_only_pages_of_this_machine_connect(origin: str | None, welcome: bool) -> None:
    """Any page knows that key, and the browser that shows it is on this host."""
    async with service(scripted()) as running:
        frame = await first_frame(running, "yap_token", origin)
        if welcome:
            assert frame["type"] == "pong"
        else:
            assert frame["error_code"] == "authentication_failed"
            assert "YAP_TEXT_API_KEY" in frame["message"] and repr(origin) in frame["message"]


@pytest.mark.parametrize(
    "variables",
    [
        {"YAP_TEXT_API_KEY": "own"},
        {"YAP_TEXT_API_KEY": "own", "ALLOWED_ORIGINS": "*"},
        {"YAP_TEXT_API_KEY": "own", "ALLOWED_ORIGINS": "https://a.example, *"},
        {"ALLOWED_ORIGINS": "https://app.example.com"},
    ],
)
async def test_the_operator_says_which_other_pages_connect(variables: dict[str, str]) -> None:
    """A key of one's own, or a list; `*` is any."""
    async with service(scripted(), **variables) as running:
        key = variables.get("YAP_TEXT_API_KEY", "yap_token")
        assert (await first_frame(running, key, "https://app.example.com"))["type"] == "pong"


@pytest.mark.parametrize(
    "value",
    [
        "app.example.com",
        "localhost:3000",
        "https://*.example.com",
        "https://app.example.com/chat",
        "https://app.example.com?x",
        "https://user@app.example.com",
        "https://",
        "wss://app.example.com",
        "https://app.example.com:99999",
        "https://bücher.example",
        "//app.example.com",
        "https://a.example https://b.example",
        "**",
    ],
)
def test_an_origin_that_no_browser_sends_ends_the_start(value: str) -> None:
    """In one line that names it; else the operator would wonder why nobody connects."""
    with pytest.raises(SettingsError, match="ALLOWED_ORIGINS=") as caught:
        Settings.load(YAP_TEXT_API_KEY="own", ALLOWED_ORIGINS=f"https://a.example, {value}")
    assert repr(value) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["*", "null", "https://a.example, *"])
def test_the_default_key_is_not_opened_to_any_page(value: str) -> None:
    """`null` is the origin of any page that is put into a sandbox. With another key, or a key file, it may be said."""
    with pytest.raises(SettingsError, match="not allowed with the default API key"):
        Settings.load(ALLOWED_ORIGINS=value)
    for other in ({"YAP_TEXT_API_KEY": "own"}, {"YAP_TEXT_KEY_FILE": "/keys"}):
        assert Settings.load(ALLOWED_ORIGINS=value, **other).allowed_origins == value


def test_origins_are_what_browsers_make_of_them() -> None:
    """The scheme's own port is never sent; empty items of a list are nothing."""
    listed = "https://A.example:443/,http://b.example:80, http://c.example:443,,capacitor://localhost,http://[::1]:1,"
    assert sorted(Settings.load(ALLOWED_ORIGINS=listed).origins or ()) == [
        "capacitor://localhost",
        "http://[::1]:1",
        "http://b.example",
        "http://c.example:443",
        "https://a.example",
    ]


# --- which names


HTTP_ROUTES = ["/healthz", "/livez", "/readyz", "/metrics", "/asyncapi.json"]


@pytest.mark.parametrize(
    ("host", "welcome"),
    [
        ("localhost:8000", True),
        ("LOCALHOST.", True),
        ("yap.localhost", True),
        ("127.0.0.1", True),
        ("[::1]:8000", True),
        ("192.0.2.1:8000", True),
        ("yap.example.com:443", True),
        ("evil.example", False),
        ("evil.example:8000", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("a" * 5000, False),
    ],
)
async def test_on_loopback_routes_without_a_key_answer_to_local_names(host: str, welcome: bool) -> None:
    """A site that gives this machine's address as its own reads nothing, also not with the key that everyone knows. An
    address is no name that a site could give."""
    async with service(scripted(), ALLOWED_HOSTS="yap.example.com, yap") as running, client_of(running) as client:
        for path in [*HTTP_ROUTES, "/status?api_key=yap_token"]:
            answer = await client.get(path, headers={"Host": host})
            assert answer.status_code == (200 if welcome else 403), path
            if not welcome:
                assert answer.json()["error_code"] == "host_not_allowed" and "ALLOWED_HOSTS" in answer.json()["message"]
        ticket = await client.post("/ticket", headers={"Host": host, "X-API-Key": "yap_token"})
        assert ticket.status_code == (200 if welcome else 403)


async def test_a_key_of_ones_own_and_another_address_need_no_such_name() -> None:
    """A proxy may pass its name on; and what the network reaches has no secret of this machine."""
    host = {"Host": "yap.example.com", "X-API-Key": "own"}
    async with service(scripted(), YAP_TEXT_API_KEY="own") as running, client_of(running) as client:
        assert (await client.get("/status", headers=host)).status_code == 200
        assert (await client.get("/healthz", headers=host)).status_code == 403
        running.server.lifecycle.on_loopback = False
        for path in HTTP_ROUTES:
            assert (await client.get(path, headers=host)).status_code == 200, path


@pytest.mark.parametrize("value", ["*", "https://yap.example.com", "yap.example.com:443", "a b"])
def test_a_host_that_is_no_name_ends_the_start(value: str) -> None:
    """In one line that names it."""
    with pytest.raises(SettingsError, match="ALLOWED_HOSTS=") as caught:
        Settings.load(ALLOWED_HOSTS=value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("path", ["/status/?api_key=yap_token", "/healthz/", "/ws/"])
async def test_no_address_is_sent_on_to_another(path: str) -> None:
    """A redirect would carry the key to wherever `Host` says."""
    async with service(scripted()) as running, client_of(running) as client:
        answer = await client.get(path, headers={"Host": "evil.example"})
        assert answer.status_code == 404 and "location" not in answer.headers


# --- what it costs


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Grows by one each time the AsyncAPI document is built."""
    times: list[int] = []
    build = asyncapi.document

    def counted() -> dict[str, Any]:
        times.append(1)
        return build()

    monkeypatch.setattr(asyncapi, "document", counted)
    yield times


async def test_the_protocols_document_is_built_once(built: list[int]) -> None:
    """Who has it already, by its ETag, gets 304 and nothing else."""
    async with service(scripted()) as running, client_of(running) as client:
        before = len(built)
        found = [await client.get("/asyncapi.json") for _ in range(5)]
        assert len(built) == before
        (tag,) = {answer.headers["ETag"] for answer in found}
        assert tag.startswith('"') and found[0].json()["asyncapi"] == "3.0.0"
        for known in (tag, f"W/{tag}", f'"other", {tag}', "*"):
            answer = await client.get("/asyncapi.json", headers={"If-None-Match": known})
            assert (answer.status_code, answer.content, answer.headers["ETag"]) == (304, b"", tag)
        for other in ('"other"', "", tag.strip('"')):
            assert (await client.get("/asyncapi.json", headers={"If-None-Match": other})).status_code == 200
        head = await client.head("/asyncapi.json")
        assert head.headers["ETag"] == tag and int(head.headers["Content-Length"]) == len(found[0].content)


@pytest.mark.parametrize(
    ("how", "address"), [(None, "127.0.0.0/24"), ("whole", "127.0.0.1"), ("truncated", "127.0.0.0/24"), ("none", None)]
)
async def test_refusals_do_not_fill_the_log(how: str | None, address: str | None) -> None:
    """One line an address, then one every ten seconds with their number; the metric counts them all."""
    settings = {} if how is None else {"LOG_ADDRESS": how}
    with capture_logs() as lines:
        async with service(scripted(), FAILED_KEYS_PER_MINUTE=0, **settings) as running, client_of(running) as client:
            for _ in range(25):
                assert (await first_frame(running, "wrong", None))["error_code"] == "authentication_failed"
                assert (await client.get("/status", headers={"X-API-Key": "wrong"})).status_code == 401
            metrics = (await client.get("/metrics")).text
    for event, fields in (("connection.refused", {}), ("request.refused", {"status": 401})):
        refused = [line for line in lines if line["event"] == event]
        assert len(refused) < 10 and refused[0]["count"] == 1
        for line in refused:
            assert line["error_code"] == "authentication_failed" and line.get("address") == address
            assert fields.items() <= line.items()
    assert 'yaptext_errors_total{code="authentication_failed"} 25.0' in metrics


# --- log lines and metrics


async def test_ready_says_what_serves() -> None:
    """Who reads only the log knows the models, their weights, the slots and the version."""
    chat, tool = ScriptedEngine(model="big", weights="awq"), ScriptedEngine(model="small")
    with capture_logs() as lines:
        async with service(Engines(chat=chat, tool=tool), MAX_CONCURRENT_CONNECTIONS=7) as running:
            address = f"127.0.0.1:{running.server.bound_port}"
    (ready,) = [line for line in lines if line["event"] == "server.ready"]
    assert (ready["url"], ready["address"], ready["version"]) == (f"http://{address}", address, __version__)
    assert ready["models"] == {"chat": "big", "tool": "small"} and ready["pid"] == os.getpid()
    assert ready["weights"] == {"chat": "awq", "tool": "float"} and ready["connections"] == 7


async def test_a_turn_says_whose_it_is_and_what_ran_beside_it() -> None:
    """So that a slow one can be explained; a connection names the session of its last turn, if it had one."""
    engine, gate = ScriptedEngine(backlog_ms=12.34), Gate()

    async def say(socket: Any, session_id: str, until: str) -> None:
        await socket.send(json.dumps({"type": "start", "session_id": session_id, "user_utterance": "hi"}))
        while json.loads(await socket.recv())["type"] != until:
            pass

    with capture_logs() as lines:
        async with service(Engines(chat=engine, tool=engine), WARM_NEXT_TURN=0) as running:
            engine.chat = Script(["a"], pace=gate)
            async with running.connect() as first, running.connect() as second, running.connect() as third:
                await say(first, "one", "toolcall")
                await say(second, "two", "toolcall")
                gate.step(2)
                for socket in (first, second):
                    while json.loads(await socket.recv())["type"] != "done":
                        pass
                engine.chat = Script(["a"])
                await say(first, "three", "done")
                await third.send('{"type": "end"}')
                await third.wait_closed()
    turns = {line["session_id"]: line for line in lines if line["event"] == "turn.finished"}
    assert [(turns[name]["key"], turns[name]["others"]) for name in ("one", "two", "three")] == [
        ("default", 0),
        ("default", 1),
        ("default", 0),
    ]
    assert {line["backlog_ms"] for line in turns.values()} == {12.3}
    closed = [line["session_id"] for line in lines if line["event"] == "connection.closed"]
    assert sorted(closed, key=str) == [None, "three", "two"]


FAIL2BAN = (
    r'^(?:\S+ \S+: )?\{"event": "(?:connection|request)\.refused", "level": "info", "address": "<SUBNET>", '
    r'(?:"status": 401, )?"error_code": "authentication_failed"'
)
"""The filter in yaptext/server/README.md. fail2ban replaces <SUBNET> by an address, with or without a mask."""


@pytest.mark.parametrize("how", ["whole", "truncated", "none"])
async def test_a_wrong_key_is_a_line_that_fail2ban_finds(how: Shown) -> None:
    """Over both protocols, as JSON; not a server that is full, and not what an address may be made of."""
    wanted = re.compile(FAIL2BAN.replace("<SUBNET>", r"(?P<found>[0-9a-f.:]+(?:/\d+)?)"))
    written: list[str] = []
    logger, handler = logging.getLogger("refusals"), logging.Handler()
    handler.setFormatter(logs.formatter())
    handler.emit = lambda record: written.append(handler.format(record))  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.setLevel("INFO")
    logger.propagate = False

    def tell(event: str, **fields: object) -> None:
        chain = [structlog.stdlib.add_log_level, structlog.stdlib.ProcessorFormatter.wrap_for_formatter]
        structlog.wrap_logger(logger, processors=chain, wrapper_class=structlog.stdlib.BoundLogger).info(
            event, **fields
        )

    sparing = Sparing(tell, how)
    for address in ("192.0.2.7", "2001:db8:1:2::9", '192.0.2.9", "error_code": "authentication_failed'):
        sparing.tell("connection.refused", address, error_code="authentication_failed")
        sparing.tell("request.refused", address, status=401, error_code="authentication_failed")
        sparing.tell("connection.refused", address, error_code="server_at_capacity")
        sparing.tell("request.refused", address, status=400)
    logger.removeHandler(handler)
    found = [match["found"] for match in map(wanted.match, written) if match is not None]
    expected = {"whole": ["192.0.2.7", "2001:db8:1:2::9"], "truncated": ["192.0.2.0/24", "2001:db8:1::/48"], "none": []}
    assert found == [address for address in expected[how] for _ in range(2)] and written
