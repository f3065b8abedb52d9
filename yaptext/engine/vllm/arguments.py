"""What vLLM is asked for: the arguments of one engine, by its settings, checkpoint, machine."""

from __future__ import annotations

from typing import Any

from yaptext.engine.base import Role
from yaptext.engine.checkpoints import Checkpoint
from yaptext.engine.vllm import cpu_awq
from yaptext.errors import StartRefused
from yaptext.settings import Settings


def engine_arguments(
    settings: Settings, checkpoint: Checkpoint, role: Role, *, alone: bool, blocks: int | None = None
) -> dict[str, Any]:
    """AsyncEngineArgs for one role, as plain data. `alone` says that no other engine shares the card. With `blocks` of
    KV cache, nothing is measured. Raises `StartRefused` if the device cannot have what the settings ask for."""
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
        # Scheduling ahead begins the step after a decision before the decision is known: later by that step's launch,
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
