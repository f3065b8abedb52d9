"""How full an engine is, by its last step."""

from __future__ import annotations

from typing import Any


def make_gauge() -> Any:
    """A stat logger class that keeps two figures: `kv_use`, the part of the KV cache in use (0 to 1), and `requests`,
    those that run or wait. As a PrometheusStatLogger it takes the place of vLLM's own,
    which registers globally and would unregister the first engine's collectors when the second opens."""
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    class Gauge(PrometheusStatLogger):  # type: ignore[misc]
        kv_use = 0.0
        requests = 0

        def __init__(self, vllm_config: Any, engine_indexes: Any = None) -> None:
            pass

        def log_engine_initialized(self) -> None:
            pass

        def record(self, scheduler_stats: Any, *_: Any, **__: Any) -> None:
            if scheduler_stats is not None:
                type(self).kv_use = scheduler_stats.kv_cache_usage
                waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
                type(self).requests = scheduler_stats.num_running_reqs + waiting

    return Gauge
