"""One turn: an utterance becomes an ack, a decision, a stream of tokens, a final and a done."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Protocol

import msgspec
import structlog
from msgspec import UNSET, UnsetType

from yaptext.dialogue.history import recent
from yaptext.dialogue.reply import Lines
from yaptext.dialogue.session import Session
from yaptext.dialogue.stage import Stage
from yaptext.dialogue.toolcall import Decision
from yaptext.dialogue.toolset import ToolSet
from yaptext.engine.base import Delta
from yaptext.errors import EngineFailed, Internal, TextTooLong, WireError
from yaptext.wire.messages import (
    Done,
    Final,
    ServerMessage,
    Start,
    Timings,
    ToolCall,
    Usage,
    error_frame,
)

_log = structlog.get_logger(__name__)
_TOOL_ONLY_MESSAGES = 16


class TokenSink(Protocol):
    """Where one turn's tokens go. Pushing never waits; what the socket has not taken can be taken back."""

    sent_tokens: int
    """Model tokens whose text was handed to the socket."""

    def push(self, text: str, tokens: int) -> None: ...

    def retract(self) -> str:
        """Drops what still waits; returns all text that was handed to the socket."""
        ...


class Turn:
    """One utterance of one session, on one socket.

    Making one is synchronous, so that the receive loop never waits; `run` is the turn's task. `cancel` may be
    called at any moment, also before `run` came to its ack: the turn then still gives ack and done, in its
    place in the order.
    """

    def __init__(
        self,
        stage: Stage,
        session: Session,
        start: Start,
        *,
        send: Callable[[ServerMessage], None],
        tokens: Callable[[int], TokenSink],
        after: Turn | None,
    ) -> None:
        """Merges the persona and takes the session's next number. The session's running turn and the one in `after`
        (the socket's last) are told to end, and this one waits for their `finished`. Raises `BadMessage` (then nothing
        has changed)."""
        self.received_at = time.perf_counter()
        persona = stage.merge(session.persona, start)
        if not isinstance(start.tools, UnsetType):
            session.tools = None if start.tools is None else ToolSet(start.tools)
        self._persona = session.persona = persona
        self._stage, self._session, self._start, self._send = stage, session, start, send
        self._tools = session.tools or (stage.decider.tools if stage.decider else None)
        session.turns += 1
        self.number = session.turns
        self._sink = tokens(self.number)
        self._persona_text = stage.persona(session)
        # With those that they wait for themselves: a turn whose socket goes ends without waiting.
        self._after: list[Turn] = []
        for turn in filter(None, (session.current, after)):
            for earlier in (*turn._after, turn):
                if earlier not in self._after and not earlier.finished.is_set():
                    self._after.append(earlier)
        for turn in self._after:
            turn.cancel()
        session.current = self
        self.finished: asyncio.Event = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._begun = False
        self.over = False
        """True once the last frame is out. The engine may take until `finished` to let go."""
        self._cut_as: str | None = None
        self._cancelled_at: float | None = None
        self._heard_chars: int | None = None
        self._usage, self._timings = Usage(), Timings()
        self._text: list[str] = []
        self._held: list[Delta] | None = None
        self._finish_reason: str | None = None
        self._utterance = start.user_utterance
        self._decision: Decision | None = None
        self._failure: WireError | None = None

    def fail(self, error: WireError) -> None:
        """Asks the turn to end with this error in the place of its `done`."""
        self._failure = error
        self.cancel()

    def cancel(self, heard_chars: int | None = None) -> None:
        """Ends the turn with `done cancelled`: at once where it has begun, without waiting for the engine. At most the
        first call counts."""
        if self._cancelled_at is not None or self.over:
            return
        self._cancelled_at = time.perf_counter()
        self._heard_chars = heard_chars
        if self._begun and self._task is not None:
            self._task.cancel()
            self._cut_as = self._end_cancelled()

    async def run(self) -> None:
        """The turn, from ack to done. Every way out leaves the transcript and the log line written.

        Raises nothing but `CancelledError` and errors that end the socket (`close_code` is set).
        """
        self._task = asyncio.current_task()
        outcome = "failed"
        try:
            for turn in self._after:
                await turn.finished.wait()
            self._after.clear()
            self._begin()
            if self._cancelled_at is None:
                await self._answer()
                outcome = self._cut_as or self._end()
            else:
                outcome = self._end_cancelled()
        except asyncio.CancelledError:
            outcome = "disconnected"
            raise
        except WireError as error:
            outcome = error.code
            if error.close_code is not None:
                raise
            if not self.over:
                self._send(error_frame(error, turn=self.number))
        except Exception as error:
            outcome = "internal"
            _log.exception("turn.crashed", turn=self.number)
            raise Internal("The turn failed by a fault of the service.") from error
        finally:
            self._close(self._cut_as or outcome)

    def abandon(self) -> None:
        """For a turn whose task is over: where that was cancelled before its first step, nothing else closes it."""
        if not self.finished.is_set():
            self._close("disconnected")

    # --- the steps

    def _begin(self) -> None:
        session, start = self._session, self._start
        self._begun = True
        if start.heard_chars is not None:
            session.transcript.cut_reply(start.heard_chars)
        if start.history_text is not UNSET:
            told = recent(start.history_text or "", self._stage.history_chars)
            session.transcript.replace(told, self._stage.warmed.pop((session.key_name, told), ()))
        self._send(self._stage.ack("start", session, self._persona, self.number, self._seed))

    @property
    def _seed(self) -> int:
        given = self._start.sampling
        if given is not None and given.seed is not None:
            return given.seed
        return self._session.seed + self.number

    async def _answer(self) -> None:
        prompts, decider = self._stage.prompts, self._stage.decider
        self._utterance = await self._stage.utterance(self._start.user_utterance)
        if prompts is None:
            await self._decide()
            del self._session.transcript.messages[:-_TOOL_ONLY_MESSAGES]  # no chat prompt trims them
        elif decider is None:
            await self._chat()
        elif self._stage.settings.concurrent_model_call:
            await self._both_at_once()
        else:
            await self._decide()
            await self._chat()

    async def _both_at_once(self) -> None:
        """Chat text is held until the decision is out; then the same stream goes on."""
        self._held = []
        failure: WireError | None = None
        async with asyncio.TaskGroup() as group:
            group.create_task(self._decide())
            try:
                await self._chat()
            except (EngineFailed, TextTooLong) as error:
                failure = error  # the decision still reaches the client, before the error
        if failure is not None:
            raise failure

    async def _decide(self) -> None:
        decider, tools = self._stage.decider, self._tools
        assert decider is not None and tools is not None
        self._mark_queue()
        if not tools.names:
            self._release(Decision([], 0.0))
            return
        decision = await decider.decide(tools, self._session.transcript.messages, self._utterance)
        self._release(decision)

    def _release(self, decision: Decision) -> None:
        """Sends the decision, then the chat text that waited for it: one step, nothing comes between."""
        if self.over:
            return  # cut in the moment in which the decision came
        self._decision = decision
        self._stage.metrics.decisions.labels(decision.reason or ("yes" if decision.calls else "no")).inc()
        self._usage.tool_prompt_tokens = decision.prompt_tokens
        self._usage.tool_cached_tokens = decision.cached_tokens
        self._timings.tool_ms = round(decision.tool_ms, 2)
        self._send(
            ToolCall(
                status="yes" if decision.calls else "no",
                raw=decision.calls,
                turn=self.number,
                tool_ms=self._timings.tool_ms,
                p=UNSET if decision.p is None else round(decision.p, 4),
                reason=decision.reason or UNSET,
            )
        )
        held, self._held = self._held, None
        for delta in held or ():
            self._pass_on(delta)

    async def _chat(self) -> None:
        if self.over:
            return  # cut while it was decided, by a tool engine that failed in letting go
        stage, prompts, engine = self._stage, self._stage.prompts, self._stage.engines.chat
        assert prompts is not None and engine is not None
        messages = self._session.transcript.messages
        prompt = await prompts.turn(self._persona_text, messages, self._utterance, stage.now())
        room = engine.max_model_len - len(prompt)
        if room < 1:
            raise TextTooLong(f"the prompt is {len(prompt)} tokens; limit is {engine.max_model_len - 1}")
        sampling = stage.sampling(self._start.sampling, self._seed, room, self._session.key_name)
        most = sampling.max_tokens - stage.thinking_room if sampling.reasoning is not None else None
        lines = Lines() if prompts.labelled else None
        self._mark_queue()
        async with aclosing(engine.stream(prompt, sampling)) as deltas:
            async for delta in deltas:
                usage = self._usage
                usage.prompt_tokens, usage.cached_tokens = delta.prompt_tokens, delta.cached_tokens
                usage.completion_tokens += delta.tokens
                usage.reasoning_tokens += delta.reasoning
                self._finish_reason = delta.finish_reason
                told = delta if lines is None else _within(lines, delta)
                if self._held is not None:
                    self._held.append(told)
                else:
                    self._pass_on(told)
                if lines is not None and lines.over:
                    self._finish_reason = "stop"
                    return
                if most is not None and usage.completion_tokens - usage.reasoning_tokens >= most:
                    self._finish_reason = self._finish_reason or "length"
                    return

    def _pass_on(self, delta: Delta) -> None:
        if self.over or not delta.text:
            return
        self._sink.push(delta.text, delta.tokens)
        self._text.append(delta.text)
        if self._timings.ttft_ms is None:
            self._timings.ttft_ms = self._since_received()

    # --- the ends

    def _end(self) -> str:
        text = "".join(self._text)
        self._finish_reason = self._finish_reason or "stop"
        self._send(Final(normalized_text=text, turn=self.number))
        self._send_done(finish_reason=self._finish_reason)
        self._session.transcript.add_turn(self._utterance, text)
        return "finished"

    def _end_cancelled(self) -> str:
        assert self._cancelled_at is not None
        self.over = True
        if self._failure is not None:
            self._send(error_frame(self._failure, turn=self.number))
            return self._failure.code
        heard = self._sink.retract()
        cancel_ms = round((time.perf_counter() - self._cancelled_at) * 1000, 3)
        self._send_done(
            finish_reason="cancelled", cancelled=True, cancel_ms=cancel_ms, tokens_sent=self._sink.sent_tokens
        )
        self._stage.metrics.cancel_ms.observe(cancel_ms)
        if self._heard_chars is not None:
            heard = heard[: self._heard_chars]
        self._session.transcript.add_turn(self._utterance, heard)
        return "cancelled"

    def _send_done(self, **fields: Any) -> None:
        self._timings.total_ms = self._since_received()
        self._send(Done(turn=self.number, usage=self._usage, timings=self._timings, **fields))

    def _close(self, outcome: str) -> None:
        """The last step, whatever came before it."""
        if self._begun and outcome not in ("finished", "cancelled"):
            self._session.transcript.add_turn(self._utterance, self._sink.retract())
        self._stage.sessions.keep(self._session)
        if self._session.current is self:
            # One that it still waited for ends a moment later: the next turn has to wait for that. Not one of another
            # session: it would never leave this one.
            waited = (turn for turn in reversed(self._after) if turn._session is self._session)
            self._session.current = next((turn for turn in waited if not turn.finished.is_set()), None)
        self._after.clear()
        self.over = True
        self.finished.set()
        self._timings.total_ms = self._timings.total_ms or self._since_received()
        self._stage.metrics.turn(outcome, self._usage, self._timings)
        _log.info(
            "turn.finished",
            outcome=outcome,
            turn=self.number,
            session_id=self._session.session_id,
            finish_reason=self._finish_reason,
            tokens_sent=self._sink.sent_tokens,
            tool_reason=self._decision.reason if self._decision else None,
            **msgspec.structs.asdict(self._usage),
            **msgspec.structs.asdict(self._timings),
        )
        if self._stage.settings.log_text:
            reply, decision = "".join(self._text), self._decision
            calls = None if decision is None else msgspec.to_builtins(decision.calls)
            session, said = self._session.session_id, self._utterance
            _log.info("turn.text", session_id=session, turn=self.number, utterance=said, decision=calls, reply=reply)

    def _mark_queue(self) -> None:
        if self._timings.queue_ms is None:
            self._timings.queue_ms = self._since_received()

    def _since_received(self) -> float:
        return round((time.perf_counter() - self.received_at) * 1000, 2)


def _within(lines: Lines, delta: Delta) -> Delta:
    """The delta with what of its text belongs to the reply."""
    text = lines.take(delta.text)
    if delta.finish_reason is not None:
        text += lines.rest()
    return delta if text == delta.text else replace(delta, text=text)
