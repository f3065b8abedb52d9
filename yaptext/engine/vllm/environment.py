"""What vLLM finds in the environment of its processes: variables, caches."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import structlog

from yaptext.settings import Settings

_log = structlog.get_logger(__name__)
_CACHES = ("XDG_CACHE_HOME", "VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def engine_environment(settings: Settings) -> dict[str, str]:
    """The variables to set before vLLM is imported, by name. The token of the hub is in a file that ends with this
    process."""
    values = {
        "VLLM_LOGGING_CONFIG_PATH": str(Path(__file__).parents[2] / "observe" / "vllm_logging.json"),
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


def leave_fixed_caches() -> None:
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
