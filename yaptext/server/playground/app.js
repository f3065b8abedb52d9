// The playground: what the page shows of one session, over client.js.
import { Yap, YapError } from "../client.js";

const MOST_TURNS = 30;
const EXAMPLE_TOOLS = [{
  name: "get_weather",
  description: "The weather in a city, now.",
  parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"], additionalProperties: false },
}];
const $ = (id) => document.getElementById(id);
const defaultKey = document.querySelector('meta[name="yap-text-key"]').content;

let yap = null;
let current = null; // the turn that was begun last
let unsentHistory = false;
const firstTokens = []; // ms, of the latest turns

// --- connection

function connectNow() {
  yap?.close();
  const [kind, secret, sessionId] = [kindOfAccess(), $("secret").value.trim(), $("session-id").value];
  sessionStorage.setItem("session", sessionId);
  sessionStorage.setItem("kind", kind);
  if (kind === "key") sessionStorage.setItem("key", secret);
  else sessionStorage.removeItem("key");
  if (!secret) {
    showError(`Give ${kind === "key" ? "an API key" : "a ticket"} to connect.`);
    openDetails("connection", "secret");
    return;
  }
  const access = kind === "key" ? { key: secret } : { ticket: once(secret) };
  const mine = new Yap({ ...access, sessionId, onstate: (state) => mine === yap && showState(state) });
  yap = mine;
  mine.open().then(() => resume(mine), () => {}); // showState reports a failure
}

function once(ticket) {
  let used = false;
  return () => {
    if (used) throw Object.assign(new YapError("ticket_failed", "The ticket is used up. Give a new one."), { retryable: false });
    used = true;
    return ticket;
  };
}

function kindOfAccess() {
  return document.querySelector('input[name="kind"]:checked').value;
}

function showState({ state, error, waitMs }) {
  const texts = {
    connecting: "Connecting",
    connected: "Connected",
    waiting: `${explain(error)} Next try in ${Math.max(1, Math.round(waitMs / 1000))} s`,
    disconnected: "Not connected",
    closed: "Not connected",
  };
  $("state").dataset.state = state;
  $("state").textContent = texts[state];
  if (state === "connected") showError("");
  if (state === "disconnected") {
    showError(explain(error));
    if (!error.retryable) openDetails("connection", "secret");
  }
}

function explain(error) {
  if (error?.code === "authentication_failed" && error.message.startsWith("Authentication required")) {
    return `The service does not accept this ${kindOfAccess()}.`;
  }
  return error?.message ?? "";
}

