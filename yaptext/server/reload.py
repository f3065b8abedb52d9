"""A reload (SIGHUP): new persona styles, new keys, a close for every socket whose key was removed."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import structlog

from yaptext.dialogue import persona
from yaptext.errors import AuthenticationFailed, SettingsError
from yaptext.server.access.accounts import Keys
from yaptext.server.lifecycle import Lifecycle
from yaptext.server.slots import Slots
from yaptext.settings import Settings

_log = structlog.get_logger(__name__)


@asynccontextmanager
async def on_hangup(reload: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """While the block runs, SIGHUP calls `reload`, also one that came before and was held back."""
    loop, wanted = asyncio.get_running_loop(), asyncio.Event()
    # Not the loop's own way: it lets go of a signal by its default, and one that comes just then ends the process.
    before = signal.signal(signal.SIGHUP, lambda *_: loop.call_soon_threadsafe(wanted.set))
    held_back = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
    task = asyncio.create_task(_when(wanted, reload))
    try:
        yield
    finally:
        # One that was held back no longer is: threads that were born since do not.
        signal.signal(signal.SIGHUP, signal.SIG_IGN if signal.SIGHUP in held_back else before)
        task.cancel()
        await asyncio.wait([task])


async def _when(wanted: asyncio.Event, reload: Callable[[], Awaitable[None]]) -> None:
    while True:
        await wanted.wait()
        wanted.clear()
        await reload()


async def reload(settings: Settings, keys: Keys, slots: Slots, lifecycle: Lifecycle) -> None:
    """Takes each file as it is now. One that is wrong changes nothing."""
    with lifecycle.reloading() as refused:
        try:
            _reload_personas(settings)
        except SettingsError as error:
            _log.error("personas.refused", error=str(error))
            refused.append(str(error))
        try:
            removed = await keys.reload()
        except SettingsError as error:
            refused.append(str(error))
        else:
            for account in removed:
                for holder in slots.of(account):
                    holder.end(AuthenticationFailed("The key of this connection was removed."))


def _reload_personas(settings: Settings) -> None:
    """Raises `SettingsError`."""
    if settings.personas_dir is not None:
        persona.use_folder(settings.personas_dir)
        persona.check_style(settings.default_persona_style)
        _log.info("personas.loaded", styles=list(persona.styles()))
