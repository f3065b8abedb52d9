"""The log probabilities of a reply's tokens, as OpenAI's clients read them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

Logprobs = list[dict[str, Any]]
_LEAST = -9999.0
"""What stands for a probability of 0."""


def logprobs_of(alternatives: Iterable[dict[str, float]], most: int) -> Logprobs:
    """One entry for each token. `alternatives` are probabilities by text, that of the token itself first. The `most`
    likeliest are listed."""
    found = []
    for by_text in alternatives:
        token = next(iter(by_text))
        likeliest = sorted(by_text, key=by_text.__getitem__, reverse=True)[:most]
        found.append(_entry(token, by_text) | {"top_logprobs": [_entry(text, by_text) for text in likeliest]})
    return found


def _entry(text: str, by_text: dict[str, float]) -> dict[str, Any]:
    probability = by_text[text]
    logprob = math.log(probability) if probability > 0 else _LEAST
    return {"token": text, "bytes": list(text.encode(errors="replace")), "logprob": logprob}