function showError(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

function openDetails(id, field) {
  $(id).open = true;
  $(field).focus();
}

/** Shows what the service still has of the session, and which styles it knows. */
async function resume(mine) {
  $("utterance").focus();
  const found = await mine.session().catch(() => null);
  if (mine !== yap || !found) return;
  showSession(found);
  if (!$("log").querySelector(".message")) {
    for (const { role, content } of found.history) message(role === "user" ? "user" : "assistant", content);
  }
  if (kindOfAccess() === "key") {
    const answer = await fetch(new URL("../status", import.meta.url), { headers: { "X-API-Key": $("secret").value.trim() } });
    const { personas = [] } = answer.ok ? await answer.json() : {};
    $("styles").replaceChildren(...personas.map((name) => new Option(name)));
  }
}

function newSession() {
  $("session-id").value = `playground-${crypto.getRandomValues(new Uint32Array(1))[0].toString(36)}`;
  clearLog();
}

// --- turns

function send() {
  const text = $("utterance").value.trim();
  if (!text) return;
  if (!yap) return connectNow();
  const fields = turnFields();
  if (!fields) return;
  unsentHistory = false;
  $("utterance").value = "";
  showError("");
  message("user", text);
  show(yap.turn(text, fields));
}

/** Undefined if a field is wrong; the page then says which. */
function turnFields() {
  const fields = {
    persona_style: $("style").value.trim() || null,
    persona_text: $("persona-text").value.trim() || null,
    assistant_gender: $("assistant-gender").value || null,
    user_identity: $("user-identity").value || null,
    await_tools: $("await").checked || undefined,
    tools: null,
  };
  try {
    if ($("tools").value.trim()) fields.tools = JSON.parse($("tools").value);
    if (fields.tools && !Array.isArray(fields.tools)) throw new Error("a list is needed");
  } catch (error) {
    $("tools-error").textContent = `Not a JSON list: ${error.message}`;
    $("tools-error").hidden = false;
    openDetails("tool-settings", "tools");
    return undefined;
  }
  $("tools-error").hidden = true;
  if (unsentHistory) fields.history_text = $("history").value || null;
  return fields;
}

async function show(turn) {
  const begun = performance.now();
  const gaps = [];
  const bubble = message("assistant", "");
  const text = bubble.appendChild(document.createTextNode(""));
  bubble.classList.add("running");
  let last = null;
  current = turn;
  $("stop").disabled = false;
  for (const id of ["first", "decision", "between", "tokens", "cached", "total"]) $(id).textContent = "-";
  try {
    for await (const event of turn) {
      const now = performance.now();
      if (event.type === "toolcall") {
        bubble.before(decisionLine(event));
        if (turn === current) $("decision").textContent = ms(event.tool_ms);
        toEnd();
      } else if (event.type === "token") {
        text.appendData(event.text);
        if (last === null) firstTokens.push(now - begun);
        else gaps.push(now - last);
        last = now;
        if (turn === current) showLive(firstTokens.at(-1), gaps);
        toEnd();
      }
    }
    if (turn === current) showUsage(turn);
    if (turn.cancelled) bubble.classList.add("cut");
    if (turn.text) $("spoken").textContent = `${turn.cancelled ? "Interrupted reply" : "Reply"}: ${turn.text}`;
    if (turn.calls.length) bubble.after(resultForm(turn));
  } catch (error) {
    const line = element("p", "failed", `${error.code}: ${explain(error)}`);
    line.role = "alert";
    bubble.after(line);
  }
  bubble.classList.remove("running");
  if (!turn.text && !turn.cancelled) bubble.remove();
  if (turn === current) $("stop").disabled = true;
  toEnd();
  if ($("session-details").open && turn === current) refreshSession();
}

function decisionLine({ status, raw, reason }) {
  const line = element("p", `decision ${status}`, status === "yes" ? "Calls " : `No tool${reason ? ` (${reason})` : ""}`);
  for (const call of raw) line.append(element("code", "", `${call.name}(${JSON.stringify(call.arguments)})`), " ");
  return line;
}

/** Asks for what the calls of a turn returned. */
function resultForm(turn) {
  const form = element("form", "results");
  const fields = turn.calls.map(({ id, name }) => {
    const label = element("label", "", `Result of ${name}`);
    const field = label.appendChild(document.createElement("input"));
    field.autocomplete = "off";
    form.append(label);
    return { id, field };
  });
  const buttons = form.appendChild(element("div", "buttons"));
  buttons.append(element("button", "", "Send result"));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    form.replaceWith(element("p", "decision yes", `Result: ${fields.map(({ field }) => field.value).join(", ")}`));
    show(yap.toolResult(turn, fields.map(({ id, field }) => ({ id, content: field.value }))));
    $("utterance").focus();
  });
  if (turn === current) queueMicrotask(() => fields[0].field.focus());
  return form;
}

function message(role, text) {
  $("empty")?.remove();
  const bubble = element("p", `message ${role}`, text);
  bubble.prepend(element("span", "unseen", role === "user" ? "You: " : "Assistant: "));
  $("log").append(bubble);
  toEnd();
  return bubble;
}

function clearLog() {
  $("log").replaceChildren();
  current = null;
}

/** Follows the reply, unless the user has scrolled up. */
function toEnd() {
  const log = $("log");
  if (log.scrollHeight - log.scrollTop - log.clientHeight < 160) log.scrollTop = log.scrollHeight;
}

function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

// --- figures

function ms(value) {
  return value == null ? "-" : `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`;
}

function quantile(values, share) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
}

function showLive(first, gaps) {
  $("first").textContent = ms(first);
  $("tokens").textContent = gaps.length + 1;
  if (gaps.length) $("between").textContent = ms(quantile(gaps, 0.5));
  if (gaps.length % 8 < 2) drawBoth(gaps);
  lastGaps = gaps;
}

let lastGaps = [];

function showUsage({ usage, timings }) {
  if (usage) {
    $("tokens").textContent = usage.completion_tokens;
    $("cached").textContent = `${usage.prompt_tokens}, ${usage.cached_tokens}`;
  }
  if (timings) $("total").textContent = ms(timings.total_ms);
  drawBoth(lastGaps);
}

function drawBoth(gaps) {
  firstTokens.splice(0, firstTokens.length - MOST_TURNS);
  plot($("plot-first"), firstTokens, "bars");
  $("plot-first").setAttribute("aria-label", `First token of the last turns: ${firstTokens.map(Math.round).join(", ")} ms`);
  plot($("plot-between"), gaps, "line");
  if (gaps.length) {
    const [half, most] = [quantile(gaps, 0.5), quantile(gaps, 0.95)];
    $("plot-between").setAttribute("aria-label", `Between tokens: p50 ${ms(half)}, p95 ${ms(most)}`);
  }
}

