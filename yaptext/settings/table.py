"""The table of settings: one line per variable with name, type, default, bounds and meaning.

Defaults that depend on what is deployed are `None` here; `derived` resolves them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

DEFAULT_API_KEY = "yap_token"
FIRST_PASSED_FD = 3
"""The listening socket that systemd passes, if `LISTEN_FDS` is 1 (sd_listen_fds(3))."""


def setting(name: str, default: Any, meaning: str, **bounds: Any) -> Any:
    return Field(default=default, validation_alias=name, description=meaning, **bounds)


class Table(BaseSettings):
    """One field per variable. Only `Settings` is ever instantiated: `defer_build` saves building the validators of its bases."""

    model_config = SettingsConfigDict(
        env_ignore_empty=True, extra="ignore", frozen=True, allow_inf_nan=False, defer_build=True
    )

    # --- server
    api_key: SecretStr = setting("YAP_TEXT_API_KEY", SecretStr(DEFAULT_API_KEY), "API key of every endpoint except the health checks. With the default key the service listens on loopback only.", min_length=1)  # fmt: skip
    key_file: Path | None = setting("YAP_TEXT_KEY_FILE", None, "File of named keys, read at the start and on SIGHUP. It turns the default key off. `yap-text key new` makes keys.")  # fmt: skip
    key_max_connections: int = setting("KEY_MAX_CONNECTIONS", 0, "Open WebSockets per key. Applies to keys whose line in the key file has no limit of its own; 0 = unlimited.", ge=0)  # fmt: skip
    key_turns_per_minute: int = setting("KEY_TURNS_PER_MINUTE", 600, "Turns and warm-ups per key and minute, also as one burst. Applies to the same keys; 0 = unlimited.", ge=0)  # fmt: skip
    key_messages_per_minute: int = setting("KEY_MESSAGES_PER_MINUTE", 6000, "Frames of any kind per key and minute. Applies to the same keys; 0 = unlimited.", ge=0)  # fmt: skip
    key_cancels_per_minute: int = setting("KEY_CANCELS_PER_MINUTE", 1200, "Cancels per key and minute. Applies to the same keys; 0 = unlimited.", ge=0)  # fmt: skip
    cache_per_key: bool = setting("CACHE_PER_KEY", False, "Separate prefix cache per key. 1: chat prompts of different keys share no blocks of the KV cache, so that neither `cached_tokens` nor the response time reveals what another key has sent. Each key then computes and keeps its own copy of a persona.")  # fmt: skip
    failed_keys_per_minute: int = setting("FAILED_KEYS_PER_MINUTE", 30, "Wrong keys and tickets per address and minute; over it the address has to wait. 0 = unlimited.", ge=0)  # fmt: skip
    allowed_origins: str | None = setting("ALLOWED_ORIGINS", None, "Web origins whose pages may open a WebSocket, separated by commas: `https://app.example.com`. `*` = any, refused with the default API key. Default: any; with the default API key only this machine (localhost, 127.0.0.1, [::1]). Clients that send no `Origin` are always allowed.")  # fmt: skip
    trusted_proxies: str | None = setting("TRUSTED_PROXIES", None, "Addresses and networks of proxies whose `X-Forwarded-For` and `X-Forwarded-Proto` are trusted, separated by commas: `10.0.0.0/8, 2001:db8::1`. Default: none. A proxy on this host needs `127.0.0.1, ::1`; any program on this host can then claim any address. Old name: `FORWARDED_ALLOW_IPS`.")  # fmt: skip
    allowed_hosts: str | None = setting("ALLOWED_HOSTS", None, "Host names that routes without a key accept in addition to localhost and IP addresses, separated by commas: `yap.example.com`. Applies if the service listens on loopback, where a proxy may forward another name.")  # fmt: skip
    playground: bool = setting("PLAYGROUND", True, "The page at `/` that holds conversations in a browser. 0 = none; `/client.js` stays.")  # fmt: skip
    host: str = setting("HOST", "127.0.0.1", "Address to listen on.")
    port: int = setting("PORT", 8000, "Port to listen on; 0 = a free port, which is logged.", ge=0, le=65535)
    max_concurrent_connections: int | None = setting("MAX_CONCURRENT_CONNECTIONS", None, "Open WebSockets of the service. Default by deployment: tool 32, chat 24, both 16; with AWQ weights 64, 40, 26.", ge=1, le=100_000)  # fmt: skip
    kv_overcommit: float = setting("KV_OVERCOMMIT", 1.0, "Sockets to allow per session that fits in the KV cache, by the measured size of turns. Applies above the default limit of connections; 0 = unlimited.", ge=0)  # fmt: skip
    max_prefill_backlog_ms: float | None = setting("MAX_PREFILL_BACKLOG_MS", None, "Backlog of waiting prompts over which new sockets are refused, in milliseconds of computing; 0 = never refuse. Default: 2000 on CUDA, 30000 on CPU.", ge=0)  # fmt: skip
    max_pending_handshakes: int = setting("MAX_PENDING_HANDSHAKES", 512, "TCP connections without a slot: before authentication, plain HTTP, or refused. Over it one is closed: the oldest that has had a response, else the oldest of the address that has most.", ge=1)  # fmt: skip
    handshake_timeout_s: float = setting("HANDSHAKE_TIMEOUT_S", 10.0, "Time that a connection may stay open before it becomes a WebSocket, in seconds. Every HTTP response restarts it.", gt=0)  # fmt: skip
    ping_interval_s: float = setting("PING_INTERVAL_S", 20.0, "Interval between WebSocket pings, in seconds. A client that does not answer within the same time is disconnected, and its slot becomes free.", gt=0)  # fmt: skip
    idle_timeout_s: float = setting("IDLE_TIMEOUT_S", 600.0, "Time without a frame from the client after which its socket is closed with 4000 (1001 on /v1/responses), in seconds; 0 = never.", ge=0)  # fmt: skip
    max_frame_bytes: int = setting("MAX_FRAME_BYTES", 1_048_576, "Largest frame of a client, in bytes. A larger one closes the socket with 1009.", ge=1024)  # fmt: skip
    send_queue_bytes: int = setting("SEND_QUEUE_BYTES", 262_144, "Bytes that may wait for a slow client. Over it the socket is closed with 4001.", ge=65_536)  # fmt: skip
    drain_timeout_s: float = setting("DRAIN_TIMEOUT_S", 20.0, "Time that running turns have to finish after SIGTERM, in seconds.", ge=0)  # fmt: skip
    session_ttl_s: float = setting("SESSION_TTL_S", 3600.0, "Lifetime of an unused session, in seconds. After it the session is deleted.", gt=0)  # fmt: skip
    max_sessions: int = setting("MAX_SESSIONS", 10_000, "Sessions in memory. Over it the key that has most loses its least recently used one.", ge=1)  # fmt: skip
    max_sessions_per_key: int = setting("MAX_SESSIONS_PER_KEY", 0, "Sessions in memory per API key. Over it the key loses its least recently used one. 0 = only `MAX_SESSIONS` applies.", ge=0)  # fmt: skip
    max_sessions_mb: int = setting("MAX_SESSIONS_MB", 1024, "Memory of all sessions, in MiB, by an estimate that is rather too high.", ge=16)  # fmt: skip
    max_sessions_mb_per_key: int = setting("MAX_SESSIONS_MB_PER_KEY", 0, "Memory of the sessions of one API key, in MiB. 0 = only `MAX_SESSIONS_MB` applies.", ge=0)  # fmt: skip

    session_store: str = setting("SESSION_STORE", "memory", "Where sessions are kept: `memory`, or `sqlite:PATH` so that they survive a restart. A relative path is below the state folder.", pattern=r"^(memory|sqlite:.+)$")  # fmt: skip
    session_store_key: SecretStr | None = setting("SESSION_STORE_KEY", None, "Secret that encrypts the session file. Without it the file holds plain text that only its user can read (mode 0600).", min_length=16)  # fmt: skip

    # --- models
    deploy_models: Literal["both", "chat", "tool"] = setting("DEPLOY_MODELS", "both", "Models to deploy: `both`, `chat` or `tool`.")  # fmt: skip
    chat_model: str | None = setting("CHAT_MODEL", None, "Chat model: a hub id or a local folder. If no model is named at all, the embedded demo model serves.")  # fmt: skip
    tool_model: str | None = setting("TOOL_MODEL", None, "Tool model: a hub id or a local folder, for example `MadeAgents/Hammer2.1-1.5b` or `MadeAgents/Hammer2.1-3b`.")  # fmt: skip
    awq_chat_model: str | None = setting("AWQ_CHAT_MODEL", None, "Chat model that is AWQ-quantized already, served instead of `CHAT_MODEL`.")  # fmt: skip
    awq_tool_model: str | None = setting("AWQ_TOOL_MODEL", None, "Tool model that is AWQ-quantized already, served instead of `TOOL_MODEL`.")  # fmt: skip
    quantization: Literal["auto", "none", "fp8", "awq", "gptq"] = setting("QUANTIZATION", "auto", "Quantization of the weights. `auto` takes GPTQ or AWQ if the model's config, weights or name say so, or a finished AWQ folder of the quantizer; else FP8 on CUDA and float on CPU. With `gptq` a tool model with float weights is served as with `auto`.")  # fmt: skip
    chat_quantization: Literal["auto", "none", "fp8", "awq", "gptq"] | None = setting("CHAT_QUANTIZATION", None, "Quantization of the chat model. Default: `QUANTIZATION`.")  # fmt: skip
    tool_quantization: Literal["auto", "none", "fp8", "awq", "gptq"] | None = setting("TOOL_QUANTIZATION", None, "Quantization of the tool model. Default: `QUANTIZATION`.")  # fmt: skip
    awq_calibration: str = setting("AWQ_CALIBRATION", "builtin", "Calibration text for AWQ (quantizer): `builtin`, a `.txt` or `.jsonl` file, a folder of them, or a hub data set as `hub:NAME`.")  # fmt: skip
    awq_calibration_samples: int | None = setting("AWQ_CALIBRATION_SAMPLES", None, "Calibration samples (quantizer). Default: 128 on CUDA, 8 on CPU.", ge=1, le=4096)  # fmt: skip
    awq_calibration_tokens: int = setting("AWQ_CALIBRATION_TOKENS", 512, "Length of one calibration sample, in tokens (quantizer).", ge=64, le=8192)  # fmt: skip
    awq_group_size: Literal["auto", "128", "64", "32"] = setting("AWQ_GROUP_SIZE", "auto", "Weights that share a scale (quantizer). `auto` = the largest size that divides the model's layers.")  # fmt: skip
    quantizer: Literal["auto", "autoawq", "llmcompressor"] = setting("QUANTIZER", "auto", "Library that quantizes (quantizer). `auto` = autoawq for the architectures that it quantizes correctly, else llm-compressor.")  # fmt: skip
    llmcompressor: Path | None = setting("LLMCOMPRESSOR", None, "Folder with the wheels of llm-compressor (quantizer). Default: the folder in the environment into which `make quantize` and `make install` put them.")  # fmt: skip
    share_engine: bool = setting("SHARE_ENGINE", True, "One engine for both models if they are the same checkpoint; 0 = two engines.")  # fmt: skip
    device: Literal["auto", "cpu", "cuda"] = setting("YAP_TEXT_DEVICE", "auto", "Device of the engines. `auto` = CUDA if an NVIDIA driver is loaded, else CPU.")  # fmt: skip
    chat_gpu_frac: float | None = setting("CHAT_GPU_FRAC", None, "Share of the GPU's memory for the chat engine, 0 to 0.98. Default: 0.70 with both models, 0.90 alone or shared.", gt=0, le=0.98)  # fmt: skip
    tool_gpu_frac: float | None = setting("TOOL_GPU_FRAC", None, "Share of the GPU's memory for the tool engine, 0 to 0.98. Default: 0.20 with both models, 0.90 alone.", gt=0, le=0.98)  # fmt: skip
    kv_dtype: Literal["auto", "fp8", "int8_per_token_head"] = setting("KV_DTYPE", "auto", "Type of the KV cache. `fp8` halves its memory; `int8_per_token_head` is for CUDA only, and `int8` is its old name.")  # fmt: skip
    attention_backend: Literal["auto", "FLASHINFER", "FLASH_ATTN"] = setting("VLLM_ATTENTION_BACKEND", "auto", "Attention kernels. `auto` = vLLM's choice for the card. XFORMERS no longer exists; FLASH_ATTN is used for it.")  # fmt: skip
    enforce_eager: bool = setting("ENFORCE_EAGER", False, "Eager execution. 1 turns CUDA graphs and compilation off: a faster start, but tokens are several times slower.")  # fmt: skip
    chat_max_model_len: int | None = setting("CHAT_MAX_MODEL_LEN", None, "Context of the chat engine, in tokens. Default: 8192, or the model's own limit if that is less.", ge=256)  # fmt: skip
    tool_max_model_len: int | None = setting("TOOL_MAX_MODEL_LEN", None, "Context of the tool engine, in tokens. Default: 4096, or the model's own limit if that is less.", ge=256)  # fmt: skip
    cuda_graphs: Literal["full", "auto"] = setting("CUDA_GRAPHS", "full", "Which engine steps run as CUDA graphs. `full` = whole steps, prompts included, if the attention kernels allow it (FLASH_ATTN on Hopper): the first token comes a third sooner. `auto` = vLLM's choice.")  # fmt: skip
    max_num_batched_tokens: int | None = setting("MAX_NUM_BATCHED_TOKENS", None, "Tokens of one engine step. It limits how long a step, and so a pause in the stream, can take. Default: on CUDA 512 for chat and 2048 for tool, on CPU 2048.", ge=128)  # fmt: skip
    chat_max_num_batched_tokens: int | None = setting("CHAT_MAX_NUM_BATCHED_TOKENS", None, "Tokens of one step of the chat engine. Default: `MAX_NUM_BATCHED_TOKENS`.", ge=128)  # fmt: skip
    tool_max_num_batched_tokens: int | None = setting("TOOL_MAX_NUM_BATCHED_TOKENS", None, "Tokens of one step of the tool engine. Default: `MAX_NUM_BATCHED_TOKENS`.", ge=128)  # fmt: skip
    max_num_seqs: int | None = setting("MAX_NUM_SEQS", None, "Requests that one engine computes at once. Default: 256 on CUDA, 64 on CPU.", ge=1)  # fmt: skip
    cpu_kv_cache_mb: int = setting("CPU_KV_CACHE_MB", 1024, "KV cache of each engine on CPU, in MiB.", ge=64)
    cpu_threads: int = setting("CPU_THREADS", 1, "Compute threads of each engine on CPU.", ge=1, le=512)

    # --- streaming and concurrency
    stream_flush_ms: float = setting("STREAM_FLUSH_MS", 0.0, "Time for which tokens after the first are gathered into one packet, in milliseconds; 0 = each token is sent at once.", ge=0, le=1000)  # fmt: skip
    concurrent_model_call: bool = setting("CONCURRENT_MODEL_CALL", False, "Order of the two models. 0: first the decision, then the chat model. 1: both start together, and chat text waits for the decision.")  # fmt: skip

    # --- tokens
    chat_thinking: bool = setting("CHAT_THINKING", False, "Thinking of the chat model. 1 lets it think before it speaks, if its template has a switch for that. Thoughts are never sent.")  # fmt: skip
    chat_thinking_max_out: int = setting("CHAT_THINKING_MAX_OUT", 1024, "Thinking before a reply, in tokens, in addition to `CHAT_MAX_OUT`. For models that think.", ge=1, le=32_768)  # fmt: skip
    reasoning_parser: str = setting("REASONING_PARSER", "auto", "Parser that separates thinking from speech: `auto` uses the marks in the chat template, the name of a vLLM parser (`deepseek_r1`, `qwen3`, ...) uses that one, and with `none` all text is sent.", pattern=r"^[A-Za-z0-9_]+$")  # fmt: skip
    chat_max_out: int = setting("CHAT_MAX_OUT", 200, "Longest reply, in tokens.", ge=1, le=4096)
    chat_soft_max_out: int | None = setting("CHAT_SOFT_MAX_OUT", None, "Length after which a reply ends with its current sentence, in tokens; its `finish_reason` is soft_limit. Default: no such limit.", ge=1, le=4096)  # fmt: skip
    history_max_tokens: int = setting("HISTORY_MAX_TOKENS", 3000, "History in a prompt, in tokens. The most recent whole messages are kept.", ge=0)  # fmt: skip
    user_utt_max_tokens: int = setting("USER_UTT_MAX_TOKENS", 350, "Longest utterance, in tokens. Of a longer one the beginning is kept.", ge=1)  # fmt: skip
    persona_max_tokens: int = setting("PERSONA_MAX_TOKENS", 2500, "Longest persona, in tokens. A longer one is refused.", ge=1)  # fmt: skip
    exact_token_trim: bool = setting("EXACT_TOKEN_TRIM", True, "How text is trimmed. 1: by the model's tokenizer. 0: by an estimate of 4 bytes per token.")  # fmt: skip
    chat_prompt_format: Literal["segments", "turns", "bare"] = setting("CHAT_PROMPT_FORMAT", "segments", "Form of the chat prompt. `segments`: persona and history in the system message. `turns`: history as messages with the template's roles. `bare`: plain text, for models without a chat template.")  # fmt: skip
    default_persona_style: str = setting("DEFAULT_PERSONA_STYLE", "wholesome", "Persona style of a session that names none.")  # fmt: skip
    personas_dir: Path | None = setting("PERSONAS_DIR", None, "Folder of your own persona styles, `NAME.toml` with `title` and `text`, read at the start and on SIGHUP. They are added to the built-in styles; the same name replaces one.")  # fmt: skip

    # --- sampling of the chat model
    warm_next_turn: bool = setting("WARM_NEXT_TURN", True, "Warming between turns. 1: after each turn the engine computes the beginning of the next prompts, at the lowest priority, while the user listens. 0: the next turn computes it.")  # fmt: skip
    interrupted_mark: str = setting("INTERRUPTED_MARK", "", "Text after a reply that the user interrupted, as later prompts show it, for example `[interrupted]`. Empty = no mark.")  # fmt: skip
    speakable: bool = setting("SPEAKABLE", False, "Replies to be read aloud. 1 removes markdown, emoji, stage directions, HTML, code fences and raw links. Applies to turns without their own `speakable`.")  # fmt: skip
    allow_empty_utterance: bool = setting("ALLOW_EMPTY_UTTERANCE", False, "Blank utterances. 1 accepts them; with 0 they are a `bad_message`.")  # fmt: skip
    chat_timeout_s: float = setting("CHAT_TIMEOUT_S", 60.0, "Time to generate a reply, in seconds. After it the reply ends with the text so far, `finish_reason` timeout. 0 = unlimited. Old name: `GEN_TIMEOUT_S`.", ge=0)  # fmt: skip

    chat_temperature: float | None = setting("CHAT_TEMPERATURE", None, "Sampling temperature; 0 = greedy. Default: 0.8; for the demo model 0, since it is too small for more.", ge=0, le=2)  # fmt: skip
    chat_top_p: float = setting("CHAT_TOP_P", 0.95, "Nucleus sampling: share of the probability to sample from.", gt=0, le=1)  # fmt: skip
    chat_top_k: int = setting("CHAT_TOP_K", 40, "Top-k sampling: number of likeliest tokens to sample from; 0 = off.", ge=0, le=1000)  # fmt: skip
    chat_min_p: float = setting("CHAT_MIN_P", 0.05, "Minimum probability of a token relative to the likeliest one; 0 = off.", ge=0, le=1)  # fmt: skip
    chat_presence_penalty: float = setting("CHAT_PRESENCE_PENALTY", 0.0, "Presence penalty; 0 = off.", ge=-2, le=2)
    chat_frequency_penalty: float = setting("CHAT_FREQUENCY_PENALTY", 0.0, "Frequency penalty; 0 = off.", ge=-2, le=2)
    chat_logit_bias: Annotated[dict[str, float], NoDecode] = setting("CHAT_LOGIT_BIAS", {}, "JSON object of token texts and their bias, -100 to 100: `{\" delve\": -5}`.")  # fmt: skip
    chat_repetition_penalty: float = setting("CHAT_REPETITION_PENALTY", 1.05, "Repetition penalty; 1 = off.", gt=0, le=2)  # fmt: skip

    # --- the decision
    tools_file: Path | None = setting("TOOLS_FILE", None, "File with a JSON list of tools (name, description, parameters). Default: the five built-in tools.")  # fmt: skip
    tool_optional: bool = setting("TOOL_OPTIONAL", False, "Start without the tool model. 1: if the tool engine cannot start, chat serves without it; decisions are `no` with reason `not_available`, and `/status` says `degraded`. A tool engine that dies later still ends the process, and systemd restarts it.")  # fmt: skip
    tools_on_openai: bool = setting("TOOLS_ON_OPENAI", False, "Whether requests of OpenAI's API that have no `tools` use the service's own tools. 1: such a request may end with their calls.")  # fmt: skip
    await_tools: bool = setting("AWAIT_TOOLS", False, "Turns that wait for tools. 1: a turn whose decision is yes ends after its `toolcall`, and the client's `tool_result` continues it. Applies to turns without their own `await_tools`.")  # fmt: skip
    tool_result_max_tokens: int = setting("TOOL_RESULT_MAX_TOKENS", 1000, "Longest result of a tool, in tokens. Of a longer one the beginning is kept.", ge=1)  # fmt: skip
    max_tool_rounds: int = setting("MAX_TOOL_ROUNDS", 4, "Decisions per utterance. After so many `tool_result` frames the reply follows without another decision.", ge=1, le=16)  # fmt: skip
    tool_max_out: int = setting("TOOL_MAX_OUT", 96, "Longest decision, in tokens.", ge=2, le=1024)
    tool_yes_threshold: float | None = setting("TOOL_YES_THRESHOLD", None, "Probability from which a decision is yes; the `toolcall` frame then has it as `p`, at some cost of the tool engine. Default: no threshold; the words that the tool model finds likeliest are the decision.", ge=0, le=1)  # fmt: skip
    tool_history_tokens: int = setting("TOOL_HISTORY_TOKENS", 200, "Recent history in the tool prompt, in tokens.", ge=0)  # fmt: skip
    tool_hard_timeout_ms: int | None = setting("TOOL_HARD_TIMEOUT_MS", None, "Time to decide, in milliseconds. A decision that takes longer is `no` with reason `timeout`. Default: 300 on CUDA, 20000 on CPU.", ge=1)  # fmt: skip

    # --- hub
    hf_token: SecretStr | None = setting("HF_TOKEN", None, "Hub token for private or gated models. Old names: `HUGGING_FACE_HUB_TOKEN`, `HUGGINGFACE_HUB_TOKEN`.")  # fmt: skip
    hf_home: Path | None = setting("HF_HOME", None, "Folder of hub downloads. Default: that of the hub client.")
    hf_xet_high_performance: bool = setting("HF_XET_HIGH_PERFORMANCE", False, "Faster hub transfers. 1 uses more memory and CPU for them. Old name: `HF_HUB_ENABLE_HF_TRANSFER`.")  # fmt: skip
    hf_awq_push: bool = setting("HF_AWQ_PUSH", False, "Upload to the hub (quantizer). 1 uploads newly quantized folders.")  # fmt: skip
    hf_awq_chat_repo: str | None = setting("HF_AWQ_CHAT_REPO", None, "Hub repository of the quantized chat model (quantizer).")  # fmt: skip
    hf_awq_tool_repo: str | None = setting("HF_AWQ_TOOL_REPO", None, "Hub repository of the quantized tool model (quantizer).")  # fmt: skip
    hf_awq_branch: str = setting("HF_AWQ_BRANCH", "main", "Branch to upload to (quantizer).")
    hf_awq_private: bool = setting(
        "HF_AWQ_PRIVATE",
        True,
        "Visibility of repositories that the upload creates (quantizer). 1 = private, 0 = public.",
    )
    hf_awq_allow_create: bool = setting("HF_AWQ_ALLOW_CREATE", True, "Creation of missing repositories (quantizer). 1 creates them; with 0 the upload fails.")  # fmt: skip
    hf_awq_commit_msg_chat: str | None = setting("HF_AWQ_COMMIT_MSG_CHAT", None, "Commit message of the chat upload (quantizer).")  # fmt: skip
    hf_awq_commit_msg_tool: str | None = setting("HF_AWQ_COMMIT_MSG_TOOL", None, "Commit message of the tool upload (quantizer).")  # fmt: skip

    # --- operation
    state_dir: Path | None = setting("YAP_TEXT_STATE_DIR", None, "State folder: converted and quantized models, session files, and the measured size of each KV cache, with which later starts on CUDA open both engines at once. Default: `STATE_DIRECTORY` under systemd, else `~/.local/state/yap-text`.")  # fmt: skip
    log_level: Literal["debug", "info", "warning", "error"] = setting("LOG_LEVEL", "info", "Lowest level that is logged.")  # fmt: skip
    log_format: Literal["auto", "json", "console"] = setting("LOG_FORMAT", "auto", "Form of the log. `auto` = JSON, or a readable form if stderr is a terminal.")  # fmt: skip
    log_text: bool = setting("LOG_TEXT", False, "Conversation text in the log. 1 logs utterance, decision and reply of each turn, and the text of exceptions.")  # fmt: skip
    log_address: Literal["whole", "truncated", "none"] = setting("LOG_ADDRESS", "truncated", "Addresses of refused connections and requests in the log: `whole`, `truncated` to their network (IPv4 /24, IPv6 /48), or `none`.")  # fmt: skip
    log_file: Path | None = setting("YAP_TEXT_LOG_FILE", None, "File that the log is also written to. After a rotation the service opens the new file.")  # fmt: skip

    metrics_old_names: bool = setting("METRICS_OLD_NAMES", False, "Old names of metrics. 1 also exposes the times of `/metrics` in milliseconds under their old names (`yaptext_ttft_ms`, ...). The next release removes this setting.")  # fmt: skip

    # --- set by systemd, not by you
    journal_stream: str | None = setting("JOURNAL_STREAM", None, "Set by systemd. Log lines then begin with a priority.")  # fmt: skip
    notify_socket: str | None = setting("NOTIFY_SOCKET", None, "Set by systemd (`Type=notify`). Socket to which readiness and status are sent.")  # fmt: skip
    watchdog_usec: int | None = setting("WATCHDOG_USEC", None, "Set by systemd (`WatchdogSec=`). Watchdog time in microseconds; the engines are asked for a token twice in it.", ge=1)  # fmt: skip
    listen_fds: int = setting("LISTEN_FDS", 0, "Set by systemd. 1 if systemd holds the listening socket (`yap-text.socket`).", ge=0, le=1)  # fmt: skip
    listen_pid: int | None = setting("LISTEN_PID", None, "Set by systemd. Process that the socket is for.")
    credentials_directory: Path | None = setting("CREDENTIALS_DIRECTORY", None, "Set by systemd (`LoadCredential=`). Folder of credentials; its files `YAP_TEXT_API_KEY`, `HF_TOKEN`, `SESSION_STORE_KEY` and `YAP_TEXT_KEY_FILE` win over the environment.")  # fmt: skip
    state_directory: Path | None = setting("STATE_DIRECTORY", None, "Set by systemd (`StateDirectory=`). Default state folder.")  # fmt: skip


class Variable(NamedTuple):
    """One row of the settings table."""

    name: str
    default: str
    meaning: str


def variables() -> list[Variable]:
    """Every variable in the order of the class, as `serve --help` and SETTINGS.md show them."""
    rows = []
    for field in Table.model_fields.values():
        value = field.default.get_secret_value() if isinstance(field.default, SecretStr) else field.default
        if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()):
            value = int(value)
        rows.append(Variable(str(field.validation_alias), "" if value is None else str(value), field.description or ""))
    return rows
