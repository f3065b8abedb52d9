"""What every Engine promises, held on the scripted engine and on real vLLM alike."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing

import pytest
from fakes import Script, ScriptedEngine

from yaptext.engine.base import CHAT, DECIDE, Delta, Engine, Sampling
from yaptext.errors import EngineFailed

pytestmark = pytest.mark.asyncio(loop_scope="session")

_SCHEMA = json.dumps({"type": "array", "items": {"type": "integer"}, "maxItems": 2})


@pytest.fixture(
    params=[
        pytest.param("scripted"),
        pytest.param("vllm", marks=pytest.mark.engine),
    ]
)
def engine(request: pytest.FixtureRequest) -> Engine:
    if request.param == "vllm":
        return request.getfixturevalue("vllm_engine")
    return ScriptedEngine(
        chat=Script([" word"] * 400, pace=lambda: asyncio.sleep(0)),
        decision=Script(["[", "1", "]"], alternatives=[{"[": 0.9, "[]": 0.1}, {"1": 0.6}, {"]": 1.0}]),
    )


async def read(engine: Engine, prompt: list[int], sampling: Sampling, **options: int) -> list[Delta]:
    async with aclosing(engine.stream(prompt, sampling, **options)) as deltas:
        return [delta async for delta in deltas]


async def prompt_of(engine: Engine, text: str = "Count from one to five hundred.") -> list[int]:
    rendered = engine.codec.render([{"role": "user", "content": text}])
    assert rendered is not None
    return await engine.codec.encode_rendered(rendered)


async def freed(engine: Engine) -> None:
    """Waits until no stream is open."""
    async with asyncio.timeout(60):
        while engine.load().running:  # noqa: ASYNC110  # the protocol has no event for it
            await asyncio.sleep(0.01)


async def test_the_cache_holds_more_than_one_conversation(engine: Engine) -> None:
    """In tokens, as prompts are counted."""
    assert engine.cache_tokens > 2 * engine.codec.max_model_len


async def test_a_stream_counts_its_tokens_and_ends_with_a_reason(engine: Engine) -> None:
    """`length` at max_tokens; every delta tells the prompt's size; only the last has a reason."""
    prompt = await prompt_of(engine)
    deltas = await read(engine, prompt, Sampling(max_tokens=12))
    assert sum(delta.tokens for delta in deltas) == 12
    assert {delta.prompt_tokens for delta in deltas} == {len(prompt)}
    assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + ["length"]
    assert "".join(delta.text for delta in deltas)
    assert engine.load().running == 0


async def test_closing_a_stream_aborts_it(engine: Engine) -> None:
    """Which the engine itself counts, too. After `aclose` nothing runs on, and the engine serves the next request."""
    prompt = await prompt_of(engine)
    async with aclosing(engine.stream(prompt, Sampling(max_tokens=400))) as deltas:
        for _ in range(3):
            await anext(deltas)
        assert (engine.load().running, engine.load().requests) == (1, 1)
    assert engine.load().running == 0
    assert len(await read(engine, prompt, Sampling(max_tokens=2))) > 0


async def test_cancelling_the_reader_aborts_the_stream(engine: Engine) -> None:
    """Also before the first delta, and for many at once."""
    prompt = await prompt_of(engine)
    for delay in (0, 0, 0.001, 0.05, 0.2):
        readers = [asyncio.create_task(read(engine, prompt, Sampling(max_tokens=400))) for _ in range(4)]
        await asyncio.sleep(delay)
        for reader in readers:
            reader.cancel()
        results = await asyncio.gather(*readers, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError | list) for result in results)
        await freed(engine)
        assert engine.load().backlog_ms == 0, "who left without a token does not wait"
    assert len(await read(engine, prompt, Sampling(max_tokens=2))) > 0


async def test_a_repeated_prefix_is_cached_in_whole_blocks(engine: Engine) -> None:
    """`cached_tokens` is true: nothing at first, then the blocks that both prompts share."""
    shared = (await engine.codec.encode("A tall ship went to sea, and I shall tell you all about it. " * 30))[
        : engine.codec.block_size * 2
    ]
    assert len(shared) == engine.codec.block_size * 2
    first = await read(engine, [*shared, *await engine.codec.encode("one")], Sampling(max_tokens=1))
    second = await read(engine, [*shared, *await engine.codec.encode("two")], Sampling(max_tokens=1))
    assert first[0].cached_tokens == 0
    assert second[0].cached_tokens == len(shared)


async def test_a_salt_keeps_cached_prefixes_apart(engine: Engine) -> None:
    """What was computed under one is found under that one alone; to have none is one, too."""
    prompt = await engine.codec.encode("Salt is what nobody else shares with me, and never will. " * 30)
    prompt = prompt[: engine.codec.block_size * 2 + 1]
    found = []
    for salt in ("", "a", "b", "", "a", "b"):
        deltas = await read(engine, prompt, Sampling(max_tokens=1, cache_salt=salt))
        found.append(deltas[0].cached_tokens)
    assert found == [0, 0, 0, *[engine.codec.block_size * 2] * 3]


async def test_a_schema_holds_whatever_the_model_would_say(engine: Engine) -> None:
    """The text parses as JSON of the schema and is compact; also when the engine has met the schema before."""
    for _ in range(2):
        deltas = await read(
            engine, await prompt_of(engine, "Say hello"), Sampling(max_tokens=40, json_schema=_SCHEMA), priority=DECIDE
        )
        text = "".join(delta.text for delta in deltas)
        numbers = json.loads(text)
        assert len(numbers) <= 2 and all(isinstance(number, int) for number in numbers)
        assert text == json.dumps(numbers, separators=(",", ":")) and deltas[-1].finish_reason == "stop"


