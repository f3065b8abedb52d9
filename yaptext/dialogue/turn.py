"""One turn: its place among the turns of a session, from the request to the one way out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal

import msgspec
import structlog
from msgspec import UNSET, UnsetType

from yaptext.dialogue import incoming
from yaptext.dialogue.answer import Answer
from yaptext.dialogue.heard import Heard, Spoken
from yaptext.dialogue.outgoing import Sink
from yaptext.dialogue.request import TurnRequest
from yaptext.dialogue.runtime import Runtime
from yaptext.dialogue.session import Running, Session
from yaptext.dialogue.tool_rounds import Asked, in_words
from yaptext.dialogue.tools import ToolSet
from yaptext.dialogue.transcript import REMEMBERED_CHARS
from yaptext.errors import Internal, WireError
from yaptext.wire.frames import Done, Final, ServerMessage, error_frame

_log = structlog.get_logger(__name__)


class State(IntEnum):
    """Turns go through these in order; one that ends early leaves some out."""

    WAITING = 0
    """Turns before it still have the engine."""
    RUNNING = 1
    """From the ack on."""
    OVER = 2
    """The last frame is out. The engine may take some time to let go."""
    FINISHED = 3


@dataclass(frozen=True, slots=True)
class _Cut:
    """That the turn is to end early: by a cancel (`heard` of the reply), or with an error instead of its `done`."""

    at: float
    heard: Heard
    error: WireError | None


class Turn:
    """One request of one session, on one sink.

    Making one is synchronous, so that the receive loop never waits; `run` is the turn's task. `cancel` may be
    called at any moment, also before `run` came to its ack: the turn then still gives ack and done, in its
    place in the order.
    """

    def __init__(
        self, runtime: Runtime, session: Session, request: TurnRequest, sink: Sink, *, after: Running | None = None
    ) -> None:
        """Merges the persona and takes the session's next number. The session's running turn and `after` (the sink's
        last) are cancelled, and this one waits for their `finished`. Raises `BadMessage` (then nothing has changed)."""
        self._runtime, self.session, self._request, self._sink = runtime, session, request, sink
        self.answer = Answer(runtime, session, request)
        self._persona = session.persona.merge(request.persona)
        if not isinstance(request.tools, UnsetType):
            given = request.tools
            session.tools = None if given is None else runtime.tool_sets.known(given) or ToolSet(given)
        session.persona, session.asked = self._persona, None
        if session.warming is not None:
            session.warming.cancel()
        session.turns += 1
        self.number = session.turns
        self.answer.open(sink, self.number)
        # With those that they wait for themselves: a turn whose socket goes ends without waiting.
        self.waits_for: list[Running] = []
        for turn in filter(None, (session.current, after)):
            for earlier in (*turn.waits_for, turn):
                if earlier not in self.waits_for and not earlier.finished.is_set():
                    self.waits_for.append(earlier)
        for turn in self.waits_for:
            turn.cancel()
        session.current = self
        self.state = State.WAITING
        self.finished = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._cut: _Cut | None = None
        self._outcome = ""
        self._others: int | None = None
        """How many turns ran when this one began; None before that."""
        self._backlog_ms = 0.0
        """Of the chat engine, then."""

    @property
    def over(self) -> bool:
        return self.state >= State.OVER

    @property
    def is_cancelled(self) -> bool:
        """True from the first `cancel` on."""
        return self._cut is not None

    @property
    def warms_next(self) -> bool:
        """Whether the session's next turn is to be expected, with a transcript that has grown."""
        failed = self._cut is not None and self._cut.error is not None
        return self.answer.finish_reason is not None and self.session.asked is None and not failed

    def cancel(self, heard: Heard | None = None) -> None:
        """Ends the turn with `done cancelled`: at once if it runs, or if nothing stands before it, without waiting
        for the engine. The first call counts."""
        self._end_early(_Cut(time.perf_counter(), heard or Heard(), None))

    def fail(self, error: WireError) -> None:
        """Ends the turn like `cancel`, with this error instead of its `done`."""
        self._end_early(_Cut(time.perf_counter(), Heard(), error))

    def _end_early(self, cut: _Cut) -> None:
        if self._cut is not None or self.over:
            if self._cut is not None and cut.error is not None:
                self._cut = cut  # nothing is to follow this turn
            return
        self._cut = cut
        if self.state is State.WAITING and all(turn.over for turn in self.waits_for):
            self._begin()
        if self.state is State.RUNNING:
            self._end_cut(cut)
            if self._task is not None:
                self._task.cancel()

    async def run(self) -> None:
        """The turn, from ack to done. Every way out leaves the transcript and the log line written.

        Raises nothing but `CancelledError` and errors that end the socket (`close_code` is set).
        """
        self._task = asyncio.current_task()
        try:
            await self._steps()
        except asyncio.CancelledError:
            self._leave("disconnected")
            raise
        except WireError as error:
            ends_socket = error.close_code is not None
            self._leave(error.code, *([] if ends_socket else [self._error(error)]))
            if ends_socket:
                raise
        except Exception as error:
            _log.exception("turn.crashed", turn=self.number)
            self._leave("internal")
            raise Internal("The turn failed by a fault of the service.") from error
        finally:
            self._finish()

    def abandon(self) -> None:
        """For a turn whose task is over: if that was cancelled before its first step, nothing else finishes it."""
        if self.state is not State.FINISHED:
            self._leave("disconnected")
            self._finish()

    async def _steps(self) -> None:
        if self.over:
            return  # cancelled before this first step
        for turn in self.waits_for:
            await turn.finished.wait()
        self.waits_for.clear()
        if self.state is State.WAITING:
            self._begin()
        if self._cut is not None:
            self._end_cut(self._cut)
            return
        await self.answer.run()
        if not self.over:
            self._end()

    def _begin(self) -> None:
        session, request, runtime = self.session, self._request, self._runtime
        transcript, asked = session.transcript, self.answer.asked
        self.state = State.RUNNING
        self._others = runtime.metrics.running_turns
        runtime.metrics.running_turns += 1
        busiest = runtime.engines.chat or runtime.engines.tool
        self._backlog_ms = busiest.load().backlog_ms if busiest is not None else 0.0
        if asked is None:
            told = incoming.told(runtime, request.history)
            if told is not None:
                warmed = runtime.take_warmed(session.key_name, told.text)
                transcript.replace(told.messages, warmed, remember=told.size <= REMEMBERED_CHARS)
            if request.heard is not None:
                transcript.cut_reply(request.heard.chars, request.heard.text, runtime.settings.interrupted_mark)
        elif asked.utterance is not None and transcript.messages:
            last = transcript.messages[-1]
            if (last.speaker, last.text) == ("user", asked.utterance):
                del transcript.messages[-1]  # this turn continues it
        what: Literal["start", "tool_result"] = "start" if asked is None else "tool_result"
        self._sink.send(runtime.ack(what, session, self._persona, self.number, self.answer.seed, request.ignored))
        if runtime.observer is not None:
            runtime.observer.began(self.answer)

    # --- the ends

    def _end(self) -> None:
        answer = self.answer
        if answer.ends_with_calls:
            answer.finish_reason = "tool_calls"
            self.session.asked = Asked(
                self.number, answer.utterance, answer.calls, answer.rounds, answer.note, answer.speakable
            )
            self._leave("finished", self._done(), said=lambda: ("", None), results=False)
            return
        text, own, spoken = answer.reply.whole()
        answer.finish_reason = answer.finish_reason or "stop"
        final = Final(normalized_text=text, turn=self.number)
        self._leave("finished", final, self._done(), said=lambda: (own, spoken))

    def _end_cut(self, cut: _Cut) -> None:
        if cut.error is not None:
            self._leave(cut.error.code, self._error(cut.error))
            return
        sent = self.answer.reply.retract()
        cancel_ms = round((time.perf_counter() - cut.at) * 1000, 3)
        self._runtime.metrics.cancel_ms.observe(cancel_ms)
        done = self._done(
            finish_reason="cancelled", cancelled=True, cancel_ms=cancel_ms, tokens_sent=self.answer.tokens.sent_tokens
        )

        mark = self._runtime.settings.interrupted_mark
        self._leave("cancelled", done, said=lambda: self.answer.reply.heard(sent, cut.heard, mark))

    def _done(self, **fields: Any) -> Done:
        answer, session_id = self.answer, self.session.session_id
        answer.mark_end()
        fields = {"finish_reason": answer.finish_reason or UNSET, **fields}
        return Done(turn=self.number, session_id=session_id, usage=answer.usage, timings=answer.timings, **fields)

    def _error(self, error: WireError) -> ServerMessage:
        return error_frame(error, turn=self.number, session_id=self.session.session_id)

    def _leave(
        self,
        outcome: str,
        *last: ServerMessage,
        said: Callable[[], tuple[str, Spoken | None]] | None = None,
        results: bool = True,
    ) -> None:
        """The one way out: the last frames go, then the transcript gets what was `said`, which is what was sent unless
        given. Without `results` it gets nothing of what tools returned, since the next turn brings it again."""
        if self.over:
            return
        begun, self.state, self._outcome = self.state is State.RUNNING, State.OVER, outcome
        answer, transcript = self.answer, self.session.transcript
        answer.reply.close()
        try:
            for message in last:
                self._sink.send(message)
        finally:
            if begun:
                reply, spoken = said() if said is not None else (answer.reply.retract(), None)
                done = in_words(answer.rounds) if results else ()
                transcript.add_turn(answer.utterance, reply, sent=answer.sent, results=done, spoken=spoken)
                transcript.bound(self._runtime.history_bytes)

    def _finish(self) -> None:
        """The engine has let go: the next turn may begin."""
        runtime, session, answer = self._runtime, self.session, self.answer
        runtime.sessions.keep(session)
        # Those that it still waited for end a moment later: the next turn has to wait for them.
        self.waits_for = [turn for turn in self.waits_for if not turn.finished.is_set()]
        if session.current is self:
            # Not one of another session: it would never leave this one.
            session.current = next((turn for turn in reversed(self.waits_for) if turn.session is session), None)
        self.state = State.FINISHED
        self.finished.set()
        answer.mark_end()
        if self._others is not None:
            runtime.metrics.running_turns -= 1
        if runtime.observer is not None:
            runtime.observer.ended(answer)
        runtime.metrics.turn(self._outcome, answer.usage, answer.timings)
        decision = answer.decision
        _log.info(
            "turn.finished",
            outcome=self._outcome,
            turn=self.number,
            session_id=session.session_id,
            key=session.key_name,
            others=self._others or 0,
            backlog_ms=round(self._backlog_ms, 1),
            finish_reason=answer.finish_reason,
            tokens_sent=answer.tokens.sent_tokens,
            tool_reason=decision.reason if decision else None,
            **msgspec.structs.asdict(answer.usage),
            **msgspec.structs.asdict(answer.timings),
        )
        if runtime.settings.log_text:
            calls = None if decision is None else msgspec.to_builtins(decision.calls)
            texts = {"utterance": answer.utterance, "decision": calls, "reply": answer.reply.text}
            _log.info("turn.text", session_id=session.session_id, turn=self.number, **texts)
