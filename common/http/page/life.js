// A request's life as a time line.

import { count, duration, el, number } from "./dom.js";

/** The parts of it that are over, and the one that is not. */
function partsOf({ started, asked, decided, moved, answering, ended }, now) {
  const parts = [];
  let last = started?.at ?? asked[0]?.at;
  const until = (event, name, kind) => {
    if (!event || last === undefined) return;
    parts.push({ name, kind, seconds: Math.max(0, event.at - last) }); // two machines' clocks may differ
    last = Math.max(last, event.at);
  };
  decided.forEach((decision, turn) => {
    until(asked[turn], turn ? "moved" : "template and tokens", turn ? "lost" : "wait");
    until(decision, "route", "route");
    const loss = moved[turn];
    if (answering && (!loss || answering.at < loss.at) && last < answering.at) until(answering, "queue and prefill", "prefill");
    until(loss, loss?.tokens ? "decode" : "queue and prefill", loss?.tokens ? "decode" : "prefill");
  });
  const after = answering && last >= answering.at ? "decode" : "queue and prefill";
  until(ended ?? { at: now }, decided.length ? after : "wait", decided.length ? after.split(" ").at(-1) : "wait");
  if (!ended && parts.length) parts.at(-1).name += " …";
  return parts;
}

export function life(request) {
  const parts = partsOf(request, Date.now() / 1000);
  const line = el("div", { className: "timeline", "aria-hidden": "true" });
  const list = el("ol", { className: "parts", "aria-label": "Its life" });
  for (const { name, kind, seconds } of parts) {
    const piece = el("i", { className: kind, title: `${name}: ${duration(seconds)}` });
    piece.style.flexGrow = 1000 * seconds; // shares of a sum that is more than 1, or the line would not be full
    line.append(piece);
    list.append(el("li", {}, el("i", { className: `swatch ${kind}` }), `${name} ${duration(seconds)}`));
  }
  return [line, list, facts(request)];
}

function facts({ id, ended, moved, started, asked }) {
  const list = el("dl", { className: "facts" });
  const say = (name, value) => {
    if (value !== null && value !== undefined) list.append(el("div", {}, el("dt", { textContent: name }), el("dd", { textContent: value })));
  };
  say("prompt", count(ended?.prompt_tokens ?? asked[0]?.tokens ?? 0, "token"));
  if (typeof ended?.cached_tokens === "number") say("cached, says the engine", count(ended.cached_tokens, "token"));
  if (ended?.completion_tokens) say("answer", count(ended.completion_tokens, "token"));
  if (ended?.ttft_seconds) say("first token after", duration(ended.ttft_seconds));
  if (ended?.completion_tokens > 1) {
    say("speed", `${number((ended.completion_tokens - 1) / Math.max(ended.seconds - ended.ttft_seconds, 1e-3))} tokens/s`);
  }
  for (const { worker_id, tokens, reason } of moved) say("moved", `from worker ${worker_id} after ${count(tokens, "token")}: ${reason}`);
  say("ended with", ended && (ended.error ? `${ended.status}: ${ended.error}` : ended.finish_reason ?? `status ${ended.status}`));
  say("model", started?.model);
  say("request", id);
  say("trace", ended?.trace_id);
  return list;
}
