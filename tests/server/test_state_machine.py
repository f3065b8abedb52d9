"""The life of turns and sessions as a state machine: any order of what clients, engines and time may do, held against
the protocol's rules after every step.

Time and engine steps are the machine's own, so a step takes what it computes and no more. `MACHINE_STEPS=50000` is the
full run; without it a few thousand.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
import os
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any

import pytest
import structlog
from conftest import Frame, MemorySocket
from fakes import ScriptedEngine
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from yaptext.dialogue.runtime import Runtime
from yaptext.dialogue.tools import ToolSet
from yaptext.dialogue.turn import Turn
from yaptext.engine.base import CHAT, Delta, Engines, Sampling
from yaptext.errors import EngineFailed
from yaptext.server.access.accounts import Account
from yaptext.server.access.keyfile import NO_LIMITS, Key
from yaptext.server.lifecycle import Lifecycle
from yaptext.server.ws.connection import Connection
from yaptext.settings import Settings
from yaptext.wire.frames import encode

STEPS = int(os.environ.get("MACHINE_STEPS", "6000"))
A_RUN = 50
"""Steps of one run."""
DECISION_S, IDLE_S = 1.0, 100.0
CALL = '[{"name":"play_music","arguments":{"query":"mix"}}]'
_EXTRAS: list[dict[str, Any]] = [
    {},
    {"history_text": None},
    {"history_text": "User: a\nAssistant: b"},
    {"tools": []},
    {"tools": None},
    {"persona_text": "You are Ada."},
    {"await_tools": True},
    {"history": [{"role": "user", "content": "a"}], "note": "n"},
]
_USUAL = {"chat": ("a", None), "decision": ("[]", None), "warm": ("x", "length")}
"""What an engine says when nothing else is asked of it, by the kind of request."""
_turn: contextvars.ContextVar[Turn | None] = contextvars.ContextVar("turn", default=None)


class Clock(asyncio.SelectorEventLoop):
    """A loop whose time passes when the machine says so."""

    now = 0.0

    def time(self) -> float:
        return self.now

    def step(self) -> None:
        """One round of all that is ready, and of timers that are due."""
        self.call_soon(self.stop)
        self.run_forever()

    @property
    def at_rest(self) -> bool:
        return not self._ready  # type: ignore[attr-defined]

    def settle(self) -> None:
        self.step()
        for _ in range(5000):
            self.step()
            if self.at_rest:
                return
        raise AssertionError("it never comes to rest")


class Stream:
    """One request to the engine: it gets its deltas from the machine."""

    def __init__(self, kind: str) -> None:
        self.kind, self.turn, self.over = kind, _turn.get(), False
        self.steps: asyncio.Queue[tuple[str, str | None] | Exception] = asyncio.Queue()


class SteeredEngine(ScriptedEngine):
    """Streams go on, and let go, when they are told to."""

    steered = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.streams: list[Stream] = []
        self.free = asyncio.Event()
        self.free.set()
        self.opened: list[tuple[str, Turn | None]] = []

    async def stream(
        self, prompt: Sequence[int], sampling: Sampling, *, priority: int = CHAT
    ) -> AsyncGenerator[Delta, None]:
        if not self.steered:
            async for delta in super().stream(prompt, sampling, priority=priority):
                yield delta
            return
        kind = "decision" if sampling.json_schema is not None else "chat" if priority == CHAT else "warm"
        stream = Stream(kind)
        self.streams.append(stream)
        self.opened.append((kind, stream.turn))
        try:
            while True:
                step = await stream.steps.get()
                if isinstance(step, Exception):
                    raise step
                yield Delta(step[0], 1, len(prompt), 0, step[1])
                if step[1] is not None:
                    return
        finally:
            stream.over = True  # it lets go, perhaps for a timeout: nobody reads what would come now
            try:
                await self.free.wait()
            finally:
                self.streams.remove(stream)


class Client(MemorySocket):
    """A socket, its connection, and what the machine expects of them."""

    def __init__(self, machine: Lives, number: int, key: str, writes_now: bool) -> None:
        self.writes_now = writes_now
        super().__init__()
        self.number, self.key, self.machine = number, key, machine
        account = Account(Key(key, key, NO_LIMITS))
        asyncio._set_running_loop(machine.loop)  # as where a server makes one
        self.connection = Connection(self, machine.runtime, account)  # type: ignore[arg-type]
        asyncio._set_running_loop(None)
        send, run = self.connection.send, self.connection.conversation.run_turn

        def sending(message: Any) -> None:
            try:
                machine.emitted(self, json.loads(encode(message)))
            except AssertionError as fault:  # in here it would be taken for a fault of the turn
                machine.faults.append(fault)
            send(message)

        async def running(turn: Turn) -> None:
            _turn.set(turn)
            machine.turns.append((self, turn))
            await run(turn)

        self.connection.send = sending  # type: ignore[method-assign]
        self.connection.conversation.run_turn = running  # type: ignore[method-assign]
        self.serving = machine.loop.create_task(self.connection.serve())
        self.current: Turn | None = None
        """The turn that runs, as it is told; `hearing` is the number of the one that the client hears of."""
        self.hearing: int | None = None
        self.text, self.decided = "", False
        self.cuts: dict[Turn | None, int | None] = {}
        """What the cancel of a turn said was heard of it."""
        self.codes: set[int | None] = set()
        """What it may be closed with."""
        self.cancelled_nothing = 0

    def write_now(self, frame: bytes) -> bool:
        if self.reading.is_set():
            self.hear(json.loads(frame))
        return self.reading.is_set()

    async def send_text(self, text: str) -> None:
        await self.reading.wait()
        self.hear(json.loads(text))

    def hear(self, frame: Frame) -> None:
        self.frames.append(frame)
        try:
            self._follow(frame)
        except AssertionError as fault:
            self.machine.faults.append(fault)

    def _follow(self, frame: Frame) -> None:
        """One turn after the other, each in its order: rules 1, 2, 8 and 9."""
        kind, turn = frame["type"], frame.get("turn")
        if kind == "done" and turn and "usage" not in frame:
            return  # of a turn on another socket, which this one cancelled
        if kind == "ack" and frame["for"] != "set_persona":
            assert self.hearing is None, "rule 3: an ack before the old turn's done"
            self.hearing, self.text, self.decided = turn, "", False
            self.heard_of = (self.key, frame["session_id"])
        elif turn and kind != "ack":
            assert turn == self.hearing, f"rule 2: {kind} of turn {turn} while {self.hearing} runs"
            match kind:
                case "toolcall":
                    assert self.machine.decides and not self.decided, "rule 9"
                    self.decided = True
                case "token":
                    assert self.machine.chats, "rule 9"
                    assert self.decided or not self.machine.decides, "rule 1"
                    self.text += frame["text"]
                case "final":
                    assert frame["normalized_text"] == self.text, "rule 8"
                case "done":
                    cut = self.cuts.get(self.current) if frame.get("cancelled") else None
                    session = self.machine.runtime.sessions.held.sessions[self.heard_of]
                    late = (self.heard_of, turn) in self.machine.cut_since
                    self.machine.cut_since.discard((self.heard_of, turn))
                    if (
                        self.current is not None
                        and self.current.session is session
                        and turn == session.turns
                        and not late
                    ):
                        # Else it is heard late: the session has gone on, or the client with another one.
                        reply = self.text if cut is None else self.text[:cut]
                        self.machine.replies[self.heard_of] = reply.rstrip() if frame.get("cancelled") else reply
            if kind in ("done", "error"):
                self.hearing = None

    @property
    def open(self) -> bool:
        return not self.serving.done() and not self.codes


@pytest.fixture(scope="module", autouse=True)
def no_logs() -> Iterator[None]:
    """Thousands of lines, which nobody reads; the tests that come after have theirs again."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    yield
    structlog.reset_defaults()


