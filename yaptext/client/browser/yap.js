// A conversation with Yap Text from a browser: one session, its turns, and a socket that reconnects. Types: client.d.ts.

const RETRIED_CLOSES = new Set([1001, 1005, 1006, 1011, 1012, 1013, 1015]);
const RETRYABLE = new Set([
  "server_at_capacity", "rate_limited", "going_away", "engine_failed", "internal", "connection_lost", "ticket_failed",
]);
const CLOSING = new Set(["authentication_failed", "server_at_capacity", "going_away", "slow_client"]);
const PING = '{"type":"ping"}';
const ANSWERS = new Set(["warmed", "session", "forgotten"]);
const TIMEOUT_MS = 15_000;
const FIRST_WAIT_MS = 250;
const LONGEST_WAIT_MS = 10_000;

/** `code` is the protocol's `error_code`, or one of the client's own: `connection_lost`, `ticket_failed`, `closed`. */
export class YapError extends Error {
  constructor(code, message, retryAfterMs = null) {
    super(message);
    this.name = "YapError";
    this.code = code;
    this.retryAfterMs = retryAfterMs;
    this.retryable = retryAfterMs !== null || RETRYABLE.has(code);
  }
}

/** Opens a session. Resolves when the service has taken the connection; rejects with a `YapError`. */
export async function connect(options = {}) {
  const yap = new Yap(options);
  await yap.open();
  return yap;
}

/** One turn: an async iterable of the frames that belong to it. Leaving a `for await` early cancels it. */
export class Turn {
  #yap;
  #settle;
  #wake = () => {};
  #error = null;
  #over = false;

