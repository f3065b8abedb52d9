"""A crowd that barges in, cancels, vanishes in mid-token and comes back: does the service grow under it?

    .venv/serve-cpu/bin/python tests/soak/crowd.py engine [--minutes 30] [--sockets 24]       real vLLM, the demo model
    .venv/serve-cpu/bin/python tests/soak/crowd.py front [--sockets 1000] [--rate 5]          a scripted engine

Ends with a table, and with status 1 where a figure has grown, something is left when the crowd is gone, or a turn
failed. `engine` starts `yap-text serve` (settings come from the environment), `front` the server of bench/front_end.py.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import uvloop

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "bench")]
from front_end import ServerProcess
from soak.flat import judge

from yaptext.bench.conversation import Conversation, Full
from yaptext.bench.http import Getter
from yaptext.bench.plan import Sampling
from yaptext.bench.prompts import UTTERANCES, Prompts
from yaptext.bench.service import Service
from yaptext.bench.text import number, table
from yaptext.client.errors import Refused

Sample = dict[str, float]
MB = 2**20
KEY = "yap_token"
REPLY_TOKENS = 40
STORIES = 4
"""Personas and histories that one user comes back with."""
ARRIVE_S = 0.005
TURN_LIMIT_S = 300.0
"""24 users on two cores wait 45 s for a whole reply, and a quarter of them for two."""
QUIET_LIMIT_S = 15.0
"""How long the service may take to be done with a crowd that is gone."""
SHORT_S, LOOSENESS = 300.0, 4.0
"""Shorter runs are judged this much more loosely: they see more of the warm-up."""
GROWTH = {
    "service_mb": (0.02, 8),
    "engine_mb": (0.02, 16),
    "service_files": (0.02, 4),
    "engine_files": (0.02, 4),
    "tasks": (0.02, 8),
    "sessions": (0.02, 2),
    "orphans": (0.0, 3),
    "kv_use": (0.1, 0.1),
}
"""What each may grow by: a share, or an amount where that is more."""
LEFT = {
    "connections": 0,
    "streams": 0,
    "orphans": 0,
    "tasks": 2,
    "service_files": 2,
    "engine_files": 2,
    "kv_use": 0.02,
}
"""What is as it was when the crowd is gone and one user speaks alone, and by how much it may be more. Orphans are
requests of an engine that nobody reads."""
ENDS = ("done", "cancelled", "gone", "refused")
"""How turns, and attempts to connect, may end."""
_SAMPLE = re.compile(r"^yaptext_(\w+)(?:\{[^}]*\})? (\S+)$", re.MULTILINE)


class Soak:
    """A crowd of `sockets` users on the service whose process is `pid`."""

    def __init__(self, url: str, key: str, pid: int, sockets: int) -> None:
        self._service, self._getter = Service(url, key, Sampling(REPLY_TOKENS)), Getter(url, key)
        self._process, self._sockets = psutil.Process(pid), sockets
        self._prompts = Prompts(7, f"soak-{pid}", persona_tokens=30, history_tokens=30)
        self._turns: Counter[str] = Counter()
        self._longest_s = 0.0

    async def run(self, seconds: float, every_s: float) -> dict[str, Any]:
        """Everything that was seen; `wrong` has a sentence for each thing that should not be."""
        before, samples = await self._alone(), []
        begun = time.monotonic()
        async with asyncio.TaskGroup() as group:
            crowd = [group.create_task(self._user(user)) for user in range(self._sockets)]
            while time.monotonic() - begun < seconds:
                await asyncio.sleep(every_s)
                samples.append({"second": round(time.monotonic() - begun, 1)} | await self._sample())
            for user in crowd:
                user.cancel()  # all vanish at once
        after = await self._alone()
        self._getter.close()
        loose = 1.0 if seconds >= SHORT_S else LOOSENESS
        verdicts = {
            name: judge([sample[name] for sample in samples], share=share * loose, floor=floor * loose)
            for name, (share, floor) in GROWTH.items()
        }
        wrong = [f"{name} has grown" for name, seen in verdicts.items() if not seen.flat]
        left = [name for name, more in LEFT.items() if after[name] > before[name] + more]
        wrong += [f"{name}: {before[name]:g} before, {after[name]:g} after" for name in left]
        wrong += [f"{self._turns[end]} times {end}" for end in self._turns - Counter() if end not in ENDS]
        return {
            "wrong": wrong,
            "turns": dict(self._turns),
            "longest_s": self._longest_s,
            "verdicts": {name: asdict(seen) | {"flat": seen.flat} for name, seen in verdicts.items()},
            "before": before,
            "after": after,
            "samples": samples,
        }

    async def _user(self, user: int) -> None:
        chosen, conversation = random.Random(user), self._service.conversation()
        await asyncio.sleep(user * ARRIVE_S)
        while True:
            conversation.meet(f"soak-{user}", self._prompts.story(user, chosen.randrange(STORIES)))
            try:
                async with asyncio.timeout(TURN_LIMIT_S):
                    await conversation.open()
                while chosen.random() < 0.9:
                    begun = time.monotonic()
                    async with asyncio.timeout(TURN_LIMIT_S):
                        end = await self._speak(conversation, chosen)
                    self._turns[end] += 1
                    self._longest_s = max(self._longest_s, time.monotonic() - begun)
                    if end not in ("done", "cancelled"):
                        break
                await conversation.close()
            except Full as full:
                self._turns["refused"] += 1
                await asyncio.sleep((full.retry_after_ms or 1000) / 1000)
            except (Refused, TimeoutError) as error:
                self._turns[str(error) or "timeout"] += 1
                await asyncio.sleep(1)
            finally:
                conversation.drop()
                self._turns["strays"] += conversation.strays
                conversation.strays = 0

    async def _speak(self, conversation: Conversation, chosen: random.Random) -> str:
        """One utterance and how it ends: heard, cut by another, cancelled, or with the user's network."""
        turn = await conversation.begin(chosen.choice(UTTERANCES))
        way = chosen.randrange(4)
        if way:
            await turn.reaches(chosen.randint(1, REPLY_TOKENS // 2))
        if way == 1:
            cut, turn = turn, await conversation.begin(chosen.choice(UTTERANCES))
            await cut.over.wait()
            if cut.error:
                return cut.error
        elif way == 2:
            conversation.cancel()
        elif way == 3:
            conversation.drop()
            return "gone"
        await turn.over.wait()
        return turn.error or turn.outcome

    async def _alone(self) -> Sample:
        """A sample while one user speaks, and nobody else any more."""
        deadline = time.monotonic() + QUIET_LIMIT_S
        while (seen := await self._sample())["connections"] or seen["streams"]:
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(0.1)
        conversation = self._service.conversation()
        await conversation.open()
        conversation.meet("soak-alone", self._prompts.story(0))
        turn = await conversation.begin(UTTERANCES[0])
        await turn.reaches(5)
        seen = await self._sample()
        await conversation.close()
        return seen

    async def _sample(self) -> Sample:
        _, text = await self._getter.get("/metrics")
        told: Counter[str] = Counter()
        for name, value in _SAMPLE.findall(text):
            told[name] += float(value)  # over its labels
        engines = self._process.children(recursive=True)
        return {
            "connections": told["connections"],
            "sessions": told["sessions"],
            "tasks": told["tasks"],
            "service_mb": told["process_resident_memory_bytes"] / MB,
            "service_files": told["process_open_fds"],
            "engine_mb": sum(engine.memory_info().rss for engine in engines) / MB,
            "engine_files": sum(engine.num_fds() for engine in engines),
            "streams": told["engine_streams"],
            "orphans": max(0.0, told["engine_requests"] - told["engine_streams"]),
            "kv_use": told["engine_kv_use"],
        }


@contextmanager
def serving_demo(sockets: int) -> Iterator[tuple[str, int]]:
    """`yap-text serve` in a process of its own: address and process id."""
    environment = {
        "PORT": "0",
        "YAP_TEXT_API_KEY": KEY,
        "LOG_FORMAT": "json",
        "MAX_CONCURRENT_CONNECTIONS": str(sockets + 1),
        "KV_OVERCOMMIT": "0",
        "MAX_PREFILL_BACKLOG_MS": "0",
        "MAX_SESSIONS": str(sockets * 3 // 4),  # so that some are forgotten all the time
    }
    with tempfile.NamedTemporaryFile() as log:
        process = subprocess.Popen([sys.executable, "-m", "yaptext", "serve"], stderr=log, env=os.environ | environment)
        try:
            while not (ready := re.search(rb'"url": ?"http(://[^"]+)"', Path(log.name).read_bytes())):
                if process.poll() is not None:
                    sys.exit(Path(log.name).read_text()[-2000:])
                time.sleep(0.5)
            yield f"ws{ready[1].decode()}/ws", process.pid
        finally:
            process.terminate()
            process.wait()


@contextmanager
def serving_script(rate: float) -> Iterator[tuple[str, int]]:
    server = ServerProcess("service", rate, slots=50)
    try:
        yield server.url, server.process.pid
    finally:
        server.stop()


def report(found: dict[str, Any]) -> str:
    rows = [("", "middle third", "last third", "trend", "allowed", "")]
    for name, seen in found["verdicts"].items():
        figures = (number(seen[key]) for key in ("middle", "last", "growth", "allowed"))
        rows.append((name, *figures, "flat" if seen["flat"] else "GROWN"))
    turns = ", ".join(f"{count} {end}" for end, count in sorted(found["turns"].items()))
    longest = f"the longest utterance took {found['longest_s']:.0f} s, one that was cut short with what replaced it"
    return "\n".join([table(rows), f"turns: {turns}", longest, *found["wrong"]])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=("engine", "front"))
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--sockets", type=int, help="default: 24, 1000 for front")
    parser.add_argument("--rate", type=float, default=5.0, help="tokens a second of each stream of the scripted engine")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between samples; at least 24 are taken")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    sockets = given.sockets or (24 if given.which == "engine" else 1000)
    with serving_demo(sockets) if given.which == "engine" else serving_script(given.rate) as (url, pid):

        async def soak() -> dict[str, Any]:
            seconds = given.minutes * 60
            return await Soak(url, KEY, pid, sockets).run(seconds, min(given.every, seconds / 24))

        found = {"which": given.which, "minutes": given.minutes, "sockets": sockets} | uvloop.run(soak())
    print(report(found))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
