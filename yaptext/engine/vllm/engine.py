"""vLLM behind the Engine protocol."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import structlog

from yaptext.engine import checkpoints, demo
from yaptext.engine.base import CHAT, Delta, Engines, Load, Reasoning, Role, Sampling
from yaptext.engine.codec import HubCodec
from yaptext.engine.template import template_file
from yaptext.engine.vllm import cpu_awq, fault, startup
from yaptext.engine.vllm.backlog import Prefill
from yaptext.engine.vllm.grammar import GrammarCheck
from yaptext.errors import EngineDead, EngineFailed, StartError, StartRefused
from yaptext.observe.systemd import notify
from yaptext.settings import Settings

_log = structlog.get_logger(__name__)
_CACHES = ("XDG_CACHE_HOME", "VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


class VllmEngine(HubCodec):
    """One AsyncLLM. Opened by `open`, which blocks while weights load; see `Engine` for the contract."""

    def __init__(self, llm: Any, model: str, kind: checkpoints.Kind, gauge: Any) -> None:
        tokenizer = llm.get_tokenizer()
        super().__init__(
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
        checkpoint: checkpoints.Checkpoint,
        role: Role,
        *,
        alone: bool,
        blocks: int | None = None,
    ) -> VllmEngine:
        """Loads the checkpoint. Raises `StartError` with vLLM's reason."""
        with fault.noted() as note:
            try:
                from vllm.engine.arg_utils import AsyncEngineArgs
                from vllm.v1.engine.async_llm import AsyncLLM

                from yaptext.engine.vllm.request import decode_from_the_end

                gauge = _make_gauge()
                args = AsyncEngineArgs(**_arguments(settings, checkpoint, role, alone=alone, blocks=blocks))
                llm = AsyncLLM.from_engine_args(args, stat_loggers=[gauge])
            except Exception as error:  # vLLM raises whatever the failing layer raises
                why = fault.reason(error, note)
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


def open_engines(settings: Settings) -> Engines:
    """Opens the deployed engines: at once on CPU, and on CUDA where an earlier start has measured how many blocks of KV
    cache each gets. Else one after the other, since each measures free GPU memory while it opens.

    Blocks. Raises `StartError`; what was already open is then closed.
    """
    os.environ.update(_environment(settings))
    _leave_fixed_caches()
    checkpoints.leave_hub_if_down(settings)
    is_demo = checkpoints.wants_demo(settings)
    folder = demo.folder(settings.state) if is_demo else None
    optional = settings.tool_optional and settings.chat_deployed
    lacking: list[StartError] = []
    chosen: dict[Role, checkpoints.Checkpoint] = {}
    try:
        if settings.tool_deployed:
            chosen["tool"] = checkpoints.choose(settings, "tool", folder)
    except StartError as error:
        if not optional:
            raise
        lacking.append(error)
    if settings.chat_deployed:
        chosen["chat"] = checkpoints.choose(settings, "chat", folder)
    for role, checkpoint in chosen.items():
        _log.info(
            "weights.chosen", role=role, model=checkpoint.source, weights=checkpoint.kind, reason=checkpoint.reason
        )
    if is_demo:
        _log.warning(
            "demo.serving", model=demo.NAME, hint="no model is configured; set CHAT_MODEL and TOOL_MODEL for real use"
        )
    _bring(settings, chosen, lacking if optional else None)
    awq = all(checkpoint.kind == "awq" for checkpoint in chosen.values())
    shared = len(chosen) == 2 and chosen["chat"].source == chosen["tool"].source and settings.share_engine
    if shared:
        del chosen["tool"]
    opened = _open_all(settings, chosen, lacking if optional else None)
    if lacking:
        _log.warning("tool.lacking", error=str(lacking[0]), hint="TOOL_OPTIONAL=1: every decision is no")
    return Engines(
        chat=opened.get("chat"),
        tool=opened.get("chat" if shared else "tool"),
        awq=awq,
        demo=is_demo,
        lacking=str(lacking[0])[:200] if lacking else None,
    )


def _bring(settings: Settings, chosen: dict[Role, checkpoints.Checkpoint], lacking: list[StartError] | None) -> None:
    """Downloads what engines will open. `lacking` takes the reason why the tool model, which then is not chosen, cannot
    be had; None if that ends the start."""
    if lacking is None or "tool" not in chosen:
        checkpoints.bring(settings, chosen)
        return
    checkpoints.bring(settings, {role: checkpoint for role, checkpoint in chosen.items() if role != "tool"})
    try:
        checkpoints.bring(settings, {"tool": chosen["tool"]})
    except StartError as error:
        lacking.append(error)
        del chosen["tool"]


