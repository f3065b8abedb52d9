"""One turn: an utterance becomes an ack, a decision, a stream of tokens, a final and a done."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Literal, Protocol

import msgspec
import structlog
from msgspec import UNSET, UnsetType

from yaptext.dialogue import incoming
from yaptext.dialogue import sampling as samplings
from yaptext.dialogue.chat_prompt import Around
from yaptext.dialogue.decision import Decision
from yaptext.dialogue.heard import Heard, Spoken, heard_part
from yaptext.dialogue.layout import Called, Rounds
from yaptext.dialogue.reply import Lines, Sentences
from yaptext.dialogue.runtime import Runtime
from yaptext.dialogue.session import Asked, Running, Session
from yaptext.dialogue.speakable import Speakable
from yaptext.dialogue.tools import ToolSet
from yaptext.dialogue.transcript import REMEMBERED_CHARS, cut_short
from yaptext.engine.base import Delta, Sampling
from yaptext.errors import BadMessage, EngineFailed, Internal, TextTooLong, WireError
from yaptext.wire.frames import (
    Done,
    Final,
    IdentifiedCall,
    ServerMessage,
    Start,
    Timings,
    ToolCall,
    ToolResult,
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
        runtime: Runtime,
        session: Session,
        start: Start | ToolResult,
        *,
        ignored: Sequence[str] = (),
        send: Callable[[ServerMessage], None],
        tokens: Callable[[int], TokenSink],
        after: Running | None,
    ) -> None:
        """Merges the persona and takes the session's next number. The session's running turn and the one in `after`
        (the socket's last) are told to end, and this one waits for their `finished`. `ignored` are fields that the ack
        lists. Raises `BadMessage` (then nothing has changed)."""
        self.received_at = time.perf_counter()
        persona = session.persona
        self._asked: Asked | None = None
        self._results: list[str] = []
        self._rounds: Rounds = ()
        if isinstance(start, ToolResult):
            self._asked, returned = (
                session.asked,
                _returned(start, session.asked, runtime.settings.tool_result_max_tokens),
            )
            if session.asked is not None:
                self._results = [*session.asked.results, *map(_in_words, returned)]
                self._rounds = [*session.asked.done, returned]
            self._utterance = session.asked.utterance if session.asked is not None else None
        else:
            persona = session.persona.merge(start)
            tools = session.tools
            if not isinstance(start.tools, UnsetType):
                tools = None if start.tools is None else runtime.tool_sets.known(start.tools) or ToolSet(start.tools)
            session.tools = tools
            self._utterance = start.user_utterance
        session.asked = None
        if session.warming is not None:
            session.warming.cancel()
        self._persona = session.persona = persona
        self._runtime, self._session, self._start, self._send = runtime, session, start, send
        self._ignored = list(ignored)
        settings = runtime.settings
        given = start if isinstance(start, Start) else Start(session_id=start.session_id, user_utterance=None)
        self._note = given.note or (self._asked.note if self._asked is not None else "")
        self._awaits = settings.await_tools if given.await_tools is None else given.await_tools
        self._awaits |= self._asked is not None
        speakable = self._asked.speakable if self._asked is not None else _chosen(given.speakable, settings.speakable)
        self._speakable = Speakable() if speakable else None
        self._marks: list[tuple[int, int]] = []
        self._sent_chars = self._own_chars = self._unsent = 0
        self._tools = session.tools or (runtime.decider.tools if runtime.decider else None)
        session.turns += 1
        self.number = session.turns
        self._sink = tokens(self.number)
        self._persona_text = runtime.persona(session)
        # With those that they wait for themselves: a turn whose socket goes ends without waiting.
        self.waits_for: list[Running] = []
        for turn in filter(None, (session.current, after)):
            for earlier in (*turn.waits_for, turn):
                if earlier not in self.waits_for and not earlier.finished.is_set():
                    self.waits_for.append(earlier)
        for turn in self.waits_for:
            turn.cancel()
        session.current = self
        self.finished: asyncio.Event = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._begun = False
        self._others, self._backlog_ms = 0, 0.0
        """How many turns ran when this one began, and the chat engine's backlog then."""
        self.over = False
        """True once the last frame is out. The engine may take until `finished` to let go."""
        self._cut_as: str | None = None
        self._cancelled_at: float | None = None
        self._heard: Heard | None = None
        self._usage, self._timings = Usage(), Timings()
        self._text: list[str] = []
        self._own: list[str] = []
        """The model's own words, if they are sent otherwise."""
        self._sent: str | None = None
        self._held: list[Delta] | None = None
        self._finish_reason: str | None = None
        self._decision: Decision | None = None
        self._failure: WireError | None = None
        self.calls: list[IdentifiedCall] = []
        self._waits_for_results = False
        """The turn ends with its calls: the client makes them, and goes on with what they return."""

    @property
    def session(self) -> Session:
        return self._session

    @property
    def is_cancelled(self) -> bool:
        """True from the first `cancel` on."""
        return self._cancelled_at is not None

    @property
    def warms_next(self) -> bool:
        """Whether another turn of the session is to be expected, with a transcript that has grown."""
        return self._finish_reason is not None and self._session.asked is None and self._failure is None

    def fail(self, error: WireError) -> None:
        """Asks the turn to end with this error in the place of its `done`."""
        self._failure = error
        self.cancel()

    def cancel(self, heard: Heard | None = None) -> None:
        """Ends the turn with `done cancelled`: at once if it has begun, or if nothing stands before it, without waiting
        for the engine. At most the first call counts."""
        if self._cancelled_at is not None or self.over:
            return
        self._cancelled_at = time.perf_counter()
        self._heard = heard
        if not self._begun and all(turn.over for turn in self.waits_for):
            self._begin()
        if self._begun:
            if self._task is not None:
                self._task.cancel()
            self._cut_as = self._end_cancelled()

    async def run(self) -> None:
        """The turn, from ack to done. Every way out leaves the transcript and the log line written.

        Raises nothing but `CancelledError` and errors that end the socket (`close_code` is set).
        """
        self._task = asyncio.current_task()
        outcome = "failed"
        try:
            if self.over:
                return  # cancelled before this first step
            for turn in self.waits_for:
                await turn.finished.wait()
            self.waits_for.clear()
            if not self._begun:
                self._begin()
            if self._cancelled_at is None:
                await self.answer()
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
                self._send(error_frame(error, turn=self.number, session_id=self._session.session_id))
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
        session, start, transcript = self._session, self._start, self._session.transcript
        self._begun = True
        metrics = self._runtime.metrics
        self._others, metrics.running_turns = metrics.running_turns, metrics.running_turns + 1
        busiest = self._runtime.engines.chat or self._runtime.engines.tool
        self._backlog_ms = busiest.load().backlog_ms if busiest is not None else 0.0
        kind: Literal["start", "tool_result"] = "tool_result"
        if isinstance(start, Start):
            kind = "start"
            told = incoming.told(self._runtime, start)
            if told is not None:
                warmed = self._runtime.take_warmed(session.key_name, told.text)
                transcript.replace(told.messages, warmed, remember=told.size <= REMEMBERED_CHARS)
            if (heard := Heard.of(start)) is not None:
                transcript.cut_reply(heard.chars, heard.text, self._runtime.settings.interrupted_mark)
        elif self._utterance is not None and transcript.messages:
            last = transcript.messages[-1]
            if (last.speaker, last.text) == ("user", self._utterance):
                del transcript.messages[-1]  # this turn goes on with it
        self._send(self._runtime.ack(kind, session, self._persona, self.number, self._seed, self._ignored))

    @property
    def _seed(self) -> int:
        given = self._start.sampling
        if given is not None and given.seed is not None:
            return given.seed
        return self._session.seed + self.number

    async def answer(self) -> None:
        """From the ack to the last token. Like `release` and `pass_on` a point of a turn that a benchmark notes."""
        prompts, decider = self._runtime.prompts, self._runtime.decider
        await asyncio.sleep(0)  # others' turn: a long history was parsed
        if self._utterance is not None:
            self._utterance = await self._runtime.utterance(self._utterance)
        if prompts is None:
            await self._decide()
            del self._session.transcript.messages[:-_TOOL_ONLY_MESSAGES]  # no chat prompt trims them
        elif decider is None:
            await self._chat()
        elif self._runtime.settings.concurrent_model_call:
            await self._both_at_once()
        else:
            await self._decide()
            if not self._waits_for_results:
                await self._chat()

    async def _both_at_once(self) -> None:
        """Chat text is held until the decision is out; then the same stream goes on."""
        self._held = []
        failure: WireError | None = None
        async with asyncio.TaskGroup() as group:
            deciding = group.create_task(self._decide())
            chatting = asyncio.ensure_future(self._chat())
            deciding.add_done_callback(lambda _: chatting.cancel() if self._waits_for_results else None)
            try:
                await chatting
            except (EngineFailed, TextTooLong) as error:
                failure = error  # the decision still reaches the client, before the error
            except asyncio.CancelledError:
                chatting.cancel()
                if not self._waits_for_results or self.over:
                    raise
        if self._waits_for_results:
            self._text.clear()
            self._own.clear()
        elif failure is not None:
            raise failure

    async def _decide(self) -> None:
        decider, tools = self._runtime.decider, self._tools
        assert decider is not None and tools is not None
        self._mark_queue()
        rounds = self._asked.rounds if self._asked is not None else 0
        if not tools.names or self._utterance is None or rounds >= self._runtime.settings.max_tool_rounds:
            self.release(Decision([], 0.0))
            return
        messages = self._session.transcript.messages
        decision = await decider.decide(tools, messages, self._utterance, self._results)
        if self._asked is not None:  # a small model may want the same again, whose result stands there
            known = self._asked.all_calls
            new = [call for call in decision.calls if (call.name, call.arguments) not in known]
            decision = replace(decision, calls=new)
        self.release(decision)

    def release(self, decision: Decision) -> None:
        """Sends the decision, then the chat text that waited for it: one step, nothing comes between."""
        if self.over:
            return  # cut in the moment in which the decision came
        self._decision = decision
        awaited = self._tools.awaited if self._tools is not None else ()
        self._waits_for_results = any(self._awaits or call.name in awaited for call in decision.calls)
        self._runtime.metrics.decisions.labels(decision.reason or ("yes" if decision.calls else "no")).inc()
        self._usage.tool_prompt_tokens = decision.prompt_tokens
        self._usage.tool_cached_tokens = decision.cached_tokens
        self._timings.tool_ms = round(decision.tool_ms, 2)
        self.calls = [IdentifiedCall(f"call_{secrets.token_hex(6)}", c.name, c.arguments) for c in decision.calls]
        self._send(
            ToolCall(
                status="yes" if decision.calls else "no",
                raw=self.calls,
                turn=self.number,
                tool_ms=self._timings.tool_ms,
                p=UNSET if decision.p is None else round(decision.p, 4),
                reason=decision.reason or UNSET,
            )
        )
        held, self._held = self._held, None
        for delta in held or ():
            self.pass_on(delta)

    async def _chat(self) -> None:
        if self.over:
            return  # cut while it was decided, by a tool engine that failed in letting go
        runtime, prompts, engine = self._runtime, self._runtime.prompts, self._runtime.engines.chat
        assert prompts is not None and engine is not None
        messages = self._session.transcript.messages
        now = runtime.now()
        if self._rounds:
            await self._bound_results()
        around = Around(self._note, self._results, self._rounds)
        prompt = await prompts.turn(self._persona_text, messages, self._utterance, now, around)
        if self._utterance is not None:
            self._sent = prompts.sent(self._utterance, now)
        room = engine.max_model_len - len(prompt)
        if room < 1:
            raise TextTooLong(f"the prompt is {len(prompt)} tokens; limit is {engine.max_model_len - 1}")
        sampling = samplings.sampling(runtime, self._start.sampling, self._seed, room, self._session.key_name)
        self._mark_queue()
        try:
            async with (
                asyncio.timeout(runtime.settings.chat_timeout_s or None),
                aclosing(engine.stream(prompt, sampling)) as deltas,
            ):
                await self._take(deltas, sampling)
        except TimeoutError:
            self._finish_reason = "timeout"

    async def _bound_results(self) -> None:
        """Cuts what the last calls returned to its limit."""
        *before, last = self._rounds
        cut = [replace(call, content=await self._runtime.tool_result(call.content)) for call in last]
        self._rounds = [*before, cut]
        self._results = [*self._results[: len(self._results) - len(cut)], *map(_in_words, cut)]

    async def _take(self, deltas: AsyncIterator[Delta], sampling: Sampling) -> None:
        """Passes the reply on, up to its end: the engine's, a label of the next speaker, or a limit."""
        runtime, usage = self._runtime, self._usage
        assert runtime.prompts is not None
        most, thinks = samplings.reply_tokens(runtime, self._start.sampling), sampling.reasoning is not None
        lines = Lines() if runtime.prompts.labelled else None
        sentences = (
            Sentences(soft) if (soft := samplings.soft_limit(runtime, self._start.sampling)) is not None else None
        )
        async for delta in deltas:
            usage.prompt_tokens, usage.cached_tokens = delta.prompt_tokens, delta.cached_tokens
            usage.completion_tokens += delta.tokens
            if thinks:
                usage.reasoning_tokens += delta.reasoning
            self._finish_reason = delta.finish_reason
            told = delta
            if lines is not None and (lines.waiting or "\n" in delta.text):  # seldom: this is done for every token
                told = _within(lines, delta)
            if sentences is not None and sentences.ends(told):
                self._finish_reason = "soft_limit"
                return
            if self._held is not None:
                self._held.append(told)
            else:
                self.pass_on(told)
            if lines is not None and lines.over:
                self._finish_reason = "stop"
                return
            if thinks and usage.completion_tokens - usage.reasoning_tokens >= most:
                self._finish_reason = self._finish_reason or "length"
                return

    def pass_on(self, delta: Delta) -> None:
        """Sends what the chat engine said, if the client is to have it."""
        text = delta.text
        if self.over or self._waits_for_results:
            return
        if text and self._speakable is not None:
            text = self._in_speech(self._speakable, text)
        self._push(text, delta.tokens - delta.reasoning)

    def _push(self, text: str, tokens: int) -> None:
        """Sends it; tokens without a text of their own, as of half a character, count with the next that has one."""
        self._unsent += tokens
        if not text:
            return
        self._sink.push(text, self._unsent)
        self._unsent = 0
        self._text.append(text)
        if self._timings.ttft_ms is None:
            self._timings.ttft_ms = self._since_received()

    def _in_speech(self, speakable: Speakable, text: str) -> str:
        """What is sent of the model's own `text`, and what was held back before it."""
        self._own.append(text)
        self._own_chars += len(text)
        text = speakable.take(text)
        self._sent_chars += len(text)
        self._marks.append((self._sent_chars, self._own_chars))
        return text

    # --- the ends

    def _end(self) -> str:
        if self._waits_for_results:
            return self._end_with_calls()
        if self._speakable is not None:
            self._push(self._speakable.rest(), 0)
        text = "".join(self._text)
        self._finish_reason = self._finish_reason or "stop"
        self._send(Final(normalized_text=text, turn=self.number))
        self._send_done(finish_reason=self._finish_reason)
        own = "".join(self._own) if self._speakable is not None else text
        self._add_turn(own, spoken=None if own == text else Spoken(text, self._marks))
        return "finished"

    def _end_with_calls(self) -> str:
        self._finish_reason = "tool_calls"
        before = self._asked
        self._session.asked = Asked(
            self.number,
            self._utterance,
            self.calls,
            made=() if before is None else [*before.made, *before.calls],
            results=self._results,
            done=self._rounds,
            note=self._note,
            speakable=self._speakable is not None,
            rounds=1 if before is None else before.rounds + 1,
        )
        self._send_done(finish_reason=self._finish_reason)
        self._session.transcript.add_turn(self._utterance, "", sent=self._sent)
        return "finished"

    def _end_cancelled(self) -> str:
        assert self._cancelled_at is not None
        self.over = True
        if self._failure is not None:
            self._send(error_frame(self._failure, turn=self.number, session_id=self._session.session_id))
            return self._failure.code
        sent = self._sink.retract()
        cancel_ms = round((time.perf_counter() - self._cancelled_at) * 1000, 3)
        self._send_done(
            finish_reason="cancelled", cancelled=True, cancel_ms=cancel_ms, tokens_sent=self._sink.sent_tokens
        )
        self._runtime.metrics.cancel_ms.observe(cancel_ms)
        heard = self._heard or Heard()
        reply, spoken = heard_part(sent, heard.chars, heard.text), None
        if self._speakable is not None:
            own, spoken = "".join(self._own), Spoken(sent, self._marks)
            own = own[: spoken.own(own, len(reply))]
            reply, spoken = own, Spoken(reply, self._marks)
        self._add_turn(
            cut_short(reply, self._runtime.settings.interrupted_mark) if reply.strip() else "", spoken=spoken
        )
        return "cancelled"

    def _add_turn(self, reply: str, *, spoken: Spoken | None = None) -> None:
        transcript = self._session.transcript
        transcript.add_turn(self._utterance, reply, sent=self._sent, results=self._results, spoken=spoken)
        transcript.bound(self._runtime.history_bytes)

    def _send_done(self, **fields: Any) -> None:
        self._timings.total_ms = self._since_received()
        session_id = self._session.session_id
        self._send(Done(turn=self.number, session_id=session_id, usage=self._usage, timings=self._timings, **fields))

    def _close(self, outcome: str) -> None:
        """The last step, whatever came before it."""
        if self._begun and outcome not in ("finished", "cancelled"):
            self._add_turn(self._sink.retract())
        self._runtime.sessions.keep(self._session)
        if self._session.current is self:
            # One that it still waited for ends a moment later: the next turn has to wait for that. Not one of another
            # session: it would never leave this one.
            waited = (turn for turn in reversed(self.waits_for) if turn.session is self._session)
            self._session.current = next((turn for turn in waited if not turn.finished.is_set()), None)
        self.waits_for.clear()
        self.over = True
        self.finished.set()
        self._timings.total_ms = self._timings.total_ms or self._since_received()
        self._runtime.metrics.running_turns -= self._begun
        self._runtime.metrics.turn(outcome, self._usage, self._timings)
        _log.info(
            "turn.finished",
            outcome=outcome,
            turn=self.number,
            session_id=self._session.session_id,
            key=self._session.key_name,
            others=self._others,
            backlog_ms=round(self._backlog_ms, 1),
            finish_reason=self._finish_reason,
            tokens_sent=self._sink.sent_tokens,
            tool_reason=self._decision.reason if self._decision else None,
            **msgspec.structs.asdict(self._usage),
            **msgspec.structs.asdict(self._timings),
        )
        if self._runtime.settings.log_text:
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
    return delta if text == delta.text else msgspec.structs.replace(delta, text=text)


def _chosen(given: bool | None, otherwise: bool) -> bool:
    return otherwise if given is None else given


def _returned(frame: ToolResult, asked: Asked | None, max_tokens: int) -> list[Called]:
    """What each call of a turn returned. Raises `BadMessage`, and `TextTooLong` for what is over the limit at any
    rate of characters a token."""
    if asked is None or asked.turn != frame.turn:
        raise BadMessage(f"Turn {frame.turn} waits for no tool results - at $.turn")
    given = {result.id: result.content for result in frame.results}
    known = [call.id for call in asked.calls]
    for index, result in enumerate(frame.results):
        if result.id not in known:
            raise BadMessage(f"Unknown id; the calls are {', '.join(known)} - at $.results[{index}].id")
    if missing := [id for id in known if id not in given]:
        raise BadMessage(f"The result of {missing[0]} is missing - at $.results")
    limit = 16 * max_tokens
    contents = [given[id] if isinstance(given[id], str) else msgspec.json.encode(given[id]).decode() for id in known]
    for text in contents:
        if len(text) > limit:
            raise TextTooLong(f"a tool result is {len(text)} characters; limit is {limit} - at $.results")
    return [Called(c.name, c.arguments, text.strip()) for c, text in zip(asked.calls, contents, strict=True)]


def _in_words(call: Called) -> str:
    return f"({call.name} {msgspec.json.encode(call.arguments).decode()} returned: {call.content})"
