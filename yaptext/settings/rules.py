"""Checks of one setting and of several together."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from typing import Any, Self

from pydantic import SecretStr, field_validator, model_validator

from yaptext import secrets
from yaptext.errors import SettingsError
from yaptext.settings.derived import Derived
from yaptext.settings.table import DEFAULT_API_KEY

LOOPBACK = ("127.0.0.1", "::1", "localhost")
_LARGEST = 10**15
"""Largest number: SQLite and the event loop accept it, also as the product of two settings."""
_MOST_GPU = 0.98
_AROUND_TOKENS = 160
"""Least room in a prompt for template, time, persona and history."""


class Checked(Derived):
    """The table, with checked values."""

    def _default_key_stays_at_home(self) -> Self:
        try:
            self.check_address(self.host)
        except SettingsError as error:
            raise ValueError(str(error)) from None
        return self

    def _lists_can_match(self) -> Self:
        """Refuses lists that no client could match, and lists that let any web page use the default key."""
        origins, _, _ = self.origins, self.proxies, self.hosts
        open_to_any = self.allowed_origins is not None and (origins is None or "null" in origins)
        if open_to_any and self.own_key == DEFAULT_API_KEY:
            raise ValueError(
                f"ALLOWED_ORIGINS={self.allowed_origins!r} is not allowed with the default API key, which any web page "
                "knows: set YAP_TEXT_API_KEY, or name the origins"
            )
        return self

    @field_validator("api_key")
    @classmethod
    def _bare_key(cls, value: SecretStr) -> SecretStr:
        """The key as clients send it. Refuses a value that is clearly more than a key."""
        key = secrets.bare(value.get_secret_value())
        if not key:
            raise ValueError("it is blank")
        if key[0] in "\"'":
            raise ValueError("it begins with a quote: write the key alone")
        if key.startswith("YAP_TEXT_API_KEY="):
            raise ValueError("it begins with the variable's name: write the key alone")
        if re.search(r"\s", key):
            raise ValueError("it contains white space or several lines: write only the key, one word")
        return SecretStr(key)

    @field_validator("chat_logit_bias", mode="before")
    @classmethod
    def _from_json(cls, value: Any) -> Any:
        """Parsed here, so that invalid JSON is a line like any other. pydantic-settings would raise its own error."""
        return json.loads(value) if isinstance(value, str) else value

    @field_validator("*")
    @classmethod
    def _no_endless_number(cls, value: Any) -> Any:
        if isinstance(value, (int, float)) and abs(value) > _LARGEST:
            raise ValueError(f"a number is at most {_LARGEST:,}")
        return value

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        """The rules over several variables. Each broken rule is one line."""
        lines = []
        for rule in (self._default_key_stays_at_home, self._lists_can_match):
            try:
                rule()
            except ValueError as error:
                lines.append(str(error))
        if lines := [*lines, *self._contradictions()]:
            raise ValueError("\n".join(lines))
        return self

    def _contradictions(self) -> Iterator[str]:
        chat, tool = self.gpu_fraction("chat", alone=False), self.gpu_fraction("tool", alone=False)
        both = self.deploy_models == "both" and not self._names_one_model
        if both and (self.chat_gpu_frac or self.tool_gpu_frac) and round(chat + tool, 6) > _MOST_GPU:
            yield (
                f"CHAT_GPU_FRAC={chat:g} and TOOL_GPU_FRAC={tool:g} are not allowed together: they share one GPU, and "
                f"limit is {_MOST_GPU} for both"
            )
        context = self.chat_max_model_len or 8192
        parts = self.user_utt_max_tokens + self.chat_max_out + _AROUND_TOKENS
        if self.chat_deployed and parts > context:
            yield (
                f"CHAT_MAX_MODEL_LEN={context} is not allowed: USER_UTT_MAX_TOKENS={self.user_utt_max_tokens}, "
                f"CHAT_MAX_OUT={self.chat_max_out} and {_AROUND_TOKENS} for the text around them need {parts}"
            )
        context = self.tool_max_model_len or 4096
        parts = self.user_utt_max_tokens + self.tool_history_tokens + self.tool_max_out
        if self.tool_deployed and parts > context:
            yield (
                f"TOOL_MAX_MODEL_LEN={context} is not allowed: USER_UTT_MAX_TOKENS={self.user_utt_max_tokens}, "
                f"TOOL_HISTORY_TOKENS={self.tool_history_tokens} and TOOL_MAX_OUT={self.tool_max_out} need {parts}, "
                "and the list of tools needs more"
            )

    @property
    def _names_one_model(self) -> bool:
        """Whether one engine certainly serves both models: then it has the GPU alone."""
        chat, tool = self.awq_chat_model or self.chat_model, self.awq_tool_model or self.tool_model
        return self.share_engine and chat is not None and chat == tool

    def check_address(self, host: str) -> None:
        """Raises `SettingsError` for an address that the default key must not be served on."""
        if self.own_key == DEFAULT_API_KEY and host not in LOOPBACK:
            folder = os.environ.get("CREDENTIALS_DIRECTORY")  # also of a container's secrets
            in_file = f", write a key into {folder}/YAP_TEXT_API_KEY" if folder else ""
            raise SettingsError(
                f"HOST={host!r} is not allowed with the default API key: set YAP_TEXT_API_KEY{in_file}, "
                f"or listen on one of {', '.join(LOOPBACK)}"
            )
