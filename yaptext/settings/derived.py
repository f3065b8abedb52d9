"""Values that follow from the settings, such as defaults by deployment and device."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from yaptext.settings import addresses
from yaptext.settings.table import DEFAULT_API_KEY, Table

AWQ_CONNECTIONS = {"tool": 64, "chat": 40, "both": 26}
FLOAT_CONNECTIONS = {"tool": 32, "chat": 24, "both": 16}


class Derived(Table):
    """The table, with the values that follow from it."""

    @property
    def own_key(self) -> str | None:
        """`api_key`; None if it is the default and there is a key file."""
        key = self.api_key.get_secret_value()
        return None if self.key_file and key == DEFAULT_API_KEY else key

    @property
    def leaves_default_key(self) -> bool:
        """Whether there is a credential for the API key that is empty or holds the default key."""
        file = self.credentials_directory and self.credentials_directory / "YAP_TEXT_API_KEY"
        return self.own_key == DEFAULT_API_KEY and file is not None and file.exists()

    @property
    def reloads(self) -> bool:
        """Whether SIGHUP means a reload. If there is nothing to reload, the terminal is gone."""
        return bool(self.key_file or self.personas_dir or self.notify_socket)

    @property
    def origins(self) -> frozenset[str] | None:
        """The origins of `allowed_origins` as browsers write them; None: any. Raises `ValueError`."""
        if self.allowed_origins is None:
            return None
        found = frozenset(map(addresses.origin, addresses.items(self.allowed_origins)))
        return None if "*" in found else found

    @property
    def hosts(self) -> frozenset[str]:
        """The names of `allowed_hosts`. Raises `ValueError`."""
        return frozenset(map(addresses.host, addresses.items(self.allowed_hosts)))

    @property
    def proxies(self) -> list[str]:
        """The networks of `trusted_proxies`. Raises `ValueError`."""
        return [network for item in addresses.items(self.trusted_proxies) for network in addresses.networks(item)]

    @property
    def chat_deployed(self) -> bool:
        return self.deploy_models != "tool"

    @property
    def tool_deployed(self) -> bool:
        return self.deploy_models != "chat"

    @property
    def on_cuda(self) -> bool:
        return self.device == "cuda" or (self.device == "auto" and Path("/proc/driver/nvidia/version").exists())

    @property
    def state(self) -> Path:
        return self.state_dir or self.state_directory or Path.home() / ".local/state/yap-text"

    @property
    def models(self) -> list[str]:
        """The names of what is deployed, which determine how long a start takes."""
        named = (self.deploy_models, self.chat_model, self.tool_model, self.awq_chat_model, self.awq_tool_model)
        return [name or "" for name in (*named, self.quantization)]

    @property
    def session_file(self) -> Path | None:
        kind, _, path = self.session_store.partition(":")
        return self.state / path if kind == "sqlite" else None

    @property
    def tool_timeout_s(self) -> float:
        default = 300 if self.on_cuda else 20_000
        return (self.tool_hard_timeout_ms or default) / 1000

    @property
    def calibration_samples(self) -> int:
        return self.awq_calibration_samples or (128 if self.on_cuda else 8)

    @property
    def watchdog_s(self) -> float | None:
        return self.watchdog_usec / 1e6 if self.watchdog_usec else None

    def max_connections(self, *, awq: bool) -> int:
        """The connection limit. `awq`: every deployed model has AWQ weights."""
        return self.max_concurrent_connections or self.usual_connections(awq=awq)

    def usual_connections(self, *, awq: bool) -> int:
        """The default limit by deployment: so many are accepted whatever they keep in the KV cache."""
        return (AWQ_CONNECTIONS if awq else FLOAT_CONNECTIONS)[self.deploy_models]

    @property
    def max_backlog_ms(self) -> float:
        default = 2000 if self.on_cuda else 30_000
        return default if self.max_prefill_backlog_ms is None else self.max_prefill_backlog_ms

    def quantization_of(self, role: Literal["chat", "tool"]) -> str:
        chosen = self.chat_quantization if role == "chat" else self.tool_quantization
        return chosen or self.quantization

    def batched_tokens(self, role: Literal["chat", "tool"]) -> int:
        chosen = self.chat_max_num_batched_tokens if role == "chat" else self.tool_max_num_batched_tokens
        return chosen or self.max_num_batched_tokens or (512 if role == "chat" and self.on_cuda else 2048)

    def gpu_fraction(self, role: Literal["chat", "tool"], *, alone: bool) -> float:
        chosen = self.chat_gpu_frac if role == "chat" else self.tool_gpu_frac
        return chosen or (0.90 if alone else {"chat": 0.70, "tool": 0.20}[role])
