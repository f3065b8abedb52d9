"""Which files of a repository an engine reads."""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub as client

from yaptext.engine.download_plan import Read
from yaptext.engine.header import INDEX
from yaptext.engine.hub_client import Hub, client_errors

BESIDE = ["*.json", "tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "*.jinja"]
"""What lies beside weights in a repository's own folder, and some loader may want. All of it is small."""

_BIN_INDEX = "pytorch_model.bin.index.json"


def engine_files(paths: Sequence[str], read: Read) -> list[str]:
    """What an engine's weights, config, tokenizer and template are read from. Raises as `engine_weights`."""
    beside = [path for path in paths if any(fnmatch.fnmatch(path, pattern) for pattern in BESIDE) and "/" not in path]
    beside += [path for path in paths if path.startswith("additional_chat_templates/")]
    return sorted({*beside, *engine_weights(paths, read)})


def engine_weights(paths: Sequence[str], read: Read) -> list[str]:
    """Those that vLLM takes (0.32: `DefaultModelLoader._prepare_weights`, `download_weights_from_hf`). Raises
    `LookupError` if there are none."""
    own = [path for path in paths if "/" not in path]
    index = INDEX if INDEX in own or fnmatch.filter(own, "*.safetensors") else _BIN_INDEX
    if fnmatch.filter(own, "consolidated*.safetensors"):  # as Mistral has them: vLLM prefers these
        weights = fnmatch.filter(paths, "consolidated*.safetensors")
    elif named := _named_weights(read(index)) if index in own else []:
        if absent := sorted(set(named) - set(paths)):
            raise LookupError(f"lacks {len(absent)} of {len(named)} files of its weights: {absent[0]}")
        weights = named
    else:
        kinds = (
            fnmatch.filter(paths, kind) for kind in ("*.safetensors", "*.bin", "*.pt") if fnmatch.filter(own, kind)
        )
        weights = [path for path in next(kinds, []) if not fnmatch.fnmatch(path, "original/**/*")]
    if not weights:
        raise LookupError("has no weights that an engine loads: *.safetensors, *.bin or *.pt")
    return weights


def _named_weights(index: bytes) -> list[str]:
    try:
        return sorted(set(json.loads(index)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


def lacking_in_cache(hub: Hub, repo: str) -> list[str]:
    """Paths that an engine without a hub would not find. Of a repository whose list of files was not noted down, only
    what an index names can be missed."""
    found = client.try_to_load_from_cache(repo, "config.json", cache_dir=hub.cache)
    if not isinstance(found, str):
        return ["config.json"]
    snapshot = Path(found).parent

    def read(path: str) -> bytes:
        try:
            return (snapshot / path).read_bytes()
        except OSError:
            return b""

    try:
        paths = [file.path for file in client.get_cached_repo_tree(repo, cache_dir=hub.cache)]
    except client_errors().CachedRepoTreeNotFoundError:
        paths = [path.name for path in snapshot.iterdir() if path.exists()]
        paths += _named_weights(read(INDEX)) or _named_weights(read(_BIN_INDEX))
    try:
        wanted = engine_weights(paths, read)
    except LookupError:
        return ["model.safetensors"]
    return [path for path in wanted if not os.path.exists(snapshot / path)]
