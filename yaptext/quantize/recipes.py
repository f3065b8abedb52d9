"""What llm-compressor does to each architecture: which places are divided by a number for each channel, which linear
layers behind them are multiplied by it, and which stay as they are.

llm-compressor has mappings of its own, but takes those of Llama for an architecture that it does not know, and leaves
most routed models to chance. All names are of a decoder layer's parts; `*` stands for the number of an expert. Parts
that a layer does not have are skipped: a stack may mix dense and routed layers, attention and convolutions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from yaptext.quantize.plan import LAYER

OUTSIDE = rf"re:(?!{LAYER}).*"
"""What is outside of the decoder layers, in the words of compressed-tensors: head, embeddings, what sees images."""
Group = tuple[str, tuple[str, ...]]
"""What is divided, and every layer that reads it: one that is left out would read other numbers than before."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """`groups` are tried in their order. `kept` are the linear layers that are not quantized: routers, and what has too
    few outputs for a 4-bit kernel. `renamed` are the projections of experts that the architecture's checkpoints have
    under another name than transformers."""

    groups: tuple[Group, ...]
    kept: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)

    @property
    def kept_pattern(self) -> str:
        """Of the kept layers' names within a decoder layer; empty if there are none."""
        return "|".join(map(re.escape, self.kept))

    @property
    def ignored(self) -> list[str]:
        """What is not quantized, in the words of compressed-tensors."""
        return [OUTSIDE, *(f"re:{LAYER}{re.escape(part)}$" for part in self.kept)]


_ATTENTION: Group = ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
_VALUES: Group = ("self_attn.v_proj", ("self_attn.o_proj",))
_LATENT: tuple[Group, ...] = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")),
    ("self_attn.q_a_layernorm", ("self_attn.q_b_proj",)),
    ("self_attn.kv_a_layernorm", ("self_attn.kv_b_proj",)),
)
_DELTA: Group = ("input_layernorm", tuple(f"linear_attn.in_proj_{part}" for part in ("qkv", "z", "b", "a")))
_DELTA_FUSED: Group = ("input_layernorm", ("linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba"))
_DELTA_KEPT = ("linear_attn.in_proj_a", "linear_attn.in_proj_b", "linear_attn.in_proj_ba")


def _mlp(
    norm: str, *routed: str, mlp: str = "mlp", gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> tuple[Group, ...]:
    """The MLP behind a norm, dense or routed. `routed` are what reads the norm besides the projections: the router
    comes first, as it sees every token."""
    parts = ("", ".experts.*", ".shared_expert", ".shared_experts")
    readers = (*(f"{mlp}.{name}" for name in routed), *(f"{mlp}{part}.{name}" for part in parts for name in (gate, up)))
    return ((norm, readers), *((f"{mlp}{part}.{up}", (f"{mlp}{part}.{down}",)) for part in parts))


_PLAIN = Recipe((_ATTENTION, _VALUES, *_mlp("post_attention_layernorm")))
_SANDWICH = Recipe((_VALUES, *_mlp("pre_feedforward_layernorm")))
_MOE = Recipe(
    (_ATTENTION, _VALUES, *_mlp("post_attention_layernorm", "gate", "shared_expert_gate")),
    kept=("mlp.gate", "mlp.shared_expert_gate"),
)
_MIXED = Recipe((_DELTA, _DELTA_FUSED, *_MOE.groups), kept=(*_MOE.kept, *_DELTA_KEPT))
_MLA = Recipe((*_LATENT, *_mlp("post_attention_layernorm", "gate")), kept=("mlp.gate",))

RECIPES = {
    **dict.fromkeys(("llama", "mistral", "ministral3", "qwen2", "qwen3", "smollm3", "granite"), _PLAIN),
    **dict.fromkeys(("mistral3", "qwen2_5_vl", "qwen3_vl"), _PLAIN),
    **dict.fromkeys(("gemma3", "gemma3_text"), _SANDWICH),
    **dict.fromkeys(
        ("gemma4", "gemma4_text"), replace(_SANDWICH, kept=("per_layer_input_gate", "per_layer_projection"))
    ),
    **dict.fromkeys(("qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe", "ernie4_5_moe"), _MOE),
    "mixtral": replace(_MOE, renamed={"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}),
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"), _MIXED),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe_lite"), _MLA),
    "granitemoehybrid": Recipe(
        (
            _ATTENTION,
            _VALUES,
            (
                "post_attention_layernorm",
                (
                    "block_sparse_moe.router",
                    "block_sparse_moe.experts.*.gate_proj",
                    "block_sparse_moe.experts.*.up_proj",
                    "shared_mlp.input_linear",
                ),
            ),
            ("shared_mlp.input_linear", ("shared_mlp.output_linear",)),
            ("block_sparse_moe.experts.*.up_proj", ("block_sparse_moe.experts.*.down_proj",)),
        ),
        kept=("mamba.in_proj", "mixer.in_proj", "block_sparse_moe.router"),
    ),
    "lfm2": Recipe(
        (
            ("operator_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("operator_norm", ("conv.in_proj",)),
            ("self_attn.v_proj", ("self_attn.out_proj",)),
            *_mlp("ffn_norm", mlp="feed_forward", gate="w1", up="w3", down="w2"),
        )
    ),
}
"""By model type: measured as right (tests/quantize). autoawq does those that it also does right, unless QUANTIZER says
otherwise."""