function plot(svg, values, kind) {
  const [left, right, top, bottom] = [34, 318, 8, 70];
  const most = Math.max(...values, 1);
  const y = (value) => bottom - (bottom - top) * (value / most);
  const parts = [
    svgPart("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }),
    svgPart("line", { class: "axis", x1: left, x2: right, y1: top, y2: top }),
    svgPart("text", { x: left - 5, y: top + 3, "text-anchor": "end" }, most < 10 ? most.toFixed(1) : Math.round(most)),
    svgPart("text", { x: left - 5, y: bottom + 3, "text-anchor": "end" }, 0),
  ];
  if (kind === "bars") {
    const step = (right - left) / Math.max(values.length, 10);
    for (const [index, value] of values.entries()) {
      parts.push(svgPart("rect", { class: "mark", x: left + index * step + 1, width: step - 3, y: y(value), height: bottom - y(value), rx: 1.5 }));
    }
  } else if (values.length > 1) {
    const step = (right - left) / (values.length - 1);
    parts.push(svgPart("polyline", { class: "line", points: values.map((value, index) => `${left + index * step},${y(value)}`).join(" ") }));
  }
  svg.replaceChildren(...parts);
}

function svgPart(tag, attributes, text = "") {
  const part = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) part.setAttribute(name, value);
  part.textContent = text;
  return part;
}

// --- session

async function refreshSession() {
  try {
    showSession(await yap.session());
  } catch (error) {
    showError(explain(error));
  }
}

function showSession({ type, ...state }) {
  $("session").textContent = JSON.stringify(state, null, 2);
}

// --- the prompt

let prompts = null;

/** Asks for the prompt of the message in the composer; without one, of an assistant that speaks by itself. */
async function refreshPrompt() {
  const fields = turnFields();
  if (!fields) return;
  if (kindOfAccess() !== "key" || !$("secret").value.trim()) return showPrompts(null, "This takes a key: a ticket only opens a connection.");
  const frame = { type: "start", session_id: $("session-id").value, user_utterance: $("utterance").value.trim() || null, ...fields };
  try {
    const answer = await fetch(new URL("prompt", import.meta.url), {
      method: "POST", headers: { "X-API-Key": $("secret").value.trim(), "Content-Type": "application/json" }, body: JSON.stringify(frame),
    });
    const text = await answer.text();
    if (answer.ok) return showPrompts(JSON.parse(text), "");
    let reason = text;
    try { reason = JSON.parse(text).message; } catch { /* it is no JSON: the text says it */ }
    showPrompts(null, reason || `The service answers with status ${answer.status}.`);
  } catch (error) {
    showPrompts(null, `The service cannot be reached: ${error.message}`);
  }
}

function showPrompts(found, error) {
  prompts = found;
  $("prompt-error").textContent = error;
  $("prompt-error").hidden = !error;
  $("prompts").hidden = !found;
  for (const role of found ? ["chat", "tool"] : []) {
    const prompt = found[role];
    $(`prompt-${role}`).hidden = !prompt;
    $(`prompt-${role}-facts`).textContent = prompt
      ? `${prompt.model}: ${prompt.ids.length} tokens; the first ${prompt.prefix_tokens} stay the same in later turns. Format ${prompt.format}.`
      : "It is not asked.";
    if (prompt) $(`prompt-${role}`).textContent = $("as-ids").checked ? prompt.ids.join(" ") : prompt.text;
  }
}

// --- what the user does

$("access").addEventListener("submit", (event) => {
  event.preventDefault();
  if (yap && yap.sessionId !== $("session-id").value) clearLog();
  connectNow();
});
$("new-session").addEventListener("click", () => {
  newSession();
  connectNow();
});
for (const radio of document.querySelectorAll('input[name="kind"]')) {
  radio.addEventListener("change", () => {
    $("secret-label").textContent = radio.value === "key" ? "API key" : "Ticket";
    $("secret").value = "";
  });
}
$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("utterance").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.isComposing && current && !current.over) current.cancel().catch(() => {});
});
$("stop").addEventListener("click", () => {
  current?.cancel().catch(() => {});
  $("utterance").focus();
});
$("history").addEventListener("input", () => { unsentHistory = true; });
$("example-tools").addEventListener("click", () => {
  $("tools").value = JSON.stringify(EXAMPLE_TOOLS, null, 2);
  $("await").checked = true;
});
$("show-session").addEventListener("click", refreshSession);
$("session-details").addEventListener("toggle", () => {
  if ($("session-details").open && yap) refreshSession();
});
$("forget").addEventListener("click", async () => {
  await yap?.forget().then(clearLog, (error) => showError(explain(error)));
  if (yap) refreshSession();
});

$("show-prompt").addEventListener("click", refreshPrompt);
$("as-ids").addEventListener("change", () => { if (prompts) showPrompts(prompts, ""); });

if (sessionStorage.getItem("kind") === "ticket") document.querySelector('input[value="ticket"]').click();
$("secret").value = kindOfAccess() === "key" ? sessionStorage.getItem("key") ?? defaultKey : "";
if (sessionStorage.getItem("session")) $("session-id").value = sessionStorage.getItem("session");
else newSession();
plot($("plot-first"), [], "bars");
plot($("plot-between"), [], "line");
if ($("secret").value) connectNow();
else openDetails("connection", "secret");
