"""Every variable of the environment that Yap Text reads: its name, default, bounds and meaning.

Nothing else reads the environment. Defaults that depend on what is deployed are `None` here and
are resolved by the properties at the end.
"""

from __future__ import annotations

import ctypes
import difflib
import errno
import ipaddress
import itertools
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from yaptext.errors import SettingsError
from yaptext.files import read_file

DEFAULT_API_KEY = "yap_token"
SECRETS = ("YAP_TEXT_API_KEY", "HF_TOKEN", "SESSION_STORE_KEY")
LOOPBACK = ("127.0.0.1", "::1", "localhost")
AWQ_CONNECTIONS = {"tool": 64, "chat": 40, "both": 26}
FLOAT_CONNECTIONS = {"tool": 32, "chat": 24, "both": 16}
_LARGEST = 10**15
"""What a number may be at most: SQLite, the event loop and the product of two take it."""
_MOST_GPU = 0.98
_MOST_SECRET_BYTES = 65_536
_MOST_SHOWN = 500
"""Characters of a value in the log: journald splits a line of over 48 KiB."""
FIRST_PASSED_FD = 3
"""The listening socket that systemd passes, if `LISTEN_FDS` is 1 (sd_listen_fds(3))."""
HIDDEN = ("/home", "/root", "/run/user")
"""What `ProtectHome=yes` takes from a unit."""
_AROUND_TOKENS = 160
"""Least room in a prompt for template, time, persona and history."""


def _env(name: str, default: Any, meaning: str, **bounds: Any) -> Any:
    return Field(default=default, validation_alias=name, description=meaning, **bounds)


