"""VllmEngine.stream: whatever vLLM raises for a request ends that request, and nothing else."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
import vllm.exceptions
from made import with_template
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from yaptext.engine.base import Delta, Reasoning, Sampling
from yaptext.engine.vllm.engine import VllmEngine
from yaptext.engine.vllm.reasoning import Thoughts
from yaptext.errors import EngineDead, EngineFailed

WORDS = "words of a request"
TOKENIZER = with_template("gpt2", None)


class Llm:
    """As much of an AsyncLLM as the engine uses. It raises `error` before its first output, or after it."""

    errored = False
    error: Exception | None = None
    late = False
    model_config = SimpleNamespace(
        max_model_len=1000,
        tokenizer="gpt2",
        get_vocab_size=lambda: 50_257,
        hf_text_config=SimpleNamespace(eos_token_id=1),
        try_get_generation_config=dict,
    )
    vllm_config = SimpleNamespace(
        cache_config=SimpleNamespace(block_size=16, num_gpu_blocks=9, kv_cache_size_tokens=144)
    )

    def __init__(self) -> None:
        self.aborted: list[str] = []

    def get_tokenizer(self) -> Any:
        return TOKENIZER

    async def generate(self, prompt: Any, params: Any, request_id: str, *, priority: int) -> AsyncGenerator[Any, None]:
        if self.error is not None and not self.late:
            raise self.error
        for finished in (False, True):
            said = SimpleNamespace(text="a", token_ids=[64], logprobs=None, finish_reason="stop" if finished else None)
            yield SimpleNamespace(outputs=[said], finished=finished, num_cached_tokens=0, prompt_token_ids=[1, 2])
            if self.error is not None:
                raise self.error

    async def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)


@pytest.fixture
def llm() -> Llm:
    return Llm()


@pytest.fixture
def engine(llm: Llm, tmp_path: Path) -> VllmEngine:
    return VllmEngine(llm, str(tmp_path), "float", SimpleNamespace(kv_use=0.0, requests=0))


async def read(engine: VllmEngine, **sampling: Any) -> list[Delta]:
    return [delta async for delta in engine.stream([1, 2], Sampling(max_tokens=5, **sampling))]


ERRORS = [
    vllm.exceptions.VLLMError(WORDS),
    vllm.exceptions.VLLMClientError(WORDS),
    vllm.exceptions.VLLMServerError(WORDS),
    vllm.exceptions.VLLMValidationError(WORDS, parameter="temperature", value=WORDS),
    vllm.exceptions.QueueOverflowError(),
    vllm.exceptions.GenerationError(WORDS),
    vllm.exceptions.RetryableRequestError(WORDS),
    EngineGenerateError(WORDS),
    ValueError(WORDS),
    TypeError(WORDS),
    KeyError(WORDS),
]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
async def test_an_error_of_a_request_ends_that_request(
    engine: VllmEngine, llm: Llm, error: Exception, late: bool
) -> None:
    """On arrival and later: as EngineFailed without its words, which may quote the request. The engine goes on."""
    llm.error, llm.late = error, late
    with pytest.raises(EngineFailed) as raised:
        await read(engine)
    assert type(raised.value) is EngineFailed and raised.value.__cause__ is error
    assert WORDS not in str(raised.value)
    llm.error = None
    assert "".join(delta.text for delta in await read(engine)) == "aa"
    assert engine.load().running == 0 and engine.load().backlog_ms == 0


async def test_what_was_refused_is_named(engine: VllmEngine, llm: Llm) -> None:
    """By vLLM's name of the parameter; there is nothing to abort."""
    llm.error = vllm.exceptions.VLLMValidationError(WORDS, parameter="temperature")
    with pytest.raises(EngineFailed, match=r"refused the request \(temperature\)"):
        await read(engine)
    assert llm.aborted == []
    llm.error = vllm.exceptions.GenerationError(WORDS)
    with pytest.raises(EngineFailed, match="failed on this request"):
        await read(engine)
    assert len(llm.aborted) == 1


async def test_a_dead_engine_is_told_from_a_failed_request(engine: VllmEngine, llm: Llm) -> None:
    llm.error = EngineDeadError()
    with pytest.raises(EngineDead):
        await read(engine)
    assert llm.aborted == []


async def test_a_sampling_that_vllm_refuses_ends_its_request(engine: VllmEngine) -> None:
    """Before the engine sees it."""
    for sampling in ({"temperature": -1.0}, {"top_p": 2.0}, {"temperature": "warm"}):
        with pytest.raises(EngineFailed):
            await read(engine, **sampling)
    assert engine.load().running == 0


async def test_a_parser_that_fails_ends_its_request(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsers of thinking raise whatever they like on what a model says, and one may refuse the prompt. That they did
    is in the log: it is nobody's request that is wrong."""

    def fail(*_: Any) -> Any:
        raise IndexError(WORDS)

    with pytest.raises(EngineFailed):
        await read(engine, reasoning=Reasoning("no_such_parser"))
    monkeypatch.setattr(Thoughts, "take", fail)
    with structlog.testing.capture_logs() as lines, pytest.raises(EngineFailed):
        await read(engine, reasoning=Reasoning("deepseek_r1"))
    assert [(line["event"], line["log_level"]) for line in lines] == [("engine.request_crashed", "error")]
    assert engine.load().running == 0
