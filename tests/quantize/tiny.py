"""Tiny models with random weights that have an opinion, with and without outlier channels, and their tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from yaptext.quantize import awq, mapping, verify

_VOCABULARY = 320
_SHAPE: dict[str, Any] = {
    "vocab_size": _VOCABULARY,
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
_OWN: dict[str, dict[str, Any]] = {
    **{name: {"head_dim": 32} for name in ("mistral", "qwen3", "gemma")},
    **{name: {"tie_word_embeddings": True} for name in ("cohere", "cohere2")},  # vLLM knows no other
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32, "tie_word_embeddings": True},
    "helium": {"head_dim": 64},  # which it takes to be the hidden size's share
}
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level one without merges: a token a byte, and the marks of the template."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: number for number, text in enumerate(["<unk>", "<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    fast.chat_template = _TEMPLATE
    return fast


def make_model(folder: Path, architecture: str, *, outliers: bool, **changes: Any) -> Path:
    """Writes the model into `folder`. Eight channels of each norm carry eight times as much as the others, as in
    trained models; with `outliers` sixteen times that, and the layers behind it sixteen times less: the function is the
    same, and plain rounding loses those channels."""
    torch.manual_seed(3)
    shape = _SHAPE | _OWN.get(architecture, {}) | changes
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **shape)).float()
    parts = mapping.MAPPINGS[architecture]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                scale = 1.0 if "embed" in name else 2.0 if "lm_head" in name else 1.2
                parameter.normal_(0, scale / parameter.shape[1] ** (0.5 if "embed" not in name else 0.0))
        for layer in model.model.layers:
            readers = [getattr(layer.self_attn, name) for name in parts.attention]
            gates = [getattr(layer.mlp, name) for name in parts.mlp]
            for norm, linears in (
                (parts.attention_norm, readers + gates if parts.parallel else readers),
                (parts.mlp_norm, gates),
            ):
                if norm is not None:
                    _raise(getattr(layer, norm), linears, 16 if outliers else 1)
            if outliers and parts.attention_norm is None:  # no norm to begin with: the MLP's inner channels
                channels = torch.randperm(gates[-1].out_features)[:8]
                gates[-1].weight[channels] *= 16
                layer.mlp.down_proj.weight[:, channels] /= 16
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def _raise(norm: Any, linears: list[Any], factor: int) -> None:
    channels = torch.randperm(norm.weight.numel())[:8]
    offset = 1 if "Gemma" in type(norm).__name__ else 0  # whose weight is what is added to one
    norm.weight[channels] = (norm.weight[channels] + offset) * 8 * factor - offset
    for linear in linears:
        linear.weight[:, channels] /= factor


def raise_values(folder: Path) -> None:
    """Sixteen times as much in eight channels of each head's values, and sixteen times less behind them: the function
    of the model in `folder` is the same."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shared = config.num_attention_heads // config.num_key_value_heads
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            values = attention.v_proj if hasattr(attention, "v_proj") else attention.qkv_proj
            rows = values.weight[-config.num_key_value_heads * size :].view(-1, size, values.in_features)
            columns = attention.o_proj.weight.view(-1, config.num_key_value_heads, shared, size)
            channels = torch.randperm(size)[:8]
            rows[:, channels] *= 16
            columns[..., channels] /= 16
    model.save_pretrained(folder)


def blocks(count: int, size: int = 128, seed: int = 5) -> list[list[int]]:
    """Token ids that the model has not been built around, in blocks of one length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 259, (size,), generator=generator).tolist() for _ in range(count)]


def quantized(source: Path, target: Path) -> verify.Report:
    """Quantizes `source` into the new folder `target` and measures, as the job does."""
    plan = awq.plan(source)
    reference = verify.Reference(source, blocks(4, seed=9), plan.group_size, on_cuda=False)
    target.mkdir()
    awq.quantize(source, target, blocks(8), plan.group_size, on_cuda=False, done=lambda layer: None)
    return reference.compare(target)
