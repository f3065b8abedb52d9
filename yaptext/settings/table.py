"""The table of settings: of each variable its name, type, default, bounds and meaning.

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
    """One field a variable. Only `Settings` is ever made of it: `defer_build` saves the start what nothing uses."""

    model_config = SettingsConfigDict(
        env_ignore_empty=True, extra="ignore", frozen=True, allow_inf_nan=False, defer_build=True
    )

    # --- server
    api_key: SecretStr = setting("YAP_TEXT_API_KEY", SecretStr(DEFAULT_API_KEY), "API key of every endpoint except the health checks. With the default the service binds to loopback only.", min_length=1)  # fmt: skip
    key_file: Path | None = setting("YAP_TEXT_KEY_FILE", None, "File of named keys, read at the start and on SIGHUP; with one, the default key is off. `yap-text key new` makes keys.")  # fmt: skip
    key_max_connections: int = setting("KEY_MAX_CONNECTIONS", 0, "WebSockets at once of one key of the key file whose line says nothing else; 0 is no limit. So for the next three.", ge=0)  # fmt: skip
    key_turns_per_minute: int = setting("KEY_TURNS_PER_MINUTE", 600, "Turns and warm-ups of such a key, which it may also spend at once.", ge=0)  # fmt: skip
    key_messages_per_minute: int = setting("KEY_MESSAGES_PER_MINUTE", 6000, "Frames of any kind of such a key.", ge=0)  # fmt: skip
    key_cancels_per_minute: int = setting("KEY_CANCELS_PER_MINUTE", 1200, "Cancels of such a key.", ge=0)
    cache_per_key: bool = setting("CACHE_PER_KEY", False, "1: chat prompts of different keys share nothing in the KV cache, so that no key can tell from `cached_tokens` or the time what another has sent. A persona is then computed and kept once a key.")  # fmt: skip
    failed_keys_per_minute: int = setting("FAILED_KEYS_PER_MINUTE", 30, "Wrong keys and tickets that one address may give before it has to wait; 0 is no limit.", ge=0)  # fmt: skip
    allowed_origins: str | None = setting("ALLOWED_ORIGINS", None, "Web origins whose pages may open a WebSocket, separated by commas: `https://app.example.com`. `*` is any, and no choice with the default API key. Default: any; with the default API key those of this machine (localhost, 127.0.0.1, [::1]). Clients that send no `Origin` are not meant.")  # fmt: skip
    trusted_proxies: str | None = setting("TRUSTED_PROXIES", None, "Addresses and networks of the proxies whose `X-Forwarded-For` and `X-Forwarded-Proto` count, separated by commas: `10.0.0.0/8, 2001:db8::1`. Default: none. A proxy on this host needs `127.0.0.1, ::1`; any program of this host can then name any address. `FORWARDED_ALLOW_IPS` is its old name.")  # fmt: skip
    allowed_hosts: str | None = setting("ALLOWED_HOSTS", None, "Host names that routes without a key answer to, beside localhost and IP addresses, separated by commas: `yap.example.com`. Applies if the service listens on loopback, where a proxy may pass another name on.")  # fmt: skip
    host: str = setting("HOST", "127.0.0.1", "Address to listen on.")
    port: int = setting("PORT", 8000, "Port to listen on; 0 takes a free one and logs it.", ge=0, le=65535)
    max_concurrent_connections: int | None = setting("MAX_CONCURRENT_CONNECTIONS", None, "WebSockets at once. Default by deployment: tool 32, chat 24, both 16; with AWQ weights 64, 40, 26.", ge=1, le=100_000)  # fmt: skip
    kv_overcommit: float = setting("KV_OVERCOMMIT", 1.0, "Where more WebSockets are allowed than by default: how many for each whose turns, at their measured size, have room in the KV cache; 0 allows any number.", ge=0)  # fmt: skip
    max_prefill_backlog_ms: float | None = setting("MAX_PREFILL_BACKLOG_MS", None, "New sockets are refused while the prompts that wait for their first token take longer than this to compute; 0 never refuses for it. Default: 2000 on CUDA, 30000 on CPU.", ge=0)  # fmt: skip
    max_pending_handshakes: int = setting("MAX_PENDING_HANDSHAKES", 512, "TCP connections at once that hold no slot: not yet known, plain HTTP, or sent away. Over it one is cut off: the oldest that has had an answer, else the oldest of the address that has most.", ge=1)  # fmt: skip
    handshake_timeout_s: float = setting("HANDSHAKE_TIMEOUT_S", 10.0, "How long such a connection may stay without becoming a WebSocket; every HTTP response gives it that time anew.", gt=0)  # fmt: skip
    ping_interval_s: float = setting("PING_INTERVAL_S", 20.0, "The service pings each WebSocket this often; a client that does not answer within the same time has gone, and its slot is free.", gt=0)  # fmt: skip
    idle_timeout_s: float = setting("IDLE_TIMEOUT_S", 600.0, "A socket on which no frame arrives for this long is closed with 4000; 0 never closes.", ge=0)  # fmt: skip
    max_frame_bytes: int = setting("MAX_FRAME_BYTES", 1_048_576, "Largest frame a client may send; a larger one closes the socket with 1009.", ge=1024)  # fmt: skip
    send_queue_bytes: int = setting("SEND_QUEUE_BYTES", 262_144, "Bytes that may wait for a slow client before it is closed with 4001.", ge=65_536)  # fmt: skip
    drain_timeout_s: float = setting("DRAIN_TIMEOUT_S", 20.0, "How long running turns may go on after SIGTERM.", ge=0)  # fmt: skip
    session_ttl_s: float = setting("SESSION_TTL_S", 3600.0, "A session unused for this long is forgotten.", gt=0)
    max_sessions: int = setting("MAX_SESSIONS", 10_000, "Sessions kept; over that, the key that has most loses its least recently used.", ge=1)  # fmt: skip
    max_sessions_per_key: int = setting("MAX_SESSIONS_PER_KEY", 0, "Sessions kept of one API key; over that its own least recently used goes. 0: as many as of all.", ge=0)  # fmt: skip
    max_sessions_mb: int = setting("MAX_SESSIONS_MB", 1024, "MiB of memory that sessions may take in all, by an estimate that is rather too high.", ge=16)  # fmt: skip
    max_sessions_mb_per_key: int = setting("MAX_SESSIONS_MB_PER_KEY", 0, "The same for the sessions of one API key. 0: as many as all.", ge=0)  # fmt: skip

    session_store: str = setting("SESSION_STORE", "memory", "`memory`, or `sqlite:PATH` for sessions that outlive a restart; a relative path is under the state folder.", pattern=r"^(memory|sqlite:.+)$")  # fmt: skip
    session_store_key: SecretStr | None = setting("SESSION_STORE_KEY", None, "Encrypts that file; without a key its texts are plain, for this user's eyes only (0600).", min_length=16)  # fmt: skip

    # --- models
    deploy_models: Literal["both", "chat", "tool"] = setting("DEPLOY_MODELS", "both", "Which models to deploy.")
    chat_model: str | None = setting("CHAT_MODEL", None, "Chat model: a hub id or a local folder. Where no model is named at all, the embedded demo model serves.")  # fmt: skip
    tool_model: str | None = setting("TOOL_MODEL", None, "Tool model: a hub id or a local folder, for example `MadeAgents/Hammer2.1-1.5b` or `MadeAgents/Hammer2.1-3b`.")  # fmt: skip
    awq_chat_model: str | None = setting("AWQ_CHAT_MODEL", None, "Pre-quantized AWQ chat model, served instead of `CHAT_MODEL`.")  # fmt: skip
    awq_tool_model: str | None = setting("AWQ_TOOL_MODEL", None, "Pre-quantized AWQ tool model, served instead of `TOOL_MODEL`.")  # fmt: skip
    quantization: Literal["auto", "none", "fp8", "awq", "gptq"] = setting("QUANTIZATION", "auto", "Weights: `auto` takes GPTQ or AWQ if the model's config, weights or name say so, a finished AWQ folder of the quantizer, else FP8 on CUDA and float on CPU. `gptq` leaves a tool model that has float weights as `auto` would serve it.")  # fmt: skip
    chat_quantization: Literal["auto", "none", "fp8", "awq", "gptq"] | None = setting("CHAT_QUANTIZATION", None, "The same for the chat model alone.")  # fmt: skip
    tool_quantization: Literal["auto", "none", "fp8", "awq", "gptq"] | None = setting("TOOL_QUANTIZATION", None, "The same for the tool model alone.")  # fmt: skip
    awq_calibration: str = setting("AWQ_CALIBRATION", "builtin", "Text to calibrate AWQ with (quantizer): `builtin`, a `.txt` or `.jsonl` file, a folder of them, or a hub data set as `hub:NAME`.")  # fmt: skip
    awq_calibration_samples: int | None = setting("AWQ_CALIBRATION_SAMPLES", None, "Calibration samples (quantizer). Default: 128 on CUDA, 8 on CPU.", ge=1, le=4096)  # fmt: skip
    awq_calibration_tokens: int = setting("AWQ_CALIBRATION_TOKENS", 512, "Tokens of one calibration sample (quantizer).", ge=64, le=8192)  # fmt: skip
    awq_group_size: Literal["auto", "128", "64", "32"] = setting("AWQ_GROUP_SIZE", "auto", "Weights that share a scale (quantizer); `auto` takes the largest that divides the model's layers.")  # fmt: skip
    quantizer: Literal["auto", "autoawq", "llmcompressor"] = setting("QUANTIZER", "auto", "What quantizes (quantizer): `auto` takes autoawq for the architectures that it does right, else llm-compressor.")  # fmt: skip
    llmcompressor: Path | None = setting("LLMCOMPRESSOR", None, "Folder with the wheels of llm-compressor (quantizer). Default: the one in the environment, where `make quantize` and `make install` put it.")  # fmt: skip
    share_engine: bool = setting("SHARE_ENGINE", True, "One engine for both models where they are the same checkpoint; 0 opens two.")  # fmt: skip
    device: Literal["auto", "cpu", "cuda"] = setting("YAP_TEXT_DEVICE", "auto", "Where the engines run; `auto` takes CUDA where an NVIDIA driver is loaded.")  # fmt: skip
    chat_gpu_frac: float | None = setting("CHAT_GPU_FRAC", None, "Share of the GPU's memory for the chat engine. Default 0.70 with both models, 0.90 alone or shared.", gt=0, le=0.98)  # fmt: skip
    tool_gpu_frac: float | None = setting("TOOL_GPU_FRAC", None, "Share of the GPU's memory for the tool engine. Default 0.20 with both models, 0.90 alone.", gt=0, le=0.98)  # fmt: skip
    kv_dtype: Literal["auto", "fp8", "int8_per_token_head"] = setting("KV_DTYPE", "auto", "KV cache type. `fp8` halves its memory; `int8` is today's `int8_per_token_head`, CUDA only.")  # fmt: skip
    attention_backend: Literal["auto", "FLASHINFER", "FLASH_ATTN"] = setting("VLLM_ATTENTION_BACKEND", "auto", "Attention kernels; `auto` is vLLM's own choice for the card. XFORMERS no longer exists and becomes FLASH_ATTN.")  # fmt: skip
    enforce_eager: bool = setting("ENFORCE_EAGER", False, "1 turns CUDA graphs and compilation off: a faster start, several times slower tokens.")  # fmt: skip
    chat_max_model_len: int | None = setting("CHAT_MAX_MODEL_LEN", None, "Context of the chat engine in tokens. Default: 8192, or the model's own where that is less.", ge=256)  # fmt: skip
    tool_max_model_len: int | None = setting("TOOL_MAX_MODEL_LEN", None, "Context of the tool engine in tokens. Default: 4096, or the model's own where that is less.", ge=256)  # fmt: skip
    cuda_graphs: Literal["full", "auto"] = setting("CUDA_GRAPHS", "full", "`full` records whole engine steps, those with prompts too, where the attention kernels allow it (FLASH_ATTN on Hopper): the first token comes a third sooner. `auto` is vLLM's own choice.")  # fmt: skip
    max_num_batched_tokens: int | None = setting("MAX_NUM_BATCHED_TOKENS", None, "Tokens one engine step may compute: it bounds how long a step, and so a stutter, can take. Default on CUDA: 512 for chat, 2048 for tool; on CPU 2048.", ge=128)  # fmt: skip
    chat_max_num_batched_tokens: int | None = setting("CHAT_MAX_NUM_BATCHED_TOKENS", None, "The same for the chat engine alone.", ge=128)  # fmt: skip
    tool_max_num_batched_tokens: int | None = setting("TOOL_MAX_NUM_BATCHED_TOKENS", None, "The same for the tool engine alone.", ge=128)  # fmt: skip
    max_num_seqs: int | None = setting("MAX_NUM_SEQS", None, "Requests one engine computes at once. Default: 256 on CUDA, 64 on CPU.", ge=1)  # fmt: skip
    cpu_kv_cache_mb: int = setting("CPU_KV_CACHE_MB", 1024, "KV cache of each engine on CPU, in MiB.", ge=64)
    cpu_threads: int = setting("CPU_THREADS", 1, "Compute threads of each engine on CPU.", ge=1, le=512)

    # --- streaming and concurrency
    stream_flush_ms: float = setting("STREAM_FLUSH_MS", 0.0, "Gathers tokens for this long after the first, to send fewer packets; 0 sends each at once.", ge=0, le=1000)  # fmt: skip
    concurrent_model_call: bool = setting("CONCURRENT_MODEL_CALL", False, "0: decision first, then chat. 1: both start together, chat text waits for the decision.")  # fmt: skip

    # --- tokens
    chat_thinking: bool = setting("CHAT_THINKING", False, "1 lets a chat model think before it speaks, if its template has a switch for that. Thinking is never sent.")  # fmt: skip
    chat_thinking_max_out: int = setting("CHAT_THINKING_MAX_OUT", 1024, "Most tokens of thinking before a reply, beside `CHAT_MAX_OUT`; for models that think.", ge=1, le=32_768)  # fmt: skip
    reasoning_parser: str = setting("REASONING_PARSER", "auto", "How thinking is told from speech: `auto` by the marks in the chat template, a parser of vLLM by its name (`deepseek_r1`, `qwen3`, ...), or `none`: all is sent.", pattern=r"^[A-Za-z0-9_]+$")  # fmt: skip
    chat_max_out: int = setting("CHAT_MAX_OUT", 200, "Most tokens of one reply.", ge=1, le=4096)
    chat_soft_max_out: int | None = setting("CHAT_SOFT_MAX_OUT", None, "Tokens after which a reply ends with its sentence, `finish_reason` soft_limit. Default: none.", ge=1, le=4096)  # fmt: skip
    history_max_tokens: int = setting("HISTORY_MAX_TOKENS", 3000, "Most tokens of history in a prompt; the most recent whole messages stay.", ge=0)  # fmt: skip
    user_utt_max_tokens: int = setting("USER_UTT_MAX_TOKENS", 350, "Most tokens of an utterance; its beginning stays.", ge=1)  # fmt: skip
    persona_max_tokens: int = setting("PERSONA_MAX_TOKENS", 2500, "Most tokens of a persona; a longer one is refused.", ge=1)  # fmt: skip
    exact_token_trim: bool = setting("EXACT_TOKEN_TRIM", True, "1 trims by the model's tokenizer; 0 by an estimate of 4 bytes a token.")  # fmt: skip
    chat_prompt_format: Literal["segments", "turns", "bare"] = setting("CHAT_PROMPT_FORMAT", "segments", "`segments`: persona and history as the system message; `turns`: history as the template's own roles; `bare`: plain text, for models without a chat template.")  # fmt: skip
    default_persona_style: str = setting("DEFAULT_PERSONA_STYLE", "wholesome", "Persona of a session that names none.")  # fmt: skip
    personas_dir: Path | None = setting("PERSONAS_DIR", None, "Folder of persona styles of your own, `NAME.toml` with `title` and `text`, laid over the built-in ones; read at the start and on SIGHUP.")  # fmt: skip

    # --- sampling of the chat model
    warm_next_turn: bool = setting("WARM_NEXT_TURN", True, "After each turn computes what the next prompts begin with, at the lowest priority, while the user listens; 0 leaves it to the next turn.")  # fmt: skip
    interrupted_mark: str = setting("INTERRUPTED_MARK", "", "Put behind a reply that the user cut short, as later prompts show it, for example `[interrupted]`.")  # fmt: skip
    speakable: bool = setting("SPEAKABLE", False, "1: replies are sent as text to be read aloud, without markdown, emoji, stage directions, HTML, code fences and raw links, for turns that do not say `speakable` themselves.")  # fmt: skip
    allow_empty_utterance: bool = setting("ALLOW_EMPTY_UTTERANCE", False, "1 takes an utterance that is blank; otherwise it is a `bad_message`.")  # fmt: skip
    chat_timeout_s: float = setting("CHAT_TIMEOUT_S", 60.0, "Seconds that the generation of a reply may take; then it ends with what it has, `finish_reason` timeout. 0 = unlimited. `GEN_TIMEOUT_S` is its old name.", ge=0)  # fmt: skip

    chat_temperature: float | None = setting("CHAT_TEMPERATURE", None, "Sampling temperature; 0 is greedy. Default 0.8; the demo model is too small for any but 0.", ge=0, le=2)  # fmt: skip
    chat_top_p: float = setting("CHAT_TOP_P", 0.95, "Nucleus sampling.", gt=0, le=1)
    chat_top_k: int = setting("CHAT_TOP_K", 40, "Top-k sampling; 0 is off.", ge=0, le=1000)
    chat_min_p: float = setting("CHAT_MIN_P", 0.05, "Minimum probability relative to the best token.", ge=0, le=1)  # fmt: skip
    chat_presence_penalty: float = setting("CHAT_PRESENCE_PENALTY", 0.0, "Presence penalty; 0 is off.", ge=-2, le=2)
    chat_frequency_penalty: float = setting("CHAT_FREQUENCY_PENALTY", 0.0, "Frequency penalty; 0 is off.", ge=-2, le=2)
    chat_logit_bias: Annotated[dict[str, float], NoDecode] = setting("CHAT_LOGIT_BIAS", {}, "JSON object that makes tokens likelier or not, -100 to 100 each, by their text: `{\" delve\": -5}`.")  # fmt: skip
    chat_repetition_penalty: float = setting("CHAT_REPETITION_PENALTY", 1.05, "Repetition penalty; 1 is off.", gt=0, le=2)  # fmt: skip

    # --- the decision
    tools_file: Path | None = setting("TOOLS_FILE", None, "JSON list of tools (name, description, parameters). Default: the built-in five.")  # fmt: skip
    tool_optional: bool = setting("TOOL_OPTIONAL", False, "1: where the tool engine cannot start, chat serves without it: decisions are `no` with reason `not_available`, `/status` says `degraded`. One that dies later still ends the process, to be restarted.")  # fmt: skip
    await_tools: bool = setting("AWAIT_TOOLS", False, "1: a turn whose decision is yes ends after its `toolcall`, and goes on with the client's `tool_result`, for turns that do not say `await_tools` themselves.")  # fmt: skip
    tool_result_max_tokens: int = setting("TOOL_RESULT_MAX_TOKENS", 1000, "Most tokens of what a tool returned; its beginning stays.", ge=1)  # fmt: skip
    max_tool_rounds: int = setting("MAX_TOOL_ROUNDS", 4, "Most decisions for one utterance: after so many `tool_result` frames none is asked, and the reply comes.", ge=1, le=16)  # fmt: skip
    tool_max_out: int = setting("TOOL_MAX_OUT", 96, "Most tokens of a decision.", ge=2, le=1024)
    tool_yes_threshold: float | None = setting("TOOL_YES_THRESHOLD", None, "A decision is yes from this probability on, which the `toolcall` frame then tells as `p`; costs the tool engine some time. Default: whatever the tool model finds likeliest, word by word.", ge=0, le=1)  # fmt: skip
    tool_history_tokens: int = setting("TOOL_HISTORY_TOKENS", 200, "Most tokens of recent history the tool model sees.", ge=0)  # fmt: skip
    tool_hard_timeout_ms: int | None = setting("TOOL_HARD_TIMEOUT_MS", None, "A decision that takes longer is `no` with reason `timeout`. Default: 300 on CUDA, 20000 on CPU.", ge=1)  # fmt: skip

    # --- hub
    hf_token: SecretStr | None = setting("HF_TOKEN", None, "Hub token for private or gated models. `HUGGING_FACE_HUB_TOKEN` and `HUGGINGFACE_HUB_TOKEN` work too.")  # fmt: skip
    hf_home: Path | None = setting("HF_HOME", None, "Where hub downloads are kept. Default: the hub client's own.")
    hf_xet_high_performance: bool = setting("HF_XET_HIGH_PERFORMANCE", False, "Faster hub transfers at the price of memory and CPU. `HF_HUB_ENABLE_HF_TRANSFER` (default 0) is its older name.")  # fmt: skip
    hf_awq_push: bool = setting("HF_AWQ_PUSH", False, "1 uploads freshly quantized folders to the hub (quantizer).")
    hf_awq_chat_repo: str | None = setting("HF_AWQ_CHAT_REPO", None, "Hub repository of the quantized chat model (quantizer).")  # fmt: skip
    hf_awq_tool_repo: str | None = setting("HF_AWQ_TOOL_REPO", None, "Hub repository of the quantized tool model (quantizer).")  # fmt: skip
    hf_awq_branch: str = setting("HF_AWQ_BRANCH", "main", "Branch that uploads go to (quantizer).")
    hf_awq_private: bool = setting("HF_AWQ_PRIVATE", True, "1 creates repositories private (quantizer).")
    hf_awq_allow_create: bool = setting("HF_AWQ_ALLOW_CREATE", True, "1 creates missing repositories; 0 expects them (quantizer).")  # fmt: skip
    hf_awq_commit_msg_chat: str | None = setting("HF_AWQ_COMMIT_MSG_CHAT", None, "Commit message of the chat upload (quantizer).")  # fmt: skip
    hf_awq_commit_msg_tool: str | None = setting("HF_AWQ_COMMIT_MSG_TOOL", None, "Commit message of the tool upload (quantizer).")  # fmt: skip

    # --- operation
    state_dir: Path | None = setting("YAP_TEXT_STATE_DIR", None, "Where converted and quantized models are kept, and what lets later starts on CUDA open both engines at once: the size of each KV cache. Default: `STATE_DIRECTORY` under systemd, else `~/.local/state/yap-text`.")  # fmt: skip
    log_level: Literal["debug", "info", "warning", "error"] = setting("LOG_LEVEL", "info", "Least level that is logged.")  # fmt: skip
    log_format: Literal["auto", "json", "console"] = setting("LOG_FORMAT", "auto", "`auto` is JSON, and a readable form where stderr is a terminal.")  # fmt: skip
    log_text: bool = setting("LOG_TEXT", False, "1 logs what was said: utterance, decision and reply of each turn, and the words of exceptions.")  # fmt: skip
    log_address: Literal["whole", "truncated", "none"] = setting("LOG_ADDRESS", "truncated", "Addresses in the log, which are those of refused connections and requests: `whole`, `truncated` to their network (IPv4 /24, IPv6 /48), or `none`.")  # fmt: skip
    log_file: Path | None = setting("YAP_TEXT_LOG_FILE", None, "Also writes the log to this file, and opens it anew when it was rotated away.")  # fmt: skip

    # --- set by systemd, not by people
    journal_stream: str | None = setting("JOURNAL_STREAM", None, "Set by systemd: log lines then carry a priority prefix.")  # fmt: skip
    notify_socket: str | None = setting("NOTIFY_SOCKET", None, "Set by systemd (`Type=notify`): where readiness and status are told.")  # fmt: skip
    watchdog_usec: int | None = setting("WATCHDOG_USEC", None, "Set by systemd (`WatchdogSec=`): the engines are asked for a token twice in this time.", ge=1)  # fmt: skip
    listen_fds: int = setting("LISTEN_FDS", 0, "Set by systemd: 1 where it holds the listening socket (`yap-text.socket`).", ge=0, le=1)  # fmt: skip
    listen_pid: int | None = setting("LISTEN_PID", None, "Set by systemd: the process that socket is meant for.")
    credentials_directory: Path | None = setting("CREDENTIALS_DIRECTORY", None, "Set by systemd (`LoadCredential=`): files named `YAP_TEXT_API_KEY`, `HF_TOKEN`, `SESSION_STORE_KEY` and `YAP_TEXT_KEY_FILE` win over the environment.")  # fmt: skip
    state_directory: Path | None = setting("STATE_DIRECTORY", None, "Set by systemd (`StateDirectory=`).")


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
