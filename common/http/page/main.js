// The page: hands on what happens, and draws at most once a frame.

import { Burst } from "./burst.js";
import { Chat } from "./chat.js";
import { kill } from "./client.js";
import { Decisions } from "./decisions.js";
import { el, number, percent, seldom, write } from "./dom.js";
import { followEvents } from "./feed.js";
import { Flight } from "./flight.js";
import { Picture } from "./picture.js";
import { lose, nameOf, Pipeline } from "./pipeline.js";

const NEWEST = 1200; // milliseconds that the newest decision stays in the picture, under load
const OWN = 4000; // and one of this page's own

const pipeline = new Pipeline();
const picture = new Picture(confirmKill);
const flight = new Flight(picture, pipeline);
const decisions = new Decisions(onSelect);
const follow = document.getElementById("follow");
const said = document.getElementById("said");

let shown = null; // the request in the picture
let own = null; // the id of the chat's last one
let until = 0; // when another one may take its place
let connected = false;

const chat = new Chat(pipeline, {
  onAsk(id, text) {
    own = id;
    until = performance.now() + OWN;
    pipeline.own(id, text);
    if (decisions.selected) decisions.select(null);
  },
  onShow(id) {
    const request = pipeline.requests.get(id);
    if (request?.decision) decisions.show(request);
    else write(said, "This request was not one of those that are shown.");
  },
});
new Burst(chat, pipeline);
follow.onclick = () => decisions.select(null);

function onSelect(request) {
  follow.hidden = !request;
  if (request) shown = request;
  changed();
}

function onEvent(name, event) {
  const now = performance.now();
  const request = pipeline.add(name, event);
  if (name === "hello" || event.stage === "processor") chat.listModels();
  if (request) {
    decisions.add(request);
    flight.follow(request, now);
    chat.follow(request);
    const mine = request.id === own;
    if (request.decision && !decisions.selected && (now > until || mine)) {
      if (shown !== request) until = now + (mine ? OWN : NEWEST);
      shown = request;
    }
  }
  changed();
}

function onState(is) {
  connected = is;
  changed();
}

async function confirmKill(engine) {
  const dialog = document.getElementById("kill");
  write(document.getElementById("kill-title"), `Kill engine ${nameOf(engine)}?`);
  dialog.returnValue = "";
  dialog.showModal();
  await new Promise((closed) => dialog.addEventListener("close", closed, { once: true }));
  if (dialog.returnValue !== "kill") return;
  try {
    await kill(engine.id);
    lose(engine);
    write(said, `Engine ${nameOf(engine)} was killed.`);
  } catch (error) {
    write(said, error.message);
  }
  changed();
}

// Drawing

const figures = Object.fromEntries(
  ["answers/s", "in progress", "blocks served from a cache"].map((name) => {
    const value = el("dd");
    document.getElementById("figures").append(el("div", {}, el("dt", { textContent: name }), value));
    return [name, value];
  }),
);

function drawFigures() {
  const workers = pipeline.engines.filter(({ worker }) => worker);
  const sum = (get) => workers.reduce((total, engine) => total + get(engine), 0);
  write(figures["answers/s"], number(sum(({ rate }) => (rate < 0.05 ? 0 : rate))));
  write(figures["in progress"], number(sum(({ worker }) => worker.requests)));
  const [cached, all] = [sum(({ worker }) => worker.overlap_blocks), sum(({ worker }) => worker.routed_blocks)];
  write(figures["blocks served from a cache"], all ? percent(cached, all) : "–");
  const node = document.getElementById("connection");
  const busy = pipeline.share < 1 ? `live, 1 of ${Math.round(1 / pipeline.share)} requests shown` : "live";
  write(node, connected ? busy : "disconnected, trying again …");
  document.body.classList.toggle("disconnected", !connected);
  document.body.classList.toggle("busy", pipeline.share < 1);
}

const drawCards = seldom(150, () => {
  if (picture.draw(pipeline, shown)) flight.moved();
  drawFigures();
});
const drawList = seldom(400, () => decisions.draw());

let moving = false;
const drawFlight = seldom(30, (now) => (moving = flight.draw(now, shown))); // half the frames are smooth enough

let frame = 0;
let dirty = true;

/** Something is to be drawn. */
function changed() {
  dirty = true;
  frame ||= requestAnimationFrame(draw);
}

function draw(now) {
  frame = 0;
  if (dirty && drawCards(now)) dirty = false;
  drawList(now);
  drawFlight(now);
  if (dirty || moving) frame = requestAnimationFrame(draw);
}

setInterval(changed, 500); // what waits is drawn, and what is in progress grows
followEvents(onEvent, onState);
