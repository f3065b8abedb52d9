"""The same turns on the raw engine, through the service, and through vLLM's own OpenAI server, in one run.

    .venv/serve-cpu/bin/python tests/bench/side_by_side.py [--door ws] [--sessions 1,8,16,32] [--rounds 3] [--json F]

All three run at once, each with an engine of its own, opened with the same arguments on the same model (the embedded
one, or `CHAT_MODEL`); only one is driven at a time. Rounds go through them in turns, each round beginning with another,
so that what the machine does meanwhile meets all alike: ratios are taken within a round, and their median and range are
over the rounds. CPU is that of a server's own process a turn, without its engine's: it says less of what else the
machine does. Prompts are the same tokens (the run tells where a count differs), decoding is greedy, prefixes are warmed
before. `raw` is `AsyncLLM.generate` in this process, on token ids that are ready before its clock starts.

`--door` is the service's: `ws`, or `completions` for `/v1/chat/completions`. Through the latter the service gets the
requests of vLLM's server, from the same client: the history as messages, no tools, no session.

`--first` adds the first turns of new sessions, where only `/ws` has been told persona and history before: its protocol
has messages for that, to be sent while the user still speaks. The others get the prompt with the utterance.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from yaptext.bench.http import Getter
from yaptext.bench.openai import OpenAI
from yaptext.bench.plan import Sampling
from yaptext.bench.prompts import Prompts, Story
from yaptext.bench.service import Service
from yaptext.bench.text import number, table
from yaptext.bench.turn import Turn
from yaptext.client.errors import Refused
from yaptext.dialogue import transcript
from yaptext.dialogue.chat_prompt import ChatPrompts, Limits
from yaptext.dialogue.runtime import Runtime
from yaptext.engine import checkpoints, demo
from yaptext.engine.vllm.arguments import engine_arguments
from yaptext.engine.vllm.engine import VllmEngine
from yaptext.engine.vllm.environment import engine_environment
from yaptext.observe.logs import configure
from yaptext.settings import Settings

TURN_LIMIT_S = 300.0
START_LIMIT_S = 300.0
MIN_TURNS = 6
"""Turns of a round at a number of sessions: a few sessions speak that often one after the other."""
_OWN_TOKENS = 48
"""What a turn brings: the time, the utterance, and the template's own pieces."""
_LEAST_WORDS = 8
DOORS = ("ws", "completions")
GREEDY = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""With these the service's own defaults take no part, as they do not on its WebSocket."""
FIGURES = ("ttft", "e2e")
STATISTICS = (("p50", 0.50), ("p95", 0.95))


class Raw:
    """The engine without anything in front of it."""

    def __init__(self, llm: Any, prompts: ChatPrompts, sampling: Sampling) -> None:
        self._llm, self._prompts, self._max_tokens = llm, prompts, sampling.max_tokens
        self._number = 0

    def conversation(self) -> RawConversation:
        return RawConversation(self)

    async def ids(self, story: Story, utterance: str) -> list[int]:
        now = None if self._prompts.plain else Runtime.now()
        return await self._prompts.turn(story.persona, transcript.parse(story.history), utterance, now)

    async def prefix(self, story: Story) -> list[int]:
        return await self._prompts.prefix(story.persona, transcript.parse(story.history))

    async def without_a_rest(self, story: Story, utterance: str) -> Story:
        """The story with a persona so much shorter that persona and history fill whole blocks of the prefix cache: a
        turn then computes what it says and no rest of a block, up to 127 tokens on CPU, which nobody's front end
        could be seen behind."""
        while len(await self.ids(story, utterance)) - len(await self.prefix(story)) > _OWN_TOKENS:
            words = story.persona.split(" ")
            if len(words) < _LEAST_WORDS:
                break
            story = Story(" ".join(words[:-1]), story.history)
        return story

    async def generate(self, ids: list[int], turn: Turn, max_tokens: int | None = None) -> None:
        from vllm import TokensPrompt
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        self._number += 1
        params = SamplingParams(
            max_tokens=max_tokens or self._max_tokens, temperature=0.0, output_kind=RequestOutputKind.DELTA
        )
        async for output in self._llm.generate(TokensPrompt(prompt_token_ids=ids), params, f"raw-{self._number}"):
            completion = output.outputs[0]
            turn.completion_tokens += len(completion.token_ids)
            turn.prompt_tokens, turn.cached_tokens = len(output.prompt_token_ids), output.num_cached_tokens
            if completion.text:
                turn.token(completion.text, time.perf_counter())
        turn.end("done", time.perf_counter())


