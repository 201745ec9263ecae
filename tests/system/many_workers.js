// Stands in for GET /events: a fleet of 64 engines, and as many requests as PER_TICK says, ten times a second.
const others = window.fetch;
window.fetch = async (path, options) => {
  if (path !== "/events") return others(path, options);
  const encoder = new TextEncoder();
  return new Response(new ReadableStream({ start(controller) {
    const N = 64, tell = (name, data) => controller.enqueue(encoder.encode(`event: ${name}\ndata: ${JSON.stringify(data)}\n\n`));
    window.made = 0;
    setTimeout(() => {
      tell("hello", { version: 1, frontend: "1", prompts: true, demo: true });
      for (const [stage, n, base] of [["frontend", 1, 1], ["processor", 2, 10], ["router", 1, 20], ["engine", N, 100]])
        for (let i = 0; i < n; i++) tell("joined", { stage, instance_id: String(base + i) });
      const fleet = () => tell("fleet", { routers: [{ router: "20", policy: "kv", workers: Array.from({ length: N }, (_, i) => ({
        instance_id: String(100 + i), worker_id: String(i), status: "joined", model: { name: "m", block_size: 16 },
        total_blocks: 16384, cached_blocks: Math.min(16384, made * 3 + i * 100), prefill_blocks: i % 7, decode_blocks: i * 3,
        requests: i % 5, routed_requests: made + i, routed_blocks: made * 10, overlap_blocks: made * 6 })) }] });
      fleet(); setInterval(fleet, 1000);
      tell("sampled", { share: 1 / 16 });
      setInterval(() => {
        for (let k = 0; k < (window.PER_TICK ?? 2); k++) {
          const id = `r${made++}`, at = Date.now() / 1000, w = Math.floor(Math.random() * N);
          const costs = Array.from({ length: N }, (_, i) => ({ worker_id: String(i), overlap_blocks: i === w ? 15 : i % 9,
            expected_blocks: i === w ? 18 : i % 9, prefill_blocks: 1, decode_blocks: i, cost: i === w ? 7 : 20 + Math.random() * 30 }));
          tell("started", { request_id: id, at, frontend: "1", model: "m", prompt: `prompt number ${made} of many` });
          tell("asked", { request_id: id, at: at + 0.001, processor: "10", tokens: 350, blocks: 22 });
          tell("decided", { request_id: id, at: at + 0.002, router: "20", policy: "kv", worker_id: String(w), prompt_blocks: 21.9, overlap_blocks: 15, costs });
          setTimeout(() => tell("answering", { request_id: id, at: at + 0.05, worker_id: String(w) }), 50);
          setTimeout(() => tell("ended", { request_id: id, at: at + 0.4, status: 200, ttft_seconds: 0.05, seconds: 0.4, completion_tokens: 30, prompt_tokens: 350, finish_reason: "stop" }), 400);
        }
      }, 100);
    }, 50);
  } }));
};