class Settings(BaseSettings):
    """The service's settings. `Settings.load()` reads the environment and raises `SettingsError`."""

    model_config = SettingsConfigDict(env_ignore_empty=True, extra="ignore", frozen=True, allow_inf_nan=False)

    # --- server
    api_key: SecretStr = _env("YAP_TEXT_API_KEY", SecretStr(DEFAULT_API_KEY), "API key of every endpoint except the health checks. With the default the service binds to loopback only.", min_length=1)  # fmt: skip
    key_file: Path | None = _env("YAP_TEXT_KEY_FILE", None, "File of named keys, read at the start and on SIGHUP; with one, the default key is off. `yap-text key new` makes keys.")  # fmt: skip
    key_max_connections: int = _env("KEY_MAX_CONNECTIONS", 0, "WebSockets at once of one key of the key file whose line says nothing else; 0 is no limit. So for the next three.", ge=0)  # fmt: skip
    key_turns_per_minute: int = _env("KEY_TURNS_PER_MINUTE", 600, "Turns and warm-ups of such a key, which it may also spend at once.", ge=0)  # fmt: skip
    key_messages_per_minute: int = _env("KEY_MESSAGES_PER_MINUTE", 6000, "Frames of any kind of such a key.", ge=0)  # fmt: skip
    key_cancels_per_minute: int = _env("KEY_CANCELS_PER_MINUTE", 1200, "Cancels of such a key.", ge=0)
    cache_per_key: bool = _env("CACHE_PER_KEY", False, "1: chat prompts of different keys share nothing in the KV cache, so that no key can tell from `cached_tokens` or the time what another has sent. A persona is then computed and kept once a key.")  # fmt: skip
    failed_keys_per_minute: int = _env("FAILED_KEYS_PER_MINUTE", 30, "Wrong keys and tickets that one address may give before it has to wait; 0 is no limit.", ge=0)  # fmt: skip
    allowed_origins: str | None = _env("ALLOWED_ORIGINS", None, "Web origins whose pages may open a WebSocket, separated by commas: `https://app.example.com`. `*` is any, and no choice with the default API key. Default: any; with the default API key those of this machine (localhost, 127.0.0.1, [::1]). Clients that send no `Origin` are not meant.")  # fmt: skip
    trusted_proxies: str | None = _env("TRUSTED_PROXIES", None, "Addresses and networks of the proxies whose `X-Forwarded-For` and `X-Forwarded-Proto` count, separated by commas: `10.0.0.0/8, 2001:db8::1`. Default: none. A proxy on this host needs `127.0.0.1, ::1`; any program of this host can then name any address. `FORWARDED_ALLOW_IPS` is its old name.")  # fmt: skip
    allowed_hosts: str | None = _env("ALLOWED_HOSTS", None, "Host names that routes without a key answer to, beside localhost and IP addresses, separated by commas: `yap.example.com`. Applies if the service listens on loopback, where a proxy may pass another name on.")  # fmt: skip
    host: str = _env("HOST", "127.0.0.1", "Address to listen on.")
    port: int = _env("PORT", 8000, "Port to listen on; 0 takes a free one and logs it.", ge=0, le=65535)
    max_concurrent_connections: int | None = _env("MAX_CONCURRENT_CONNECTIONS", None, "WebSockets at once. Default by deployment: tool 32, chat 24, both 16; with AWQ weights 64, 40, 26.", ge=1, le=100_000)  # fmt: skip
    kv_overcommit: float = _env("KV_OVERCOMMIT", 1.0, "Where more WebSockets are allowed than by default: how many for each whose turns, at their measured size, have room in the KV cache; 0 allows any number.", ge=0)  # fmt: skip
    max_prefill_backlog_ms: float | None = _env("MAX_PREFILL_BACKLOG_MS", None, "New sockets are refused while the prompts that wait for their first token take longer than this to compute; 0 never refuses for it. Default: 2000 on CUDA, 30000 on CPU.", ge=0)  # fmt: skip
    max_pending_handshakes: int = _env("MAX_PENDING_HANDSHAKES", 512, "TCP connections at once that hold no slot: not yet known, plain HTTP, or sent away. Over it one is cut off: the oldest that has had an answer, else the oldest of the address that has most.", ge=1)  # fmt: skip
    handshake_timeout_s: float = _env("HANDSHAKE_TIMEOUT_S", 10.0, "How long such a connection may stay without becoming a WebSocket; every HTTP response gives it that time anew.", gt=0)  # fmt: skip
    ping_interval_s: float = _env("PING_INTERVAL_S", 20.0, "The service pings each WebSocket this often; a client that does not answer within the same time has gone, and its slot is free.", gt=0)  # fmt: skip
    idle_timeout_s: float = _env("IDLE_TIMEOUT_S", 600.0, "A socket on which no frame arrives for this long is closed with 4000; 0 never closes.", ge=0)  # fmt: skip
    max_frame_bytes: int = _env("MAX_FRAME_BYTES", 1_048_576, "Largest frame a client may send; a larger one closes the socket with 1009.", ge=1024)  # fmt: skip
    send_queue_bytes: int = _env("SEND_QUEUE_BYTES", 262_144, "Bytes that may wait for a slow client before it is closed with 4001.", ge=65_536)  # fmt: skip
    drain_timeout_s: float = _env("DRAIN_TIMEOUT_S", 20.0, "How long running turns may go on after SIGTERM.", ge=0)  # fmt: skip
    session_ttl_s: float = _env("SESSION_TTL_S", 3600.0, "A session unused for this long is forgotten.", gt=0)
    max_sessions: int = _env("MAX_SESSIONS", 10_000, "Sessions kept; over that, the key that has most loses its least recently used.", ge=1)  # fmt: skip
    max_sessions_per_key: int = _env("MAX_SESSIONS_PER_KEY", 0, "Sessions kept of one API key; over that its own least recently used goes. 0: as many as of all.", ge=0)  # fmt: skip
    max_sessions_mb: int = _env("MAX_SESSIONS_MB", 1024, "MiB of memory that sessions may take in all, by an estimate that is rather too high.", ge=16)  # fmt: skip
    max_sessions_mb_per_key: int = _env("MAX_SESSIONS_MB_PER_KEY", 0, "The same for the sessions of one API key. 0: as many as all.", ge=0)  # fmt: skip

    session_store: str = _env("SESSION_STORE", "memory", "`memory`, or `sqlite:PATH` for sessions that outlive a restart; a relative path is under the state folder.", pattern=r"^(memory|sqlite:.+)$")  # fmt: skip
    session_store_key: SecretStr | None = _env("SESSION_STORE_KEY", None, "Encrypts that file; without a key its texts are plain, for this user's eyes only (0600).", min_length=16)  # fmt: skip

    # --- models
    deploy_models: Literal["both", "chat", "tool"] = _env("DEPLOY_MODELS", "both", "Which models to deploy.")
    chat_model: str | None = _env("CHAT_MODEL", None, "Chat model: a hub id or a local folder. Where no model is named at all, the embedded demo model serves.")  # fmt: skip
    tool_model: str | None = _env("TOOL_MODEL", None, "Tool model: a hub id or a local folder, for example `MadeAgents/Hammer2.1-1.5b` or `MadeAgents/Hammer2.1-3b`.")  # fmt: skip
    awq_chat_model: str | None = _env("AWQ_CHAT_MODEL", None, "Pre-quantized AWQ chat model, served instead of `CHAT_MODEL`.")  # fmt: skip
    awq_tool_model: str | None = _env("AWQ_TOOL_MODEL", None, "Pre-quantized AWQ tool model, served instead of `TOOL_MODEL`.")  # fmt: skip
    quantization: Literal["auto", "none", "fp8", "awq", "gptq"] = _env("QUANTIZATION", "auto", "Weights: `auto` takes GPTQ or AWQ if the model's config, weights or name say so, a finished AWQ folder of the quantizer, else FP8 on CUDA and float on CPU. `gptq` leaves a tool model that has float weights as `auto` would serve it.")  # fmt: skip
    chat_quantization: Literal["auto", "none", "fp8", "awq", "gptq"] | None = _env("CHAT_QUANTIZATION", None, "The same for the chat model alone.")  # fmt: skip
    tool_quantization: Literal["auto", "none", "fp8", "awq", "gptq"] | None = _env("TOOL_QUANTIZATION", None, "The same for the tool model alone.")  # fmt: skip
    awq_calibration: str = _env("AWQ_CALIBRATION", "builtin", "Text to calibrate AWQ with (quantizer): `builtin`, a `.txt` or `.jsonl` file, a folder of them, or a hub data set as `hub:NAME`.")  # fmt: skip
    awq_calibration_samples: int | None = _env("AWQ_CALIBRATION_SAMPLES", None, "Calibration samples (quantizer). Default: 128 on CUDA, 8 on CPU.", ge=1, le=4096)  # fmt: skip
    awq_calibration_tokens: int = _env("AWQ_CALIBRATION_TOKENS", 512, "Tokens of one calibration sample (quantizer).", ge=64, le=8192)  # fmt: skip
    awq_group_size: Literal["auto", "128", "64", "32"] = _env("AWQ_GROUP_SIZE", "auto", "Weights that share a scale (quantizer); `auto` takes the largest that divides the model's layers.")  # fmt: skip
    quantizer: Literal["auto", "autoawq", "llmcompressor"] = _env("QUANTIZER", "auto", "What quantizes (quantizer): `auto` takes autoawq for the architectures that it does right, else llm-compressor.")  # fmt: skip
    llmcompressor: Path | None = _env("LLMCOMPRESSOR", None, "Folder with the wheels of llm-compressor (quantizer). Default: the one in the environment, where `make quantize` and `make install` put it.")  # fmt: skip
    share_engine: bool = _env("SHARE_ENGINE", True, "One engine for both models where they are the same checkpoint; 0 opens two.")  # fmt: skip
    device: Literal["auto", "cpu", "cuda"] = _env("YAP_TEXT_DEVICE", "auto", "Where the engines run; `auto` takes CUDA where an NVIDIA driver is loaded.")  # fmt: skip
    chat_gpu_frac: float | None = _env("CHAT_GPU_FRAC", None, "Share of the GPU's memory for the chat engine. Default 0.70 with both models, 0.90 alone or shared.", gt=0, le=0.98)  # fmt: skip
    tool_gpu_frac: float | None = _env("TOOL_GPU_FRAC", None, "Share of the GPU's memory for the tool engine. Default 0.20 with both models, 0.90 alone.", gt=0, le=0.98)  # fmt: skip
    kv_dtype: Literal["auto", "fp8", "int8_per_token_head"] = _env("KV_DTYPE", "auto", "KV cache type. `fp8` halves its memory; `int8` is today's `int8_per_token_head`, CUDA only.")  # fmt: skip
    attention_backend: Literal["auto", "FLASHINFER", "FLASH_ATTN"] = _env("VLLM_ATTENTION_BACKEND", "auto", "Attention kernels; `auto` is vLLM's own choice for the card. XFORMERS no longer exists and becomes FLASH_ATTN.")  # fmt: skip
    enforce_eager: bool = _env("ENFORCE_EAGER", False, "1 turns CUDA graphs and compilation off: a faster start, several times slower tokens.")  # fmt: skip
    chat_max_model_len: int | None = _env("CHAT_MAX_MODEL_LEN", None, "Context of the chat engine in tokens. Default: 8192, or the model's own where that is less.", ge=256)  # fmt: skip
    tool_max_model_len: int | None = _env("TOOL_MAX_MODEL_LEN", None, "Context of the tool engine in tokens. Default: 4096, or the model's own where that is less.", ge=256)  # fmt: skip
    cuda_graphs: Literal["full", "auto"] = _env("CUDA_GRAPHS", "full", "`full` records whole engine steps, those with prompts too, where the attention kernels allow it (FLASH_ATTN on Hopper): the first token comes a third sooner. `auto` is vLLM's own choice.")  # fmt: skip
    max_num_batched_tokens: int | None = _env("MAX_NUM_BATCHED_TOKENS", None, "Tokens one engine step may compute: it bounds how long a step, and so a stutter, can take. Default on CUDA: 512 for chat, 2048 for tool; on CPU 2048.", ge=128)  # fmt: skip
    chat_max_num_batched_tokens: int | None = _env("CHAT_MAX_NUM_BATCHED_TOKENS", None, "The same for the chat engine alone.", ge=128)  # fmt: skip
    tool_max_num_batched_tokens: int | None = _env("TOOL_MAX_NUM_BATCHED_TOKENS", None, "The same for the tool engine alone.", ge=128)  # fmt: skip
    max_num_seqs: int | None = _env("MAX_NUM_SEQS", None, "Requests one engine computes at once. Default: 256 on CUDA, 64 on CPU.", ge=1)  # fmt: skip
    cpu_kv_cache_mb: int = _env("CPU_KV_CACHE_MB", 1024, "KV cache of each engine on CPU, in MiB.", ge=64)
    cpu_threads: int = _env("CPU_THREADS", 1, "Compute threads of each engine on CPU.", ge=1, le=512)

    # --- streaming and concurrency
    stream_flush_ms: float = _env("STREAM_FLUSH_MS", 0.0, "Gathers tokens for this long after the first, to send fewer packets; 0 sends each at once.", ge=0, le=1000)  # fmt: skip
    concurrent_model_call: bool = _env("CONCURRENT_MODEL_CALL", False, "0: decision first, then chat. 1: both start together, chat text waits for the decision.")  # fmt: skip

    # --- tokens
    chat_thinking: bool = _env("CHAT_THINKING", False, "1 lets a chat model think before it speaks, if its template has a switch for that. Thinking is never sent.")  # fmt: skip
    chat_thinking_max_out: int = _env("CHAT_THINKING_MAX_OUT", 1024, "Most tokens of thinking before a reply, beside `CHAT_MAX_OUT`; for models that think.", ge=1, le=32_768)  # fmt: skip
    reasoning_parser: str = _env("REASONING_PARSER", "auto", "How thinking is told from speech: `auto` by the marks in the chat template, a parser of vLLM by its name (`deepseek_r1`, `qwen3`, ...), or `none`: all is sent.", pattern=r"^[A-Za-z0-9_]+$")  # fmt: skip
    chat_max_out: int = _env("CHAT_MAX_OUT", 200, "Most tokens of one reply.", ge=1, le=4096)
    chat_soft_max_out: int | None = _env("CHAT_SOFT_MAX_OUT", None, "Tokens after which a reply ends with its sentence, `finish_reason` soft_limit. Default: none.", ge=1, le=4096)  # fmt: skip
    history_max_tokens: int = _env("HISTORY_MAX_TOKENS", 3000, "Most tokens of history in a prompt; the most recent whole messages stay.", ge=0)  # fmt: skip
    user_utt_max_tokens: int = _env("USER_UTT_MAX_TOKENS", 350, "Most tokens of an utterance; its beginning stays.", ge=1)  # fmt: skip
    persona_max_tokens: int = _env("PERSONA_MAX_TOKENS", 2500, "Most tokens of a persona; a longer one is refused.", ge=1)  # fmt: skip
    exact_token_trim: bool = _env("EXACT_TOKEN_TRIM", True, "1 trims by the model's tokenizer; 0 by an estimate of 4 bytes a token.")  # fmt: skip
    chat_prompt_format: Literal["segments", "turns", "bare"] = _env("CHAT_PROMPT_FORMAT", "segments", "`segments`: persona and history as the system message; `turns`: history as the template's own roles; `bare`: plain text, for models without a chat template.")  # fmt: skip
    default_persona_style: str = _env("DEFAULT_PERSONA_STYLE", "wholesome", "Persona of a session that names none.")  # fmt: skip
    personas_dir: Path | None = _env("PERSONAS_DIR", None, "Folder of persona styles of your own, `NAME.toml` with `title` and `text`, laid over the built-in ones; read at the start and on SIGHUP.")  # fmt: skip

    # --- sampling of the chat model
    warm_next_turn: bool = _env("WARM_NEXT_TURN", True, "After each turn computes what the next prompts begin with, at the lowest priority, while the user listens; 0 leaves it to the next turn.")  # fmt: skip
    interrupted_mark: str = _env("INTERRUPTED_MARK", "", "Put behind a reply that the user cut short, as later prompts show it, for example `[interrupted]`.")  # fmt: skip
    speakable: bool = _env("SPEAKABLE", False, "1: replies are sent as text to be read aloud, without markdown, emoji, stage directions, HTML, code fences and raw links, for turns that do not say `speakable` themselves.")  # fmt: skip
    allow_empty_utterance: bool = _env("ALLOW_EMPTY_UTTERANCE", False, "1 takes an utterance that is blank; otherwise it is a `bad_message`.")  # fmt: skip
    chat_timeout_s: float = _env("CHAT_TIMEOUT_S", 60.0, "Seconds that the generation of a reply may take; then it ends with what it has, `finish_reason` timeout. 0 = unlimited. `GEN_TIMEOUT_S` is its old name.", ge=0)  # fmt: skip

    chat_temperature: float | None = _env("CHAT_TEMPERATURE", None, "Sampling temperature; 0 is greedy. Default 0.8; the demo model is too small for any but 0.", ge=0, le=2)  # fmt: skip
    chat_top_p: float = _env("CHAT_TOP_P", 0.95, "Nucleus sampling.", gt=0, le=1)
    chat_top_k: int = _env("CHAT_TOP_K", 40, "Top-k sampling; 0 is off.", ge=0, le=1000)
    chat_min_p: float = _env("CHAT_MIN_P", 0.05, "Minimum probability relative to the best token.", ge=0, le=1)  # fmt: skip
    chat_presence_penalty: float = _env("CHAT_PRESENCE_PENALTY", 0.0, "Presence penalty; 0 is off.", ge=-2, le=2)
    chat_frequency_penalty: float = _env("CHAT_FREQUENCY_PENALTY", 0.0, "Frequency penalty; 0 is off.", ge=-2, le=2)
    chat_logit_bias: Annotated[dict[str, float], NoDecode] = _env("CHAT_LOGIT_BIAS", {}, "JSON object that makes tokens likelier or not, -100 to 100 each, by their text: `{\" delve\": -5}`.")  # fmt: skip
    chat_repetition_penalty: float = _env("CHAT_REPETITION_PENALTY", 1.05, "Repetition penalty; 1 is off.", gt=0, le=2)  # fmt: skip

    # --- the decision
    tools_file: Path | None = _env("TOOLS_FILE", None, "JSON list of tools (name, description, parameters). Default: the built-in five.")  # fmt: skip
    tool_optional: bool = _env("TOOL_OPTIONAL", False, "1: where the tool engine cannot start, chat serves without it: decisions are `no` with reason `not_available`, `/status` says `degraded`. One that dies later still ends the process, to be restarted.")  # fmt: skip
    await_tools: bool = _env("AWAIT_TOOLS", False, "1: a turn whose decision is yes ends after its `toolcall`, and goes on with the client's `tool_result`, for turns that do not say `await_tools` themselves.")  # fmt: skip
    tool_result_max_tokens: int = _env("TOOL_RESULT_MAX_TOKENS", 1000, "Most tokens of what a tool returned; its beginning stays.", ge=1)  # fmt: skip
    max_tool_rounds: int = _env("MAX_TOOL_ROUNDS", 4, "Most decisions for one utterance: after so many `tool_result` frames none is asked, and the reply comes.", ge=1, le=16)  # fmt: skip
    tool_max_out: int = _env("TOOL_MAX_OUT", 96, "Most tokens of a decision.", ge=2, le=1024)
    tool_yes_threshold: float | None = _env("TOOL_YES_THRESHOLD", None, "A decision is yes from this probability on, which the `toolcall` frame then tells as `p`; costs the tool engine some time. Default: whatever the tool model finds likeliest, word by word.", ge=0, le=1)  # fmt: skip
    tool_history_tokens: int = _env("TOOL_HISTORY_TOKENS", 200, "Most tokens of recent history the tool model sees.", ge=0)  # fmt: skip
    tool_hard_timeout_ms: int | None = _env("TOOL_HARD_TIMEOUT_MS", None, "A decision that takes longer is `no` with reason `timeout`. Default: 300 on CUDA, 20000 on CPU.", ge=1)  # fmt: skip

    # --- hub
    hf_token: SecretStr | None = _env("HF_TOKEN", None, "Hub token for private or gated models. `HUGGING_FACE_HUB_TOKEN` and `HUGGINGFACE_HUB_TOKEN` work too.")  # fmt: skip
    hf_home: Path | None = _env("HF_HOME", None, "Where hub downloads are kept. Default: the hub client's own.")
    hf_xet_high_performance: bool = _env("HF_XET_HIGH_PERFORMANCE", False, "Faster hub transfers at the price of memory and CPU. `HF_HUB_ENABLE_HF_TRANSFER` (default 0) is its older name.")  # fmt: skip
    hf_awq_push: bool = _env("HF_AWQ_PUSH", False, "1 uploads freshly quantized folders to the hub (quantizer).")
    hf_awq_chat_repo: str | None = _env("HF_AWQ_CHAT_REPO", None, "Hub repository of the quantized chat model (quantizer).")  # fmt: skip
    hf_awq_tool_repo: str | None = _env("HF_AWQ_TOOL_REPO", None, "Hub repository of the quantized tool model (quantizer).")  # fmt: skip
    hf_awq_branch: str = _env("HF_AWQ_BRANCH", "main", "Branch that uploads go to (quantizer).")
    hf_awq_private: bool = _env("HF_AWQ_PRIVATE", True, "1 creates repositories private (quantizer).")
    hf_awq_allow_create: bool = _env("HF_AWQ_ALLOW_CREATE", True, "1 creates missing repositories; 0 expects them (quantizer).")  # fmt: skip
    hf_awq_commit_msg_chat: str | None = _env("HF_AWQ_COMMIT_MSG_CHAT", None, "Commit message of the chat upload (quantizer).")  # fmt: skip
    hf_awq_commit_msg_tool: str | None = _env("HF_AWQ_COMMIT_MSG_TOOL", None, "Commit message of the tool upload (quantizer).")  # fmt: skip

    # --- operation
    state_dir: Path | None = _env("YAP_TEXT_STATE_DIR", None, "Where converted and quantized models are kept, and what lets later starts on CUDA open both engines at once: the size of each KV cache. Default: `STATE_DIRECTORY` under systemd, else `~/.local/state/yap-text`.")  # fmt: skip
    log_level: Literal["debug", "info", "warning", "error"] = _env("LOG_LEVEL", "info", "Least level that is logged.")  # fmt: skip
    log_format: Literal["auto", "json", "console"] = _env("LOG_FORMAT", "auto", "`auto` is JSON, and a readable form where stderr is a terminal.")  # fmt: skip
    log_text: bool = _env("LOG_TEXT", False, "1 logs what was said: utterance, decision and reply of each turn, and the words of exceptions.")  # fmt: skip
    log_address: Literal["whole", "truncated", "none"] = _env("LOG_ADDRESS", "truncated", "Addresses in the log, which are those of refused connections and requests: `whole`, `truncated` to their network (IPv4 /24, IPv6 /48), or `none`.")  # fmt: skip
    log_file: Path | None = _env("YAP_TEXT_LOG_FILE", None, "Also writes the log to this file, and opens it anew when it was rotated away.")  # fmt: skip

    # --- set by systemd, not by people
    journal_stream: str | None = _env("JOURNAL_STREAM", None, "Set by systemd: log lines then carry a priority prefix.")  # fmt: skip
    notify_socket: str | None = _env("NOTIFY_SOCKET", None, "Set by systemd (`Type=notify`): where readiness and status are told.")  # fmt: skip
    watchdog_usec: int | None = _env("WATCHDOG_USEC", None, "Set by systemd (`WatchdogSec=`): the engines are asked for a token twice in this time.", ge=1)  # fmt: skip
    listen_fds: int = _env("LISTEN_FDS", 0, "Set by systemd: 1 where it holds the listening socket (`yap-text.socket`).", ge=0, le=1)  # fmt: skip
    listen_pid: int | None = _env("LISTEN_PID", None, "Set by systemd: the process that socket is meant for.")
    credentials_directory: Path | None = _env("CREDENTIALS_DIRECTORY", None, "Set by systemd (`LoadCredential=`): files named `YAP_TEXT_API_KEY`, `HF_TOKEN`, `SESSION_STORE_KEY` and `YAP_TEXT_KEY_FILE` win over the environment.")  # fmt: skip
    state_directory: Path | None = _env("STATE_DIRECTORY", None, "Set by systemd (`StateDirectory=`).")

    def _default_key_stays_at_home(self) -> Settings:
        try:
            self.check_address(self.host)
        except SettingsError as error:
            raise ValueError(str(error)) from None
        return self

    def _lists_can_match(self) -> Settings:
        """Refuses at the start what would match nobody, and what would open the default key to any page."""
        origins, _, _ = self.origins, self.proxies, self.hosts
        open_to_any = self.allowed_origins is not None and (origins is None or "null" in origins)
        if open_to_any and self.own_key == DEFAULT_API_KEY:
            raise ValueError(
                f"ALLOWED_ORIGINS={self.allowed_origins!r} is not allowed with the default API key, which any page "
                "knows: set YAP_TEXT_API_KEY, or name the origins"
            )
        return self

    @field_validator("api_key")
    @classmethod
    def _bare_key(cls, value: SecretStr) -> SecretStr:
        """The key as clients send it. What is surely more than a key is refused."""
        key = _bare(value.get_secret_value())
        if not key:
            raise ValueError("it is blank")
        if key[0] in "\"'":
            raise ValueError("it begins with a quote: write the key alone")
        if key.startswith("YAP_TEXT_API_KEY="):
            raise ValueError("it begins with the variable's name: write the key alone")
        if re.search(r"\s", key):
            raise ValueError("white space stands inside, or it has several lines: write the key alone, one word")
        return SecretStr(key)

    @field_validator("chat_logit_bias", mode="before")
    @classmethod
    def _from_json(cls, value: Any) -> Any:
        """Here, where a text that is none is a line of its own: pydantic-settings would end the start with it."""
        return json.loads(value) if isinstance(value, str) else value

    @field_validator("*")
    @classmethod
    def _no_endless_number(cls, value: Any) -> Any:
        if isinstance(value, (int, float)) and abs(value) > _LARGEST:
            raise ValueError(f"a number is at most {_LARGEST:,}")
        return value

    @model_validator(mode="after")
    def _go_together(self) -> Settings:
        """The rules over several variables, of which each that is broken is a line."""
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
                f"CHAT_MAX_OUT={self.chat_max_out} and {_AROUND_TOKENS} for what stands around them need {parts}"
            )
        context = self.tool_max_model_len or 4096
        parts = self.user_utt_max_tokens + self.tool_history_tokens + self.tool_max_out
        if self.tool_deployed and parts > context:
            yield (
                f"TOOL_MAX_MODEL_LEN={context} is not allowed: USER_UTT_MAX_TOKENS={self.user_utt_max_tokens}, "
                f"TOOL_HISTORY_TOKENS={self.tool_history_tokens} and TOOL_MAX_OUT={self.tool_max_out} need {parts}, "
                "and the list of tools comes on top"
            )

    @property
    def _names_one_model(self) -> bool:
        """Whether one engine surely serves both: then it has the GPU alone."""
        chat, tool = self.awq_chat_model or self.chat_model, self.awq_tool_model or self.tool_model
        return self.share_engine and chat is not None and chat == tool

    def check_address(self, host: str) -> None:
        """Raises `SettingsError` for an address that the default key must not be served on."""
        if self.own_key == DEFAULT_API_KEY and host not in LOOPBACK:
            folder = os.environ.get("CREDENTIALS_DIRECTORY")  # a container's secrets, too
            in_file = f", write a key into {folder}/YAP_TEXT_API_KEY" if folder else ""
            raise SettingsError(
                f"HOST={host!r} is not allowed with the default API key: set YAP_TEXT_API_KEY{in_file}, "
                f"or listen on one of {', '.join(LOOPBACK)}"
            )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings, _Credentials(settings_cls), _MovedNames(settings_cls), env_settings)

    @classmethod
    def load(cls, *, serving: bool = False, **given: Any) -> Settings:
        """Reads the environment; `given` (by variable name) wins over it. Raises `SettingsError`: one line for each
        thing that is wrong, names that look like slips included. `serving` also asks for a state folder to write to.
        """
        lines: list[str] = []
        try:
            settings = cls(**given)
        except ValidationError as error:
            lines = _lines(error) + cls._broken_rules(given, {str(f["loc"][0]) for f in error.errors() if f["loc"]})
        if serving:
            lines += _state_faults(given)
        if not lines:
            return settings
        slips = [note for note in unknown_names() if "do you mean" in note]
        raise SettingsError("\n".join(dict.fromkeys([*lines, *slips])))

    @classmethod
    def _broken_rules(cls, given: dict[str, Any], wrong: set[str]) -> list[str]:
        """Which rules over several variables are broken, beside those that the `wrong` ones are part of: pydantic asks
        none of them while a value is wrong."""
        defaults = {str(field.validation_alias): field.default for field in cls.model_fields.values()}
        try:
            cls(**given | {name: defaults[name] for name in wrong})
        except ValidationError as error:
            return [line for line in _lines(error) if not any(name in line for name in wrong)]
        return []

    # --- what the deployment decides

    @property
    def own_key(self) -> str | None:
        """`api_key`; None where it is the default and a key file names others."""
        key = self.api_key.get_secret_value()
        return None if self.key_file and key == DEFAULT_API_KEY else key

    @property
    def leaves_default_key(self) -> bool:
        """Whether a credential is there for the API key, and is empty or the default key itself."""
        file = self.credentials_directory and self.credentials_directory / "YAP_TEXT_API_KEY"
        return self.own_key == DEFAULT_API_KEY and file is not None and file.exists()

    @property
    def reloads(self) -> bool:
        """Whether SIGHUP means to read the key file anew. Without one and without a supervisor the terminal is gone."""
        return bool(self.key_file or self.personas_dir or self.notify_socket)

    @property
    def origins(self) -> frozenset[str] | None:
        """The origins of `allowed_origins` as browsers write them; None: any. Raises `ValueError`."""
        if self.allowed_origins is None:
            return None
        found = frozenset(map(_origin, _items(self.allowed_origins)))
        return None if "*" in found else found

    @property
    def hosts(self) -> frozenset[str]:
        """The names of `allowed_hosts`. Raises `ValueError`."""
        return frozenset(map(_host, _items(self.allowed_hosts)))

    @property
    def proxies(self) -> list[str]:
        """The networks of `trusted_proxies`. Raises `ValueError`."""
        return [network for item in _items(self.trusted_proxies) for network in _networks(item)]

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
        """What is deployed, as it was named: what a start takes its time for."""
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
        """The connection limit, where `awq` says that every deployed model has AWQ weights."""
        return self.max_concurrent_connections or self.usual_connections(awq=awq)

    def usual_connections(self, *, awq: bool) -> int:
        """The limit by deployment: so many are taken however much they keep in the KV cache."""
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