  constructor(yap, frame, functions) {
    this.#yap = yap;
    this.frame = frame;
    this.functions = functions;
    this.number = 0;
    this.events = [];
    this.text = "";
    this.decisions = [];
    this.usage = null;
    this.timings = null;
    this.finishReason = null;
    this.cancelled = false;
    this.done = new Promise((resolve, reject) => { this.#settle = { resolve, reject }; });
    this.done.catch(() => {}); // who only iterates gets the error there
  }

  get over() {
    return this.#over;
  }

  /** On the utterance; `decisions` has those after results of tools, too. Null if no tool model is deployed. */
  get decision() {
    return this.decisions[0] ?? null;
  }

  /** Those that wait for a result after the end of the turn. */
  get calls() {
    return this.finishReason === "tool_calls" ? this.decisions.at(-1).raw : [];
  }

  async *[Symbol.asyncIterator]() {
    let next = 0;
    try {
      for (;;) {
        while (next < this.events.length) yield this.events[next++];
        if (this.#error) throw this.#error;
        if (this.#over) return;
        await new Promise((resolve) => {
          const others = this.#wake;
          this.#wake = () => { others(); resolve(); };
        });
      }
    } finally {
      this.cancel();
    }
  }

  /** Stops the reply. `heardText` or `heardChars` (code points) say how much of it the user heard, also after its end. */
  cancel({ heardText, heardChars } = {}) {
    return this.#yap.cancelTurn(this, { heard_text: heardText, heard_chars: heardChars });
  }

  take(event) {
    this.events.push(event);
    if (event.type === "ack") this.number = event.turn;
    else if (event.type === "toolcall") this.decisions.push(event);
    else if (event.type === "token") this.text += event.text;
    else if (event.type === "done") {
      for (const [name, tokens] of Object.entries(event.usage ?? {})) {
        this.usage = { ...this.usage, [name]: (this.usage?.[name] ?? 0) + tokens };
      }
      this.timings = event.timings ?? this.timings;
      this.finishReason = event.finish_reason ?? null;
      this.cancelled = event.cancelled ?? false;
    }
    this.#wakeAll();
  }

  end(error = null) {
    if (this.#over) return;
    this.#over = true;
    this.#error = error;
    if (error) this.#settle.reject(error);
    else this.#settle.resolve(this);
    this.#wakeAll();
  }

  #wakeAll() {
    const wake = this.#wake;
    this.#wake = () => {};
    wake();
  }
}

/** A session on the service. Every method reconnects first, if it has to. */
export class Yap {
  #url;
  #ticket;
  #tools;
  #attempts;
  #onstate;
  #timeoutMs;
  #socket = null;
  #end = () => {}; // of the socket: says why, and whether to open another at once
  #timer = null; // runs while the service owes an answer, or a reply its next token
  #opening = null;
  #closed = false;
  #stopWaiting = () => {};
  #unsent = null; // the turn that waits for a connection
  #calling = null; // the turn whose functions run
  #turns = new Map(); // by number: those that run
  #asked = []; // requests without an answer, oldest first
  #fenced = []; // what was sent, up to the pong behind it: errors that arrive before that are of the oldest of these
  #last = null;

  constructor({ url = new URL(".", import.meta.url).href, key, ticket, sessionId, tools, attempts = 8, timeoutMs = TIMEOUT_MS, onstate } = {}) {
    if ((key === undefined) === (ticket === undefined)) throw new TypeError("connect() needs either key or ticket");
    this.#url = new URL(url);
    if (!this.#url.pathname.endsWith("/ws")) this.#url.pathname = this.#url.pathname.replace(/\/?$/, "/ws");
    this.#url.protocol = this.#url.protocol.replace("http", "ws");
    this.#ticket = ticket ?? (() => ticketFor(this.#url, key));
    this.#tools = tools;
    this.#attempts = attempts;
    this.#timeoutMs = timeoutMs;
    this.#onstate = onstate ?? (() => {});
    this.sessionId = sessionId ?? randomId();
  }

  /** Begins a turn; one that runs is interrupted. `fields` are more of the frame `start`, under the wire's names. */
  turn(text, fields = {}) {
    const { tools = this.#tools, ...others } = fields;
    const frame = { type: "start", session_id: this.sessionId, user_utterance: text, ...others };
    const functions = new Map();
    if (tools !== undefined) {
      frame.tools = tools && tools.map(({ run, ...tool }) => {
        if (!run) return tool;
        functions.set((tool.function ?? tool).name, run);
        return { ...tool, await: true };
      });
    }
    return this.#begin(new Turn(this, frame, functions));
  }

  /** Answers the calls of a turn that ended with `tool_calls`: `results` are `{id, content}`. What follows is a turn. */
  toolResult(turn, results, fields = {}) {
    const frame = { type: "tool_result", session_id: this.sessionId, turn: turn.number, results, ...fields };
    return this.#begin(new Turn(this, frame, turn.functions));
  }

  /** Computes a persona, and a history if there is one, before the turn that uses them. Resolves to `warmed`. */
  warm(fields = {}) {
    const type = "history" in fields || "history_text" in fields ? "warm_history" : "warm_persona";
    return this.#request("warmed", { type, session_id: this.sessionId, ...fields });
  }

  /** Resolves to the `ack`. */
  setPersona(fields) {
    return this.#request("set_persona", { type: "set_persona", session_id: this.sessionId, ...fields });
  }

  /** Resolves to `session`: the session as its next turn will find it. */
  session() {
    return this.#request("session", { type: "get_session", session_id: this.sessionId });
  }

  /** Deletes the session on the service. */
  forget() {
    return this.#request("forgotten", { type: "forget", session_id: this.sessionId });
  }

  /** Ends the connection; the session stays on the service for a while. */
  close() {
    this.#closed = true;
    this.#stopWaiting();
    const socket = this.#socket;
    if (socket?.readyState === WebSocket.OPEN) socket.send('{"type":"end"}');
    this.#lost(new YapError("closed", "The client closed the connection."));
    this.#tell("closed");
  }

  // --- turns

  #begin(turn) {
    superseded(this.#calling);
    this.#last = turn;
    if (this.#socket?.readyState === WebSocket.OPEN) {
      this.#sendTurn(turn);
      return turn;
    }
    superseded(this.#unsent);
    this.#unsent = turn;
    this.open().catch((error) => {
      if (this.#unsent === turn) this.#unsent = null;
      turn.end(error);
    });
    return turn;
  }

  #sendTurn(turn) {
    this.#ask(turn.frame, { answer: "turn", turn, fail: (error) => turn.end(error) });
  }

  cancelTurn(turn, heard) {
    if (turn === this.#unsent) {
      this.#unsent = null;
      superseded(turn);
    } else if (turn === this.#calling) {
      superseded(turn);
    } else if (turn === this.#last && this.#socket && (!turn.over || Object.values(heard).some((value) => value != null))) {
      this.#send({ type: "cancel", ...heard }, { fail: () => {} }); // over its limit: the reply goes on
    }
    return turn.done;
  }

  async #runTools(turn) {
    this.#calling = turn;
    try {
      const results = await Promise.all(turn.calls.map(async ({ id, name, arguments: given }) => {
        try {
          return { id, content: (await turn.functions.get(name)(given)) ?? null };
        } catch (error) {
          return { id, content: { error: String(error?.message ?? error) } };
        }
      }));
      await this.open();
      if (turn.over) return; // the user spoke meanwhile
      turn.frame = { type: "tool_result", session_id: this.sessionId, turn: turn.number, results };
      this.#sendTurn(turn);
    } catch (error) {
      turn.end(error);
    } finally {
      if (this.#calling === turn) this.#calling = null;
    }
  }

  // --- frames

  #send(frame, asked) {
    this.#fenced.push(asked);
    this.#socket.send(JSON.stringify(frame));
    this.#socket.send(PING);
    this.#watch();
  }

  /** A browser keeps a socket whose network is gone. The service answers a ping at once, unless the frames before it are
   *  still being sent: without that the socket is lost. A turn that is silent for so long is asked for by a ping. */
  #watch(unsent = Infinity) {
    this.#timer ??= setTimeout(() => {
      this.#timer = null;
      if (!this.#fenced.length) {
        this.#fenced.push({ answered: true });
        this.#socket.send(PING);
        this.#watch();
        return;
      }
      const left = this.#socket.bufferedAmount;
      if (left > 0 && left < unsent) this.#watch(left);
      else this.#end(new YapError("connection_lost", `The service did not answer in ${this.#timeoutMs} ms.`), true);
    }, this.#timeoutMs);
  }

  #unwatch() {
    clearTimeout(this.#timer);
    this.#timer = null;
  }

  #ask(frame, asked) {
    this.#asked.push(asked);
    this.#send(frame, asked);
  }

  async #request(answer, frame) {
    await this.open();
    return new Promise((resolve, reject) => this.#ask(frame, { answer, resolve, fail: reject }));
  }

  /** The oldest request that this answers. */
  #answered(answer) {
    const index = this.#asked.findIndex((asked) => asked.answer === answer);
    if (index < 0) return undefined;
    const [asked] = this.#asked.splice(index, 1);
    asked.answered = true;
    return asked;
  }

  #receive(frame) {
    if (frame.type === "ack" && frame.for === "set_persona") {
      this.#answered("set_persona")?.resolve(frame);
    } else if (frame.type === "ack") {
      const turn = this.#answered("turn")?.turn;
      if (!turn) return;
      this.#turns.set(frame.turn, turn);
      turn.take(frame);
    } else if (frame.type === "pong") {
      this.#fenced.shift();
    } else if (frame.type === "done") {
      const turn = this.#turns.get(frame.turn);
      if (!turn) return;
      this.#turns.delete(frame.turn);
      turn.take(frame);
      if (turn.calls.length && turn.calls.every(({ name }) => turn.functions.has(name))) this.#runTools(turn);
      else turn.end();
    } else if (frame.type === "error") {
      this.#fail(frame);
    } else if (frame.turn !== undefined) {
      this.#turns.get(frame.turn)?.take(frame);
    } else if (ANSWERS.has(frame.type)) {
      this.#answered(frame.type)?.resolve(frame);
    }
  }

  #fail(frame) {
    const error = errorOf(frame);
    const turn = this.#turns.get(frame.turn);
    if (turn) {
      this.#turns.delete(frame.turn);
      turn.end(error);
    } else if (CLOSING.has(error.code)) {
      return; // it is reported when the connection ends
    } else {
      const refused = this.#fenced.find((sent) => !sent.answered) ?? this.#answered("warmed"); // that can fail later
      if (!refused) return;
      refused.answered = true;
      this.#asked = this.#asked.filter((asked) => asked !== refused);
      refused.fail(error);
    }
  }