class RawConversation:
    """As much of a `Conversation` as this script uses."""

    def __init__(self, raw: Raw) -> None:
        self._raw = raw

    async def open(self) -> None:
        pass

    def meet(self, session: str, story: Story) -> None:
        self._story = story

    async def warm(self) -> None:
        await self._raw.generate(await self._raw.prefix(self._story), Turn(0.0), max_tokens=1)

    async def begin(self, utterance: str, *, again: bool) -> Turn:
        assert again
        ids = await self._raw.ids(self._story, utterance)
        turn = Turn(time.perf_counter())
        self._task = asyncio.create_task(self._raw.generate(ids, turn))
        return turn

    async def close(self) -> None:
        pass


@asynccontextmanager
async def raw_engine(
    arguments: dict[str, Any], settings: Settings, door: str, sampling: Sampling
) -> AsyncIterator[Raw]:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    configure(level="error", format="json", journald=False)  # what vLLM warns of stands in the logs of the other two
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
    try:
        opened = VllmEngine(llm, arguments["model"], "float", None)
        limits = Limits(persona=2000, history=4000, utterance=settings.user_utt_max_tokens, reply=settings.chat_max_out)
        plain = door == "completions"
        form = "turns" if plain else settings.chat_prompt_format
        yield Raw(llm, await ChatPrompts.open(opened.codec, form, limits, plain=plain), sampling)
    finally:
        llm.shutdown(timeout=5)


@contextmanager
def process(command: list[str], log: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as out:
        started = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | environment)
    try:
        yield started
    finally:
        started.terminate()
        try:
            started.wait(30)
        except subprocess.TimeoutExpired:
            started.kill()


def last_words(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])


async def answers(url: str, path: str, started: subprocess.Popen[bytes], log: Path) -> None:
    """Waits until a GET is answered with 200."""
    until = time.monotonic() + START_LIMIT_S
    while time.monotonic() < until:
        if started.poll() is not None:
            break
        getter = Getter(url, None)
        try:
            if (await getter.get(path))[0] == 200:
                return
        except Refused:
            pass
        finally:
            getter.close()
        await asyncio.sleep(0.5)
    raise SystemExit(f"{url} does not serve (status {started.poll()}); its last words:\n{last_words(log)}")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def flags(arguments: dict[str, Any]) -> list[str]:
    """Engine arguments as the OpenAI server's command line."""
    found = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            found += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return found


async def turns(users: int, waves: int, prompts: Prompts, first: int, conversations: list[Any]) -> list[Turn]:
    """Every user says something, all at once, `waves` times."""
    said = []
    gc.collect()
    gc.disable()
    try:
        for wave in range(waves):
            begun = [
                await conversation.begin(prompts.utterance(user, first + wave), again=True)
                for user, conversation in enumerate(conversations[:users])
            ]
            async with asyncio.timeout(TURN_LIMIT_S):
                for turn in begun:
                    await turn.over.wait()
            said += begun
    finally:
        gc.enable()
    failed = [turn.error for turn in said if turn.outcome != "done"]
    if failed:
        raise SystemExit(f"{len(failed)} turns failed: {failed[0]}")
    return said


def milliseconds(said: list[Turn]) -> dict[str, list[float]]:
    return {
        "ttft": sorted((turn.arrivals[0] - turn.sent_at) * 1000 for turn in said),
        "e2e": sorted(((turn.last_at or 0.0) - turn.sent_at) * 1000 for turn in said),
    }


async def run(given: argparse.Namespace) -> dict[str, Any]:
    settings = Settings.load(DEPLOY_MODELS="chat")
    os.environ.update(engine_environment(settings))
    folder = demo.folder(settings.state) if checkpoints.wants_demo(settings) else None
    checkpoint = checkpoints.choose(settings, "chat", folder)
    arguments = engine_arguments(settings, checkpoint, "chat", alone=True)
    sampling = Sampling(given.max_tokens)
    prompts = Prompts(
        1,
        f"{time.time_ns() // 10**6 % 16**8:08x}",
        persona_tokens=given.persona_tokens,
        history_tokens=given.history_tokens,
    )
    users = max(given.sessions)
    logs = Path(tempfile.mkdtemp(prefix="side-by-side-"))
    print(f"opening three engines; their logs are in {logs}", file=sys.stderr, flush=True)

    service_port, openai_port = free_port(), free_port()
    serve = [sys.executable, "-m", "yaptext", "serve"]
    limits = {
        "DEPLOY_MODELS": "chat",
        "PORT": str(service_port),
        "MAX_CONCURRENT_CONNECTIONS": str(2 * users + 1),
        "KV_OVERCOMMIT": "0",
    }
    peer = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--host",
        "127.0.0.1",
        "--port",
        str(openai_port),
    ]
    peer += ["--served-model-name", "chat", "--enable-prompt-tokens-details", "--disable-uvicorn-access-log"]
    with (
        process(serve, logs / "service.log", limits) as service,
        process([*peer, *flags(arguments)], logs / "openai.log", {}) as openai,
    ):
        service_url, openai_url = f"ws://127.0.0.1:{service_port}/ws", f"http://127.0.0.1:{openai_port}"
        await answers(service_url, "/readyz", service, logs / "service.log")
        await answers(openai_url, "/health", openai, logs / "openai.log")
        async with raw_engine(arguments, settings, given.door, sampling) as raw:
            key = settings.api_key.get_secret_value()
            targets: dict[str, Any] = {"raw": raw}
            if given.door == "completions":
                url = service_url.replace("ws:", "http:").removesuffix("/ws")
                targets["service"] = OpenAI(url, "chat", key, sampling, in_roles=True, fields=GREEDY)
                targets["openai"] = OpenAI(openai_url, "chat", None, sampling, in_roles=True, fields=GREEDY)
            else:
                targets["service"] = Service(service_url, key, sampling)
                targets["openai"] = OpenAI(openai_url, "chat", None, sampling)
            processes = {"service": service.pid, "openai": openai.pid}
            return await rounds(given, targets, processes, prompts, users)


