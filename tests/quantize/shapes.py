"""The smallest configs of the architectures that can be quantized, by model type."""

from __future__ import annotations

from typing import Any

TEXT: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
_ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
_SHARED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "n_shared_experts": 1}
_LATENT = {
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "num_key_value_heads": 4,
    "n_group": 1,
    "topk_group": 1,
}
_HYBRID = {
    "head_dim": 64,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
_OWN: dict[str, dict[str, Any]] = {
    **{name: {"head_dim": 32} for name in ("mistral", "qwen3", "gemma")},
    **{name: {"tie_word_embeddings": True} for name in ("cohere", "cohere2")},  # vLLM knows no other
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32, "tie_word_embeddings": True},
    "gemma3_text": {"head_dim": 64, "query_pre_attn_scalar": 64, "tie_word_embeddings": True},
    "gemma4_text": {"head_dim": 64, "vocab_size_per_layer_input": 320, "tie_word_embeddings": True},
    "helium": {"head_dim": 64},  # which it takes to be the hidden size's share
    "qwen3_moe": {"head_dim": 64, **_ROUTED, "mlp_only_layers": [0]},
    "qwen2_moe": {**_ROUTED, "shared_expert_intermediate_size": 128},
    "mixtral": {"head_dim": 64, "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen3_next": {**_ROUTED, **_HYBRID, "shared_expert_intermediate_size": 128},
    "qwen3_5_text": _HYBRID,
    "qwen3_5_moe_text": {**_ROUTED, **_HYBRID, "shared_expert_intermediate_size": 128},
    "glm4_moe": {"head_dim": 64, **_SHARED, "first_k_dense_replace": 1},
    "glm4_moe_lite": {**_SHARED, **_LATENT, "mlp_layer_types": ["dense", "sparse"], "first_k_dense_replace": 1},
    "deepseek_v2": {**_SHARED, **_LATENT, "first_k_dense_replace": 1, "topk_method": "greedy"},
    "deepseek_v3": {**_SHARED, **_LATENT, "first_k_dense_replace": 1},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 128,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
    },
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 64,
        "mamba_d_state": 32,
        "mamba_n_groups": 1,
        "mamba_expand": 2,
        "num_local_experts": 0,
        "shared_intermediate_size": 256,
    },
    "lfm2": {
        "layer_types": ["conv", "full_attention"],
        "block_auto_adjust_ff_dim": False,
        **{"conv_dim": 256, "conv_dim_out": 256, "block_dim": 256, "tie_word_embeddings": True},  # vLLM expects
    },
    "qwen3_vl_text": {"head_dim": 64},
    "qwen2_5_vl_text": {"num_attention_heads": 2},
}
_EYES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
_QWEN_EYES = {"depth": 1, "hidden_size": 64, "num_heads": 2, "intermediate_size": 128, "out_hidden_size": 256}
_WITH_EYES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gemma3": ("gemma3_text", {**_EYES, "image_size": 28, "patch_size": 14}, {"mm_tokens_per_image": 4}),
    "gemma4": ("gemma4_text", {**_EYES, "num_key_value_heads": 2, "head_dim": 32}, {"audio_config": None}),
    "mistral3": ("mistral", {**_EYES, "model_type": "pixtral", "head_dim": 32, "image_size": 28, "patch_size": 14}, {}),
    "qwen2_5_vl": ("qwen2_5_vl_text", {**_QWEN_EYES, "fullatt_block_indexes": [0]}, {}),
    "qwen3_vl": ("qwen3_vl_text", {**_QWEN_EYES, "deepstack_visual_indexes": [0]}, {}),
    "qwen3_5": ("qwen3_5_text", _QWEN_EYES, {}),
    "qwen3_5_moe": ("qwen3_5_moe_text", _QWEN_EYES, {}),
}
"""The text model inside, what sees, and what is beside them."""


def shape(architecture: str) -> dict[str, Any]:
    """The fields of the config."""
    if architecture not in _WITH_EYES:
        return TEXT | _OWN.get(architecture, {})
    inside, eyes, beside = _WITH_EYES[architecture]
    text = shape(inside) | {"model_type": inside}
    both = {name: text[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")}
    return both | {"text_config": text, "vision_config": eyes} | beside
