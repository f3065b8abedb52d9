"""What one bench does: every number that bounds it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Sampling:
    """How replies are sampled. Greedy names every parameter, so that no server's own defaults take part."""

    max_tokens: int
    greedy: bool = True

    def service(self) -> dict[str, Any]:
        fields: dict[str, Any] = {"max_tokens": self.max_tokens}
        if self.greedy:
            fields |= {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
        return fields

    def openai(self) -> dict[str, Any]:
        """Of what a greedy choice depends on, only what every such server knows."""
        fields: dict[str, Any] = {"max_tokens": self.max_tokens}
        if self.greedy:
            fields |= {"temperature": 0.0, "top_p": 1.0}
        return fields


@dataclass(frozen=True, slots=True)
class Plan:
    scenarios: tuple[str, ...]
    sessions: tuple[int, ...] = (1, 8)
    turns: int = 4
    """Turns of a session in one run."""
    rounds: int = 3
    """How often everything is repeated, targets alternating: the spread of a figure is that between rounds."""
    duration_s: float = 20.0
    """No turn of a run begins later than this."""
    turn_timeout_s: float = 60.0
    persona_tokens: int = 300
    history_tokens: int = 700
    shared_persona: bool = False
    sampling: Sampling = field(default_factory=lambda: Sampling(64))
    gap_s: float = 10.0
    """The silence of the scenario `idle`."""
    spread_s: float = 0.0
    """Users begin at random moments within this time; 0 is all at once."""
    ramp_max: int = 256
    """Sockets at which `ramp` stops where nobody was refused."""
    seed: int = 1

    def sizes(self, scenario: str) -> tuple[int, ...]:
        """The numbers of sessions that a scenario runs at. A ramp finds out by itself."""
        return (self.ramp_max,) if scenario == "ramp" else self.sessions

    def runs(self, targets: int) -> int:
        return self.rounds * targets * sum(len(self.sizes(scenario)) for scenario in self.scenarios)

    @property
    def run_limit_s(self) -> float:
        """A run that takes longer than this is cut: its last turns may begin at the end of the time for them, and
        opening, warming and leaving have limits of their own."""
        return self.duration_s + 2 * self.turn_timeout_s + self.gap_s + self.spread_s