_QUANTIZATIONS = {
    "awq_marlin": "awq",
    "gptq_marlin": "gptq",
    "compressed-tensors": "auto",
    "compressed_tensors": "auto",
    "float": "none",
    "bf16": "none",
    "bfloat16": "none",
}
"""vLLM's and others' words, and what they mean here: the checkpoint's own config says how it is quantized."""


def _bare(secret: str) -> str:
    """Without the line end, the white space and the byte order mark that editors leave around it."""
    return secret.strip().removeprefix("\ufeff").strip()


def _items(listed: str | None) -> list[str]:
    return [item.strip() for item in (listed or "").split(",") if item.strip()]


_ORIGIN = re.compile(r"(?!wss?:)([a-z][a-z0-9+.-]*)://([a-z0-9_.-]+|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?")


def _origin(item: str) -> str:
    """As a browser writes it: small letters, no slash at the end, no port that the scheme has anyway."""
    origin = item.rstrip("/").lower()
    if origin in ("*", "null"):
        return origin
    parts = _ORIGIN.fullmatch(origin)
    if parts is None or int(parts[3] or 0) > 65_535:
        raise ValueError(
            f"ALLOWED_ORIGINS={item!r} is not allowed: no browser sends such an origin. Write it as "
            "https://app.example.com or http://localhost:3000"
        )
    scheme, host, port = parts.groups()
    usual = port is None or int(port) == {"http": 80, "https": 443}.get(scheme)
    return f"{scheme}://{host}" if usual else f"{scheme}://{host}:{int(port)}"


