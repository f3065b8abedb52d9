"""What a process leaves for the next."""

from __future__ import annotations

from pathlib import Path

import pytest

from yaptext.server import record
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
    monkeypatch.setattr(record, "_BOOT_ID", boot)
    before.ended("stop")
    updated = Record(tmp_path, ["a"], "2")
    assert updated.after == "a stop, a boot of the machine, a change of version from 1" and not updated.is_usual
