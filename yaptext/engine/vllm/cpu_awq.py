"""AWQ on CPUs without AVX-512, for which vLLM has no 4-bit kernel: a plugin that decodes the weights as they load.

vLLM finds it by its entry point (`vllm.general_plugins`) in each of its processes. It costs the memory that 4 bits
save: a machine like that is for trying a checkpoint, and for tests.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any


@cache
def lacks_kernel() -> bool:
    """True where this CPU cannot run vLLM's own kernel."""
    try:
        return "avx512f" not in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def register() -> None:
    """Replaces vLLM's own kernel with the decoding one if vLLM's would fail."""
    if not lacks_kernel():
        return
    from vllm.platforms import PlatformEnum, current_platform

    if not current_platform.is_cpu():
        return
    from vllm.model_executor.kernels.linear import register_linear_kernel

    disabled = os.environ.get("VLLM_DISABLED_KERNELS", "").split(",")
    os.environ["VLLM_DISABLED_KERNELS"] = ",".join(filter(None, {*disabled, "CPUWNA16LinearKernel"}))
    register_linear_kernel(_kernel(), PlatformEnum.CPU, "mp")


@cache
def _kernel() -> type:
    import torch
    from vllm.model_executor.kernels.linear import MPLinearKernel
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_quantized_values_into_int32
    from vllm.scalar_type import scalar_types

    class DecodedLinearKernel(MPLinearKernel):  # type: ignore[misc]
        _plain = UnquantizedLinearMethod()

        @classmethod
        def get_min_capability(cls) -> int:
            return -1

        @classmethod
        def can_implement(cls, c: Any) -> tuple[bool, str | None]:
            fits = c.weight_type == scalar_types.uint4 and c.zero_points
            return fits, None if fits else "only 4 bits with zero points are decoded"

        def process_weights_after_loading(self, layer: Any) -> None:
            packed, scales, zeros = (getattr(layer, name) for name in (self.w_q_name, self.w_s_name, self.w_zp_name))
            kind = self.config.weight_type
            values = unpack_quantized_values_into_int32(packed.data, kind, 0)  # [in, out]
            scales, zeros = (part.data.t() if part.output_dim == 0 else part.data for part in (scales, zeros))
            group = values.shape[0] // scales.shape[0]
            origin = unpack_quantized_values_into_int32(zeros, kind, 1).repeat_interleave(group, 0)
            weight = (values - origin).float() * scales.float().repeat_interleave(group, 0)
            for name in (self.w_q_name, self.w_s_name, self.w_zp_name):
                getattr(layer, name).data = torch.empty(0)
            layer.weight = torch.nn.Parameter(weight.t().to(self.config.act_type).contiguous(), requires_grad=False)
            self._plain.process_weights_after_loading(layer)

        def apply_weights(self, layer: Any, x: Any, bias: Any = None) -> Any:
            return self._plain.apply(layer, x, bias)

    return DecodedLinearKernel