class Lives(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = Clock()
        self.clients: list[Client] = []
        self.turns: list[tuple[Client, Turn]] = []
        self.faults: list[AssertionError] = []
        self.asked: dict[tuple[str, str], tuple[int, Any]] = {}
        """Calls that wait for their results."""
        self.replies: dict[tuple[str, str], str] = {}
        """What was heard last in each session, where nothing has come since."""
        self.cut_since: set[tuple[tuple[str, str], int]] = set()
        """Turns whose reply was cut after it had been sent whole."""
        self.fed: dict[int, list[str]] = {}
        """What each turn's chat stream was told to say."""

    @initialize(
        deploy=st.sampled_from(["both", "both", "chat", "tool"]), concurrent=st.booleans(), drains=st.booleans()
    )
    def begin(self, deploy: str, concurrent: bool, drains: bool) -> None:
        async def opening() -> Runtime:
            self.engine = SteeredEngine()
            given = Settings.load(
                DEPLOY_MODELS=deploy,
                CONCURRENT_MODEL_CALL=concurrent,
                TOOL_HARD_TIMEOUT_MS=DECISION_S * 1000,
                IDLE_TIMEOUT_S=IDLE_S,
                SEND_QUEUE_BYTES=65_536,
            )
            engines = Engines(
                chat=None if deploy == "tool" else self.engine, tool=None if deploy == "chat" else self.engine
            )
            return await Runtime.open(given, engines, ToolSet.from_file(None))

        self.drains = drains
        self.decides, self.chats = deploy != "chat", deploy != "tool"
        self.runtime = self.loop.run_until_complete(opening())
        self.engine.steered = True

    def go(self, rounds: int | None) -> None:
        """Lets the service run: to the end, or some rounds only, so that the next step comes in between."""
        if rounds is None:
            self.loop.settle()
        for _ in range(rounds or 0):
            self.loop.step()

    # --- what the service says, as it says it

    def emitted(self, client: Client, frame: dict[str, Any]) -> None:
        kind, turn = frame["type"], frame.get("turn")
        if kind == "error" and turn is None:
            assert frame["error_code"] not in ("internal", "engine_failed"), frame
            return
        if kind == "done" and turn and "usage" not in frame:
            return  # the answer to who cancelled it
        if kind in ("pong", "warmed", "session") or (kind == "ack" and frame["for"] == "set_persona"):
            return
        if kind == "done" and turn == 0:
            client.cancelled_nothing -= 1
            assert client.cancelled_nothing >= 0, "rule 4: a done of no turn that nobody asked for"
            return
        if kind == "ack":
            session = self.runtime.sessions.held.sessions[client.key, frame["session_id"]]
            self.replies.pop(session.key, None)
            client.current = session.current
            assert client.current is not None and client.current.number == turn
            for other, earlier in self.turns:
                if earlier is client.current:
                    break
                if earlier.session is session or other is client:
                    assert earlier.over, "rule 3: the old turn ends first"
            return
        if kind in ("toolcall", "token"):
            for other, earlier in self.turns:
                if earlier is client.current:
                    break
                if earlier.session is client.current.session or other is client:
                    assert earlier.finished.is_set(), "rule 3: no engine is asked before the old turn has let go"
        if kind == "error":
            assert frame["error_code"] == "engine_failed", frame
        elif kind == "done" and frame.get("finish_reason") == "tool_calls":
            self.asked[client.current.session.key] = (turn, client.current.answer.calls)
        elif kind == "done" and not frame.get("cancelled"):
            assert frame["usage"]["completion_tokens"] == len(self.fed.get(id(client.current), [])), "rule 8"
        elif kind == "final":
            assert frame["normalized_text"] == "".join(self.fed.get(id(client.current), [])), "nothing is lost"

    # --- what clients do

    def one(self, number: int) -> Client:
        """A client that is there; a new one comes where there are few."""
        there = [client for client in self.clients if client.open]
        if number >= len(there):
            there.append(Client(self, len(self.clients), "AAB"[number % 3], number % 2 == 0))
            self.clients.append(there[-1])
        return there[number % len(there)]

    _client, _rounds = st.integers(0, 3), st.none() | st.none() | st.integers(0, 6)
    _heard = st.none() | st.integers(0, 12)

    @rule(number=_client, session=st.sampled_from("st"), heard=_heard, rounds=_rounds, what=st.integers(0, 7))
    def start(self, number: int, session: str, heard: int | None, rounds: int | None, what: int) -> None:
        client = self.one(number)
        extra: dict[str, Any] = _EXTRAS[what]
        client.start("hello", session, **extra, **({} if heard is None else {"heard_chars": heard}))
        self.go(rounds)

    @rule(number=_client, session=st.sampled_from("st"), rounds=_rounds, right=st.booleans())
    def answer(self, number: int, session: str, rounds: int | None, right: bool) -> None:
        """The results of calls, for those that a turn waits for or for others."""
        client = self.one(number)
        turn, calls = self.asked.get((client.key, session), (1, []))
        results = [{"id": call.id, "content": {"done": True}} for call in calls]
        client.say("tool_result", session_id=session, turn=turn if right else 999, results=results)
        self.go(rounds)

    @rule(number=_client, session=st.sampled_from("st"), rounds=_rounds)
    def cancel_session(self, number: int, session: str, rounds: int | None) -> None:
        """On whatever socket its turn runs."""
        client = self.one(number)
        self.loop.settle()
        if not client.open or client.serving.done():
            return
        found = self.runtime.sessions.find((client.key, session))
        running = found.current if found is not None else None
        if running is not None and running.over:
            running = None
        client.cancelled_nothing += running is None
        if running is not None and not running.is_cancelled:
            for other in self.clients:
                other.cuts[running] = None
        client.say("cancel", session_id=session)
        self.go(rounds)
        if running is not None and rounds is None and self.engine.free.is_set():
            assert running.finished.is_set(), "a cancel reaches its session on any socket"

    @rule(number=_client, heard=_heard, rounds=_rounds, as_text=st.booleans())
    def cancel(self, number: int, heard: int | None, rounds: int | None, as_text: bool) -> None:
        client = self.one(number)
        self.loop.settle()  # what came before it is acted on: then it is known what it means
        if not client.open or client.serving.done():
            return
        running = client.connection.conversation.turn
        if running is not None and running.over:
            running = None  # cut, and told so, although the engine may still have to let go
        client.cancelled_nothing += running is None
        if running is not None and not running.is_cancelled:
            client.cuts[running] = heard
        elif running is None and heard is not None and client.connection.conversation.session is not None:
            session = client.connection.conversation.session
            self.replies.pop(session.key, None)
            self.cut_since.add((session.key, session.turns))
        words = "".join(self.fed.get(id(running), []))
        as_text &= (
            heard is not None and running is not None and not client.text[:heard].isspace() and client.text == words
        )
        said = {"heard_text": client.text[:heard]} if as_text else {} if heard is None else {"heard_chars": heard}
        client.say("cancel", **said)
        self.go(rounds)
        if running is not None and rounds is None and self.engine.free.is_set():
            assert running.finished.is_set(), "rule 5: a cancel is acted on, also while the socket is stalled"
            assert not any(stream.turn is running for stream in self.engine.streams)
        assert running is not None or rounds is not None or client.cancelled_nothing == 0, "rule 4: it is answered"

    @rule(number=_client, rounds=_rounds, what=st.integers(0, 7))
    def say(self, number: int, rounds: int | None, what: int) -> None:
        client = self.one(number)
        frames = [
            {"type": "ping"},
            {"type": "set_persona", "assistant_gender": "man", "session_id": "s"},
            {"type": "set_persona", "persona_text": None},
            {"type": "warm_persona", "persona_style": "wholesome"},
            {"type": "warm_history", "history_text": "User: a"},
            {"type": "get_session", "session_id": "t"},
            {"type": "start", "session_id": ""},
            {"type": "start", "session_id": "s", "user_utterance": "x", "assistant_gender": "x"},
        ]
        client.say_raw(json.dumps(frames[what]))
        self.go(rounds)

    @rule(number=_client, rounds=_rounds, says_so=st.booleans())
    def leave(self, number: int, rounds: int | None, says_so: bool) -> None:
        client = self.one(number)
        client.codes |= {1000 if says_so else None}
        if says_so:
            client.say("end")
        else:
            client.leave()
        self.go(rounds)

    @rule(number=_client, rounds=_rounds)
    def stall_or_read_on(self, number: int, rounds: int | None) -> None:
        client = self.one(number)
        if client.reading.is_set():
            client.reading.clear()
        else:
            client.reading.set()
        self.go(rounds)

    # --- what engines do

    def _feed(self, kind: str, number: int, step: Any, rounds: int | None) -> None:
        """Gives a step to a stream of this kind; where there is none, another one goes its usual way."""
        streams = [stream for stream in self.engine.streams if not stream.over]
        streams = [stream for stream in streams if stream.kind == kind] or streams
        if streams:
            stream = streams[number % len(streams)]
            step = step if stream.kind == kind else _USUAL[stream.kind]
            stream.steps.put_nowait(step)
            stream.over = isinstance(step, Exception) or step[1] is not None
            if stream.kind == "chat" and isinstance(step, tuple):
                self.fed.setdefault(id(stream.turn), []).append(step[0])
            self.go(rounds)

    _steps = st.lists(
        st.sampled_from(
            [
                *[("chat", text, None) for text in ("a", " b", "", "\U0001f600", "long")],
                ("chat", "", "stop"),
                ("chat", ".", "length"),
                ("chat", "The engine failed.", "error"),
                *[("decision", "[]", None)] * 4,
                ("decision", CALL, None),
                ("decision", CALL, "stop"),
                ("decision", CALL[:9], None),
                ("decision", "nonsense", "stop"),
                ("decision", "The engine failed.", "error"),
                ("decision", "[", "length"),
            ]
        ),
        min_size=1,
        max_size=8,
    )

    @rule(number=st.integers(0, 7), steps=_steps, rounds=_rounds)
    def work(self, number: int, steps: list[tuple[str, str, str | None]], rounds: int | None) -> None:
        for kind, text, finish in steps:
            said = (text.replace("long", "x" * 40_000), finish)
            self._feed(kind, number, EngineFailed(text) if finish == "error" else said, rounds)

    @rule(number=_client, session=st.sampled_from("st"), steps=_steps)
    def converse(self, number: int, session: str, steps: list[tuple[str, str, str | None]]) -> None:
        """A turn that nothing interrupts, as long as the steps go."""
        self.engine.free.set()
        self.start(number, session, None, None, 0)
        self.work(-1, steps, None)

    @rule(rounds=_rounds)
    def hold_or_release(self, rounds: int | None) -> None:
        """Aborts take long from here on, or not."""
        if self.engine.free.is_set():
            self.engine.free.clear()
        else:
            self.engine.free.set()
            self.go(rounds)

    # --- what time does

    def _pass(self, seconds: float) -> None:
        self.loop.settle()
        self.loop.now += seconds
        self.loop.settle()

    @rule(seconds=st.sampled_from([0.4, 0.4, 0.4, DECISION_S + 0.1, DECISION_S + 0.1, IDLE_S + 20]))
    def wait(self, seconds: float) -> None:
        waiting = [stream for stream in self.engine.streams if stream.kind == "decision"]
        idle = [client for client in self.clients if client.open and seconds > IDLE_S]
        for client in idle:
            client.codes |= {4000}
        self._pass(seconds)
        for client in idle:
            client.codes -= {4000} if not client.connection.is_ending else set()
        if self.engine.free.is_set() and seconds > DECISION_S:
            assert not set(waiting) & set(self.engine.streams), "rule 7: the hard timeout decides"

    # --- what holds

    @invariant()
    def what_was_said_was_right(self) -> None:
        if self.faults:
            raise self.faults[0]

    @invariant()
    def sockets_close_with_their_code(self) -> None:
        for client in self.clients:
            if client.serving.done():
                code = client.serving.result().code  # and raises what it raised
                assert code in client.codes | {4001}, f"rule 10: {code}, not {client.codes}"
                assert client.closed == code or code is None

    @invariant()
    def nothing_is_lost(self) -> None:
        """Where nothing is ready to run and no engine is asked, no turn is left."""
        if not self.loop.at_rest:
            return
        asked = {stream.turn for stream in self.engine.streams}
        for client, turn in self.turns:
            waits = turn in asked or any(not earlier.finished.is_set() for earlier in turn.waits_for)
            assert turn.finished.is_set() or waits or client.serving.done(), "a lost turn"
        for session in self.runtime.sessions.held.sessions.values():
            assert session.current is None or not session.current.finished.is_set()
            reply = self.replies.get(session.key)
            if reply is not None and session.current is None:
                last = session.transcript.messages[-1]
                wanted = ("assistant", reply) if reply.strip() else ("user", "hello")
                assert (last.speaker, last.text) == wanted, "the transcript is what was heard"
        chats = [turn for kind, turn in self.engine.opened if kind == "chat"]
        assert len(chats) == len(set(chats)), "rule 6: no second prefill"

    def teardown(self) -> None:
        if not hasattr(self, "runtime"):
            self.loop.close()
            return
        self.engine.free.set()
        for client in self.clients:
            client.codes |= {1012 if self.drains else None}
            if self.drains and not client.serving.done():
                client.connection.end(Lifecycle().going_away())
            else:
                client.leave()
        for _ in range(3):
            self._pass(11.0)  # what a close waits for at most
        try:
            self.what_was_said_was_right()
            self.sockets_close_with_their_code()
            assert all(client.serving.done() for client in self.clients)
            assert all(turn.finished.is_set() for _, turn in self.turns)
            assert not self.engine.streams, "an engine's work outlives its client"
            assert not asyncio.all_tasks(self.loop)
        finally:
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
            self.loop.settle()
            self.loop.close()


@pytest.mark.timeout(900)
def test_the_rules_hold_in_any_order_of_events() -> None:
    """Starts, cancels, disconnects, second sockets, engine faults, timeouts, drains, slow clients."""
    run_state_machine_as_test(
        Lives,
        settings=settings(
            max_examples=STEPS // A_RUN,
            stateful_step_count=A_RUN,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