async def rounds(
    given: argparse.Namespace, targets: dict[str, Any], processes: dict[str, int], prompts: Prompts, users: int
) -> dict[str, Any]:
    raw: Raw = targets["raw"]
    stories = [await raw.without_a_rest(prompts.story(user), prompts.utterance(user, 0)) for user in range(users)]
    conversations: dict[str, list[Any]] = {name: [] for name in targets}
    for name, target in targets.items():
        print(f"warming {users} sessions of {name}", file=sys.stderr, flush=True)
        for user in range(users):
            conversation = target.conversation()
            await conversation.open()
            conversation.meet(f"user-{user}", stories[user])
            await conversation.warm()
            conversations[name].append(conversation)
        # What a server does only for its first turn belongs to its start.
        await turns(min(2, users), 1, prompts, 0, conversations[name])
    names = list(targets)
    found: dict[str, list[dict[str, list[Turn]]]] = {}
    cpu_s: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for number_of_round in range(given.rounds):
        order = names[number_of_round % 3 :] + names[: number_of_round % 3]
        for sessions in given.sessions:
            waves = -(-MIN_TURNS // sessions)
            first = 1 + number_of_round * MIN_TURNS
            kinds: dict[str, dict[str, list[Turn]]] = {str(sessions): {}}
            for name in order:
                begun = cpu_of(processes.get(name))
                kinds[str(sessions)][name] = await turns(sessions, waves, prompts, first, conversations[name])
                cpu_s[str(sessions)][name] += cpu_of(processes.get(name)) - begun
            if given.first:
                stories = [prompts.story(user, variant=users * number_of_round + sessions) for user in range(sessions)]
                kinds[f"{sessions} new"] = {name: await first_turns(targets[name], prompts, stories) for name in order}
            for kind, said in kinds.items():
                found.setdefault(kind, []).append(said)
                told = ", ".join(f"{name} {np.quantile(milliseconds(said[name])['ttft'], 0.5):.0f}" for name in names)
                print(f"round {number_of_round + 1}, {kind} sessions: TTFT p50 {told} ms", file=sys.stderr, flush=True)
    for opened in conversations.values():
        await asyncio.gather(*(conversation.close() for conversation in opened))
    return {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "given": {name: str(value) for name, value in vars(given).items()},
        "sessions": {kind: figures(several, cpu_s[kind]) for kind, several in found.items()},
    }


def cpu_of(pid: int | None) -> float:
    """CPU seconds of a process, by the clock that clock_getcpuclockid(3) names; 0 for none."""
    return 0.0 if pid is None else time.clock_gettime((~pid << 3) | 2)


async def first_turns(target: Any, prompts: Prompts, stories: list[Story]) -> list[Turn]:
    """New sessions say their first words, all at once."""
    conversations = [target.conversation() for _ in stories]
    for user, (conversation, story) in enumerate(zip(conversations, stories, strict=True)):
        await conversation.open()
        conversation.meet(f"new-{user}", story)
        if isinstance(target, Service):
            await conversation.warm()
    said = await turns(len(stories), 1, prompts, 0, conversations)
    await asyncio.gather(*(conversation.close() for conversation in conversations))
    return said


def figures(several: list[dict[str, list[Turn]]], cpu_s: Mapping[str, float]) -> dict[str, Any]:
    """Of one number of sessions: figures over all rounds by target, ratios by pair, and what was not alike. `cpu_s` is
    the CPU time of all rounds, by target."""
    names = list(several[0])
    by_round = [{name: milliseconds(said[name]) for name in names} for said in several]
    whole = {name: milliseconds([turn for said in several for turn in said[name]]) for name in names}
    ratios: dict[str, Any] = {}
    for other in ("raw", "openai"):
        for figure in FIGURES:
            for label, share in STATISTICS:
                of_rounds = [
                    np.quantile(each["service"][figure], share) / np.quantile(each[other][figure], share)
                    for each in by_round
                ]
                ratios[f"service/{other} {figure} {label}"] = {
                    "median": statistics.median(of_rounds),
                    "low": min(of_rounds),
                    "high": max(of_rounds),
                }
    return {
        "targets": {
            name: {
                f"{figure}_{label}_ms": np.quantile(whole[name][figure], share)
                for figure in FIGURES
                for label, share in STATISTICS
            }
            | {
                "turns": len(whole[name]["ttft"]),
                "cpu_ms": cpu_s.get(name, 0.0) * 1000 / len(whole[name]["ttft"]),
                "prompt_tokens": statistics.median(turn.prompt_tokens for said in several for turn in said[name]),
                "cached_tokens": statistics.median(turn.cached_tokens or 0 for said in several for turn in said[name]),
                "completion_tokens": sorted({turn.completion_tokens for said in several for turn in said[name]}),
            }
            for name in names
        },
        "ratios": ratios,
    }


def shown(content: dict[str, Any]) -> str:
    columns = [f"{figure}_{label}_ms" for figure in FIGURES for label, _ in STATISTICS]
    rows = [
        (
            "ms",
            *(f"{figure} {label}" for figure in FIGURES for label, _ in STATISTICS),
            "cpu",
            "turns",
            "prompt",
            "cached",
            "out",
        )
    ]
    for sessions, found in content["sessions"].items():
        for name, of in found["targets"].items():
            out = of["completion_tokens"]
            rows.append(
                (
                    f"{sessions} sessions, {name}",
                    *(number(of[column]) for column in columns),
                    number(of["cpu_ms"]) if of["cpu_ms"] else "",
                    str(of["turns"]),
                    f"{of['prompt_tokens']:.0f}",
                    f"{of['cached_tokens']:.0f}",
                    str(out[0]) if len(out) == 1 else f"{out[0]}-{out[-1]}",
                )
            )
        for other in ("raw", "openai"):
            cells = []
            for figure in FIGURES:
                for label, _ in STATISTICS:
                    ratio = found["ratios"][f"service/{other} {figure} {label}"]
                    cells.append(f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})")
            rows.append((f"    service / {other}", *cells, "", "", "", "", ""))
    return table(rows)


