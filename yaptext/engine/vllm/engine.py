"""vLLM behind the Engine protocol."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import structlog

from yaptext.engine.base import CHAT, Codec, Delta, Load, Reasoning, Role, Sampling
from yaptext.engine.checkpoints import Checkpoint
from yaptext.engine.codec import HubCodec
from yaptext.engine.template import template_file
from yaptext.engine.vllm import arguments, open_failure
from yaptext.engine.vllm.backlog import Prefill
from yaptext.engine.vllm.gauge import make_gauge
from yaptext.engine.vllm.grammar import GrammarCheck
from yaptext.engine.weight_kind import Kind
from yaptext.errors import EngineDead, EngineFailed, StartError
from yaptext.settings import Settings

_log = structlog.get_logger(__name__)


class VllmEngine:
    """One AsyncLLM. Opened by `open`, which blocks while weights load; see `Engine` for the contract."""

    def __init__(self, llm: Any, model: str, kind: Kind, gauge: Any) -> None:
        tokenizer = llm.get_tokenizer()
        self.codec: Codec = HubCodec(
            tokenizer,
            max_model_len=llm.model_config.max_model_len,
            block_size=llm.vllm_config.cache_config.block_size,
            template=None if tokenizer.chat_template else template_file(model),
            end_ids=_end_ids(llm.model_config),
        )
        self._llm, self.model, self._gauge = llm, model, gauge
        self.blocks: int = llm.vllm_config.cache_config.num_gpu_blocks
        self.cache_tokens: int = llm.vllm_config.cache_config.kv_cache_size_tokens or 0
        self.weights: str = kind
        self._running = self._begun = 0
        self._prefill = Prefill()
        self._grammars = GrammarCheck(llm.model_config.tokenizer, llm.model_config.get_vocab_size())

    @classmethod
    def open(
        cls,
        settings: Settings,
        checkpoint: Checkpoint,
        role: Role,
        *,
        alone: bool,
        blocks: int | None = None,
    ) -> VllmEngine:
        """Loads the checkpoint. Raises `StartError` with vLLM's reason."""
        with open_failure.noted() as note:
            try:
                from vllm.engine.arg_utils import AsyncEngineArgs
                from vllm.v1.engine.async_llm import AsyncLLM

                from yaptext.engine.vllm.request import decode_from_the_end

                gauge = make_gauge()
                args = AsyncEngineArgs(
                    **arguments.engine_arguments(settings, checkpoint, role, alone=alone, blocks=blocks)
                )
                llm = AsyncLLM.from_engine_args(args, stat_loggers=[gauge])
            except Exception as error:  # vLLM raises whatever the failing layer raises
                why = open_failure.reason(error, note)
                raise StartError(f"the {role} engine cannot open {checkpoint.source}: {why}") from error
        engine = cls(llm, checkpoint.source, checkpoint.kind, gauge)
        decode_from_the_end(llm.get_tokenizer())
        return engine

    async def stream(
        self, prompt: Sequence[int], sampling: Sampling, *, priority: int = CHAT
    ) -> AsyncGenerator[Delta, None]:
        from vllm.v1.engine.exceptions import EngineDeadError

        from yaptext.engine.vllm.request import alternatives_of, params_of, prompt_of

        thoughts = None
        finished, waits = False, True
        self._prefill.begin(len(prompt))
        self._running += 1
        self._begun += 1
        request_id = f"{priority}-{self._begun}"
        try:
            if sampling.reasoning is not None:
                from yaptext.engine.vllm.reasoning import Thoughts

                thoughts = Thoughts(sampling.reasoning, self._llm.get_tokenizer(), prompt)
            outputs = self._llm.generate(
                prompt_of(prompt, sampling),
                params_of(sampling),
                request_id,
                priority=priority,
            )
            async with aclosing(outputs):
                async for output in outputs:
                    completion = output.outputs[0]
                    finished = output.finished
                    if waits:
                        waits = False
                        self._prefill.end(len(prompt), output.num_cached_tokens or 0)
                    text, thought = completion.text, 0
                    if thoughts is not None:
                        text, thought = thoughts.take(text, completion.token_ids)
                        text += thoughts.rest() if finished else ""
                    yield Delta(
                        text=text,
                        tokens=len(completion.token_ids),
                        prompt_tokens=len(output.prompt_token_ids or ()),
                        cached_tokens=output.num_cached_tokens or 0,
                        finish_reason=completion.finish_reason if finished else None,
                        alternatives=alternatives_of(completion.logprobs) if sampling.alternatives else (),
                        reasoning=thought,
                    )
        except EngineDeadError as error:
            finished = True
            raise EngineDead("The engine died.") from error
        except Exception as error:  # vLLM's own by many names, plain ones of its checks and parsers: none ends a socket
            finished = _is(error, "VLLMClientError")
            if not _is(error, "VLLMError"):
                _log.exception("engine.request_crashed", model=self.model)
            # Without its words: they quote the request.
            why = f"refused the request ({getattr(error, 'parameter', None)})" if finished else "failed on this request"
            raise EngineFailed(f"The engine {why}.") from error
        finally:
            self._running -= 1
            if waits:
                self._prefill.end(len(prompt))
            if not finished and not self._llm.errored:
                # generate() aborts by itself, except where it is cancelled before it holds the request.
                await self._llm.abort(request_id)

    def load(self) -> Load:
        running, seen = self._running, self._gauge
        return Load(
            running=running,
            kv_use=seen.kv_use if running else 0.0,  # with nothing running, its last step is of some time ago
            requests=seen.requests if running else 0,
            begun=self._begun,
            backlog_ms=self._prefill.backlog_ms,
            prefill_tokens_per_s=self._prefill.tokens_per_s,
        )

    def check_reasoning(self, reasoning: Reasoning) -> None:
        from yaptext.engine.vllm.reasoning import check

        check(reasoning, self._llm.get_tokenizer())

    async def check_schema(self, schema: str) -> None:
        await self._grammars.check(schema)

    async def check(self) -> None:
        if self._llm.errored:
            error = EngineDead("The engine died.")
            if (cause := _cause_of_death(self._llm)) is not None:
                error.add_note(cause)
            raise error

    async def aclose(self, *, at_once: bool = False) -> None:
        await self._grammars.aclose()
        await asyncio.to_thread(self.close, 0 if at_once else 5)  # it waits for its process

    def close(self, within_s: float = 5) -> None:
        self._llm.shutdown(timeout=within_s)
        self._llm.shutdown = lambda timeout=None: None  # __del__ calls it again, when the interpreter is half gone


def _cause_of_death(llm: Any) -> str | None:
    """How the engine's process ended, for the log; None if that is not known."""
    for process in getattr(llm.engine_core.resources.engine_manager, "processes", ()):
        status = process.exitcode
        if status is not None and status < 0:
            killed = f"Its process was killed by {signal.Signals(-status).name}."
            hint = " If nobody did that, the kernel was out of memory: journalctl -k -g 'out of memory'"
            return killed + (hint if -status == signal.SIGKILL else "")
        if status:
            return f"Its process ended with status {status}; what it logged before says why."
    return None


def _is(error: Exception, name: str) -> bool:
    """Whether it is of that class of vLLM's, in a version that has it."""
    from vllm import exceptions

    return isinstance(error, getattr(exceptions, name, ()))


def _end_ids(config: Any) -> list[int]:
    """What ends a reply by `eos_token_id` in the model's config and generation config: a number, a list or nothing."""
    found = []
    for ids in (config.hf_text_config.eos_token_id, config.try_get_generation_config().get("eos_token_id")):
        found += [ids] if isinstance(ids, int) else list(ids or ())
    return found
