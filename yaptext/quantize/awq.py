"""autoawq, held to what a server can rely on: the only module that imports awq."""

from __future__ import annotations

import gc
import inspect
import json
import logging
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yaptext.errors import QuantizeRefused
from yaptext.quantize import mapping
from yaptext.quantize.source import check_finite, load

GROUP_SIZES = (128, 64, 32)
_OUT_MULTIPLE = 64
"""vLLM's AWQ kernels compute this many outputs at once."""
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""AWQ's packing: nibble i of an int32 holds column `ORDER[i]` of its eight."""
_MOVED, _MOVED_HALF = 1e-3, 5e-2
"""How much scaling may change a layer's answer by rounding errors, relative, in 32 and in 16 bits."""
KEPT_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
"""Kept byte for byte: transformers writes some tokenizers back as others than it read (NFC, another split)."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer is done. `seconds` is its own time."""

    number: int
    count: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What a model allows: its decoder layers' count, the group size, and the weights' bytes before and after."""

    layers: int
    group_size: int
    float_bytes: int
    awq_bytes: int


def plan(folder: Path, wanted: str = "auto") -> Plan:
    """Looks at the model's shape without loading a weight. `wanted` is auto, 128, 64 or 32.

    Raises `QuantizeRefused` for an architecture that autoawq cannot do, or layers that no group size divides.
    """
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    mapping.check_architecture(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with init_empty_weights(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(config)
    layers = model.model.layers
    linears = {
        f"{number}.{name}": module
        for number, layer in enumerate(layers)
        for name, module in layer.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    for name, linear in linears.items():
        if linear.out_features % _OUT_MULTIPLE:
            raise QuantizeRefused(
                f"layer {name} has {linear.out_features} outputs; AWQ needs a multiple of {_OUT_MULTIPLE}"
            )
    sizes = [int(wanted)] if wanted != "auto" else GROUP_SIZES
    inputs = {name: linear.in_features for name, linear in linears.items()}
    fitting = [size for size in sizes if all(count % size == 0 for count in inputs.values())]
    if not fitting:
        name = next(name for name, count in inputs.items() if count % sizes[-1])
        raise QuantizeRefused(
            f"layer {name} has {inputs[name]} inputs, which no group of {' or '.join(map(str, sizes))} divides"
        )
    quantized = sum(linear.weight.numel() for linear in linears.values())
    rest = sum(parameter.numel() for parameter in model.parameters()) - quantized
    bits = 4 + (16 + 4) / fitting[0]  # a weight, and its share of a scale and a zero point
    return Plan(len(layers), fitting[0], 2 * (quantized + rest), int(quantized * bits / 8) + 2 * rest)


def quantize(
    source: Path,
    target: Path,
    blocks: list[list[int]],
    group_size: int,
    *,
    on_cuda: bool,
    done: Callable[[Layer], None],
) -> None:
    """Quantizes the float model in `source` to 4 bits and writes a checkpoint into the new folder `target`.

    `blocks` are calibration samples of one length each (token ids); `done` is called after each layer. Takes minutes.
    On CUDA one layer at a time is on the card; the rest waits in memory, as it was on disk.
    """
    from huggingface_hub import save_torch_state_dict

    # It names its logger after its file, and tells where it has saved what.
    logging.getLogger(inspect.getfile(save_torch_state_dict)).setLevel(logging.WARNING)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    model = search(source, blocks, group_size, on_cuda=on_cuda, quantizer=_quantizer(done))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.model.half()  # what stays unquantized, in the type of the scales
        check_finite(model.model)
        model.save_quantized(str(target))
    del model
    gc.collect()  # it and its quantizer hold each other; what is loaded next needs the room
    for name in KEPT_FILES:
        (target / name).unlink(missing_ok=True)  # a generation config is written for models that have none
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    written = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config |= {"quantization_config": written["quantization_config"], "dtype": "float16"}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def search(
    source: Path,
    blocks: list[list[int]],
    group_size: int,
    *,
    on_cuda: bool,
    quantizer: type | None = None,
    scales_alone: bool = False,
) -> Any:
    """autoawq's model of `source`, its `.model` quantized in place; with `scales_alone` scaled, and neither clipped nor
    rounded: then it computes what it computed before."""
    model = _wrapped(load(source, on_cuda=on_cuda))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.quantize(
            tokenizer=None,
            quant_config={"zero_point": True, "q_group_size": group_size, "w_bit": 4, "version": "GEMM"},
            calib_data=blocks,
            max_calib_samples=len(blocks),
            max_calib_seq_len=len(blocks[0]),
            quantizer_cls=quantizer or _quantizer(lambda layer: None),
            export_compatible=scales_alone,
            apply_clip=not scales_alone,
        )
    return model


def bring_autoawq() -> None:
    """Imports it without its farewell: it says that it is archived, past every filter that is set."""
    with warnings.catch_warnings(record=True):
        import awq.models  # noqa: F401


def _wrapped(model: Any) -> Any:
    """The model as autoawq takes it: with the groups of `mapping`."""
    bring_autoawq()
    from awq.models.llama import LlamaAWQForCausalLM
    from awq.quantize import scale

    model.config.use_cache = False  # or the layers' arguments would hold a cache that each trial fills
    parts = mapping.MAPPINGS[model.config.model_type]
    norm = type(getattr(model.model.layers[0], parts.attention_norm or "", None))
    if norm.__name__ == "Cohere2LayerNorm" and norm not in scale.allowed_norms:
        scale.allowed_norms.append(norm)  # a weight that multiplies, like the one of Cohere

    class Model(LlamaAWQForCausalLM):  # type: ignore[misc]
        @staticmethod
        def get_layers_for_scaling(module: Any, input_feat: Any, module_kwargs: Any) -> list[dict[str, Any]]:
            return mapping.groups(parts, module, input_feat, module_kwargs)

    return Model(model, model.config.model_type, False, model.config, None, None)


def _quantizer(done: Callable[[Layer], None]) -> type:
    """autoawq's quantizer, made safe on CPU, quick at clipping, and telling how far it is."""
    import torch

    bring_autoawq()
    from awq.modules.linear import WQLinear_GEMM
    from awq.quantize.quantizer import AwqQuantizer
    from awq.utils.module import set_op_by_name
    from awq.utils.utils import get_best_device

    class Quantizer(AwqQuantizer):  # type: ignore[misc]
        finished = 0

        def quantize(self) -> None:
            self.begun = time.monotonic()
            super().quantize()

        def _get_input_feat(self, layer: Any, named_linears: Any) -> Any:
            """Keeps what the layer makes of the first sample, too."""
            before, arguments = self._first(self.inps), self._first(self._sanitize_kwargs(self.module_kwargs, layer))
            found = super()._get_input_feat(layer, named_linears)
            self.asked = (layer, before, arguments, self._first(self.inps))
            return found

        def _first(self, value: Any) -> Any:
            """The first sample's part of what a layer is called with."""
            if isinstance(value, dict):
                return {name: self._first(part) for name, part in value.items()}
            if isinstance(value, tuple):
                return tuple(map(self._first, value))
            if torch.is_tensor(value) and value.dim() > 1 and value.shape[0] == self.inps.shape[0]:
                return value[:1].clone()
            return value

        def _search_best_clip(self, *args: Any, **kwargs: Any) -> Any:
            """After the scaling, before anything is lost: the layer must still compute the same."""
            layer, before, arguments, answer = self.asked
            now = self._module_forward(before, layer.to(before.device), arguments)
            moved = ((now - answer).float().norm() / answer.float().norm()).item()
            if not moved < (_MOVED if answer.dtype is torch.float32 else _MOVED_HALF):
                raise QuantizeRefused(
                    f"scaling changes layer {self.finished} by {moved:.2%}: its groups do not fit this model"
                )
            return super()._search_best_clip(*args, **kwargs)

        def _compute_best_scale(self, *args: Any, **kwargs: Any) -> Any:
            """It backs the weights up with `.cpu()`, which on a CPU copies nothing: its trial scales would stick."""
            module = args[3]
            state_dict = module.state_dict
            module.state_dict = lambda: {name: tensor.clone() for name, tensor in state_dict().items()}
            try:
                return super()._compute_best_scale(*args, **kwargs)
            finally:
                del module.state_dict

        def _compute_best_clip(
            self, w: Any, input_feat: Any, n_grid: int = 20, max_shrink: float = 0.5, n_sample_token: int = 0
        ) -> Any:
            """The clip of each group that moves its outputs least, [out, groups, 1].

            Like autoawq's, which multiplies all outputs of a sample of tokens out (n_sample_token) and takes most of
            its time for it. Here the inputs' second moments stand for the tokens, all of them: with the change d of a
            group's weights, the mean square of d·x over the tokens is d G dᵀ, where G is the mean of x xᵀ.
            """
            with torch.no_grad():
                size = self.group_size
                weights = w.float().reshape(w.shape[0], -1, size).transpose(0, 1)  # [groups, out, size]
                inputs = input_feat.to(w.device).float().reshape(-1, weights.shape[0], size).transpose(0, 1)
                moments = inputs.transpose(1, 2) @ inputs / inputs.shape[1]  # [groups, size, size]
                largest = weights.abs().amax(dim=-1, keepdim=True)
                best, least = largest.clone(), torch.full_like(largest, float("inf"))
                for step in range(int(max_shrink * n_grid)):
                    limit = largest * (1 - step / n_grid)
                    clipped = torch.minimum(torch.maximum(weights, -limit), limit)
                    change = self.pseudo_quantize_tensor(clipped.reshape(-1, size))[0].reshape(clipped.shape) - weights
                    error = ((change @ moments) * change).sum(dim=-1, keepdim=True)
                    better = error < least
                    least[better], best[better] = error[better], limit[better]
                return best.transpose(0, 1).to(w.dtype)

        def _apply_quant(self, module: Any, named_linears: dict[str, Any]) -> None:
            """Like autoawq's, but packed at once: column by column it takes most of a large layer's time on a GPU."""
            with torch.no_grad():
                for name, linear in named_linears.items():
                    linear.to(get_best_device()).half()
                    linear.weight.data, scales, zeros = self.pseudo_quantize_tensor(linear.weight.data)
                    packed = WQLinear_GEMM.from_linear(linear, self.w_bit, self.group_size, init_only=True)
                    packed.scales = scales.t().contiguous().half()
                    packed.bias = None if linear.bias is None else linear.bias.clone().half()
                    origin = zeros.t().contiguous()
                    steps, shifts = (
                        part.repeat_interleave(self.group_size, 0) for part in (packed.scales, origin * packed.scales)
                    )
                    packed.qweight = _packed(((linear.weight.data.t() + shifts) / steps).round())
                    packed.qzeros = _packed(origin)
                    linear.cpu()
                    set_op_by_name(module, name, packed.to(next(module.parameters()).device))
            self.finished += 1
            now = time.monotonic()
            done(Layer(self.finished, len(self.modules), now - self.begun))
            self.begun = now

    return Quantizer


def _packed(values: Any) -> Any:
    """Numbers from 0 to 15, [rows, columns], eight columns in an int32 each, [rows, columns/8], in `ORDER`."""
    import torch

    eights = values.to(torch.int32).reshape(values.shape[0], -1, 8)
    packed = torch.zeros_like(eights[..., 0])
    for nibble, column in enumerate(ORDER):
        packed |= eights[..., column] << 4 * nibble
    return packed