def _open_all(
    settings: Settings, chosen: dict[Role, checkpoints.Checkpoint], lacking: list[StartError] | None
) -> dict[Role, VllmEngine]:
    """`lacking` takes the reason why the tool engine cannot open; None where that ends the start."""
    begun = time.monotonic()
    alone = len(chosen) == 1

    def opener(
        role: Role, blocks: int | None, lacking: list[StartError] | None = None
    ) -> Callable[[], VllmEngine | None]:
        def open() -> VllmEngine | None:
            try:
                return _timed(settings, chosen[role], role, alone=alone, blocks=blocks)
            except StartError as error:
                if lacking is None or role != "tool":
                    raise
                lacking.append(error)
                return None

        return open

    if not settings.on_cuda:  # the size of the KV cache is a setting there
        opened = startup.at_once({role: opener(role, None, lacking) for role in chosen})
    else:
        sizes = startup.Sizes(settings.state / "kv_blocks.json", _measured_for(settings, chosen, alone=alone))
        opened = {}
        if known := sizes.recall():
            try:
                opened = startup.at_once({role: opener(role, known.get(role)) for role in chosen})
            except StartError as error:
                _log.warning("engines.reopening", error=str(error), hint="one by one: sizes of an earlier start failed")
                sizes.forget()
        if not opened:
            opened = startup.in_turn({role: opener(role, None, lacking) for role in chosen})
            if len(opened) == len(chosen):
                sizes.remember({role: engine.blocks for role, engine in opened.items()})
    _log.info("engines.opened", seconds=round(time.monotonic() - begun, 1), roles=list(opened))
    return opened


def _timed(
    settings: Settings, checkpoint: checkpoints.Checkpoint, role: Role, *, alone: bool, blocks: int | None
) -> VllmEngine:
    begun = time.monotonic()
    _log.info("engine.opening", role=role, model=checkpoint.source)
    notify(f"STATUS=Opening the {role} engine: {checkpoint.source}")
    # For NVIDIA's MPS, where that runs: of two engines the chat engine stands back. Its process takes the environment
    # along as it starts, and the next engine opens after that.
    os.environ["CUDA_MPS_CLIENT_PRIORITY"] = "1" if role == "chat" and not alone else "0"
    engine = VllmEngine.open(settings, checkpoint, role, alone=alone, blocks=blocks)
    _log.info(
        "engine.opened",
        role=role,
        model=checkpoint.source,
        seconds=round(time.monotonic() - begun, 1),
        max_model_len=engine.max_model_len,
        block_size=engine.block_size,
        blocks=engine.blocks,
    )
    return engine


def _measured_for(settings: Settings, chosen: dict[Role, checkpoints.Checkpoint], *, alone: bool) -> dict[str, Any]:
    """Everything that decides how many blocks an engine gets on a card, as plain data."""
    engines = {
        role: _arguments(settings, checkpoint, role, alone=alone)
        | {"hf_token": None, "version": checkpoints.version(checkpoint)}
        for role, checkpoint in chosen.items()
    }
    return {"engines": engines, "card": _card()}


def _card() -> list[Any]:
    """vLLM's version, the card's name and its bytes. Raises `StartError` where there is no card."""
    try:
        import vllm
        from vllm.platforms import current_platform

        return [vllm.__version__, current_platform.get_device_name(), current_platform.get_device_total_memory()]
    except Exception as error:  # the driver's, or none at all
        raise StartError(f"no CUDA card answers: {str(error) or type(error).__name__}") from error


