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


@pytest.mark.parametrize("name", ["decision", "ttft", "turn"])
def test_times_that_were_not_reached_are_not_observed(name: str) -> None:
    """A turn that was cancelled before its first token says nothing about time to the first token."""
    metrics = Metrics()
    metrics.turn("finished", Usage(), Timings(queue_ms=1, tool_ms=30, ttft_ms=60, total_ms=90))
    metrics.turn("cancelled", Usage(), Timings(queue_ms=1))
    found = samples(metrics)
    assert found[f"yaptext_{name}_ms_count",] == 1
    assert found[f"yaptext_{name}_ms_sum",] == {"decision": 30, "ttft": 60, "turn": 90}[name]


def test_a_time_of_zero_is_a_time() -> None:
    """0 ms is not the same as none."""
    metrics = Metrics()
    metrics.turn("finished", Usage(), Timings(ttft_ms=0.0))
    assert samples(metrics)["yaptext_ttft_ms_count",] == 1


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
    assert samples(one)["yaptext_cancel_ms_sum",] == 4
    assert ("yaptext_errors_total", "bad_message") not in samples(other)


def test_every_metric_is_of_this_service_and_explained() -> None:
    """Names begin alike, and each has a help text; the content type is that of the text format."""
    text = Metrics().exposition(lambda: None).decode()
    families = list(text_string_to_metric_families(text))
    assert families
    assert all(family.name.startswith("yaptext_") and family.documentation for family in families)
    assert CONTENT_TYPE.startswith("text/plain; version=0.0.4")
