"""server/playground/: a person holds a conversation in a real browser."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import Running, service, until
from fakes import Gate, Script, ScriptedEngine

from yaptext.engine.base import WARM, Engine, Engines
from yaptext.server import lifecycle
from yaptext.server.opening import Opening

WEATHER = [{"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}]
CALL = '[{"name":"get_weather","arguments":{"city":"Oslo"}}]'
pytestmark = pytest.mark.browser


class Person:
    """What somebody does with the page, and sees of it."""

    def __init__(self, page: Any) -> None:
        self.page = page

    async def sees(self, where: str, text: str = "") -> None:
        await self.page.locator(where, has_text=text).first.wait_for()

    async def says(self, text: str) -> None:
        await self.page.fill("#utterance", text)
        await self.page.press("#utterance", "Enter")

    async def messages(self) -> list[str]:
        return list(await self.page.locator(".message").all_text_contents())

    async def text(self, where: str) -> str:
        return str(await self.page.locator(where).inner_text())


@pytest.fixture
def person(tab: Any) -> Person:
    return Person(tab.page)


@asynccontextmanager
async def visiting(person: Person, engine: Engine, *, demo: bool = False, **variables: Any) -> AsyncIterator[Running]:
    """The service, and its page, which is left before the service stops: it would try to connect again."""
    async with service(Engines(chat=engine, tool=engine, demo=demo), **variables) as running:
        await person.page.goto(running.http)
        yield running
        await person.page.goto("about:blank")


async def test_a_conversation(tab: Any, person: Person) -> None:
    """The default key is in the page, so that a first conversation needs nothing but words. The reply is streamed and
    read to a screen reader as a whole; decision, figures and the session are shown. The key is in no address, and
    nothing outlives the tab."""
    gate, engine = Gate(), ScriptedEngine(chat=Script(["Hello", " there", "."]))
    async with visiting(person, engine) as running:
        engine.chat.pace = gate
        await person.sees("#state", "Connected")
        await person.says("hi <b>you</b>")
        gate.step(2)
        await person.sees(".assistant.running", "Hello there")
        assert await person.text("#first") != "-" and await person.text("#spoken") == ""
        gate.step()
        await person.sees(".assistant:not(.running)", "Hello there.")
        assert await person.messages() == ["You: hi <b>you</b>", "Assistant: Hello there."]
        assert (await person.text("#spoken"), await person.text(".decision")) == ("Reply: Hello there.", "No tool")
        assert await person.text("#tokens") == "3" and (await person.text("#total")).endswith(" ms")
        label = await person.page.get_attribute("#plot-first", "aria-label")
        assert label.startswith("First token of the last turns: ")
        await person.page.click("summary:has-text('Session as')")
        await person.sees("#session", "Hello there.")
        shown = json.loads(await person.text("#session"))
        assert [message["content"] for message in shown["history"]] == ["hi <b>you</b>", "Hello there."]
        assert any(address.startswith("ws:") and "ticket=" in address for address in tab.asked)
        assert not any("yap_token" in address for address in tab.asked)
        assert {address.split("/")[2] for address in tab.asked} == {running.http.split("/")[2]}
        assert await person.page.evaluate("localStorage.length + document.cookie.length") == 0


async def test_typing_interrupts_and_esc_stops(person: Person) -> None:
    """A new message ends the reply that runs, and Esc one that nobody wants; both are marked, and the engine stops."""
    gate, engine = Gate(), ScriptedEngine(chat=Script(["One", " two", " three"]))
    async with visiting(person, engine):
        engine.chat.pace = gate
        await person.says("count")
        gate.step()
        await person.sees(".assistant", "One")
        await person.says("stop it")
        await person.sees(".assistant.cut", "One")
        await until(lambda: engine.aborted == 1)
        gate.step(2)
        await person.sees(".assistant.running", "One two")
        await person.page.keyboard.press("Escape")
        await person.sees(".assistant.cut", "One two")
        await until(lambda: engine.aborted == 2)
        assert await person.text("#spoken") == "Interrupted reply: One two"
        assert await person.page.locator("#stop").is_disabled()


async def test_a_wrong_key_is_named(tab: Any, person: Person) -> None:
    """The page says so, once, and leads to the field; the right key then connects, and is kept in this tab."""
    tab.allowed = ("401",)
    async with visiting(person, ScriptedEngine(), YAP_TEXT_API_KEY="a-key-of-mine"):
        assert await person.page.input_value("#secret") == "", "only the default key is in the page"
        await person.page.fill("#secret", "wrong")
        await person.page.press("#secret", "Enter")
        await person.sees("#error", "The service does not accept this key.")
        await person.sees("#state", "Not connected")
        assert sum(address.endswith("/ticket") for address in tab.asked) == 1
        await person.page.fill("#secret", "a-key-of-mine")
        await person.page.press("#secret", "Enter")
        await person.sees("#state", "Connected")
        assert await person.page.locator("#error").is_hidden()
        await person.says("hi")
        await person.sees(".assistant:not(.running)", "Hello there.")
        await person.page.reload()
        await person.sees("#state", "Connected")
        await person.sees(".assistant", "Hello there.")  # the session, too


async def test_a_ticket_opens_one_connection(person: Person) -> None:
    """A person without a key gets a ticket from somebody else."""
    async with visiting(person, ScriptedEngine(), YAP_TEXT_API_KEY="a-key-of-mine") as running:
        asking = urllib.request.Request(f"{running.http}/ticket", method="POST", headers={"X-API-Key": "a-key-of-mine"})
        answer = await asyncio.to_thread(lambda: urllib.request.urlopen(asking).read())
        await person.page.check("input[value=ticket]")
        await person.page.fill("#secret", json.loads(answer)["ticket"])
        await person.page.click("#connect")
        await person.sees("#state", "Connected")
        await person.says("hi")
        await person.sees(".assistant:not(.running)", "Hello there.")
        await person.page.click("#connect")
        await person.sees("#error", "The service does not accept this ticket.")
        kept = await person.page.evaluate("JSON.stringify(sessionStorage)")
        assert set(json.loads(kept)) == {"kind", "session"}, "a ticket is not kept"


async def test_the_page_survives_a_restart(
    tab: Any, person: Person, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the service is away the page says when it tries again; then it goes on with the same session."""
    monkeypatch.setattr(lifecycle, "_RETRY_AFTER_MS", (200, 400))
    tab.allowed = ("ERR_CONNECTION_REFUSED", "503")
    store = {"SESSION_STORE": f"sqlite:{tmp_path}/sessions.db", "YAP_TEXT_STATE_DIR": str(tmp_path)}
    engines = Engines(ScriptedEngine(), ScriptedEngine())
    async with service(engines, **store) as running:
        await person.page.goto(running.http)
        port = running.server.bound_port
        await person.says("before")
        await person.sees(".assistant:not(.running)", "Hello there.")
        running.server.begin_drain()
        await person.sees("#state", "restarting")
    async with service(engines, PORT=port, **store):
        await person.sees("#state", "Connected")
        await person.says("after")
        await person.sees(".assistant:not(.running) >> nth=1", "Hello there.")
        await person.page.click("summary:has-text('Session as')")
        await person.sees("#session", "after")
        assert "before" in await person.text("#session")
        await person.page.goto("about:blank")


