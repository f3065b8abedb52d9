"""How many sessions the chosen models hold in the memory of this card, or of this machine. An estimate: only a start
measures what its kernels and graphs take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from yaptext.commands.doctor import cards, network
from yaptext.commands.doctor.check import ROLES, Finding, check, fail, ok, warn
from yaptext.commands.doctor.deployment import Deployment, Unknown
from yaptext.commands.doctor.model_source import Model, model_of
from yaptext.commands.doctor.resources import GIB, cpu_flags, gib, memory_bytes, memory_limit
from yaptext.engine.base import Role
from yaptext.engine.hub_client import cache
from yaptext.engine.model_config import context_of
from yaptext.engine.weight_kind import kind_of
from yaptext.errors import YapError

_AROUND_TOKENS = 160
"""Template and time in a prompt (settings.py has the same)."""
_TOOL_LIST_TOKENS = 400
"""The built-in five tools in a prompt, about."""
_USUAL_TOKENS = 2000
"""Persona and history of a session in the middle of a talk."""
_CUDA_BYTES = int(1.3 * GIB)
"""CUDA's context, its libraries and recorded graphs of one engine, about."""
_CPU_BYTES = int(1.3 * GIB)
"""Python, torch and vLLM of one engine on CPU, about."""
_DECODED = 4
"""4-bit weights that a CPU without AVX-512 decodes to 16 bits as they load."""


@dataclass(frozen=True, slots=True)
class Room:
    """One engine's memory: all it may take, its weights, what else it needs, and so its KV cache."""

    roles: tuple[Role, ...]
    model: Model
    limit_bytes: int
    weights_bytes: int
    other_bytes: int
    kv_bytes: int
    token_bytes: int
    context: int
    session_tokens: int

    @property
    def tokens(self) -> int:
        return self.kv_bytes // self.token_bytes if self.kv_bytes > 0 else 0

    @property
    def name(self) -> str:
        return " and ".join(self.roles)


def deployed(seen: Deployment) -> list[tuple[tuple[Role, ...], Model]]:
    """The roles of each engine, and its model. Raises `Unknown`."""
    settings = seen.settings
    named: list[tuple[Role, Model]] = []
    for role in ROLES:
        if settings.chat_deployed if role == "chat" else settings.tool_deployed:
            try:
                named.append((role, model_of(seen, role)))
            except YapError as error:
                raise Unknown(str(error)) from None
    one_folder = len({str(model.folder or model.source) for _, model in named}) == 1
    if len(named) == 2 and one_folder and settings.share_engine:
        return [(("chat", "tool"), named[0][1])]
    return [((role,), model) for role, model in named]


def rooms(seen: Deployment) -> list[Room]:
    """Raises `Unknown`."""
    return seen.once("rooms", lambda: [_room(seen, roles, model) for roles, model in deployed(seen)])


