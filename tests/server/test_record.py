"""What a process leaves for the next."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from yaptext.server import lifecycle, record
from yaptext.server.lifecycle import Lifecycle
from yaptext.server.record import Record


def test_the_time_of_a_start_is_kept_for_its_models(tmp_path: Path) -> None:
    first = Record(tmp_path, ["a"], "1")
    assert first.last_seconds is first.after is None and first.is_usual
    first.keep(28.44)
    assert Record(tmp_path, ["a"], "1").last_seconds == 28.4
    assert Record(tmp_path, ["b"], "1").last_seconds is None


@pytest.mark.parametrize("wrong", ["", "[]", "{}", '{"models": ["a"], "seconds": "x"}', "\udcff", '{"models": 1}'])
def test_a_record_that_cannot_be_read_is_none(tmp_path: Path, wrong: str) -> None:
    (tmp_path / "start.json").write_bytes(wrong.encode(errors="surrogateescape"))
    assert Record(tmp_path, ["a"], "1").after is None
    Record(tmp_path / "absent", ["a"], "1").keep(1.0)  # nor is a folder that is not there a reason to fail


def test_a_start_knows_what_it_came_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop, a killed process, the death of an engine, a boot, another version."""
    before = Record(tmp_path, ["a"], "1")
    before.keep(1.0)
    killed = Record(tmp_path, ["a"], "1")
    assert killed.after == "the end of a process that was killed or crashed" and not killed.is_usual
    before.ended("stop")
    assert Record(tmp_path, ["a"], "1").after == "a stop" and Record(tmp_path, ["a"], "1").is_usual
    before.ended("engine")
    assert Record(tmp_path, ["a"], "1").after == "the death of an engine"
    boot = tmp_path / "boot_id"
    boot.write_text("another\n")
    monkeypatch.setattr(record, "BOOT_ID", boot)
    before.ended("stop")
    updated = Record(tmp_path, ["a"], "2")
    assert updated.after == "a stop, a boot of the machine, a change of version from 1" and not updated.is_usual


async def test_what_goes_wrong_stands_in_the_status(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as it does, before what there was to say of the start."""
    statuses: list[str] = []
    monkeypatch.setattr(lifecycle, "notify", lambda *told: statuses.extend(told))
    monkeypatch.setattr(lifecycle, "WATCH_S", 0.01)
    ready, troubles = Lifecycle(), ["Sessions are not saved in /a: disk is full."]
    ready.phase, ready.address, ready.start_told = "ready", "127.0.0.1:8000", ["1 warning at the start: hub.down."]
    watch = asyncio.create_task(ready.keep_told(lambda: list(troubles)))
    for count in (1, 2):
        async with asyncio.timeout(30):
            while len(statuses) < count:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        troubles.clear()
    watch.cancel()
    serving, at_start = "STATUS=Serving on 127.0.0.1:8000.", "1 warning at the start: hub.down."
    told = f"{serving} Sessions are not saved in /a: disk is full. {at_start}"
    assert statuses == [told, f"{serving} {at_start}"]


def test_the_status_tells_what_was_not_usual_about_a_start(tmp_path: Path) -> None:
    usual = Record(tmp_path, ["a"], "1")
    assert lifecycle.of_start(usual, []) == []
    usual.keep(1.0)
    told = lifecycle.of_start(Record(tmp_path, ["a"], "2"), ["setting.unknown: A", "hub.down: B"])
    assert told[0].startswith(
        "Started after the end of a process that was killed or crashed, a change of version from 1"
    )
    assert told[1] == "2 warnings at the start: setting.unknown: A; hub.down: B"
