"""A float model's folder before anything of it is loaded: files that are missing, broken or of another model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from yaptext.engine import awq_results, header
from yaptext.errors import QuantizeRefused
from yaptext.quantize.kept import KEPT_FILES, code

_TOKENIZERS = ("tokenizer.json", "*.model", "tekken.json", "vocab.*", "*.tiktoken")
_ADAPTER = "adapter_config.json"
_EMBEDDING = "embed_tokens.weight"


def check(folder: Path, source: str) -> None:
    """Raises `QuantizeRefused` with one line: the file, what is wrong with it, and what to do. `source` is the model as
    its setting names it, a hub id or a folder. Reads headers and indexes, a few MB of any model."""

    def broken(file: Path, error: header.BrokenFile) -> QuantizeRefused:
        pulled = isinstance(error, header.LfsPointer) and awq_results.is_folder(source)
        remedy = "run `git lfs pull` in that folder" if pulled else _again(source)
        return QuantizeRefused(f"{file.name} of {source} {error}: {remedy}")

    try:
        named = header.index(folder)
    except header.BrokenFile as error:
        raise broken(folder / header.INDEX, error) from None
    held: dict[str, header.Tensor] = {}
    for name in [header.WHOLE] if named is None else sorted(set(named.values())):
        try:
            tensors = header.tensors(folder / name)
        except header.BrokenFile as error:
            raise broken(folder / name, error) from None
        except FileNotFoundError:
            raise lacking(source, name, beside_whole=(folder / header.WHOLE).exists()) from None
        if absent := [tensor for tensor, file in (named or {}).items() if file == name and tensor not in tensors]:
            more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
            raise QuantizeRefused(
                f"{header.INDEX} of {source} expects {absent[0]}{more} in {name}, which has no such tensor: take the "
                "index and the weights from the same place"
            )
        held |= tensors
    for name in KEPT_FILES:
        if (folder / name).is_file() and header.is_pointer(folder / name):
            raise broken(folder / name, header.LfsPointer())
    if not any(fnmatch(file.name, kind) for file in folder.iterdir() for kind in _TOKENIZERS):
        raise QuantizeRefused(
            f"{source} has no tokenizer (tokenizer.json or tokenizer.model): copy it from the model that it was made of"
        )


def lacking(source: str, shard: str, *, beside_whole: bool = False) -> QuantizeRefused:
    """The error for a missing shard of the index; `beside_whole`: the weights are also there in one file."""
    remedy = f"delete the index, or {_again(source)}" if beside_whole else _again(source)
    return QuantizeRefused(f"{source} lacks {shard}, which {header.INDEX} names: {remedy}")


def _again(source: str) -> str:
    return (
        "copy or download it again"
        if awq_results.is_folder(source)
        else "the hub's copy is the same; name another repository"
    )


def check_tokens(folder: Path, source: str, blocks: Iterable[Sequence[int]], tokenizer: Any) -> None:
    """Raises `QuantizeRefused` if a token of `blocks` has no row in the embedding: another model's tokenizer, or tokens
    that were added to it alone."""
    places = {name: file for name, file in header.places(folder).items() if name.endswith(_EMBEDDING)}
    for name, file in places.items():
        rows = header.tensors(file)[name].shape[0]
        token = max(max(block) for block in blocks)
        if token >= rows:
            raise QuantizeRefused(
                f"the tokenizer of {source} makes token {token} ({tokenizer.convert_ids_to_tokens(token)!r}), and "
                f"{name} in {file.name} has {rows} rows: take the tokenizer of these weights, or resize the embedding"
            )


def needs_code(folder: Path, source: str) -> QuantizeRefused | None:
    """What to say of a tokenizer that could not be opened, if it names code of its own."""
    named = code(folder / "tokenizer_config.json")
    if not named:
        return None
    return QuantizeRefused(
        f"tokenizer_config.json of {source} needs code of its own ({', '.join(named)}), and no code of a model is run: "
        "save the tokenizer as tokenizer.json, without auto_map"
    )


def without_config(folder: Path, source: str) -> QuantizeRefused:
    """What to say of a folder without a config.json that can be read."""
    if (folder / _ADAPTER).is_file():
        try:
            base = json.loads((folder / _ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
        except (OSError, ValueError, KeyError, TypeError):
            base = None
        return QuantizeRefused(
            f"{source} is a LoRA adapter ({_ADAPTER}), no model: merge it into {base or 'its base model'} "
            "(merge_and_unload of peft), and name the folder of the merged model"
        )
    return QuantizeRefused(f"{source} has no config.json that can be read: it is no model to quantize")
