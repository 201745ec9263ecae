// The blocks of a prompt as squares: in a worker's cache, about to be, or to compute. Three paths instead of an element
// for each, because 64 workers have thousands.

const SIZE = 12; // of a square, with its margin

function make(tag, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

/** cells: squares at most; a longer prompt has several blocks in each. */
export function strip(blocks, { overlap_blocks, expected_blocks }, cells) {
  const squares = Math.min(blocks, cells);
  const paths = { cached: "", expected: "", compute: "" };
  for (let place = 0; place < squares; place++) {
    const block = ((place + 0.5) * blocks) / squares;
    const kind = block < overlap_blocks ? "cached" : block < expected_blocks ? "expected" : "compute";
    const x = place * SIZE + 1;
    paths[kind] += `M${x} 1h9v9h-9z`;
    if (kind === "expected") paths[kind] += `M${x} 10l9-9M${x} 5l4-4M${x + 5} 10l4-4`; // hatched
  }
  const viewBox = `0 0 ${squares * SIZE} 11`;
  const node = make("svg", { viewBox, class: "blocks", preserveAspectRatio: "none", "aria-hidden": "true" });
  node.style.width = `${squares * SIZE}px`;
  for (const [kind, d] of Object.entries(paths)) if (d) node.append(make("path", { d, class: kind }));
  return node;
}