def _arguments(
    settings: Settings, checkpoint: checkpoints.Checkpoint, role: Role, *, alone: bool, blocks: int | None = None
) -> dict[str, Any]:
    """AsyncEngineArgs for one role, as plain data. With `blocks` of KV cache, nothing is measured."""
    cuda = settings.on_cuda
    if settings.kv_dtype == "int8_per_token_head" and not cuda:
        raise StartRefused("KV_DTYPE=int8 gives garbage on CPU: use auto or fp8")
    wanted = settings.chat_max_model_len if role == "chat" else settings.tool_max_model_len
    context = min(wanted or (8192 if role == "chat" else 4096), checkpoint.context)
    batched = settings.batched_tokens(role)
    arguments: dict[str, Any] = {
        "model": checkpoint.source,
        "tokenizer_mode": "hf",
        "dtype": "auto",
        "kv_cache_dtype": settings.kv_dtype,
        "max_model_len": context,
        # On CPU a seeded request whose prefill is split kills the engine ("CPU Generator does not use offset"):
        # there every prompt is computed in one step.
        "max_num_batched_tokens": batched if cuda else max(batched, context),
        "enable_chunked_prefill": cuda,
        "max_num_seqs": settings.max_num_seqs or (256 if cuda else 64),
        "enable_prefix_caching": True,
        "scheduling_policy": "priority",
        "enforce_eager": settings.enforce_eager or not cuda,  # compiling for a CPU costs minutes and gains little
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
        "generation_config": "vllm",  # the service's own sampling defaults count, not the checkpoint's
        "use_tqdm_on_load": False,
        "disable_log_stats": True,
        "enable_log_requests": False,
        "hf_token": settings.hf_token.get_secret_value() if settings.hf_token else None,
    }
    if checkpoint.online_fp8:
        arguments["quantization"] = "fp8"
    emulated = not cuda and cpu_awq.lacks_kernel()  # half precision: prompts take four times as long
    if emulated and checkpoint.kind == "float" and settings.kv_dtype == "auto":
        arguments["dtype"] = "float32"
    elif checkpoint.kind == "awq" and (emulated or settings.kv_dtype == "fp8"):
        # AWQ's usual type is float16. FlashAttention refuses fp8 KV under it, an old CPU is slow at it, and float32 is
        # none of AWQ's.
        arguments["dtype"] = "bfloat16"
    if settings.attention_backend != "auto":
        arguments["attention_backend"] = settings.attention_backend
    if role == "tool":
        # Scheduling ahead begins the step after a decision before the decision is told: later by that step's launch,
        # and beside whatever the card computes meanwhile.
        arguments["async_scheduling"] = False
    if cuda:
        if settings.cuda_graphs == "full" and not settings.enforce_eager:
            # vLLM's own choice launches a prompt layer by layer, which takes longer than computing a short one; it goes
            # back to that where the attention kernels do not allow this one.
            arguments["compilation_config"] = {"cudagraph_mode": "FULL"}
        arguments["gpu_memory_utilization"] = settings.gpu_fraction(role, alone=alone)
    else:
        arguments["kv_cache_memory_bytes"] = settings.cpu_kv_cache_mb * 2**20
        # vLLM's own 128 leaves up to 127 tokens of a warm prefix to be computed again: here that is half a second.
        arguments["block_size"] = 32
    if blocks is not None:
        # The bytes only turn the measuring off: the blocks decide. The fraction is still held against free memory.
        arguments |= {"kv_cache_memory_bytes": 1, "num_gpu_blocks_override": blocks}
    return arguments


def _leave_fixed_caches() -> None:
    """Gives a cache that cannot be written a folder for as long as this machine is up. Torch would not even import."""
    named = {name: os.environ[name] for name in _CACHES if os.environ.get(name)}
    for name, folder in named.items():
        try:
            os.makedirs(folder, exist_ok=True)
            writable = os.access(folder, os.W_OK)
        except OSError:
            writable = False
        if not writable:
            os.environ[name] = tempfile.mkdtemp(prefix="yap-text-cache.")
            _log.warning("cache.read_only", variable=name, folder=folder, instead=os.environ[name])


def _environment(settings: Settings) -> dict[str, str]:
    """What vLLM and its processes read from the environment."""
    values = {
        "VLLM_LOGGING_CONFIG_PATH": str(Path(__file__).parent.parent / "observe" / "vllm_logging.json"),
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # What would stand between the log's lines in a form of its own: progress bars, torch's logs, warnings.
        "TQDM_DISABLE": "1",
        "TORCH_LOGS": "-all",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "FLASHINFER_LOGGING_LEVEL": "error",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONWARNINGS": "ignore",
    }
    if settings.hf_home:
        values["HF_HOME"] = str(settings.hf_home)
    if settings.hf_token:
        values["HF_TOKEN_PATH"] = _file_in_memory(settings.hf_token.get_secret_value().strip())
    if settings.hf_xet_high_performance:
        values["HF_XET_HIGH_PERFORMANCE"] = "1"
    if not settings.on_cuda:
        values |= {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(settings.cpu_threads),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # drops the extra worker process of each engine
            # Eager means vLLM's model; it would still compile its counting of logprobs, for which the engine dies on a
            # machine that has no C++ compiler.
            "TORCH_COMPILE_DISABLE": "1",
            # oneDNN keeps 1,024 kernels, one for each number of tokens that a step ever had and each shape of weights:
            # 600 MB in half an hour. A new one costs nothing that could be measured.
            "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
        }
    return values


def _file_in_memory(text: str) -> str:
    """The path of a file that this process and its children can read, until it ends. The hub client takes its token
    from one: in their environment it would be seen."""
    file = os.memfd_create("yap-text")
    os.write(file, text.encode())
    return f"/proc/{os.getpid()}/fd/{file}"


def _make_gauge() -> Any:
    """A stat logger class that keeps two figures. As a PrometheusStatLogger it takes the place of vLLM's own,
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
