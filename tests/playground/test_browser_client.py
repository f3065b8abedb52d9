"""client/browser/yap.js: what a developer does with it, in a real browser."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import websockets
from conftest import Running, service, until
from fakes import Gate, Script, ScriptedEngine, at_once
from other_server import ACK, TURN, serving

from yaptext.engine.base import Engine, Engines
from yaptext.server import lifecycle

BROWSER = Path(__file__).resolve().parents[2] / "yaptext" / "client" / "browser"
CALL = '[{"name":"get_weather","arguments":{"city":"Oslo"}}]'
HEAD = """async () => {
    const { connect, Yap, YapError } = await import("/client.js");
    const failure = (error) => ({ ...error, message: error.message, ours: error instanceof YapError });
    const tool = { name: "get_weather", parameters: { type: "object", properties: { city: { type: "string" } } } };
    const key = "yap_token";
"""
pytestmark = pytest.mark.browser


@asynccontextmanager
async def site(tab: Any, engine: Engine, **variables: Any) -> AsyncIterator[Running]:
    """The service, and a page of it without a policy, as the playground's does not let a test in."""
    async with service(Engines(chat=engine, tool=engine), **variables) as running:
        await tab.page.goto(f"{running.http}/healthz")
        yield running
        await tab.page.goto("about:blank")


async def run(tab: Any, script: str) -> Any:
    """What the script returns; it is the body of an asynchronous function."""
    return await tab.page.evaluate(f"{HEAD}{script}}}")


async def test_a_turn_is_its_frames(tab: Any) -> None:
    """Iterated, they come in order; text, decision, usage and timings are there at the end, for several readers."""
    async with site(tab, ScriptedEngine()):
        found = await run(
            tab,
            """
            const yap = await connect({ key, sessionId: "s" });
            const turn = yap.turn("hi", { sampling: { max_tokens: 2 } });
            const types = [];
            for await (const event of turn) types.push(event.type);
            const again = [];
            for await (const event of turn) again.push(event.type);
            const same = (await turn.done) === turn;
            return { types, again, same, text: turn.text, number: turn.number, decision: turn.decision.status,
                     tokens: turn.usage.completion_tokens, finish: turn.finishReason, total: turn.timings.total_ms,
                     cancelled: turn.cancelled, over: turn.over, id: yap.sessionId };
            """,
        )
    assert found["types"] == found["again"] == ["ack", "toolcall", "token", "token", "final", "done"]
    assert (found["text"], found["number"], found["decision"], found["id"]) == ("Hello there", 1, "no", "s")
    assert (found["tokens"], found["finish"], found["cancelled"]) == (2, "length", False)
    assert found["same"] and found["over"] and found["total"] > 0
    assert not any("yap_token" in address for address in tab.asked), "a key in an address is a key in a log"


async def test_the_example_of_the_page_runs(tab: Any) -> None:
    """As it stands in client/browser/README.md, but for the address of the service; the backend is this test."""
    page = (BROWSER / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```javascript\n(.*?)^```$", page, re.M | re.S)
    shown: list[str] = []
    async with site(tab, ScriptedEngine()) as running:

        def show(text: str) -> None:
            shown.append(text)

        async def backend(route: Any) -> None:
            await route.fulfill(body=await asyncio.to_thread(ticket_for, running))

        await tab.page.route("**/my-backend/ticket", backend)
        await tab.page.expose_function("show", show)
        assert example.count("https://yap.example.com") == 1
        await tab.page.add_script_tag(content=example.replace("https://yap.example.com", running.http), type="module")
        await until(lambda: "".join(shown) == "Hello there.")


def ticket_for(running: Running) -> str:
    asking = urllib.request.Request(f"{running.http}/ticket", method="POST", headers={"X-API-Key": "yap_token"})
    with urllib.request.urlopen(asking) as answer:
        return str(json.loads(answer.read())["ticket"])


async def test_a_new_turn_interrupts(tab: Any) -> None:
    """The running turn ends, cancelled, with the text so far; what was heard of it goes with the new one."""
    gate, engine = Gate(), ScriptedEngine(chat=Script(["One", " two", " three"]))
    async with site(tab, engine):
        engine.chat.pace = gate
        script = """
            const yap = await connect({ key, sessionId: "s" });
            const first = yap.turn("count");
            for await (const event of first) if (event.type === "token" && first.text === "One two") break;
            const second = yap.turn("and now?", { heard_text: "One" });
            await second.done;
            const { history } = await yap.session();
            const said = history.map(({ content }) => content);
            return { cancelled: first.cancelled, text: first.text, second: second.text, said };
        """
        running = asyncio.ensure_future(run(tab, script))
        gate.step(2)
        await until(lambda: engine.aborted == 1)
        gate.step(3)
        found = await running
    assert (found["cancelled"], found["text"], found["second"]) == (True, "One two", "One two three")
    assert found["said"] == ["count", "One", "and now?", "One two three"]


async def test_cancel_stops_a_turn_and_cuts_what_was_not_heard(tab: Any) -> None:
    """While it runs, and after its end, as playback is slower than the model; also by leaving the loop. A turn that
    is over is left alone."""
    gate, engine = Gate(), ScriptedEngine(chat=Script(["One", " two", " three"]))
    async with site(tab, engine):
        engine.chat.pace = gate
        script = """
            const yap = await connect({ key, sessionId: "s" });
            const first = yap.turn("count");
            for await (const event of first) if (event.type === "token") first.cancel({ heardText: "On" });
            const second = yap.turn("again");
            await second.done;
            await second.cancel({ heardChars: 7 });
            await second.cancel();
            const { history } = await yap.session();
            const said = history.map(({ content }) => content);
            const third = yap.turn("and again");
            for await (const event of third) if (event.type === "token") break;
            await third.done;
            return { first: first.cancelled, second: second.cancelled, third: third.cancelled, said };
        """
        running = asyncio.ensure_future(run(tab, script))
        gate.step()
        await until(lambda: engine.aborted == 1)
        gate.step(4)
        found = await running
    assert (found["first"], found["second"], found["third"]) == (True, False, True)
    assert found["said"][0] == "count" and found["said"][2:] == ["again", "One two"]


async def test_functions_answer_their_calls(tab: Any) -> None:
    """A tool with `run` is answered by the client, and the same turn goes on to the reply; one that throws is answered
    with its error. Without `run` the calls are the caller's to answer."""
    engine = ScriptedEngine(decision=Script([CALL]))
    async with site(tab, engine, MAX_TOOL_ROUNDS=1):
        found = await run(
            tab,
            """
            const given = [];
            const weather = { ...tool, run: async ({ city }) => { given.push(city); return { degrees: -3 }; } };
            const broken = { ...tool, run: () => { throw new Error("no network"); } };
            const yap = await connect({ key, sessionId: "s", tools: [weather] });
            const first = yap.turn("is it cold?");
            const types = [];
            for await (const event of first) types.push(event.type);
            const second = await yap.turn("and now?", { tools: [broken] }).done;
            const third = await yap.turn("still?", { tools: [tool], await_tools: true }).done;
            const [{ id, name }] = third.calls;
            const last = await yap.toolResult(third, [{ id, content: "mild" }]).done;
            return { given, types, first: first.text, second: second.text, third: third.text, name, last: last.text,
                     tokens: first.usage.completion_tokens, left: first.calls };
            """,
        )
    prompts = [engine.decode(ids) for ids, sampling, _ in engine.requests if sampling.json_schema is None]
    assert found["given"] == ["Oslo"] and found["left"] == [] and found["tokens"] == 3
    assert found["types"] == ["ack", "toolcall", "done", "ack", "toolcall", *["token"] * 3, "final", "done"]
    assert found["first"] == found["second"] == found["last"] == "Hello there." and found["third"] == ""
    assert found["name"] == "get_weather"
    for result in ("-3", "no network", "mild"):
        assert any(result in prompt for prompt in prompts)


async def test_errors_say_what_helps(tab: Any) -> None:
    """Each has its code, and whether waiting helps; the session goes on after those of one request."""
    tab.allowed = ("401",)
    async with site(tab, ScriptedEngine()) as running:
        found = await run(
            tab,
            """
            const wrong = await connect({ key: "wrong" }).catch(failure);
            const neither = await connect({}).catch((error) => error.constructor.name);
            const yap = await connect({ key });
            const bad = await yap.turn("hi", { sampling: { temperature: 9 } }).done.catch(failure);
            const persona = await yap.turn("hi", { persona_style: "nonsense" }).done.catch(failure);
            let thrown = null;
            try { for await (const _ of yap.turn("")); } catch (error) { thrown = failure(error); }
            const warm = await yap.warm({ persona_style: "nonsense" }).catch(failure);
            const after = await yap.turn("hi").done;
            yap.close();
            const closed = await yap.turn("hi").done.catch(failure);
            return { wrong, neither, bad, persona, thrown, warm, after: after.text, closed };
            """,
        )
        assert found["wrong"]["code"] == "authentication_failed" and not found["wrong"]["retryable"]
        assert found["neither"] == "TypeError" and found["wrong"]["ours"]
        assert (found["bad"]["code"], found["thrown"]["code"]) == ("bad_message", "bad_message")
        assert "temperature" in found["bad"]["message"]
        assert found["persona"]["code"] == found["warm"]["code"] == "unknown_persona"
        assert (found["after"], found["closed"]["code"]) == ("Hello there.", "closed")
        await until(lambda: running.active == 0)


async def test_an_error_is_that_of_its_own_request(tab: Any) -> None:
    """The frame of an error names no request: one of a turn is not taken for one of the warm-up that still runs."""
    gate, engine = Gate(), ScriptedEngine()
    async with site(tab, engine):
        engine.chat.pace = gate
        script = """
            const yap = await connect({ key, sessionId: "s" });
            const warming = yap.warm({ persona_text: "You are a lighthouse." });
            const bad = await yap.turn("hi", { sampling: { top_k: -1 } }).done.catch(failure);
            const worse = await yap.setPersona({ persona_style: "nonsense" }).catch(failure);
            const turn = yap.turn("hi");
            const wrong = await yap.warm({ persona_style: "nonsense" }).catch(failure);
            return { bad, worse, wrong, segment: (await warming).segment, text: (await turn.done).text };
        """
        running = asyncio.ensure_future(run(tab, script))
        await until(lambda: gate.waiting == 2 or running.done())
        gate.step(9)
        found = await running
    assert (found["bad"]["code"], found["worse"]["code"]) == ("bad_message", "unknown_persona")
    assert (found["wrong"]["code"], found["segment"], found["text"]) == (
        "unknown_persona",
        "persona_static",
        "Hello there.",
    )


async def test_a_full_service_is_waited_for(tab: Any) -> None:
    """`server_at_capacity` says how long; the client waits that long, as often as `attempts` allows, and says so."""
    async with site(tab, ScriptedEngine(), MAX_CONCURRENT_CONNECTIONS=1) as running:
        found = await run(
            tab,
            """
            const first = await connect({ key });
            const refused = await connect({ key, attempts: 1 }).catch(failure);
            const states = [];
            const waiting = connect({ key, onstate: ({ state, error, waitMs }) => {
                states.push([state, error?.code, waitMs]);
                if (state === "waiting") first.close();
            } });
            const second = await waiting;
            const { text } = await second.turn("hi").done;
            return { refused, states, text };
            """,
        )
        assert found["refused"]["code"] == "server_at_capacity" and found["refused"]["retryable"]
        assert found["refused"]["retryAfterMs"] > 0 and found["text"] == "Hello there."
        assert [state for state, *_ in found["states"]] == ["connecting", "waiting", "connecting", "connected"]
        assert found["states"][1][1] == "server_at_capacity" and found["states"][1][2] > 0
        assert running.active == 1


async def test_a_lost_connection_fails_its_turn_and_comes_back(tab: Any) -> None:
    """The turn that ran fails with `connection_lost`, which a retry helps; the next one has the same session."""
    gate, engine = Gate(), ScriptedEngine(chat=Script(["One", " two"]))
    async with site(tab, engine) as running:
        engine.chat.pace = gate
        script = """
            const states = [];
            const yap = await connect({ key, sessionId: "s", onstate: ({ state }) => states.push(state) });
            await yap.turn("first").done;
            const lost = await yap.turn("second").done.catch(failure);
            const { number } = await yap.turn("third").done;
            return { lost, number, states };
        """
        finding = asyncio.ensure_future(run(tab, script))
        gate.step(3)
        await until(lambda: gate.waiting == 1 and engine.finished > 1)
        for connection in list(running.server.server_state.connections):
            if hasattr(connection, "handshake_started_event") or "WebSocket" in type(connection).__name__:
                connection.transport.abort()
        await until(lambda: engine.aborted == 1)
        gate.step(2)
        found = await finding
    assert (found["lost"]["code"], found["lost"]["retryable"]) == ("connection_lost", True)
    assert found["number"] == 3
    assert found["states"] == ["connecting", "connected", "disconnected", "connecting", "connected"]


async def test_a_restart_is_waited_for_as_long_as_the_service_asks(
    tab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A drain lets the running turn finish. A turn that is begun while the service is away waits for it; of several,
    only the newest is sent."""
    monkeypatch.setattr(lifecycle, "_RETRY_AFTER_MS", (700, 800))
    tab.allowed = ("ERR_CONNECTION_REFUSED", "503")
    store = {"SESSION_STORE": f"sqlite:{tmp_path}/sessions.db", "YAP_TEXT_STATE_DIR": str(tmp_path)}
    gate, engine = Gate(), ScriptedEngine(chat=Script(["One", " two"]))
    engines = Engines(chat=engine, tool=engine)
    async with service(engines, **store) as running:
        engine.chat.pace = gate
        port = running.server.bound_port
        await tab.page.goto(f"{running.http}/healthz")
        script = """
            let away;
            const leaving = new Promise((resolve) => { away = resolve; });
            const [waits, states] = [[], []];
            const yap = await connect({ key, sessionId: "s", onstate: ({ state, error, waitMs }) => {
                states.push(state);
                if (state === "waiting") { waits.push([error.code, waitMs, performance.now()]); away(); }
                else if (state === "connecting") waits.at(-1)?.push(performance.now());
            } });
            const first = await yap.turn("first").done;
            await leaving;
            const [old, last] = [yap.turn("superseded"), yap.turn("second")];
            await last.done;
            const { history } = await yap.session();
            const said = history.map(({ content }) => content);
            return { first: first.text, old: old.cancelled, waits, number: last.number, said, states };
        """
        finding = asyncio.ensure_future(run(tab, script))
        gate.step()
        await until(lambda: gate.waiting == 1 and engine.running == 1)
        running.server.begin_drain()
        gate.step()
        await until(lambda: running.active == 0)
    engine.chat.pace = at_once
    async with service(engines, PORT=port, **store):
        found = await finding
        await tab.page.goto("about:blank")
    assert (found["first"], found["old"], found["number"]) == ("One two", True, 2)
    assert found["said"] == ["first", "One two", "second", "One two"]
    code, wait_ms, since, until_ms = found["waits"][0]
    assert code == "going_away" and wait_ms >= 700
    assert until_ms - since >= wait_ms - 1
    assert found["states"][2:4] == ["disconnected", "waiting"], "it did not try before that"


async def test_a_ticket_is_asked_for_each_connection(tab: Any) -> None:
    """The callback stands for the page's own backend. One that fails is tried again, as its network may be back."""
    async with site(tab, ScriptedEngine()):
        found = await run(
            tab,
            """
            let asked = 0;
            const ticket = async () => {
                if (++asked === 1) throw new TypeError("Failed to fetch");
                const answer = await fetch("/ticket", { method: "POST", headers: { "X-API-Key": key } });
                return (await answer.json()).ticket;
            };
            const never = await connect({ ticket: () => { throw new Error("no"); }, attempts: 2 }).catch(failure);
            const yap = await connect({ ticket });
            const { text } = await yap.turn("hi").done;
            return { asked, never, text };
            """,
        )
    assert (found["asked"], found["text"]) == (2, "Hello there.")
    assert (found["never"]["code"], found["never"]["message"]) == ("ticket_failed", "No ticket: no")


async def test_a_session_is_warmed_changed_read_and_forgotten(tab: Any) -> None:
    """Each method resolves to the frame that answers it, also if several wait at once."""
    async with site(tab, ScriptedEngine()):
        found = await run(
            tab,
            """
            const yap = await connect({ key, sessionId: "s" });
            const [persona, warmed, history] = await Promise.all([
                yap.setPersona({ persona_style: "savage" }),
                yap.warm({ persona_style: "savage" }),
                yap.warm({ history: [{ role: "user", content: "hello" }] }),
            ]);
            const turn = yap.turn("hi");
            const session = await yap.session();
            await turn.done;
            return { persona, warmed, history, session, forgotten: await yap.forget(), after: await yap.session() };
            """,
        )
    assert (found["persona"]["for"], found["persona"]["persona_style"]) == ("set_persona", "savage")
    assert (found["warmed"]["segment"], found["history"]["segment"]) == ("persona_static", "history")
    assert found["session"]["persona_style"] == "savage"
    assert found["forgotten"]["known"] is True and found["after"]["known"] is False


async def test_a_page_of_another_site_imports_it(tab: Any) -> None:
    """The module knows where it came from. ALLOWED_ORIGINS lets the page in, with a ticket from its own backend."""
    page = "<link rel=icon href=data:,><script type=module>import * as c from '%s/client.js'; window.c = c</script>"
    asked = asyncio.Queue[str]()

    async def backend(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = (page % await asked.get()).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        writer.close()
        await writer.wait_closed()

    engine = ScriptedEngine()
    async with await asyncio.start_server(backend, "127.0.0.1", 0) as other:
        origin = f"http://127.0.0.1:{other.sockets[0].getsockname()[1]}"
        async with service(Engines(chat=engine, tool=engine), ALLOWED_ORIGINS=origin) as running:
            asked.put_nowait(running.http)
            ticket = await asyncio.to_thread(ticket_for, running)
            await tab.page.goto(origin, wait_until="load")
            script = "async (ticket) => (await (await c.connect({ ticket: () => ticket })).turn('hi').done).text"
            assert await tab.page.evaluate(script, ticket) == "Hello there."
            await tab.page.goto("about:blank")


# --- a service, or a page, that does what it should not


async def test_a_frame_that_cannot_be_read_ends_the_turn(tab: Any) -> None:
    """It does not hang, nothing is thrown into the page, and the next turn finds another socket. What is known of no
    type, or answers nothing, is ignored."""
    for wrong in ("{", "null", "[1]", '"text"', '{"turn":1}'):
        came = 0

        async def talk(socket: websockets.ServerConnection, wrong: str = wrong) -> None:
            nonlocal came
            came += 1
            await socket.recv()
            for frame in ({"type": "turn"}, {"type": "mood", "turn": 1}, {"type": "set_persona"}):
                await socket.send(json.dumps(frame))
            if came == 1:
                await socket.send(json.dumps(ACK))
                await socket.send(wrong)
                await socket.wait_closed()
            for frame in TURN:
                await socket.send(json.dumps(frame))
            await socket.wait_closed()

        async with site(tab, ScriptedEngine()), serving(talk) as url:
            found = await run(
                tab,
                """
                const yap = await connect({ url: "URL", ticket: () => "t" });
                const lost = await yap.turn("hi").done.catch(failure);
                const { text } = await yap.turn("again").done;
                yap.close();
                return { lost, text };
                """.replace("URL", url),
            )
        assert found["lost"]["code"] == "connection_lost" and "cannot be read" in found["lost"]["message"], wrong
        assert found["text"] == "a"


@pytest.mark.parametrize("begun", [False, True])
async def test_a_network_that_is_silent_is_noticed(tab: Any, begun: bool) -> None:
    """A browser keeps a socket whose network is gone. The service answers what it is asked at once: without that the
    client takes another socket. In a turn it asks after a silence; a service that is only slow is not left."""
    came = 0

    async def talk(socket: websockets.ServerConnection) -> None:
        nonlocal came
        came += 1
        async for frame in socket:
            starts = json.loads(frame)["type"] == "start"
            if came > 1 and starts:
                await socket.send(json.dumps(ACK))
                answering.append(asyncio.create_task(answer(socket)))
            elif came > 1 or (begun and len(asked) < 2):
                asked.append(frame)
                for each in TURN[:2] if starts else [{"type": "pong"}]:
                    await socket.send(json.dumps(each))

    async def answer(socket: websockets.ServerConnection) -> None:
        await asyncio.sleep(1.2)  # four times as long as the client waits for a network
        for each in TURN[1:]:
            await socket.send(json.dumps(each))

    asked: list[Any] = []
    answering: list[Any] = []
    async with site(tab, ScriptedEngine()), serving(talk) as url:
        found = await run(
            tab,
            """
            const states = [];
            const onstate = ({ state }) => states.push(state);
            const yap = await connect({ url: "URL", ticket: () => "t", timeoutMs: 300, onstate });
            const begun = performance.now();
            const turn = yap.turn("hi");
            if (!BEGUN) turn.cancel();
            const lost = await turn.done.catch(failure);
            const ms = performance.now() - begun;
            const { text } = await yap.turn("again").done;
            await new Promise((resolve) => setTimeout(resolve, 600));
            yap.close();
            return { lost, ms, text, states };
            """.replace("URL", url).replace("BEGUN", json.dumps(begun)),
        )
    assert (found["lost"]["code"], found["lost"]["retryable"]) == ("connection_lost", True)
    assert 250 < found["ms"] < 10_000 and found["text"] == "a" and came == 2
    assert found["states"] == ["connecting", "connected", "disconnected", "connecting", "connected", "closed"]


async def test_a_callback_that_throws_stops_nothing(tab: Any) -> None:
    """The page hears of it as of any error."""
    tab.allowed = ("mine",)
    async with site(tab, ScriptedEngine()) as running:
        script = """
            let gone;
            const left = new Promise((resolve) => { gone = resolve; });
            const yap = await connect({ key, onstate: ({ state }) => {
                if (state === "disconnected") gone();
                throw new Error("mine");
            } });
            const first = await yap.turn("hi").done;
            window.ready();
            await left;
            const second = await yap.turn("hi").done;
            return [first.text, second.text];
        """
        ready = asyncio.Event()
        await tab.page.expose_function("ready", ready.set)
        finding = asyncio.ensure_future(run(tab, script))
        await asyncio.wait_for(ready.wait(), 20)
        for connection in list(running.server.server_state.connections):
            if "WebSocket" in type(connection).__name__:
                connection.transport.abort()
        assert await finding == ["Hello there.", "Hello there."]
    assert any("mine" in text for text in tab.complaints)


@pytest.mark.skipif(not shutil.which("npm"), reason="there is no npm, which has TypeScript")
def test_the_types_are_those_of_the_module(tmp_path: Path) -> None:
    """TypeScript takes a program of all that is there, and refuses fields and codes that are not."""
    (tmp_path / "package.json").write_text('{"private": true, "type": "module"}', encoding="utf-8")
    command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", f"typescript@{TYPESCRIPT}"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=250)
    shutil.copy(BROWSER / "yap.d.ts", tmp_path / "client.d.ts")
    (tmp_path / "use.ts").write_text(USE, encoding="utf-8")
    options = ["--strict", "--noEmit", "--target", "es2022", "--module", "nodenext", "--lib", "es2022,dom"]
    checked = subprocess.run(
        [tmp_path / "node_modules" / ".bin" / "tsc", *options, "use.ts"],
        cwd=tmp_path, capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert (checked.stdout, checked.returncode) == ("", 0)


TYPESCRIPT = "5.9"
USE = """
import { connect, Turn, Yap, YapError, type Options, type TurnEvent } from "./client.js";

const options: Options = { key: "k", sessionId: "s", tools: [{ name: "clock", run: () => "12:00" }] };
const yap: Yap = await connect(options);
const turn: Turn = yap.turn("hi", { persona_style: "savage", sampling: { max_tokens: 5 } });
for await (const event of turn) if (event.type === "token") console.log(event.text.length);
await turn.cancel({ heardText: "a" });
const last: TurnEvent | undefined = turn.events.at(-1);
console.log((await turn.done).usage?.cached_tokens, turn.decision?.raw[0]?.name, turn.calls.length, last);
console.log((await yap.session()).history.length, (await yap.warm({ history: [] })).ms, (await yap.forget()).known);
await yap.toolResult(turn, [{ id: "c", content: { degrees: 3 } }]).done;
yap.turn(null).done.catch((error) => error instanceof YapError && error.retryable && console.log(error.retryAfterMs));
// @ts-expect-error no such field
yap.turn("hi", { persona: "savage" });
// @ts-expect-error no such code
new YapError("nonsense", "x");
yap.close();
"""


def test_the_types_name_every_error_code() -> None:
    """A code that the service adds is added there."""
    from yaptext.errors import wire_codes

    types = (BROWSER / "yap.d.ts").read_text(encoding="utf-8")
    for code in wire_codes():
        assert json.dumps(code) in types
