// GET /events, for as long as the page is open: it connects again by itself, and says when it is disconnected.

const NAMES = [
  ...["hello", "joined", "left", "fleet", "sampled", "skipped"],
  ...["started", "asked", "decided", "answering", "moved", "ended"],
];
const AGAIN = 2000; // milliseconds before a connection that the browser gave up is tried again

export class Feed {
  #onEvent;
  #onState;

  constructor(onEvent, onState) {
    this.#onEvent = onEvent;
    this.#onState = onState;
    this.#connect();
  }

  #connect() {
    const source = new EventSource("/events");
    for (const name of NAMES) {
      source.addEventListener(name, (message) => {
        if (name === "hello") this.#onState(true); // from here on, nothing is missed
        this.#onEvent(name, JSON.parse(message.data));
      });
    }
    source.onerror = () => {
      this.#onState(false);
      if (source.readyState === EventSource.CLOSED) setTimeout(() => this.#connect(), AGAIN);
    };
  }
}
