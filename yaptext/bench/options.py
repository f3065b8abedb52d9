"""The options of `yap-text bench`."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

from yaptext.bench.plan import Plan, Sampling
from yaptext.errors import YapError


class OptionError(YapError):
    """Options that do not go together."""


SCENARIOS = {
    "cold": "first turns of sessions with a persona and history that are new to the server",
    "warm": "first turns after warm_persona and warm_history",
    "conversation": "turn after turn of one session, its transcript held by the server",
    "barge-in": "turns interrupted at a random token, by a cancel and by a new start; then all at once",
    "reconnect": "all sockets drop at once and reconnect at once, into the same sessions",
    "ramp": "one socket after another until the server refuses; then one disconnects and one connects",
    "idle": "turns after a silence, compared with turns without one",
    "slow-reader": "turns before (calm) and while another client does not read",
}
"""What `--scenario` knows; `scenarios` has one function for each."""


def add_options(parser: argparse.ArgumentParser) -> None:
    plan = Plan(tuple(SCENARIOS))
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "scenarios:\n" + "\n".join(f"  {name:<14}{meaning}" for name, meaning in SCENARIOS.items())
    where = parser.add_argument_group("where")
    where.add_argument("--url", help="address of the service (default: ws://HOST:PORT/ws of the environment)")
    where.add_argument("--openai", metavar="URL", help="an OpenAI-compatible server to measure in the same minutes")
    where.add_argument("--model", metavar="NAME", help="its model")
    where.add_argument("--openai-key-file", metavar="FILE", type=Path, help="a file with its API key")
    where.add_argument("--only-openai", action="store_true", help="do not measure the service")

    what = parser.add_argument_group("what")
    what.add_argument(
        "--scenario", type=_scenarios, default=tuple(SCENARIOS), metavar="all|NAME,...", help="see below (all)"
    )
    what.add_argument("--sessions", type=_counts, default=plan.sessions, metavar="N[,N...]", help="users at once (1,8)")
    _number(what, "--turns", int, plan.turns, 1, 1000, "turns of a session in one run")
    _number(what, "--rounds", int, plan.rounds, 1, 100, "repetitions of everything; the report shows their spread")
    _number(what, "--duration-s", float, plan.duration_s, 0.1, 3600, "no turn of a run begins later than this")
    _number(what, "--turn-timeout-s", float, plan.turn_timeout_s, 0.1, 600, "a turn that takes longer has failed")
    _number(what, "--persona-tokens", int, plan.persona_tokens, 0, 100_000, "approximate length of each persona")
    _number(what, "--history-tokens", int, plan.history_tokens, 0, 100_000, "approximate length of each history")
    what.add_argument("--shared-persona", action="store_true", help="all users share one persona")
    _number(what, "--max-tokens", int, plan.sampling.max_tokens, 1, 4096, "most tokens of a reply")
    what.add_argument("--server-sampling", action="store_true", help="the servers' own sampling instead of greedy")
    _number(what, "--gap-s", float, plan.gap_s, 0, 600, "the silence of the scenario idle")
    _number(what, "--spread-s", float, plan.spread_s, 0, 600, "users begin within this time instead of at once")
    _number(what, "--ramp-max", int, plan.ramp_max, 1, 10_000, "sockets at which a ramp ends")
    _number(what, "--seed", int, plan.seed, 0, 2**31, "of what is said and when it is cut")

    out = parser.add_argument_group("results")
    out.add_argument("--json", metavar="FILE", type=Path, help="write all figures")
    out.add_argument("--html", metavar="FILE", type=Path, help="write a page with plots")
    out.add_argument("--compare", nargs=2, metavar=("A.json", "B.json"), type=Path, help="measure nothing; show B / A")
    out.add_argument("--figure", type=_names, metavar="NAME,...", help="what to compare, such as ttft_ms.p95")
    _number(out, "--fail-over", float, 1.2, 0, 1e9, "exit with 1 if a figure got worse by more than this factor")


def check_packages(parsed: argparse.Namespace) -> None:
    """Raises `OptionError` if something is not installed that a bench needs."""
    needed = ("httptools", "numpy", "websockets", *(["matplotlib"] if parsed.html else []))
    if lacking := [name for name in needed if find_spec(name) is None]:
        raise OptionError(f"bench needs {', '.join(lacking)}, not installed here: pip install 'yaptext[bench]'")


def plan_of(parsed: argparse.Namespace) -> Plan:
    """Raises `OptionError`."""
    if parsed.openai and not parsed.model:
        raise OptionError("--openai needs --model")
    if parsed.only_openai and not parsed.openai:
        raise OptionError("--only-openai needs --openai")
    return Plan(
        scenarios=parsed.scenario,
        sessions=parsed.sessions,
        turns=parsed.turns,
        rounds=parsed.rounds,
        duration_s=parsed.duration_s,
        turn_timeout_s=parsed.turn_timeout_s,
        persona_tokens=parsed.persona_tokens,
        history_tokens=parsed.history_tokens,
        shared_persona=parsed.shared_persona,
        sampling=Sampling(parsed.max_tokens, greedy=not parsed.server_sampling),
        gap_s=parsed.gap_s,
        spread_s=parsed.spread_s,
        ramp_max=parsed.ramp_max,
        seed=parsed.seed,
    )


def _number(
    group: argparse._ArgumentGroup, name: str, kind: type[float], default: float, low: float, high: float, help: str
) -> None:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not allowed: {low:g} to {high:g}")
        return value

    group.add_argument(name, type=parse, default=default, metavar="N", help=f"{help} ({default:g})")


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _scenarios(text: str) -> tuple[str, ...]:
    names = tuple(SCENARIOS) if text == "all" else _names(text)
    for name in names:
        if name not in SCENARIOS:
            raise argparse.ArgumentTypeError(f"{name!r} is unknown; known are all, {', '.join(SCENARIOS)}")
    return names


def _counts(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers") from None
    if not all(1 <= count <= 10_000 for count in counts):
        raise argparse.ArgumentTypeError("each number of sessions is from 1 to 10000")
    return counts