  // --- the connection

  /** Resolves when there is a connection. Tries again while that may help, as long as the service asks to wait. */
  open() {
    if (this.#closed) return Promise.reject(new YapError("closed", "The client closed the connection."));
    if (this.#socket) return Promise.resolve();
    this.#opening ??= this.#open().finally(() => { this.#opening = null; });
    return this.#opening;
  }

  async #open() {
    for (let attempt = 1; ; attempt++) {
      this.#tell("connecting");
      try {
        this.#adopt(await this.#dial());
        return;
      } catch (error) {
        if (!error.retryable || attempt >= this.#attempts || this.#closed) {
          if (!this.#closed) this.#tell("disconnected", { error });
          throw error;
        }
        const longest = Math.min(FIRST_WAIT_MS * 2 ** attempt, LONGEST_WAIT_MS);
        const waitMs = error.retryAfterMs ?? longest * (0.5 + Math.random() / 2);
        this.#tell("waiting", { error, waitMs });
        await new Promise((resolve) => {
          const timer = setTimeout(resolve, waitMs);
          this.#stopWaiting = () => { clearTimeout(timer); resolve(); };
        });
        if (this.#closed) throw new YapError("closed", "The client closed the connection.");
      }
    }
  }

  /** A socket that the service has taken: it answered a ping. A refusal comes as a frame, since a browser sees no status. */
  async #dial() {
    const url = new URL(this.#url);
    try {
      url.searchParams.set("ticket", await this.#ticket());
    } catch (error) {
      if (error instanceof YapError) throw error;
      throw new YapError("ticket_failed", `No ticket: ${error?.message ?? error}`);
    }
    const socket = new WebSocket(url);
    try {
      await new Promise((resolve, reject) => {
        const late = () => reject(new YapError("connection_lost", "The service does not answer."));
        const timer = setTimeout(late, this.#timeoutMs);
        socket.onopen = () => socket.send(PING);
        socket.onclose = (event) => reject(lostBy(event));
        socket.onmessage = ({ data }) => {
          const frame = parsed(data);
          if (!frame) reject(unreadable());
          else if (frame.type === "error") reject(errorOf(frame));
          else resolve();
        };
        socket.addEventListener("close", () => clearTimeout(timer));
        socket.addEventListener("message", () => clearTimeout(timer));
      });
    } catch (error) {
      socket.onclose = socket.onmessage = null;
      socket.close();
      throw error;
    }
    return socket;
  }

  #adopt(socket) {
    if (this.#closed) {
      socket.onclose = socket.onmessage = null;
      socket.close();
      throw new YapError("closed", "The client closed the connection.");
    }
    let refusal = null;
    this.#socket = socket;
    const end = (error, again) => {
      if (this.#closed || this.#socket !== socket) return;
      socket.onclose = socket.onmessage = null;
      socket.close();
      this.#lost(error);
      this.#tell("disconnected", { error });
      // Otherwise the next turn connects: nobody waits for an idle session.
      if (again || this.#unsent) this.#reopen(error);
    };
    this.#end = end;
    socket.onclose = (event) => end(refusal ?? lostBy(event), RETRIED_CLOSES.has(event.code));
    socket.onmessage = ({ data }) => {
      const frame = parsed(data);
      if (!frame) {
        end(unreadable(), false);
        return;
      }
      this.#unwatch();
      if (frame.type === "error" && frame.turn === undefined && CLOSING.has(frame.error_code)) refusal = errorOf(frame);
      this.#receive(frame);
      if (this.#fenced.length || this.#turns.size) this.#watch();
    };
    this.#tell("connected");
    if (this.#unsent) {
      const turn = this.#unsent;
      this.#unsent = null;
      this.#sendTurn(turn);
    }
  }

  #reopen(error) {
    const wait = error.retryAfterMs ?? 0;
    this.#opening ??= (async () => {
      if (wait) this.#tell("waiting", { error, waitMs: wait });
      await new Promise((resolve) => {
        const timer = setTimeout(resolve, wait);
        this.#stopWaiting = () => { clearTimeout(timer); resolve(); };
      });
      if (this.#closed) throw new YapError("closed", "The client closed the connection.");
      await this.#open();
    })().finally(() => { this.#opening = null; });
    this.#opening.catch((failure) => {
      this.#unsent?.end(failure);
      this.#unsent = null;
    });
  }

  /** What waits for an answer fails. A turn that a restarting service did not begin waits for the next connection. */
  #lost(error) {
    this.#unwatch();
    this.#socket = null;
    const [asked, running] = [this.#asked, [...this.#turns.values()]];
    this.#asked = [];
    this.#fenced = [];
    this.#turns.clear();
    for (const turn of running) turn.end(error);
    for (const request of asked) {
      if (error.code === "going_away" && request.turn && request.turn === this.#last) this.#unsent = request.turn;
      else request.fail(error);
    }
    if (this.#closed) {
      this.#unsent?.end(error);
      this.#unsent = null;
    }
  }

  #tell(state, { error = null, waitMs = 0 } = {}) {
    try {
      this.#onstate({ state, error, waitMs });
    } catch (failure) {
      queueMicrotask(() => { throw failure; }); // the page's, as of an event handler
    }
  }
}

function superseded(turn) {
  if (!turn || turn.over) return;
  turn.take({ type: "done", turn: turn.number, cancelled: true, finish_reason: "cancelled" });
  turn.end();
}

/** A frame; null for what is none. */
function parsed(data) {
  try {
    const frame = JSON.parse(data);
    return typeof frame?.type === "string" ? frame : null;
  } catch {
    return null;
  }
}

function unreadable() {
  return new YapError("connection_lost", "The service sent a frame that cannot be read.");
}

function errorOf({ error_code: code, message, retry_after_ms: retryAfterMs }) {
  return new YapError(code, message, retryAfterMs ?? null);
}

function lostBy({ code, reason }) {
  if (code === 1009) return new YapError("bad_message", "The frame is larger than the service allows (MAX_FRAME_BYTES).");
  return new YapError("connection_lost", `The connection ended (${code}${reason && `: ${reason}`}).`);
}

/** A browser cannot set a header on a WebSocket, and an address gets logged: so the key buys a ticket, in a header. */
async function ticketFor(socketUrl, key) {
  const url = new URL(socketUrl);
  url.protocol = url.protocol.replace("ws", "http");
  url.pathname = url.pathname.replace(/\/ws$/, "/ticket");
  url.search = "";
  let response;
  try {
    response = await fetch(url, { method: "POST", headers: { "X-API-Key": key }, cache: "no-store" });
  } catch (error) {
    throw new YapError("connection_lost", `The service cannot be reached: ${error.message}`);
  }
  const body = await response.json().catch(() => ({}));
  if (response.ok) return body.ticket;
  const seconds = Number(response.headers.get("Retry-After")) || null;
  const waitMs = body.retry_after_ms ?? (seconds && seconds * 1000);
  const code = body.error_code ?? (response.status >= 500 ? "connection_lost" : "ticket_failed");
  throw Object.assign(new YapError(code, body.message ?? `POST /ticket: status ${response.status}`, waitMs), {
    retryable: waitMs !== null || response.status >= 500,
  });
}

function randomId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12)); // randomUUID exists only on https and localhost
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
