"""llm-compressor, for what autoawq cannot do: a process of its own, with some wheels of its own before ours.

It needs other versions of transformers and compressed-tensors than vLLM. Those few wheels lie in a folder
(nix/lock/llmcompressor.txt); torch and the rest are ours. compressor_child.py is the program.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import structlog

from yaptext.errors import QuantizeDelayed, QuantizeError, QuantizeRefused, SettingsError
from yaptext.quantize import compressor_child
from yaptext.quantize.kept import copy_kept
from yaptext.quantize.plan import Layer
from yaptext.quantize.recipes import RECIPES
from yaptext.quantize.source import architecture

VERSION = "0.14.0.1"
"""As pinned in pyproject.toml: the child uses internals of it."""
_MOVED, _MOVED_HALF = 1e-4, 5e-2
"""How far scaling alone may move the answers by rounding errors, KL in nats, in 32 and in 16 bits."""
_END_S = 10
_TAIL_LINES = 20

_log = structlog.get_logger(__name__)


def wheels(given: Path | None) -> Path:
    """The folder with llm-compressor and what it needs in other versions: `given`, else in this environment. Raises
    `SettingsError` if it is not there."""
    folder = given or Path(sys.prefix) / "llmcompressor"
    if (folder / f"llmcompressor-{VERSION}.dist-info").is_dir():
        return folder
    raise SettingsError(
        f"llm-compressor {VERSION} does not lie in {folder}: `make quantize` and `make install` bring it, and so "
        "does Nix; LLMCOMPRESSOR names another folder"
    )


def quantize(
    source: Path,
    target: Path,
    blocks: list[list[int]],
    group_size: int,
    *,
    on_cuda: bool,
    done: Callable[[Layer], None],
    wheels: Path,
) -> float:
    """As awq.quantize, by llm-compressor in `wheels`: a checkpoint of compressed-tensors in `target`. Returns how far
    scaling alone has moved the model's answers, KL in nats.

    Raises `QuantizeRefused` if that is more than rounding errors explain, `MemoryError`, `QuantizeDelayed` if the child
    was killed, and `QuantizeError` for what else it ended with.
    """
    from transformers import AutoConfig

    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    recipe = RECIPES[config["model_type"]]
    request = {
        "source": str(source),
        "target": str(target),
        "blocks": blocks,
        "group_size": group_size,
        "cuda": on_cuda,
        "architecture": architecture(AutoConfig.from_pretrained(source, trust_remote_code=False)).__name__,
        "groups": recipe.groups,
        "ignored": recipe.ignored,
        "renamed": recipe.renamed,
    }
    moved = float("nan")
    with _child(request, wheels) as answers:
        begun = time.monotonic()
        for answer in answers:
            now = time.monotonic()
            if "layer" in answer:
                done(Layer(answer["layer"], answer["layers"], now - begun))
                begun = now
            moved = answer.get("moved", moved)
    if not moved < (_MOVED_HALF if on_cuda else _MOVED):
        raise QuantizeRefused(f"scaling changes the answers by {moved:.2g} nats: its groups do not fit this model")
    written = json.loads((target / "config.json").read_text(encoding="utf-8"))
    for file in target.iterdir():
        if not file.name.startswith("model"):
            file.unlink()
    copy_kept(source, target)
    how = written["quantization_config"] | {"ignore": recipe.ignored}  # transformers' names are not always vLLM's
    for part in (config, config.get("text_config") or {}):
        if part.pop("torch_dtype", None) or "dtype" in part or part is config:
            part["dtype"] = compressor_child.DTYPE
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": how}, indent=2) + "\n", "utf-8")
    return moved


@contextmanager
def _child(request: dict[str, Any], wheels: Path) -> Iterator[Iterator[dict[str, Any]]]:
    """The child's answers, to its end. Whatever ends the block ends the child."""
    # No token of the hub, no key: it reads a folder.
    passed = ("PATH", "HOME", "TMPDIR", "LANG", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TZ")
    environment = {name: os.environ[name] for name in passed if name in os.environ}
    environment |= {"PYTHONPATH": str(wheels), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", compressor_child.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            text=True,
            start_new_session=True,  # Ctrl-C is ours to pass on
        )
        try:
            yield _answers(process, request, log)
        finally:
            process.terminate()
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


def _answers(process: subprocess.Popen[str], request: dict[str, Any], log: IO[str]) -> Iterator[dict[str, Any]]:
    assert process.stdin and process.stdout
    try:
        json.dump(request, process.stdin)
        process.stdin.close()
    except BrokenPipeError:
        pass  # it has ended: its status says why
    answer: dict[str, Any] = {}
    for line in process.stdout:
        answer = json.loads(line)
        yield answer
    status = process.wait()
    if status == 0 and answer.get("done"):
        return
    log.seek(0)
    _log.error("quantize.compressor_failed", status=status, output="".join(log.readlines()[-_TAIL_LINES:]))
    if answer.get("error") in ("MemoryError", "OutOfMemoryError"):
        raise MemoryError(answer["text"])
    if "error" in answer:
        raise QuantizeError(f"llm-compressor ended with {answer['error']}: {answer['text'][:300]}")
    if status < 0:
        killer = signal.Signals(-status).name
        reason = "the system may have run out of memory" if -status == signal.SIGKILL else "another process sent it"
        raise QuantizeDelayed(f"llm-compressor was ended by {killer}: {reason}")
    raise QuantizeError(f"llm-compressor ended with status {status}, without a message")
