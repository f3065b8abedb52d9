"""A load generator that other people wrote: aiperf's own report agrees with the service's figures."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from clients.conftest import KEY, LOAD, Target
from clients.transcript import Pages
from conftest import until
from faults.process import Process
from prometheus_client.parser import text_string_to_metric_families

from yaptext.engine.demo import place

pytestmark = [pytest.mark.clients, pytest.mark.engine, pytest.mark.subprocess, pytest.mark.timeout(600)]
README = Path(__file__).with_name("README.md")
MOST = 24
"""Tokens of a reply."""
SAID = (
    ("What is the capital of France?", "And what do people eat there?"),
    ("Name a river in Germany.", "Where does it end?"),
    ("What is the tallest mountain?", "Who climbed it first?"),
    ("What do bees make?", "How do people eat it?"),
    ("Which planet is the largest?", "How many moons does it have?"),
    ("What is the opposite of hot?", "And of tall?"),
)
OSLO = "What is the weather in Oslo?"
RESULT = "Sunny, 21 degrees."
LONG = "Tell me a very long story about the sea."
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a place.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}
CALLED = {"id": "call-1", "type": "function", "function": {"name": "get_weather", "arguments": '{"place": "Oslo"}'}}


@dataclass
class Report:
    """What aiperf wrote: the sums, and each request with its answer, by conversation and turn."""

    sums: dict[str, Any]
    requests: dict[tuple[str, int], dict[str, Any]]

    def of(self, metric: str, kind: str = "avg") -> float:
        return float(self.sums[metric][kind])


@pytest.fixture
def real(demo: Process, pages: Pages) -> Target:
    return Target(demo.http, process=demo, pages=pages)


@pytest.fixture
def tokenizer(real: Target, state_folder: Path) -> Path:
    """That of the demo model, which the service has put there: no network is needed."""
    return place(state_folder)


async def run(target: Target, folder: Path, *command: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *command,
        env=target.environment(folder, venv=LOAD),
        cwd=folder,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        out, _ = await asyncio.wait_for(process.communicate(), 180)
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)  # aiperf starts workers
    print(out.decode(errors="replace"))
    assert process.returncode == 0


async def aiperf(target: Target, folder: Path, tokenizer: Path, talk: list[list[dict[str, Any]]], *more: str) -> Report:
    """A run of it over the conversations, three at a time."""
    lines = [json.dumps({"session_id": str(number), "turns": turns}) for number, turns in enumerate(talk)]
    (folder / "talk.jsonl").write_text("\n".join(lines), encoding="utf-8")
    at = ("--url", target.http, "--api-key", KEY, "--model", "chat", "--endpoint-type", "chat", "--streaming")
    given = ("--input-file", "talk.jsonl", "--custom-dataset-type", "multi-turn", "--tokenizer", str(tokenizer))
    load = ("--concurrency", "3", "--num-conversations", str(len(talk)), "--workers-max", "2", "--random-seed", "1")
    wrote = ("--artifact-dir", "report", "--export-level", "raw", "--ui", "none")
    await run(target, folder, "aiperf", "profile", *at, *given, *load, *wrote, *more)
    requests: dict[tuple[str, int], dict[str, Any]] = {}
    for name in ("profile_export_raw.jsonl", "profile_export.jsonl"):
        for line in (folder / "report" / name).read_text(encoding="utf-8").splitlines():
            found = json.loads(line)
            about = found["metadata"]
            requests.setdefault((about["conversation_id"], about["turn_index"]), {}).update(found)
    return Report(sums_of(folder / "report"), requests)


def sums_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "profile_export_aiperf.json").read_text(encoding="utf-8"))
    return found


async def figures(target: Target) -> dict[tuple[str, ...], float]:
    """The service's counters, by name and labels."""
    async with httpx.AsyncClient(headers={"X-API-Key": KEY}, trust_env=False) as client:
        text = (await client.get(f"{target.http}/metrics")).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(sample.name.removeprefix("yaptext_"), *sample.labels.values()): sample.value for sample in samples}