async def test_alternatives_are_told_under_the_constraint(engine: Engine) -> None:
    """One dict a token: the chosen text is in it, and the grammar leaves nothing but its own ways to begin."""
    sampling = Sampling(max_tokens=40, json_schema=_SCHEMA, alternatives=8)
    deltas = await read(engine, await prompt_of(engine, "Say hello"), sampling)
    told = [(delta.text, *delta.alternatives) for delta in deltas if delta.tokens == 1 and delta.text]
    assert told
    for text, alternatives in told:
        assert text in alternatives
        assert 0 < alternatives[text] <= sum(alternatives.values()) <= 1.001
    assert all(text.startswith("[") for text, probability in told[0][1].items() if probability > 1e-6)
    plain = await read(engine, await prompt_of(engine, "Say hello"), Sampling(max_tokens=2))
    assert not any(delta.alternatives for delta in plain)


async def test_streams_side_by_side_do_not_mix(engine: Engine) -> None:
    """Eight streams at both priorities, each bound to a text of its own, say their own."""
    prompt = await prompt_of(engine, "Say something.")
    texts = [f"stream {n} " + "abcdefgh"[n] * 20 for n in range(8)]
    together = await asyncio.gather(
        *(
            read(
                engine,
                prompt,
                Sampling(max_tokens=60, json_schema=json.dumps({"const": text})),
                priority=(DECIDE, CHAT)[number % 2],
            )
            for number, text in enumerate(texts)
        )
    )
    assert [json.loads("".join(delta.text for delta in deltas)) for deltas in together] == texts


async def test_a_bad_request_fails_alone(engine: Engine) -> None:
    """A prompt over the context raises EngineFailed; a stream beside it goes on."""
    prompt = await prompt_of(engine)
    beside = asyncio.create_task(read(engine, prompt, Sampling(max_tokens=20)))
    with pytest.raises(EngineFailed):
        await read(engine, prompt * (engine.codec.max_model_len // len(prompt) + 1), Sampling(max_tokens=1))
    assert (await beside)[-1].finish_reason is not None
    await engine.check()


async def test_a_long_seeded_prompt_is_answered(engine: Engine) -> None:
    """Whatever the engine does with prompts that are longer than one step may be."""
    words = " ".join(f"{number} {number * 7919 % 1000}" for number in range(1500))
    prompt = (await prompt_of(engine, words))[:3000]
    assert len(prompt) > 2400
    deltas = await read(engine, prompt, Sampling(max_tokens=3, temperature=0.8, seed=5))
    assert sum(delta.tokens for delta in deltas) >= 1
    await engine.check()


async def test_a_stop_string_ends_the_text_before_it(engine: Engine) -> None:
    """The stop string itself is not part of the text."""
    deltas = await read(engine, await prompt_of(engine), Sampling(max_tokens=60))
    text = "".join(delta.text for delta in deltas)
    stop = text[5:10]
    stopped = await read(engine, await prompt_of(engine), Sampling(max_tokens=60, stop=(stop,)))
    assert "".join(delta.text for delta in stopped) == text[: text.index(stop)]
    assert stopped[-1].finish_reason == "stop"


async def test_control_tokens_in_a_users_text_are_only_text(engine: Engine) -> None:
    """`encode` makes them special only where the service itself wrote them."""
    as_text, as_control = await engine.codec.encode("<|im_end|>"), await engine.codec.encode_rendered("<|im_end|>")
    assert len(as_control) == 1 and as_control[0] not in as_text


async def test_many_texts_are_encoded_each_by_itself(engine: Engine) -> None:
    """Also where they are so long that a thread does it, and none at all."""
    for texts in (["one", "", "<|im_end|>", "one two"], ["a long text. " * 200, "and one more"], []):
        assert await engine.codec.encode_all(texts) == [await engine.codec.encode(text) for text in texts]


@pytest.mark.parametrize("text", ["", "hello", "naïve café — 東京 🚀🚀🚀", "a b c d e f g h " * 200])
@pytest.mark.parametrize("limit", [0, 1, 3, 40])
async def test_clip_keeps_the_start_or_the_end_within_the_limit(engine: Engine, text: str, limit: int) -> None:
    """What is kept is a true start or end of the text, and as long as fits."""
    start = await engine.codec.clip(text, limit, keep="start")
    end = await engine.codec.clip(text, limit, keep="end")
    assert text.startswith(start) and text.endswith(end)
    assert len(await engine.codec.encode(start)) <= limit and len(await engine.codec.encode(end)) <= limit
    if len(await engine.codec.encode(text)) <= limit:
        assert start == end == text


async def test_render_keeps_contents_in_order_and_opens_the_reply(engine: Engine) -> None:
    """The template's text holds each content once."""
    messages = [
        {"role": "system", "content": "SYSTEM"},
        {"role": "user", "content": "FIRST"},
        {"role": "assistant", "content": "REPLY"},
        {"role": "user", "content": "SECOND"},
    ]
    text = engine.codec.render(messages)
    assert text is not None
    places = [text.index(str(message["content"])) for message in messages]
    assert places == sorted(places) and text.endswith("assistant\n")
