"""What AWQ scales together, for each architecture: one place that can be divided by a number for each channel, and the
linear layers behind it that are multiplied by the same.

autoawq has classes for this, but some of them change the model's function (Phi-3 with grouped keys and values) or
search on the wrong input (Cohere), and most of today's models have none. These are named by the layers' own parts, and
hold under a test: scaling alone leaves the logits as they were.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Mapping:
    """The names of a decoder layer's parts. A norm is one whose output goes into these linear layers and nowhere else;
    None if there is none: the norm comes after, as in OLMo 2."""

    attention_norm: str | None = "input_layernorm"
    attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    mlp_norm: str | None = "post_attention_layernorm"
    mlp: tuple[str, ...] = ("gate_proj", "up_proj")
    parallel: bool = False
    """Attention and MLP read the same norm, and their outputs are added."""


_PLAIN = Mapping()
_SANDWICH = replace(_PLAIN, mlp_norm="pre_feedforward_layernorm")
_FUSED_MLP = replace(_PLAIN, mlp=("gate_up_proj",))
_NORMS_AFTER = replace(_PLAIN, attention_norm=None, mlp_norm=None)
_PARALLEL = replace(_PLAIN, mlp_norm=None, parallel=True)

MAPPINGS = {
    **dict.fromkeys(("llama", "mistral", "ministral3", "qwen2", "qwen3", "smollm3", "granite", "stablelm"), _PLAIN),
    **dict.fromkeys(("cwm", "ernie4_5", "gemma", "helium", "seed_oss"), _PLAIN),
    "gemma2": _SANDWICH,
    **dict.fromkeys(("glm", "glm4"), _FUSED_MLP),
    "phi3": replace(_FUSED_MLP, attention=("qkv_proj",)),
    **dict.fromkeys(("olmo2", "olmo3", "exaone4"), _NORMS_AFTER),
    **dict.fromkeys(("cohere", "cohere2"), _PARALLEL),
}
"""By model type: what comes out right, measured (tests/quantize). Gemma 3 is worse than rounding, and left out."""


def refusal(config: dict[str, Any]) -> str | None:
    """Why autoawq cannot quantize the model of this config.json; None if it can."""
    model_type = config.get("model_type")
    if model_type not in MAPPINGS:
        return f"can do {', '.join(sorted(MAPPINGS))}"
    if config.get("use_parallel_residual"):
        return f"cannot do {model_type} with use_parallel_residual"
    return None


def groups(mapping: Mapping, layer: Any, inputs: dict[str, Any], arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """The groups of one decoder layer in autoawq's form. `inputs` are those of its linear layers by name, each
    [samples, tokens, channels]; `arguments` are what the layer is called with."""
    attention, mlp = layer.self_attn, layer.mlp
    readers = [getattr(attention, name) for name in mapping.attention]
    gates = [getattr(mlp, name) for name in mapping.mlp]
    found: list[dict[str, Any]] = []

    def behind_norm(norm: str | None, layers: list[Any], name: str, inspected: Any) -> None:
        if norm is not None:
            group = {"prev_op": getattr(layer, norm), "layers": layers, "inp": inputs[name]}
            found.append(group | {"module2inspect": inspected, "kwargs": arguments})

    def behind_linear(source: Any, target: Any, name: str) -> None:
        found.append({"prev_op": source, "layers": [target], "inp": inputs[name]})

    first = f"self_attn.{mapping.attention[0]}"
    if mapping.parallel:
        behind_norm(mapping.attention_norm, readers + gates, first, _side_by_side(attention, mlp))
    else:
        behind_norm(mapping.attention_norm, readers, first, attention)
    values = readers[-1].out_features // (3 if len(readers) == 1 else 1)
    if values == attention.o_proj.in_features:  # grouped: a channel of the values goes to several of the output's
        behind_linear(readers[-1], attention.o_proj, "self_attn.o_proj")
    if not mapping.parallel:
        behind_norm(mapping.mlp_norm, gates, f"mlp.{mapping.mlp[0]}", mlp)
    behind_linear(gates[-1], mlp.down_proj, "mlp.down_proj")  # of a fused one, its last rows
    return found


def _side_by_side(attention: Any, mlp: Any) -> Any:
    """What a parallel block computes of its normed input: the block itself would norm it once more."""
    import torch

    class SideBySide(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.mlp = attention, mlp

        def forward(self, hidden_states: Any, position_embeddings: Any = None, attention_mask: Any = None) -> Any:
            told = {"position_embeddings": position_embeddings, "attention_mask": attention_mask}
            return self.attention(hidden_states, **told)[0] + self.mlp(hidden_states)

    return SideBySide()