async def test_a_page_that_is_opened_during_a_start_becomes_the_playground(tab: Any, person: Person) -> None:
    """It says how far the start is, also to a screen reader, and that the service is away if it is; then a person
    writes to it without having done anything."""
    from axe_playwright_python.async_playwright import Axe

    tab.allowed = ("503", "ERR_CONNECTION_REFUSED")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with Opening([listener], expected_s=None):
            await person.page.goto(f"http://127.0.0.1:{port}/")
            await person.sees("[role=status]", "The service is starting.")
            for scheme in ("light", "dark"):
                await person.page.emulate_media(color_scheme=scheme)
                found = (await Axe().run(person.page)).response["violations"]
                assert [fault["id"] for fault in found] == []
    await person.sees("[role=status]", "The service does not answer.")
    engine = ScriptedEngine()
    async with service(Engines(chat=engine, tool=engine), PORT=port):
        await person.sees("#state", "Connected")
        await person.says("hi")
        await person.sees(".assistant:not(.running)", "Hello there.")
        await person.page.goto("about:blank")


async def test_a_tool_call_with_its_result(person: Person) -> None:
    """The page shows the call, asks for its result, and the reply follows. Wrong JSON is named at its field."""
    engine = ScriptedEngine(decision=Script([CALL]))
    async with visiting(person, engine):
        await person.sees("#state", "Connected")
        await person.page.click("summary:has-text('Tools')")
        await person.page.fill("#tools", "{")
        await person.says("is it cold in Oslo?")
        await person.sees("#tools-error", "Not a JSON list")
        await person.page.fill("#tools", json.dumps(WEATHER))
        await person.page.check("#await")
        await person.page.press("#utterance", "Enter")
        await person.sees(".decision.yes", 'get_weather({"city":"Oslo"})')
        engine.decision = Script(["[]"])
        field = person.page.get_by_label("Result of get_weather")
        await field.fill("-3 degrees")
        await field.press("Enter")
        await person.sees(".assistant:not(.running)", "Hello there.")
        prompt = engine.decode(engine.requests[-1][0])
        assert "-3 degrees" in prompt and "is it cold in Oslo?" in prompt