def _host(item: str) -> str:
    if re.fullmatch(r"[a-zA-Z0-9_.-]+", item) is None:
        raise ValueError(f"ALLOWED_HOSTS={item!r} is not allowed: it is no host name. Write it as yap.example.com")
    return item.lower().rstrip(".")


def _networks(item: str) -> list[str]:
    """The network, and for IPv4 also how a socket that takes both kinds writes it."""
    try:
        network = ipaddress.ip_network(item)
    except ValueError:
        raise ValueError(
            f"TRUSTED_PROXIES={item!r} is not allowed: it is neither an address nor a network. Write it as 10.0.0.1 "
            "or 10.0.0.0/8"
        ) from None
    if network.version == 6:
        return [str(network)]
    return [str(network), f"::ffff:{network.network_address}/{96 + network.prefixlen}"]


_RENAMED = {
    "HUGGING_FACE_HUB_TOKEN": "HF_TOKEN",
    "HUGGINGFACE_HUB_TOKEN": "HF_TOKEN",
    "HUGGINGFACE_TOKEN": "HF_TOKEN",
    "HF_HUB_ENABLE_HF_TRANSFER": "HF_XET_HIGH_PERFORMANCE",
    "GEN_TIMEOUT_S": "CHAT_TIMEOUT_S",
    "FORWARDED_ALLOW_IPS": "TRUSTED_PROXIES",
    "CHAT_MAX_LEN": "CHAT_MAX_MODEL_LEN",
    "TOOL_MAX_LEN": "TOOL_MAX_MODEL_LEN",
    "MAX_NUM_BATCHED_TOKENS_CHAT": "CHAT_MAX_NUM_BATCHED_TOKENS",
    "MAX_NUM_BATCHED_TOKENS_TOOL": "TOOL_MAX_NUM_BATCHED_TOKENS",
    "AWQ_NSAMPLES": "AWQ_CALIBRATION_SAMPLES",
    "AWQ_SEQLEN": "AWQ_CALIBRATION_TOKENS",
    "AWQ_CALIB_DATASET": "AWQ_CALIBRATION",
    "AWQ_CACHE_DIR": "YAP_TEXT_STATE_DIR",
    "CHAT_MAX_TOKENS": "CHAT_MAX_OUT",
    "TOOL_MAX_TOKENS": "TOOL_MAX_OUT",
}
"""Names of earlier stacks."""
_GONE = {
    "WARMUP_ON_START": "every start is warmed",
    "PREFETCH_CHAT": "models are fetched at the start",
    "NUKE_ALL": "systemd stops and restarts the service",
    "STREAM_RATE_TOKS_PER_S": "tokens are sent as they come",
}
_INTERNAL = {"YAP_TEXT_ENGINE_FAULT", "YAP_TEXT_TEST_STATE", "TOOL_TIMEOUT_S"}
_OURS = ("CHAT_", "TOOL_", "AWQ_", "HF_AWQ_", "YAP_TEXT_")
_NEAR = 0.85