def _room(seen: Deployment, roles: tuple[Role, ...], model: Model) -> Room:
    settings, role = seen.settings, roles[0]
    config = model.known_config
    text = text_config(config)
    if model.weights_bytes is None:
        raise Unknown(f"the size of the weights of {model.source} is not known")
    size, bits = _weights(seen, role, model, text)
    context = min(
        (settings.chat_max_model_len or 8192) if role == "chat" else (settings.tool_max_model_len or 4096),
        context_of(config),
    )
    session = sum(_session_tokens(seen, one, context) for one in roles)
    token = token_bytes(text, bits if settings.kv_dtype == "auto" else 1)
    if not seen.on_cuda:
        kv = settings.cpu_kv_cache_mb * 2**20
        return Room(roles, model, size + _CPU_BYTES + kv, size, _CPU_BYTES, kv, token, context, session)
    alone = len(deployed(seen)) == 1
    limit = int(settings.gpu_fraction(role, alone=alone) * cards.card(seen).total_bytes)
    other = _CUDA_BYTES + _step_bytes(seen, role, text)
    return Room(roles, model, limit, size, other, limit - size - other, token, context, session)


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part about the language model."""
    for nested in ("thinker_config", "text_config", "llm_config", "language_config"):
        if isinstance(config.get(nested), dict):
            config = config[nested]
    return config


def _weights(seen: Deployment, role: Role, model: Model, text: dict[str, Any]) -> tuple[int, int]:
    """Bytes of the weights as they are in memory, and bytes of a value of the KV cache if `KV_DTYPE` does not say."""
    size = model.weights_bytes or 0
    source = model.source if model.place != "shelf" else str(model.folder)
    kind = kind_of(source, model.known_config, cache(seen.settings))
    if seen.on_cuda:
        online = kind == "float" and seen.settings.quantization_of(role) in ("auto", "fp8")
        if online:
            embedded = (
                2
                * _number(text, "vocab_size")
                * _number(text, "hidden_size")
                * (1 if text.get("tie_word_embeddings") else 2)
            )
            size -= max(0, size - embedded) // 2
        return size, 2
    if "avx512f" in cpu_flags(seen.machine):
        return size, 2
    if kind == "float":  # half precision is slow there: the engine computes in float32
        return size * 2, 4
    return (size * _DECODED if kind == "awq" else size), 2


def token_bytes(text: dict[str, Any], each: int) -> int:
    """What one token takes in the KV cache. Raises `Unknown`."""
    layers = _number(text, "num_hidden_layers", "n_layer", "num_layers")
    kinds = text.get("layer_types")
    if isinstance(kinds, list) and kinds:
        layers = sum(1 for kind in kinds if "attention" in str(kind) and "linear" not in str(kind)) or layers
    if rank := text.get("kv_lora_rank"):  # DeepSeek's: one latent vector a layer
        return layers * (int(rank) + int(text.get("qk_rope_head_dim") or 0)) * each
    heads = _number(text, "num_attention_heads", "n_head")
    kv_heads = int(text.get("num_key_value_heads") or heads)
    size = int(text.get("head_dim") or _number(text, "hidden_size", "n_embd") // heads)
    return layers * 2 * kv_heads * size * each


def _number(text: dict[str, Any], *names: str) -> int:
    """Raises `Unknown`."""
    for name in names:
        if isinstance(value := text.get(name), int) and value > 0:
            return value
    raise Unknown(f"the config of the model does not say {names[0]}")


def _step_bytes(seen: Deployment, role: Role, text: dict[str, Any]) -> int:
    """What one engine step takes at most: logits in float32, thrice for sampling, and activations."""
    settings = seen.settings
    sequences = settings.max_num_seqs or 256
    logits = 3 * 4 * sequences * _number(text, "vocab_size")
    width = 8 * _number(text, "hidden_size", "n_embd") + 4 * int(text.get("intermediate_size") or 0)
    return logits + 2 * settings.batched_tokens(role) * width


def _session_tokens(seen: Deployment, role: Role, context: int) -> int:
    """Of one session at its longest."""
    settings = seen.settings
    around = settings.user_utt_max_tokens + _AROUND_TOKENS
    if role == "chat":
        return min(context, settings.persona_max_tokens + settings.history_max_tokens + around + settings.chat_max_out)
    return min(context, settings.tool_history_tokens + around + settings.tool_max_out + _TOOL_LIST_TOKENS)


_KNOWN = ("settings.valid",)


def _smaller(seen: Deployment, room: Room) -> str:
    """What makes room for the KV cache."""
    name = "CHAT" if "chat" in room.roles else "TOOL"
    if seen.on_cuda:
        return (
            f"raise {name}_GPU_FRAC, set KV_DTYPE=fp8 or QUANTIZATION=awq, lower {name}_MAX_MODEL_LEN, or choose a "
            "smaller model"
        )
    return f"raise CPU_KV_CACHE_MB, lower {name}_MAX_MODEL_LEN, or choose a smaller model"


@check("capacity.engines", needs=_KNOWN)
def engines(seen: Deployment) -> Finding:
    """Whether each can start at all: vLLM refuses a KV cache that does not hold one whole context."""
    told = []
    for room in rooms(seen):
        if room.kv_bytes <= 0:
            found = f"{room.name}: {gib(room.limit_bytes)} are its share, and weights take {gib(room.weights_bytes)}"
            return fail(f"{found} and the rest about {gib(room.other_bytes)}", _smaller(seen, room))
        if room.tokens < room.context:
            found = (
                f"{room.name}: the KV cache would hold about {room.tokens:,} tokens, and a context is {room.context:,}"
            )
            return fail(found, _smaller(seen, room))
        told.append(
            f"{room.name}: {gib(room.weights_bytes)} of weights, about {gib(room.kv_bytes)} of KV cache "
            f"({room.tokens:,} tokens of {room.token_bytes:,} bytes)"
        )
    return ok("; ".join(told))


@check("capacity.memory", needs=_KNOWN)
def memory(seen: Deployment) -> Finding:
    """Whether all engines together find that much free now."""
    found = rooms(seen)
    needed = sum(room.limit_bytes for room in found)
    if seen.on_cuda:
        return _card_memory(seen, needed)
    known = memory_bytes(seen.machine)
    limit = memory_limit(seen)
    total = min(known.get("MemTotal", 0), limit or 2**62)
    free = min(known.get("MemAvailable", total), total)
    told = f"the engines take about {gib(needed)}"
    if needed > total:
        remedy = "choose smaller models, lower CPU_KV_CACHE_MB, or use a machine with more memory"
        return fail(f"{told}; the limit here is {gib(total)}", remedy)
    if needed > free:
        if network.is_ours(network.ready(seen)):
            return ok(f"{told}; the service that runs has them")
        return warn(f"{told}; {gib(free)} are available now", "ps aux --sort=-rss | head")
    return ok(f"{told} of {gib(free)} available")


def _card_memory(seen: Deployment, needed: int) -> Finding:
    card = cards.card(seen)
    if seen.environ.get("CUDA_VISIBLE_DEVICES", "").startswith("MIG-"):
        raise Unknown("nvidia-smi does not say what a slice of MIG has free")
    share = f"the engines' shares are {gib(needed)} of {gib(card.total_bytes)}"
    if any(one.is_ours for one in cards.processes(seen)):
        return ok(f"{share}; the service that runs has them")
    if needed > card.free_bytes:
        remedy = "stop what uses the card (nvidia-smi), or lower CHAT_GPU_FRAC and TOOL_GPU_FRAC"
        return fail(f"{share}, and {gib(card.free_bytes)} are free: vLLM refuses to start", remedy)
    return ok(f"{share}, {gib(card.free_bytes)} are free")


@check("capacity.sessions", needs=("capacity.engines",))
def sessions(seen: Deployment) -> Finding:
    settings = seen.settings
    found = rooms(seen)
    longest = min(found, key=lambda room: room.tokens // room.session_tokens)
    usual = min(_usual(room) for room in found)
    hub = cache(settings)
    awq = all(kind_of(room.model.source, room.model.known_config, hub) == "awq" for room in found)
    limit = settings.max_connections(awq=awq)
    where = f"{cards.card(seen).name}" if seen.on_cuda else "CPU"
    most = longest.tokens // longest.session_tokens
    told = (
        f"about {usual} sessions of {_USUAL_TOKENS:,} tokens, {most} at their longest "
        f"({longest.session_tokens:,} tokens), stay in the KV cache on this {where}; {limit} connections "
        "are allowed (MAX_CONCURRENT_CONNECTIONS)"
    )
    if usual < limit:
        remedy = f"MAX_CONCURRENT_CONNECTIONS={max(1, usual)}, or {_smaller(seen, longest)}"
        return warn(f"{told}: over that, first tokens wait for prompts to be computed again", remedy)
    return ok(told)


def _usual(room: Room) -> int:
    """Sessions of the usual size; the tool model sees its own part of each."""
    tool = min(room.session_tokens, _TOOL_LIST_TOKENS + 500)
    each = _USUAL_TOKENS * ("chat" in room.roles) + tool * ("tool" in room.roles)
    return room.tokens // min(each, room.session_tokens)
