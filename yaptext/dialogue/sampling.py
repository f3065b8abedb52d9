"""How a reply is sampled: the settings with the client's laid over."""

from __future__ import annotations

from yaptext.dialogue.runtime import Runtime
from yaptext.engine.base import Sampling
from yaptext.wire.frames import SamplingFields

_TEMPERATURE = 0.8


def sampling(runtime: Runtime, given: SamplingFields | None, seed: int, room: int, key_name: str = "") -> Sampling:
    """The settings' sampling with the client's laid over; at most `room` tokens."""
    settings, given = runtime.settings, given or SamplingFields()

    def pick(value: float | None, default: float) -> float:
        return default if value is None else value

    thinking = thinking_room(runtime)
    return Sampling(
        max_tokens=max(1, min(reply_tokens(runtime, given) + thinking, room)),
        temperature=pick(given.temperature, _temperature(runtime)),
        top_p=pick(given.top_p, settings.chat_top_p),
        top_k=int(pick(given.top_k, settings.chat_top_k)),
        min_p=pick(given.min_p, settings.chat_min_p),
        repetition_penalty=pick(given.repetition_penalty, settings.chat_repetition_penalty),
        presence_penalty=pick(given.presence_penalty, settings.chat_presence_penalty),
        frequency_penalty=pick(given.frequency_penalty, settings.chat_frequency_penalty),
        seed=seed if given.seed is None else given.seed,
        logit_bias=runtime.logit_bias,
        stop=(*_layout_stop(runtime), *(given.stop or ())),
        stop_ids=stop_ids(runtime),
        reasoning=runtime.reasoning,
        cache_salt=salt(runtime, key_name),
    )


def reply_tokens(runtime: Runtime, given: SamplingFields | None) -> int:
    """Most tokens of a reply that are spoken."""
    wanted = given.max_tokens if given is not None else None
    return wanted or runtime.settings.chat_max_out


def soft_limit(runtime: Runtime, given: SamplingFields | None) -> int | None:
    """Tokens after which a reply ends with its sentence."""
    wanted = given.soft_max_tokens if given is not None else None
    return wanted or runtime.settings.chat_soft_max_out


def _temperature(runtime: Runtime) -> float:
    chosen = runtime.settings.chat_temperature
    if chosen is None:
        return 0.0 if runtime.engines.demo else _TEMPERATURE
    return chosen


def salt(runtime: Runtime, key_name: str) -> str:
    return key_name if runtime.settings.cache_per_key else ""


def thinking_room(runtime: Runtime) -> int:
    """Tokens by which thinking may lengthen a reply."""
    return runtime.settings.chat_thinking_max_out if runtime.reasoning is not None else 0


def _layout_stop(runtime: Runtime) -> tuple[str, ...]:
    return runtime.prompts.layout.stop if runtime.prompts else ()


def stop_ids(runtime: Runtime) -> tuple[int, ...]:
    """What ends a reply: the template's tokens, and those of the model's configuration."""
    if runtime.prompts is None or runtime.engines.chat is None:
        return ()
    return tuple(sorted({*runtime.prompts.layout.stop_ids, *runtime.engines.chat.codec.end_ids}))