class Moved(NamedTuple):
    """What old names and values became: `values` by today's variable name, and one `note` each."""

    values: dict[str, str]
    notes: list[str]


def moved_names(environ: Mapping[str, str] | None = None) -> Moved:
    """Maps variables and values of earlier stacks to today's (`environ` defaults to the process's own)."""
    environ = os.environ if environ is None else environ
    values: dict[str, str] = {}
    notes: list[str] = []

    def rename(old: str, new: str) -> None:
        if environ.get(old) and not environ.get(new) and new not in values:
            values[new] = "0" if new == "CHAT_TIMEOUT_S" and environ[old].startswith("-") else environ[old]
            notes.append(f"{old} is now {new}")

    for old, new in _RENAMED.items():
        rename(old, new)
    backend = environ.get("VLLM_ATTENTION_BACKEND", "").upper()
    if backend == "XFORMERS":
        values["VLLM_ATTENTION_BACKEND"] = "FLASH_ATTN"
        notes.append("VLLM_ATTENTION_BACKEND=XFORMERS no longer exists in vLLM: FLASH_ATTN is used")
    elif backend:
        values["VLLM_ATTENTION_BACKEND"] = "auto" if backend == "AUTO" else backend
        if backend != "AUTO":
            notes.append("VLLM_ATTENTION_BACKEND is now an argument of the engine: it is passed on as one")
    for name in ("QUANTIZATION", "CHAT_QUANTIZATION", "TOOL_QUANTIZATION"):
        value = environ.get(name, "").lower()
        if value in _QUANTIZATIONS:
            values[name] = _QUANTIZATIONS[value]
            notes.append(f"{name}={environ[name]} means {_QUANTIZATIONS[value]} here")
    tool_timeout = environ.get("TOOL_TIMEOUT_S", "")
    if tool_timeout and not environ.get("TOOL_HARD_TIMEOUT_MS"):
        seconds = _number(tool_timeout)
        if seconds is not None:
            if math.isfinite(seconds * 1000):
                tool_timeout = str(round(seconds * 1000) if seconds > 0 else 86_400_000)
            values["TOOL_HARD_TIMEOUT_MS"] = tool_timeout
            notes.append("TOOL_TIMEOUT_S is now TOOL_HARD_TIMEOUT_MS, in milliseconds")
    if environ.get("KV_DTYPE", "").lower() == "int8":
        values["KV_DTYPE"] = "int8_per_token_head"
        notes.append("KV_DTYPE=int8 is now int8_per_token_head")
    return Moved(values, notes)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def unknown_names(environ: Mapping[str, str] | None = None) -> list[str]:
    """One note for each variable that looks like ours and is none: a slip would otherwise change nothing and say
    nothing. `environ` defaults to the process's own."""
    environ = os.environ if environ is None else environ
    known = {str(field.validation_alias) for field in Settings.model_fields.values()}
    notes = []
    for name in sorted(environ):
        if name in _GONE:
            notes.append(f"{name} has no meaning here: {_GONE[name]}")
        elif name not in known and name not in _RENAMED and name not in _INTERNAL:
            near = difflib.get_close_matches(name, known, 1, _NEAR) if "_" in name else []
            if near or name.startswith(_OURS):
                notes.append(f"{name} is not known" + (f"; do you mean {near[0]}?" if near else ""))
    return notes