def draw(content: dict[str, Any], to: Path) -> None:
    """The ratios of TTFT and E2E at p50, over the sessions: medians of the rounds, and their range as bars."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams |= {"svg.hashsalt": "side by side", "svg.fonttype": "none", "font.size": 9}
    drawing, axes = pyplot.subplots(figsize=(7, 3.2), layout="constrained")
    sessions = list(content["sessions"])
    for index, (other, figure) in enumerate((other, figure) for other in ("raw", "openai") for figure in FIGURES):
        found = [content["sessions"][count]["ratios"][f"service/{other} {figure} p50"] for count in sessions]
        middle = [each["median"] for each in found]
        below = [each["median"] - each["low"] for each in found]
        above = [each["high"] - each["median"] for each in found]
        places = [place + (index - 1.5) * 0.12 for place in range(len(sessions))]
        axes.errorbar(
            places, middle, yerr=[below, above], fmt="o", capsize=3, label=f"{figure.upper()}, service / {other}"
        )
    axes.axhline(1.0, color="gray", linewidth=0.8)
    axes.set_xticks(range(len(sessions)), [f"{count} sessions" for count in sessions])
    axes.set_ylabel("ratio at p50")
    axes.legend()
    drawing.savefig(to, format="svg", metadata={"Date": None})


def counts(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--door", choices=DOORS, default="ws")
    parser.add_argument("--sessions", type=counts, default=[1, 8, 16, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--persona-tokens", type=int, default=150)
    parser.add_argument("--history-tokens", type=int, default=250)
    parser.add_argument("--first", action="store_true", help="also the first turns of new sessions")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--svg", type=Path, help="draws the ratios")
    given = parser.parse_args()
    content = uvloop.run(run(given))
    print(shown(content))
    if given.json:
        given.json.write_text(json.dumps(content, indent=1))
    if given.svg:
        draw(content, given.svg)


if __name__ == "__main__":
    main()  # guarded: engine processes import this module anew
