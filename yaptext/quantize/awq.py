"""autoawq, held to what a server can rely on: the only module that imports awq."""

from __future__ import annotations

import gc
import inspect
import json
import logging
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from yaptext.errors import QuantizeRefused
from yaptext.quantize import mapping
from yaptext.quantize.kept import copy_kept
from yaptext.quantize.plan import Layer
from yaptext.quantize.source import check_finite, dtype_that_holds, load

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""AWQ's packing: nibble i of an int32 holds column `ORDER[i]` of its eight."""
_MOVED, _MOVED_HALF = 1e-3, 5e-2
"""How much scaling may change a layer's answer by rounding errors, relative, in 32 and in 16 bits."""


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
    On CUDA one layer at a time is on the card; the others stay in memory as they are on disk.
    """
    from huggingface_hub import save_torch_state_dict

    # Its logger is named after its file; it logs each path that it saves.
    logging.getLogger(inspect.getfile(save_torch_state_dict)).setLevel(logging.WARNING)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    dtype = dtype_that_holds(loaded := load(source, on_cuda=on_cuda))
    model = search(loaded, blocks, group_size, quantizer=quantizer_class(done, dtype))
    del loaded
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.model.to(dtype)  # what stays unquantized, in the type of the scales
        check_finite(model.model)
        model.save_quantized(str(target))
    del model
    gc.collect()  # it and its quantizer hold each other; what is loaded next needs the room
    copy_kept(source, target)
    written = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config |= {"quantization_config": written["quantization_config"], "dtype": str(dtype).removeprefix("torch.")}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def search(
    loaded: Any, blocks: list[list[int]], group_size: int, *, quantizer: type | None = None, scales_alone: bool = False
) -> Any:
    """autoawq's model around `loaded`, which is quantized in place; with `scales_alone` scaled, and neither clipped nor
    rounded: then it computes what it computed before."""
    model = _wrapped(loaded)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.quantize(
            tokenizer=None,
            quant_config={"zero_point": True, "q_group_size": group_size, "w_bit": 4, "version": "GEMM"},
            calib_data=blocks,
            max_calib_samples=len(blocks),
            max_calib_seq_len=len(blocks[0]),
            quantizer_cls=quantizer or quantizer_class(lambda layer: None),
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


def quantizer_class(done: Callable[[Layer], None], dtype: Any = None) -> type:
    """autoawq's quantizer, made safe on CPU, quick at clipping, and telling how far it is. Scales and biases are stored
    in `dtype`, which is half precision by default."""
    import torch

    dtype = dtype or torch.float16
    rounded_in = dtype if dtype is torch.float16 else torch.float32

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
                    linear.to(get_best_device()).to(rounded_in)
                    linear.weight.data, scales, zeros = self.pseudo_quantize_tensor(linear.weight.data)
                    packed = WQLinear_GEMM.from_linear(linear, self.w_bit, self.group_size, init_only=True)
                    packed.scales = scales.t().contiguous().to(rounded_in)
                    packed.bias = None if linear.bias is None else linear.bias.clone().to(dtype)
                    origin = zeros.t().contiguous()
                    steps, shifts = (
                        part.repeat_interleave(self.group_size, 0) for part in (packed.scales, origin * packed.scales)
                    )
                    packed.qweight = pack(((linear.weight.data.t() + shifts) / steps).round())
                    packed.qzeros = pack(origin)
                    packed.scales = packed.scales.to(dtype)
                    linear.cpu()
                    set_op_by_name(module, name, packed.to(next(module.parameters()).device))
            self.finished += 1
            now = time.monotonic()
            done(Layer(self.finished, len(self.modules), now - self.begun))
            self.begun = now

    return Quantizer


def pack(values: Any) -> Any:
    """Numbers from 0 to 15, [rows, columns], eight columns in an int32 each, [rows, columns/8], in `ORDER`."""
    import torch

    eights = values.to(torch.int32).reshape(values.shape[0], -1, 8)
    packed = torch.zeros_like(eights[..., 0])
    for nibble, column in enumerate(ORDER):
        packed |= eights[..., column] << 4 * nibble
    return packed