def hidden_paths(told: str) -> list[str]:
    """One note for each variable whose path the error `told` is about, if systemd runs this process and its units do
    not see that path: there it looks like one that is missing or closed."""
    if not os.environ.get("INVOCATION_ID"):
        return []
    values = {**os.environ, **moved_names().values}
    notes = []
    for field in Settings.model_fields.values():
        name = str(field.validation_alias)
        path = values.get(name, "").removeprefix("sqlite:")
        folder = next((folder for folder in HIDDEN if Path(path).is_relative_to(folder)), None)
        if folder and path in told:
            notes.append(f"{name}: the unit does not see {folder} (ProtectHome=yes): move it, for example to /srv")
    return notes


class LogPlaces(NamedTuple):
    """Where the log goes by the environment alone: for a start whose settings are wrong. A wrong value is no value."""

    format: str
    file: Path | None
    journal_stream: str | None
    notify_socket: str | None

    @classmethod
    def find(cls) -> LogPlaces:
        format, file = os.environ.get("LOG_FORMAT", ""), os.environ.get("YAP_TEXT_LOG_FILE")
        return cls(
            format if format in ("json", "console") else "auto",
            Path(file) if file else None,
            os.environ.get("JOURNAL_STREAM"),
            os.environ.get("NOTIFY_SOCKET"),
        )


