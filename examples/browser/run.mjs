// Runs an ONNX file with onnxruntime-web in Node.js:
//   node run.mjs model.onnx < feeds.json > outputs.json
// Feeds and outputs map a name to { type, dims, data }.

import { readFileSync } from "node:fs";
import * as ort from "onnxruntime-web/wasm";

ort.env.wasm.numThreads = 1;

const session = await ort.InferenceSession.create(readFileSync(process.argv[2]), {
  executionProviders: ["wasm"],
});
const feeds = {};
for (const [name, { type, dims, data }] of Object.entries(JSON.parse(readFileSync(0, "utf8")))) {
  const values = type === "int64" ? BigInt64Array.from(data, BigInt) : Float32Array.from(data);
  feeds[name] = new ort.Tensor(type, values, dims);
}
const outputs = {};
for (const [name, { type, dims, data }] of Object.entries(await session.run(feeds))) {
  outputs[name] = { type, dims, data: Array.from(data, Number) };
}
process.stdout.write(JSON.stringify(outputs));
