"""Models from the hub, before anything opens them.

What is whole lies where the client keeps it, so vLLM and transformers find it.
"""

from __future__ import annotations

import glob
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import huggingface_hub as client

from yaptext.engine.bars import bars
from yaptext.engine.download_plan import Plan
from yaptext.engine.hub_client import Hub
from yaptext.engine.transfer import Transfer
from yaptext.engine.underway import Progress, Teller, size


def bring(hub: Hub, plans: Sequence[Plan], *, progress: Progress | None = None) -> list[Path]:
    """Fetches what the plans lack, and returns the folder of each. Says nothing if nothing is missing. Raises as
    `Hub.failure`; a signal that raises in this thread ends it within a second."""
    lacking = [plan for plan in plans if plan.missing]
    if lacking:
        hub.cache.mkdir(parents=True, exist_ok=True)
        for plan in lacking:
            _clear(plan)
        _check_disk(hub, lacking)
        with Teller(lacking, is_watched=hub.is_watched, progress=progress) as teller:
            for plan in lacking:
                with teller.bringing(plan):
                    Transfer(hub, plan, teller).run()
    return [plan.snapshot if plan.is_linked else _link(hub, plan) for plan in plans]


def _clear(plan: Plan) -> None:
    """Deletes what killed processes left under names of their own, as the client does; one that lives has the lock."""
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    for file in plan.missing:
        for leftover in plan.folder.glob(f"blobs/{file.etag}.*.incomplete"):
            with suppress(OSError), WeakFileLock(plan.lock(file), timeout=0.1):
                leftover.unlink()


def _check_disk(hub: Hub, plans: list[Plan]) -> None:
    needed, free = sum(plan.total_bytes - plan.there_bytes for plan in plans), shutil.disk_usage(hub.cache).free
    if needed > free:
        names = " and ".join(plan.label for plan in plans)
        verb = "needs" if len(plans) == 1 else "need"
        raise hub.passes(
            f"{names} {verb} {size(needed)} more in {hub.cache}, and {size(free)} are free: free some, or set HF_HOME "
            "to a folder of a larger disk"
        )


def _link(hub: Hub, plan: Plan) -> Path:
    """Has the client give what came its names. It also notes down the branch's commit and the list of files."""

    def link() -> Path:
        names = [glob.escape(file.path) for file in plan.files]
        return Path(
            client.snapshot_download(
                plan.repo,
                cache_dir=hub.cache,
                token=hub.api.token,
                allow_patterns=names,
                tqdm_class=bars(lambda _: None),
            )
        )

    return hub.ask(plan.repo, "read", link, label=plan.label)