class _MovedNames(PydanticBaseSettingsSource):
    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        raise NotImplementedError  # the whole source is one dict, below

    def __call__(self) -> dict[str, Any]:
        return dict(moved_names().values)


class _Credentials(_MovedNames):
    def __call__(self) -> dict[str, Any]:
        folder = os.environ.get("CREDENTIALS_DIRECTORY")
        if not folder:
            return {}
        texts = {name: self._text(Path(folder, name)) for name in SECRETS}
        found = {name: text for name, text in texts.items() if text}
        key_file = Path(folder, "YAP_TEXT_KEY_FILE")
        return found | ({key_file.name: str(key_file)} if key_file.is_file() else {})

    @staticmethod
    def _text(file: Path) -> str:
        try:
            if not file.exists():
                return ""
            return _bare(read_file(file, _MOST_SECRET_BYTES).decode())
        except OSError as error:
            raise SettingsError(f"{_credential(file.name)} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise SettingsError(f"{_credential(file.name)} is not UTF-8 text: write the key or token alone") from None


def _credential(name: str) -> str:
    """What to call it: the operator knows the file that the unit passes, not the folder that systemd puts it in."""
    file = {"YAP_TEXT_API_KEY": "/etc/yap-text/api-key", "HF_TOKEN": "/etc/yap-text/hf-token"}.get(name)
    return f"the credential {name}{f' (by default the file {file})' if file else ''}"


def forget_secrets() -> None:
    """Takes keys and tokens out of the environment, which processes inherit that are started from here on, and out of
    what /proc/PID/environ shows: the memory that this process was started with, of which a forked one has a copy."""
    entries = ctypes.POINTER(ctypes.c_void_p).in_dll(ctypes.CDLL(None), "environ")
    names = (*SECRETS, "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "HUGGINGFACE_TOKEN")
    for place in itertools.takewhile(bool, map(entries.__getitem__, itertools.count())):
        variable, _, value = ctypes.string_at(place).partition(b"=")
        if os.fsdecode(variable) in names:
            ctypes.memset(place + len(variable) + 1, 0, len(value))
    for name in names:
        os.environ.pop(name, None)


class Variable(NamedTuple):
    """One row of the settings table."""

    name: str
    default: str
    meaning: str


def variables() -> list[Variable]:
    """Every variable in the order of the class, as `serve --help` and the README show them."""
    rows = []
    for field in Settings.model_fields.values():
        value = field.default.get_secret_value() if isinstance(field.default, SecretStr) else field.default
        if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()):
            value = int(value)
        rows.append(Variable(str(field.validation_alias), "" if value is None else str(value), field.description or ""))
    return rows


class Changes(NamedTuple):
    """What differs from the defaults, by variable name: the `settings`, and the `sources` they came from, `environment`
    or `credential`."""

    settings: dict[str, str | float]
    sources: dict[str, str]


def changes(settings: Settings) -> Changes:
    """For a log: a secret is "set", and so is a URL, which may hold one. Without what systemd sets at each start.
    `settings` are those of `Settings.load()`. Raises `SettingsError` if a credential cannot be read."""
    credentials = _Credentials(Settings)()
    changed = Changes({}, {})
    for field_name, field in Settings.model_fields.items():
        name, value = str(field.validation_alias), getattr(settings, field_name)
        if value != field.default and not (field.description or "").startswith("Set by systemd"):
            changed.settings[name] = _shown(value)
            changed.sources[name] = "credential" if name in credentials else "environment"
    return changed


def _shown(value: Any) -> str | float:
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, (int, float)):
        return value
    text = json.dumps(value) if isinstance(value, dict) else str(value)
    if isinstance(value, SecretStr) or "://" in text:
        return "set"
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _lines(error: ValidationError) -> list[str]:
    """One line for each fault, without its value if that is a secret."""
    lines = []
    for fault in error.errors():
        said = fault["msg"].removeprefix("Value error, ")
        if not fault["loc"]:  # rules over several variables word themselves
            lines += said.splitlines()
            continue
        name = str(fault["loc"][0])
        field = next(f for f in Settings.model_fields.values() if f.validation_alias == name)
        if name in _Credentials(Settings)():
            shown = _credential(name)
        else:
            shown = f"{name}={'(hidden)' if 'SecretStr' in str(field.annotation) else repr(fault['input'])}"
        lines.append(f"{shown} is not allowed: {said[0].lower()}{said[1:]}. {field.description}")
    return lines


def _state_faults(given: Mapping[str, Any]) -> list[str]:
    """One line if the state folder that was named can never be written to. A full or a read-only disk may pass."""
    named = {**os.environ, **moved_names().values, **given}
    name = next((name for name in ("YAP_TEXT_STATE_DIR", "STATE_DIRECTORY") if named.get(name)), None)
    if name is None:
        return []
    place = Path(named[name])
    try:
        while not place.exists():  # it will be made
            place = place.parent
        with tempfile.TemporaryFile(dir=place):
            return []
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
            return []
        return [f"{name}={str(named[name])!r} is not allowed: it cannot be written to: {error.strerror}"]
