"""Faults that can be switched on inside real vLLM: a plugin of its own, which the engine's process loads like any."""

from __future__ import annotations

from pathlib import Path

_PLUGIN = '''
"""Reads the switch at each step: `raise TEXT` fails it, `clock SECONDS` moves the wall clock. Counts preemptions."""
import os, time
from pathlib import Path

_real = time.time


def register():
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    sample, preempt = GPUModelRunner.sample_tokens, Scheduler._preempt_request
    switch = Path(os.environ["YAP_FAULT"])

    def sample_tokens(self, *args, **kwargs):
        what, _, rest = switch.read_text().partition(" ")
        if what == "raise":
            raise RuntimeError(rest)
        time.time = (lambda: _real() + float(rest)) if what == "clock" else _real
        return sample(self, *args, **kwargs)

    def _preempt_request(self, *args, **kwargs):
        with open(switch.with_name("preempted"), "a") as file:
            file.write("x")
        return preempt(self, *args, **kwargs)

    GPUModelRunner.sample_tokens, Scheduler._preempt_request = sample_tokens, _preempt_request
'''


class Plant:
    """`environment` is for the service's process; `switch` turns a fault on there, `preempted` is its count."""

    def __init__(self, folder: Path) -> None:
        self._switch = folder / "switch"
        self._switch.touch()
        (folder / "yap_fault.py").write_text(_PLUGIN)
        info = folder / "yap_fault-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: yap-fault\nVersion: 1\n")
        (info / "entry_points.txt").write_text("[vllm.general_plugins]\nyap_fault = yap_fault:register\n")
        self.environment = {"YAP_FAULT": str(self._switch), "PYTHONPATH": str(folder)}

    def switch(self, fault: str) -> None:
        self._switch.write_text(fault)

    @property
    def preempted(self) -> int:
        counted = self._switch.with_name("preempted")
        return len(counted.read_text()) if counted.exists() else 0
