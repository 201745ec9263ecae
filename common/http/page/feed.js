// GET /events, for as long as the page is open: it connects again by itself, and says when it is disconnected.

import { events } from "./client.js"; // an EventSource could send no key

const AGAIN = 2000; // milliseconds before a connection that was lost is tried again

export async function followEvents(onEvent, onState) {
  for (;;) {
    const feed = events();
    const next = () => feed.next().catch(() => ({ done: true })); // it was lost, or never there
    for (let event = await next(); !event.done; event = await next()) {
      const { name, data } = event.value;
      if (name === "hello") onState(true); // from here on, nothing is missed
      onEvent(name, data);
    }
    onState(false);
    await new Promise((resolve) => setTimeout(resolve, AGAIN));
  }
}