async def test_persona_and_history_reach_the_model(person: Person) -> None:
    """Styles are offered by name; a history replaces the transcript with the next message, and only with that."""
    engine = ScriptedEngine()
    async with visiting(person, engine):
        await person.page.locator("#styles option", has_text="savage").wait_for(state="attached")
        await person.page.click("summary:has-text('Persona')")
        await person.page.fill("#persona-text", "You are a lighthouse.")
        await person.page.click("summary:has-text('History')")
        await person.page.fill("#history", "User: is it dark?\nAssistant: It is.")
        await person.says("and now?")
        await person.sees(".assistant:not(.running)", "Hello there.")
        await person.says("once more")
        await person.sees(".assistant:not(.running) >> nth=1", "Hello there.")
        prompts = [engine.decode(ids) for ids, sampling, _ in engine.requests if sampling.json_schema is None]
        asked = next(text for text in prompts if "and now?" in text and "once more" not in text)
        assert "You are a lighthouse." in asked and "It is." in asked
        again = next(text for text in prompts if "once more" in text)
        assert "and now?" in again, "the history was not sent again"


async def test_the_prompt_is_shown_on_demand(tab: Any, person: Person) -> None:
    """For the message that is being written, with the fields as they are, and for no other: it is what the models then
    get, as text or as token ids. A refusal is named; a ticket shows none."""
    engine = ScriptedEngine()
    async with visiting(person, engine):
        await person.sees("#state", "Connected")
        await person.page.click("summary:has-text('Persona')")
        await person.page.fill("#persona-text", "You are a lighthouse.")
        await person.page.click("summary:has-text('History')")
        await person.page.fill("#history", "User: is it dark?\nAssistant: It is.")
        await person.page.click("summary:has-text('Prompt of')")
        await person.page.fill("#utterance", "and <b>now</b>?")
        before = len(engine.requests)
        await person.page.click("#show-prompt")
        await person.sees("#prompt-chat", "and <b>now</b>?")
        assert len(engine.requests) == before and not await person.messages()
        shown = {role: await person.page.text_content(f"#prompt-{role}") for role in ("chat", "tool")}
        await person.page.check("#as-ids")
        ids = {role: (await person.text(f"#prompt-{role}")).split() for role in ("chat", "tool")}
        assert "tokens; the first" in await person.text("#prompt-chat-facts")
        await person.page.press("#utterance", "Enter")
        await person.sees(".assistant:not(.running)", "Hello there.")
        for sent, sampling, priority in engine.requests[before:]:
            role = "chat" if sampling.json_schema is None else "tool"
            if priority != WARM:
                clock = r"\w+, \d\d:\d\d"  # a minute may have passed
                assert re.sub(clock, "", shown.pop(role)) == re.sub(clock, "", engine.decode(sent))
                assert len(ids[role]) == len(sent)
        assert not shown
        await person.page.uncheck("#as-ids")
        await person.page.click("#show-prompt")
        await person.sees("#prompt-chat", "(The user is silent. Go on.)")
        assert await person.text("#prompt-tool-facts") == "It is not asked."
        tab.allowed = ("400",)
        await person.page.fill("#style", "nonsense")
        await person.page.fill("#persona-text", "")
        await person.page.click("#show-prompt")
        await person.sees("#prompt-error", "known are")
        assert await person.page.locator("#prompts").is_hidden()
        await person.page.click("summary:has-text('Connection')")
        await person.page.check("input[value=ticket]")
        await person.page.click("#show-prompt")
        await person.sees("#prompt-error", "This takes a key")


