"""observe/metrics.py: what a turn adds, and the text that Prometheus reads."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from yaptext.observe.metrics import CONTENT_TYPE, Metrics
from yaptext.wire.frames import Timings, Usage


def samples(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """Every sample by its name and the values of its labels."""
    text = metrics.exposition(lambda: None).decode()
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_turn_is_counted_by_its_outcome_and_tokens() -> None:
    """Every figure of usage has its kind."""
    metrics = Metrics()
    metrics.turn("finished", Usage(1, 2, 3, 4, 5, 6), Timings(1, 20, 300, 4000))
    metrics.turn("finished", Usage(10, 20, 30, 40, 50, 60), Timings(1, 20, 300, 4000))
    metrics.turn("cancelled", Usage(), Timings())
    found = samples(metrics)
    assert found["yaptext_turns_total", "finished"] == 2
    assert found["yaptext_turns_total", "cancelled"] == 1
    kinds = ("prompt", "cached", "completion", "reasoning", "tool_prompt", "tool_cached")
    assert [found["yaptext_tokens_total", kind] for kind in kinds] == [11, 22, 33, 44, 55, 66]


@pytest.mark.parametrize("name", ["decision", "time_to_first_token", "turn"])
def test_times_that_were_not_reached_are_not_observed(name: str) -> None:
    """A turn that was cancelled before its first token says nothing about time to the first token."""
    metrics = Metrics()
    metrics.turn("finished", Usage(), Timings(queue_ms=1, tool_ms=30, ttft_ms=60, total_ms=90))
    metrics.turn("cancelled", Usage(), Timings(queue_ms=1))
    found = samples(metrics)
    assert found[f"yaptext_{name}_seconds_count",] == 1
    expected = {"decision": 0.03, "time_to_first_token": 0.06, "turn": 0.09}
    assert found[f"yaptext_{name}_seconds_sum",] == pytest.approx(expected[name])


def test_a_time_of_zero_is_a_time() -> None:
    """0 ms is not the same as none."""
    metrics = Metrics()
    metrics.turn("finished", Usage(), Timings(ttft_ms=0.0))
    assert samples(metrics)["yaptext_time_to_first_token_seconds_count",] == 1


def test_times_have_the_buckets_of_the_field() -> None:
    """Those of vLLM's and OpenTelemetry's time to the first token, so that one panel shows both."""
    metrics = Metrics()
    metrics.turn("finished", Usage(), Timings(ttft_ms=60))
    found = samples(metrics)
    shared = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
    counts = [found["yaptext_time_to_first_token_seconds_bucket", str(bound)] for bound in shared]
    assert counts == [0] * 5 + [1] * 11


OLD = {
    "yaptext_decision_seconds": "yaptext_decision_ms",
    "yaptext_time_to_first_token_seconds": "yaptext_ttft_ms",
    "yaptext_turn_seconds": "yaptext_turn_ms",
    "yaptext_cancel_seconds": "yaptext_cancel_ms",
}


@pytest.mark.parametrize(("new", "old"), OLD.items())
def test_old_names_are_exposed_if_asked_for(new: str, old: str) -> None:
    """In milliseconds and with their buckets, beside the new names; by default they have gone."""
    for asked in (False, True):
        metrics = Metrics(old_names=asked)
        metrics.turn("finished", Usage(), Timings(tool_ms=250, ttft_ms=250, total_ms=250))
        metrics.cancel_ms.observe(250)
        metrics.backlog("chat", 250)
        found = samples(metrics)
        assert found[f"{new}_sum",] == 0.25 and found["yaptext_engine_backlog_seconds", "chat"] == 0.25
        assert found.get((f"{old}_sum",)) == (250 if asked else None)
        assert found.get((f"{old}_bucket", "200.0")) == (0 if asked else None)
        assert found.get((f"{old}_bucket", "300.0")) == (1 if asked else None)
        assert found.get(("yaptext_engine_backlog_ms", "chat")) == (250 if asked else None)


def test_the_size_of_a_session_is_the_mean_of_its_turns() -> None:
    """Prompt and reply; turns without a prompt say nothing; the last ones count, not all that ever were."""
    metrics = Metrics()
    metrics.turn("cancelled", Usage(), Timings())
    assert metrics.session_tokens == 0
    for prompt in (1000, 3000):
        metrics.turn("finished", Usage(prompt_tokens=prompt, completion_tokens=100), Timings())
    assert metrics.session_tokens == pytest.approx(2100)
    for _ in range(400):
        metrics.turn("finished", Usage(prompt_tokens=500), Timings())
    assert metrics.session_tokens == pytest.approx(500, rel=0.01)


def test_gauges_are_refreshed_when_they_are_read() -> None:
    """What is scraped is true at that moment, not at the last event."""
    metrics = Metrics()

    def refresh() -> None:
        metrics.connections.set(3)
        metrics.engine_running.labels("chat").set(2)
        metrics.engine_kv_use.labels("chat").set(0.5)

    text = metrics.exposition(refresh).decode()
    assert "yaptext_connections 3.0" in text
    assert 'yaptext_engine_streams{engine="chat"} 2.0' in text
    assert 'yaptext_engine_kv_use{engine="chat"} 0.5' in text


def test_the_process_is_measured() -> None:
    """Memory and open files, which a soak watches for growth."""
    found = samples(Metrics())
    assert found["yaptext_process_resident_memory_bytes",] > 2**20 and found["yaptext_process_open_fds",] > 2


def test_two_services_count_for_themselves() -> None:
    """Registries are not shared: a second app in one process begins at 0 and clashes with nothing."""
    one, other = Metrics(), Metrics()
    one.errors.labels("bad_message").inc()
    one.cancel_ms.observe(4)
    assert samples(one)["yaptext_errors_total", "bad_message"] == 1
    assert samples(one)["yaptext_cancel_seconds_sum",] == pytest.approx(0.004)
    assert ("yaptext_errors_total", "bad_message") not in samples(other)


def test_every_metric_is_of_this_service_and_explained() -> None:
    """Names begin alike, and each has a help text; the content type is that of the text format."""
    text = Metrics().exposition(lambda: None).decode()
    families = list(text_string_to_metric_families(text))
    assert families
    assert all(family.name.startswith("yaptext_") and family.documentation for family in families)
    assert CONTENT_TYPE.startswith("text/plain; version=0.0.4")
