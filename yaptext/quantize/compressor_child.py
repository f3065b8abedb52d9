"""The program that runs llm-compressor, with its wheels before ours: imports nothing of this package.

    PYTHONPATH=WHEELS python -P compressor_child.py < REQUEST

The request is one JSON object: `source` and `target` (folders), `blocks` (token ids, in samples of one length),
`group_size`, `cuda`, `architecture` (a class of transformers), and of a recipe (recipes.py) `groups`, `ignored` and
`renamed`. Standard output gets JSON objects, one per line: {"layer": 3, "layers": 24} after each layer, {"moved": KL}
for scaling alone, at the end {"done": true}, or {"error": type, "text": line}.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import sys
import warnings
from typing import Any, TextIO

DTYPE = "bfloat16"
"""Of what stays unquantized, and of the scales."""
LAYER = r"(model\.|language_model\.)*layers\.\d+"
_LOOKED_AT = 128
"""Tokens on which scaling alone is measured."""


def main() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: without the parent nothing reads the output
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    request = json.load(sys.stdin)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _quantize(request, out)
    except Exception as error:  # of any library: the parent makes a message of it
        import traceback

        traceback.print_exc()
        _tell(out, error=type(error).__name__, text=next(iter(str(error).strip().splitlines()), ""))
        sys.exit(1)
    _tell(out, done=True)


def _tell(out: TextIO, **fields: Any) -> None:
    print(json.dumps(fields), file=out)


def _quantize(request: dict[str, Any], out: TextIO) -> None:
    import torch
    import transformers
    from compressed_tensors.offload import set_onload_device
    from llmcompressor import oneshot
    from llmcompressor.modeling.moe.linearize import linearize_moe
    from llmcompressor.modifiers import Modifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache
    from llmcompressor.utils.helpers import DisableQuantization
    from torch.utils.data import DataLoader
    from transformers.core_model_loading import WeightRenaming

    class Reporter(Modifier):  # type: ignore[misc]
        """Tells of each layer, after what comes before it in the recipe."""

        layers: int
        told: int = 0

        def on_initialize(self, state: Any, **kwargs: Any) -> bool:
            return True

        def on_sequential_epoch_end(self, state: Any, event: Any, **kwargs: Any) -> None:
            if 0 < self.told <= self.layers:  # what comes first is before the layers
                _tell(out, layer=self.told, layers=self.layers)
            self.told += 1

    device = torch.device("cuda:0" if request["cuda"] else "cpu")
    if not request["cuda"]:
        IntermediatesCache.pin_memory = lambda *_: None  # which fails if there is no card to copy to
    kind = getattr(transformers, request["architecture"])
    dtype = "auto" if request["cuda"] else torch.float32
    model = kind.from_pretrained(request["source"], dtype=dtype, trust_remote_code=False).eval()
    linearize_moe(model)
    if request["renamed"]:
        conversions = [change for change in model._weight_conversions if type(change) is WeightRenaming]
        for ours, theirs in request["renamed"].items():
            conversions.append(WeightRenaming(rf"\.experts\.(\d+)\.{theirs}\.", rf".experts.\1.{ours}."))
        model._weight_conversions = conversions

    set_onload_device(model, device)
    looked_at = torch.tensor([request["blocks"][0][:_LOOKED_AT]], device=device)

    def answers() -> Any:
        with torch.inference_mode():
            return torch.log_softmax(model(input_ids=looked_at, use_cache=False).logits.float(), -1).cpu()

    before = answers()
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": False,
        "strategy": "group",
        "group_size": request["group_size"],
    }
    layers = [name for name, _ in model.named_modules() if re.fullmatch(LAYER, name)]
    groups = [group for layer in layers for group in _groups(model.get_submodule(layer), layer, request["groups"])]
    oneshot(
        model=model,
        processor=transformers.AutoTokenizer.from_pretrained(request["source"], trust_remote_code=False),
        dataset=DataLoader(
            [
                {"input_ids": torch.tensor([block]), "attention_mask": torch.ones(1, len(block), dtype=torch.long)}
                for block in request["blocks"]
            ],
            batch_size=None,
        ),
        recipe=[
            AWQModifier(mappings=[AWQMapping(divided, readers) for divided, readers in groups]),
            QuantizationModifier(
                config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=request["ignored"]
            ),
            Reporter(layers=len(layers)),
        ],
        pipeline="sequential",
        num_calibration_samples=len(request["blocks"]),
        max_seq_length=len(request["blocks"][0]),
    )
    with DisableQuantization(model):
        _tell(out, moved=(before.exp() * (before - answers())).sum(-1).mean().item())
    model.to(getattr(torch, DTYPE))
    model.save_pretrained(request["target"], save_compressed=True)


def _groups(layer: Any, name: str, groups: list[tuple[str, list[str]]]) -> list[tuple[str, list[str]]]:
    """The groups of a decoder layer with this name, in llm-compressor's form: a full name, or `re:` and a pattern."""
    parts = dict(layer.named_modules())

    def found(part: str) -> list[str]:
        pattern = re.escape(part).replace(r"\*", r"\d+")
        return [name for name in parts if re.fullmatch(pattern, name)]

    def named(part: str) -> str:
        whole = f"{name}.{part}"
        return "re:" + re.escape(whole).replace(r"\*", r"\d+") + "$" if "*" in part else whole

    here = []
    for divided, readers in groups:
        divided_here, readers_here = found(divided), [reader for reader in readers if found(reader)]
        if divided_here and readers_here and _fits(parts[divided_here[0]], parts[found(readers_here[0])[0]]):
            here.append((named(divided), [named(reader) for reader in readers_here]))
    return here


def _fits(divided: Any, reader: Any) -> bool:
    """Values that several heads share are narrower than what reads them; of a fused layer the last rows count."""
    if not (hasattr(divided, "out_features") and hasattr(reader, "in_features")):
        return True
    return divided.out_features in (reader.in_features, 2 * reader.in_features)


if __name__ == "__main__":
    main()