def deltas(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Of the stream that aiperf got."""
    for response in request["responses"]:
        for packet in response["packets"]:
            if packet["name"] == "data" and packet["value"] != "[DONE]":  # else a keepalive
                for choice in json.loads(packet["value"])["choices"]:
                    yield choice["delta"] | {"finish": choice["finish_reason"]}


def text_of(request: dict[str, Any]) -> str:
    return "".join(delta.get("content") or "" for delta in deltas(request))


def figure(request: dict[str, Any], name: str) -> float:
    return float(request["metrics"][name]["value"])


def a_turn(request: dict[str, Any]) -> dict[str, Any]:
    """As `scripts/told.py` tells it."""
    last = request["payload"]["messages"][-1]
    return {
        "what": "turn",
        "result" if last["role"] == "tool" else "said": last["content"],
        "text": text_of(request),
        "finish": [delta["finish"] for delta in deltas(request)][-1],
        "cached": figure(request, "usage_prompt_cache_read_tokens"),
        "ttft_ms": figure(request, "time_to_first_token"),
    }


async def test_conversations_of_two_turns(real: Target, tokenizer: Path, tmp_path: Path) -> None:
    """Without an error. The second request has the reply to the first in its history. aiperf counts tokens as the
    service does, and sees no first token before the service sent it."""
    talk = [[{"text": said} for said in both] for both in SAID]
    before = await figures(real)
    report = await aiperf(real, tmp_path, tokenizer, talk, "--osl", str(MOST))
    since = await figures(real)
    assert real.pages is not None
    real.pages.add("aiperf", "conversation", [a_turn(report.requests["0", turn]) for turn in (0, 1)])
    grown = {key: value - before.get(key, 0) for key, value in since.items()}

    assert set(report.requests) == {(str(number), turn) for number in range(len(SAID)) for turn in (0, 1)}
    assert report.of("request_count") == grown["turns_total", "finished"] == len(report.requests)
    assert report.sums["is_complete"] and not report.sums["error_summary"]
    template = set()
    """Tokens of the chat template, which aiperf leaves out."""
    for (number, turn), request in report.requests.items():
        said, replied = SAID[int(number)], text_of(report.requests[number, 0])
        whole = [("user", said[0]), ("assistant", replied), ("user", said[1])]
        messages = [(message["role"], message["content"]) for message in request["payload"]["messages"]]
        assert messages == (whole if turn else whole[:1])
        # All of a reply may come at once.
        assert 0 < figure(request, "time_to_first_token") <= figure(request, "request_latency")
        if not turn:
            template.add(figure(request, "usage_prompt_tokens") - figure(request, "input_sequence_length"))
        ended = a_turn(request)["finish"] == "stop"  # by a token that has no text
        theirs = figure(request, "output_token_count") + ended
        assert (
            abs(theirs - figure(request, "usage_completion_tokens")) <= 1
        )  # a text can be more than one row of tokens
    assert len(template) == 1 and template.pop() > 0

    kinds = {"prompt": "prompt", "prompt_cache_read": "cached", "completion": "completion"}
    for theirs, ours in kinds.items():
        assert report.of(f"total_usage_{theirs}_tokens") == grown["tokens_total", ours] > 0
    assert grown["time_to_first_token_seconds_count",] == len(report.requests)
    late_ms = report.of("time_to_first_token", "sum") - 1000 * grown["time_to_first_token_seconds_sum",]
    assert 0 < late_ms < 1000 * len(report.requests)


async def test_tool_calls(real: Target, tokenizer: Path, tmp_path: Path) -> None:
    """Three at a time: the calls come as a stream that aiperf measures. It sends no results of its own: the second turn
    is a request with a call and its result."""
    question = {"role": "user", "content": OSLO}
    called = {"role": "assistant", "content": None, "tool_calls": [CALLED]}
    result = {"role": "tool", "tool_call_id": CALLED["id"], "content": RESULT}
    turns = [
        {"text": OSLO, "extra": {"tools": [WEATHER], "tool_choice": "required"}},
        {"text": RESULT, "extra": {"tools": [WEATHER], "messages": [question, called, result]}},
    ]
    report = await aiperf(real, tmp_path, tokenizer, [turns] * 3, "--osl", str(MOST))
    assert report.of("request_count") == 6 and not report.sums["error_summary"]
    told: list[dict[str, Any]] = []
    for number in "012":
        first, second = report.requests[number, 0], report.requests[number, 1]
        calls = [call for delta in deltas(first) for call in delta.get("tool_calls", ())]
        assert [call["function"]["name"] for call in calls] == ["get_weather"]
        assert set(json.loads(calls[0]["function"]["arguments"])) == {"place"}
        assert a_turn(first)["finish"] == "tool_calls" and not text_of(first)
        assert figure(first, "time_to_first_token") > 0
        assert a_turn(second)["finish"] in ("stop", "length") and text_of(second)
        told = [
            {"what": "asked", "said": OSLO},
            {"what": "calls", "calls": [(call["id"], *call["function"].values()) for call in calls]},
            a_turn(second),
        ]
    assert real.pages is not None
    real.pages.add("aiperf", "tool", told)


async def test_barge_ins(real: Target, tokenizer: Path, tmp_path: Path) -> None:
    """aiperf closes half of its streams after half a second. The service ends just these turns, each within a second,
    and answers the others."""
    talk = [[{"text": LONG}, {"text": LONG}]] * 4
    before, logged = await figures(real), len(real.finished())
    cancel = ("--request-cancellation-rate", "50", "--request-cancellation-delay", "0.5")
    report = await aiperf(real, tmp_path, tokenizer, talk, "--osl", "50", *cancel)
    cancelled = {key for key, request in report.requests.items() if request["metadata"]["was_cancelled"]}
    answered = set(report.requests) - cancelled
    assert cancelled and answered and len(report.requests) == 8
    await until(lambda: len(real.finished()) == logged + 8)
    turns = [turn for turn in real.finished()[logged:] if turn["outcome"] == "disconnected"]
    since = await figures(real)
    grown = {key: value - before.get(key, 0) for key, value in since.items()}
    assert grown["turns_total", "disconnected"] == len(turns) == len(cancelled) == report.of("error_request_count")
    assert grown["turns_total", "finished"] == len(answered) == report.of("request_count")
    assert {error["error_details"]["type"] for error in report.sums["error_summary"]} == {"RequestCancellationError"}
    assert all(turn["total_ms"] < 1500 for turn in turns)
    assert await real.running() == 0
    answers = [report.requests[key] for key in sorted(answered)]
    assert all(text_of(request) for request in answers)
    last = turns[-1]
    told = [
        {"what": "asked", "said": LONG},
        {"what": "closed", "heard": ""},
        {"what": "seen", "text": f"The turn ended after {last['total_ms']:.0f} ms and {last['tokens_sent']} tokens."},
        a_turn(answers[-1]),
    ]
    assert real.pages is not None
    real.pages.add("aiperf", "barge_in", told)


async def test_the_example_runs(real: Target, tokenizer: Path, tmp_path: Path) -> None:
    """As in the README, except for address, key and state folder: two turns in each of six conversations."""
    (text,) = re.findall(r"^```bash\n(aiperf .*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)
    state = str(tokenizer.parents[1])
    for theirs, ours in {
        "http://127.0.0.1:8000": real.http,
        "yap_token": KEY,
        "~/.local/state/yap-text": state,
    }.items():
        assert text.count(theirs) == 1
        text = text.replace(theirs, ours)
    await run(real, tmp_path, "/bin/bash", "-euo", "pipefail", "-c", text)
    (report,) = (tmp_path / "artifacts").glob("chat-*")
    sums = sums_of(report)
    assert sums["request_count"]["avg"] == 12 and not sums["error_summary"]
