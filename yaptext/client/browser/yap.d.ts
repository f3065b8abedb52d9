/** Types of client.js. Frames and their fields have the names of the protocol (`GET /asyncapi.json`). */

export type ErrorCode =
  | "authentication_failed" | "server_at_capacity" | "bad_message" | "text_too_long" | "unknown_persona"
  | "not_deployed" | "rate_limited" | "slow_client" | "engine_failed" | "going_away" | "internal"
  | "connection_lost" | "ticket_failed" | "closed";

export declare class YapError extends Error {
  readonly code: ErrorCode;
  /** Whether the same request may succeed later. */
  readonly retryable: boolean;
  /** Time after which it may, in milliseconds; null if the service names none. */
  readonly retryAfterMs: number | null;
  constructor(code: ErrorCode, message: string, retryAfterMs?: number | null);
}

export interface HistoryItem { role: "user" | "assistant" | "system"; content: string; name?: string }

export interface PersonaFields {
  persona_text?: string | null;
  persona_style?: string | null;
  assistant_gender?: "woman" | "man" | null;
  user_identity?: "woman" | "man" | "non-binary" | null;
}

export interface HistoryFields { history_text?: string | null; history?: HistoryItem[] | null }

export interface Sampling {
  temperature?: number; top_p?: number; top_k?: number; min_p?: number;
  repetition_penalty?: number; presence_penalty?: number; frequency_penalty?: number;
  max_tokens?: number; soft_max_tokens?: number; seed?: number; stop?: string[];
}

export interface ToolSchema { name: string; description?: string; parameters?: object }

/** With `run` the client answers the calls itself, and the turn goes on with the result. */
export type Tool = (ToolSchema | { type: "function"; function: ToolSchema }) & {
  await?: boolean;
  run?: (given: any) => unknown;
};

export interface TurnFields extends PersonaFields, HistoryFields {
  tools?: Tool[] | null;
  await_tools?: boolean;
  sampling?: Sampling;
  heard_chars?: number;
  heard_text?: string;
  speakable?: boolean;
  note?: string;
}

export interface Call { id: string; name: string; arguments: Record<string, unknown> }

export interface Usage {
  prompt_tokens: number; cached_tokens: number; completion_tokens: number; reasoning_tokens: number;
  tool_prompt_tokens: number; tool_cached_tokens: number; tool_completion_tokens: number;
}

/** Milliseconds from the arrival of the turn at the service. */
export interface Timings { queue_ms: number | null; tool_ms: number | null; ttft_ms: number | null; total_ms: number | null }

export interface Ack {
  type: "ack"; for: "start" | "set_persona" | "tool_result"; ok: boolean; session_id: string; turn: number; seed: number;
  now: string; assistant_gender: "woman" | "man" | null; persona_style: string | null; persona_text_override: boolean;
  models: { chat: string | null; tool: string | null }; ignored?: string[];
}
export interface ToolCall {
  type: "toolcall"; status: "yes" | "no"; raw: Call[]; turn: number; tool_ms: number; p?: number; reason?: string;
}
export interface Token { type: "token"; text: string; turn: number }
export interface Final { type: "final"; normalized_text: string; turn: number }
export interface Done {
  type: "done"; turn: number; session_id?: string; usage?: Usage; timings?: Timings; finish_reason?: string;
  cancelled?: boolean; cancel_ms?: number; tokens_sent?: number;
}
export type TurnEvent = Ack | ToolCall | Token | Final | Done;

export interface Warmed {
  type: "warmed"; segment: "persona_static" | "history"; persona_style: string | null; persona_text_override: boolean;
  messages: number; bytes: number; prefix_tokens: number; cached_tokens: number; prefix_stable: boolean; ms: number;
}
export interface SessionState {
  type: "session"; session_id: string; known: boolean; turns: number; assistant_gender: "woman" | "man" | null;
  user_identity: "woman" | "man" | "non-binary" | null; persona_style: string | null; persona_text: string | null;
  tools: string[] | null; history: HistoryItem[];
}
export interface Forgotten { type: "forgotten"; session_id: string; known: boolean }

export interface Turn extends AsyncIterable<TurnEvent> {
  /** Its number in the session; 0 before the `ack`. */
  readonly number: number;
  readonly events: readonly TurnEvent[];
  /** The reply so far. */
  readonly text: string;
  /** On the utterance; null if no tool model is deployed. */
  readonly decision: ToolCall | null;
  /** All of the turn: after results of tools the service decides again. */
  readonly decisions: readonly ToolCall[];
  /** Those that wait for a result after the end of the turn: `toolResult` brings them. */
  readonly calls: readonly Call[];
  /** The sum of all that ran for this turn; `timings` are those of the last. */
  readonly usage: Usage | null;
  readonly timings: Timings | null;
  readonly finishReason: string | null;
  readonly cancelled: boolean;
  readonly over: boolean;
  /** Resolves at its end, also if it was cancelled or interrupted; rejects with a `YapError`. */
  readonly done: Promise<Turn>;
  /** Stops the reply. What the user heard of it may also be said after its end. */
  cancel(heard?: { heardText?: string; heardChars?: number }): Promise<Turn>;
}

export interface State {
  state: "connecting" | "connected" | "waiting" | "disconnected" | "closed";
  error: YapError | null;
  /** Time until the next try, in milliseconds, in the state `waiting`. */
  waitMs: number;
}

export interface Options {
  /** Of the service, or of its `/ws`. Default: where this module came from. */
  url?: string;
  /** A key that this page may know: its user typed it. Otherwise use `ticket`. */
  key?: string;
  /** Called for each connection: your own backend gets a ticket by `POST /ticket`. */
  ticket?: () => string | Promise<string>;
  /** Default: a random one. The same id continues the same session. */
  sessionId?: string;
  /** Sent with every turn that has no `tools` of its own. */
  tools?: Tool[];
  /** Attempts to connect before an error is reported. Default: 8. */
  attempts?: number;
  /** Time for the service to answer before the connection counts as lost, in milliseconds. Default: 15000. */
  timeoutMs?: number;
  onstate?: (state: State) => void;
}

export declare class Yap {
  readonly sessionId: string;
  turn(text: string | null, fields?: TurnFields): Turn;
  toolResult(turn: Turn, results: { id: string; content: unknown }[], fields?: { sampling?: Sampling }): Turn;
  warm(fields?: PersonaFields & HistoryFields): Promise<Warmed>;
  setPersona(fields: PersonaFields): Promise<Ack>;
  session(): Promise<SessionState>;
  forget(): Promise<Forgotten>;
  open(): Promise<void>;
  close(): void;
}

export declare function connect(options: Options): Promise<Yap>;
