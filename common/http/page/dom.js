// Making elements, and saying numbers. Whatever comes from outside becomes text here, and never markup.

export function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

/** Writes a text only if it is a new one: the browser then has nothing to lay out. */
export function write(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

const whole = new Intl.NumberFormat("en");
const tenth = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });

export const number = (value) => (value >= 100 ? whole.format(Math.round(value)) : tenth.format(value));
export const count = (value, noun) => `${number(value)} ${noun}${value === 1 ? "" : "s"}`;
export const percent = (part, all) => `${all ? Math.round((100 * part) / all) : 0} %`;

export function duration(seconds) {
  if (seconds >= 1) return `${seconds.toFixed(seconds < 10 ? 2 : 0)} s`;
  return `${number(seconds * 1000)} ms`;
}

/** At most once in so many milliseconds, however often it is asked for; the last time counts. */
export function seldom(milliseconds, work) {
  let last = -Infinity;
  return (now) => {
    if (now - last < milliseconds) return false;
    last = now;
    work(now);
    return true;
  };
}
