"""client/errors.py: each error of the service, as the client raises it."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
from pathlib import Path
from typing import Any

import pytest
from conftest import Running, service
from fakes import Gate, Script, ScriptedEngine

from yaptext import client, errors
from yaptext.client import ServiceError, Yap, YapTextError, connect
from yaptext.client.errors import CLASSES, error_of
from yaptext.engine.base import Engines
from yaptext.errors import WireError, wire_codes
from yaptext.wire.frames import Error

RETRYABLE = {"server_at_capacity", "going_away", "rate_limited", "engine_failed", "internal"}


def test_every_code_of_the_wire_has_its_class() -> None:
    """Under the name that the service has for it, and importable from `yaptext.client`."""
    assert set(CLASSES) == set(wire_codes())
    for code, cls in CLASSES.items():
        assert getattr(client, cls.__name__) is cls and cls.__name__ in client.__all__
        assert getattr(errors, cls.__name__).code == code
        assert cls.retryable == (code in RETRYABLE)


def test_an_error_is_one_of_the_client_not_of_the_service() -> None:
    """One root; a command ends with status 1, whatever the service that it talks to will end with."""
    module = inspect.getmodule(YapTextError)
    assert module is not None and module.__doc__ is not None
    for name, cls in inspect.getmembers(module, inspect.isclass):
        if issubclass(cls, YapTextError):
            assert name in module.__doc__ and cls.exit_status == 1 and not issubclass(cls, WireError)


def test_a_code_of_a_newer_service_is_a_service_error() -> None:
    """With its own code; time to wait makes it retryable."""
    error = error_of(Error(error_code="too_new", message="what"))
    assert type(error) is ServiceError
    assert (error.code, error.message, str(error), error.retryable) == ("too_new", "what", "what", False)
    error = error_of(Error(error_code="too_new", message="what", retry_after_ms=5, turn=3))
    assert (error.retryable, error.retry_after_ms, error.turn) == (True, 5, 3)


async def wrong_key(running: Running, yap: Yap, engine: ScriptedEngine) -> None:
    async with connect(running.ws, "wrong"):
        pytest.fail("a wrong key")


async def full(running: Running, yap: Yap, engine: ScriptedEngine) -> None:
    try:
        async with connect(running.ws, "yap_token"):
            pytest.fail("the house is full")
    except client.ServerAtCapacity as error:
        assert error.capacity is not None and error.capacity.max == 1 and error.retry_after_ms
        raise


async def draining(running: Running, yap: Yap, engine: ScriptedEngine) -> None:
    engine.chat = Script(["a"], pace=Gate())
    await yap.turn("hi").begin()
    running.server.begin_drain()
    await asyncio.sleep(0)
    async with connect(running.ws, "yap_token"):
        pytest.fail("it stops")


async def not_reading(running: Running, yap: Yap, engine: ScriptedEngine) -> None:
    engine.chat = Script(["z" * 100_000] * 200, pace=lambda: asyncio.sleep(0.001))
    turn = await yap.turn("hi").begin()
    socket = yap._link.socket
    assert socket is not None
    socket.transport.pause_reading()
    async with asyncio.timeout(60):
        while running.active:  # noqa: ASYNC110  # a slot has no event
            await asyncio.sleep(0.01)
    socket.transport.resume_reading()
    await turn.result()


async def blank(running: Running, yap: Yap, engine: ScriptedEngine) -> None:
    await yap.turn(" ").begin()


async def long(running: Running, yap: Yap, engine: ScriptedEngine) -> None:
    await yap.turn("hi", persona_text="a b " * 20_000).begin()


async def unknown(running: Running, yap: Yap, engine: ScriptedEngine) -> None:
    await yap.turn("hi", persona_style="nope").begin()


async def warm(running: Running, yap: Yap, engine: ScriptedEngine) -> None:
    await yap.warm(persona_style="savage")


async def often(running: Running, yap: Yap, engine: ScriptedEngine) -> None:
    for _ in range(9):
        async with yap.turn("hi") as turn:
            await turn.result()


async def failing(running: Running, yap: Yap, engine: ScriptedEngine) -> None:
    engine.chat = Script(["a"], error=errors.EngineFailed("It failed."))
    async with yap.turn("hi") as turn:
        try:
            await turn.result()
        except ServiceError as error:
            assert error.turn == turn.number and turn.over and turn.text == "a"
            engine.chat = Script()
            async with yap.turn("again") as another:
                assert (await another.result()).text == "Hello there."
            raise


async def crashing(running: Running, yap: Yap, engine: ScriptedEngine) -> None:
    engine.chat = Script(error=ZeroDivisionError("secret"))
    async with yap.turn("hi") as turn:
        await turn.result()


@pytest.mark.parametrize(
    ("code", "cause", "settings"),
    [
        ("authentication_failed", wrong_key, {}),
        ("server_at_capacity", full, {"MAX_CONCURRENT_CONNECTIONS": 1}),
        ("going_away", draining, {"DRAIN_TIMEOUT_S": 1}),
        ("slow_client", not_reading, {}),
        ("bad_message", blank, {}),
        ("text_too_long", long, {}),
        ("unknown_persona", unknown, {}),
        ("not_deployed", warm, {"DEPLOY_MODELS": "tool"}),
        ("rate_limited", often, {"limits": "turns_per_minute=3"}),
        ("engine_failed", failing, {}),
        ("internal", crashing, {}),
    ],
)
async def test_every_error_of_the_service_is_raised_as_its_class(
    tmp_path: Path, code: str, cause: Any, settings: dict[str, Any]
) -> None:
    """Where it belongs: from `connect`, from the call that was refused, or from the iteration of the turn."""
    engine, settings = ScriptedEngine(), dict(settings)
    if limits := settings.pop("limits", None):
        file = tmp_path / "keys"
        await asyncio.to_thread(file.write_text, f"phone sha256:{hashlib.sha256(b'yap_token').hexdigest()} {limits}\n")
        settings["YAP_TEXT_KEY_FILE"] = file
    deployed = Engines(chat=None if code == "not_deployed" else engine, tool=engine)
    async with service(deployed, **settings) as running:
        async with connect(running.ws, "yap_token", reconnect=False) as yap:
            with pytest.raises(CLASSES[code]) as raised:
                await cause(running, yap, engine)
    assert type(raised.value) is CLASSES[code] and raised.value.code == code
    assert raised.value.retryable == (code in RETRYABLE) and raised.value.message


def test_no_code_is_left_out() -> None:
    """Of those that the test above causes."""
    (mark,) = test_every_error_of_the_service_is_raised_as_its_class.pytestmark  # type: ignore[attr-defined]
    assert {code for code, *_ in mark.args[1]} == set(wire_codes())
