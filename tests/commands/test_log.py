"""commands/log.py: why a turn was slow, from lines of the log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from yaptext.commands.log import log, reasons_of
from yaptext.errors import SettingsError

TURN: dict[str, Any] = {
    "event": "turn.finished", "timestamp": "2026-11-30T03:00:00Z", "outcome": "finished", "turn": 3,
    "session_id": "ann",
    "finish_reason": "stop", "tokens_sent": 40, "tool_reason": None, "prompt_tokens": 3000, "cached_tokens": 2900,
    "tool_prompt_tokens": 900, "tool_cached_tokens": 880, "queue_ms": 1.0, "tool_ms": 15.0, "ttft_ms": 55.0,
    "total_ms": 900.0, "others": 0, "backlog_ms": 0.0,
}  # fmt: skip


def written(tmp_path: Path, *turns: dict[str, Any]) -> Path:
    file = tmp_path / "yap-text.log"
    lines = [
        "vLLM says something",
        '{"event": "server.ready"}',
        "{broken",
        *(f"<6>{json.dumps(turn)}" for turn in turns),
    ]
    file.write_text("\n".join(lines))
    return file


def test_a_fast_turn_is_one_line_and_its_longest_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other sessions are not shown."""
    assert log("ann", file=written(tmp_path, TURN | {"session_id": "bob", "turn": 9}, TURN), turns=20) == 0
    assert capsys.readouterr().out.splitlines() == [
        "2026-11-30T03:00:00Z  turn 3: finished, first token after 55 ms, 900 ms in all",
        "    39 ms from the decision to the first token: 100 of 3000 prompt tokens computed",
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"queue_ms": 1700.0}, "1.70 s until an engine was asked"),
        ({"tool_ms": 1900.0}, "1.90 s for the decision (20 of 900 prompt tokens computed)"),
        ({"cached_tokens": 16}, "2984 of 3000 prompt tokens computed"),
        ({"cached_tokens": 16}, "only 16 prompt tokens were in the cache"),
        ({"others": 31}, "31 other turns ran at its start"),
        ({"backlog_ms": 700.0}, "prompts of 700 ms were waiting for their first token"),
        ({"tool_reason": "timeout"}, "there was no decision: timeout"),
    ],
)
def test_a_slow_turn_says_why(changes: dict[str, Any], words: str) -> None:
    """In words of the README, not of the code."""
    assert any(words in reason for reason in reasons_of(TURN | {"ttft_ms": 2000.0} | changes))


def test_a_session_without_turns_and_a_log_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told, with a status of 1, or of 2 by the error."""
    assert log("nobody", file=written(tmp_path, TURN), turns=5) == 1
    assert "No turn of the session 'nobody'" in capsys.readouterr().out
    with pytest.raises(SettingsError, match=r"--file .* cannot be read: No such file"):
        log("ann", file=tmp_path / "none", turns=5)


def test_only_the_last_turns_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As many as asked for."""
    log("ann", file=written(tmp_path, *(TURN | {"turn": number} for number in range(9))), turns=2)
    assert [line.split(":")[2][-1] for line in capsys.readouterr().out.splitlines() if "turn" in line] == ["7", "8"]