async def test_axe_finds_nothing(tab: Any, person: Person) -> None:
    """In light and dark, wide and on a phone, with every part open, a conversation, an error and a call to answer. A
    phone's page is no wider than the phone."""
    from axe_playwright_python.async_playwright import Axe

    engine = ScriptedEngine(decision=Script([CALL]))
    async with visiting(person, engine):
        await person.sees("#state", "Connected")
        await person.page.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
        await person.page.fill("#tools", json.dumps(WEATHER))
        await person.page.check("#await")
        await person.says("is it cold in Oslo?")
        await person.sees("form.results")
        await person.page.fill("#style", "nonsense")
        await person.says("hi")
        await person.sees(".failed", "unknown_persona")
        await person.page.fill("#style", "")
        await person.page.fill("#utterance", "hi")
        await person.page.click("#show-prompt")
        await person.sees("#prompt-chat", "is it cold in Oslo?")
        await person.sees("#prompt-tool", "get_weather")
        for scheme in ("light", "dark"):
            for width in (1280, 360):
                await person.page.emulate_media(color_scheme=scheme)
                await person.page.set_viewport_size({"width": width, "height": 740})
                found = (await Axe().run(person.page)).response["violations"]
                assert [(fault["id"], [node["html"] for node in fault["nodes"]]) for fault in found] == []
                assert await person.page.evaluate("document.documentElement.scrollWidth") <= width


async def test_a_violation_of_the_policy_is_noticed(tab: Any, person: Person) -> None:
    """Every test here fails at one. This makes some: an inline style, other hosts."""
    from playwright.async_api import Error

    async with visiting(person, ScriptedEngine()):
        await person.sees("#state", "Connected")
        assert tab.complaints == []
        tab.allowed = ("Content Security Policy",)
        for violation in (
            "document.body.append(Object.assign(document.createElement('style'), { textContent: 'p { color: red }' }))",
            "document.body.append(Object.assign(document.createElement('img'), { src: 'http://127.0.0.2/x.png' }))",
            "fetch('http://127.0.0.2/')",
        ):
            seen = len(tab.complaints)
            with suppress(Error):
                await person.page.evaluate(f"{{ {violation} }}")
            await until(lambda seen=seen: len(tab.complaints) > seen)


@pytest.mark.engine
@pytest.mark.asyncio(loop_scope="session")
async def test_a_conversation_with_the_demo(browsing: Any, vllm_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On real vLLM: a decision with a call, a reply, a barge-in, and the figures of a warm prompt."""

    async def stays_open(**_: Any) -> None:
        pass

    monkeypatch.setattr(vllm_engine, "aclose", stays_open)  # it outlives this service
    async with browsing() as tab:
        person = Person(tab.page)
        tab.page.set_default_timeout(120_000)
        async with visiting(person, vllm_engine, demo=True):
            await person.says("What is the capital of France?")
            await person.sees(".assistant:not(.running)", "Paris")
            await person.says("Tell me a very long story about the sea.")
            await person.sees(".assistant.running >> nth=-1", " ")
            await person.says("play some jazz")
            await person.sees(".assistant.cut")
            await person.sees(".decision.yes", "play_music")
            await person.sees(".assistant:not(.running):not(.cut) >> nth=1")
            prompt, cached = (await person.text("#cached")).split(", ")
            assert 0 < int(cached) < int(prompt)
