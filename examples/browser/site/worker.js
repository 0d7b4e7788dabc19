// Runs the models, away from the thread that draws the page.

import * as ort from "./ort.wasm.bundle.min.mjs";

// More threads would need the page to be cross-origin isolated, that is, a server with headers.
ort.env.wasm.numThreads = 1;
// Only the binary: a path for all files would also replace the loader inside the bundle.
ort.env.wasm.wasmPaths = { wasm: new URL("ort-wasm-simd-threaded.wasm", import.meta.url).href };

const WARM_UP = 2;
const ROUNDS = 9;

let manifest;
const sessions = [];

function feeds(ids) {
  const shape = [1, ids.length];
  return {
    input_ids: new ort.Tensor("int64", BigInt64Array.from(ids, BigInt), shape),
    attention_mask: new ort.Tensor("int64", new BigInt64Array(ids.length).fill(1n), shape),
  };
}

async function embed(session, ids) {
  const outputs = await session.run(feeds(ids));
  return outputs[session.outputNames[0]].data;
}

async function milliseconds(session, ids) {
  const start = performance.now();
  await embed(session, ids);
  return performance.now() - start;
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

async function get(file) {
  const response = await fetch(file);
  if (!response.ok) throw new Error(`${file}: ${response.status} ${response.statusText}`);
  return response;
}

function progress(text, share) {
  postMessage({ kind: "progress", text, share });
}

async function load() {
  manifest = await (await get("manifest.json")).json();
  for (const [i, model] of manifest.models.entries()) {
    progress(`Loading ${model.label}…`, (0.6 * i) / manifest.models.length);
    const bytes = new Uint8Array(await (await get(model.file)).arrayBuffer());
    sessions.push(await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] }));
  }
}

async function run() {
  const results = manifest.models.map(() => ({ embeddings: [], times: [] }));
  for (const [i, session] of sessions.entries()) {
    progress(`Embedding: ${manifest.models[i].label}…`, 0.6 + (0.1 * i) / sessions.length);
    for (const { input_ids } of manifest.sentences) {
      results[i].embeddings.push(await embed(session, input_ids));
    }
  }
  // In turns, so that whatever else the machine does hits every model alike.
  for (let round = -WARM_UP; round < ROUNDS; round++) {
    progress("Timing, in turns…", 0.7 + (0.3 * (round + WARM_UP)) / (ROUNDS + WARM_UP));
    for (const [i, session] of sessions.entries()) {
      const time = await milliseconds(session, manifest.timed_ids);
      if (round >= 0) results[i].times.push(time);
    }
  }
  postMessage({
    kind: "done",
    manifest,
    runtime: ort.env.versions.web,
    rounds: ROUNDS,
    results: results.map(({ embeddings, times }) => ({
      embeddings: embeddings.map((row) => [...row]),
      milliseconds: median(times),
    })),
  });
}

onmessage = async () => {
  try {
    if (!sessions.length) await load();
    await run();
  } catch (error) {
    postMessage({ kind: "failed", text: String(error.message ?? error) });
  }
};
