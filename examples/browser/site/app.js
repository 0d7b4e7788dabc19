// Draws what worker.js computes.

/** Largest difference between a mean cosine computed here and in Python: int8 kernels round differently. */
const TOLERANCE = 0.01;

const find = (id) => document.getElementById(id);
const worker = new Worker("worker.js", { type: "module" });

function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

// Embeddings have unit length.
const cosine = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const megabytes = (bytes) => `${(bytes / 1e6).toFixed(bytes < 1e6 ? 2 : 1)} MB`;

function setState(state, text, share = 1) {
  document.body.dataset.state = state;
  find("status").textContent = text;
  find("progress").value = share;
  find("run").disabled = state === "loading";
}

function summarise({ manifest, results }) {
  const [dense] = results;
  return manifest.models.map((model, i) => {
    const cosines = results[i].embeddings.map((row, s) => cosine(row, dense.embeddings[s]));
    return {
      ...model,
      milliseconds: results[i].milliseconds,
      speedup: dense.milliseconds / results[i].milliseconds,
      embeddings: results[i].embeddings,
      cosines,
      cosine: mean(cosines),
      expected: mean(model.cosines),
    };
  });
}

function drawCards(models) {
  const slowest = Math.max(...models.map((model) => model.milliseconds));
  find("cards").replaceChildren(...models.map((model) => {
    const isDense = model.reduction === null;
    const bar = element("span");
    bar.style.width = `${(100 * model.milliseconds) / slowest}%`;
    const facts = [
      ["Speed against dense", isDense ? "1×" : `${model.speedup.toFixed(2)}×`],
      ["Linear weights", megabytes(model.linear_bytes)],
      ["Whole file", megabytes(model.model_bytes)],
      ["Mean cosine to dense", isDense ? "1" : model.cosine.toFixed(3)],
    ].flatMap(([term, value]) => [
      element("dt", { textContent: term }), element("dd", { textContent: value }),
    ]);
    return element("article", { className: isDense ? "card dense" : "card" },
      element("h3", { textContent: model.label }),
      element("div", { className: "time" }, model.milliseconds.toFixed(1), element("small", { textContent: " ms" })),
      element("div", { className: "bar", ariaHidden: "true" }, bar),
      element("dl", {}, ...facts));
  }));
}

function drawHeat(models) {
  find("heat").replaceChildren(...models.map((model) => {
    const numbers = model.embeddings.map((_, i) => element("th", { scope: "col", textContent: i + 1 }));
    const rows = model.embeddings.map((a, i) => element("tr", {},
      element("th", { scope: "row", textContent: i + 1 }),
      ...model.embeddings.map((b) => {
        const value = cosine(a, b);
        const cell = element("td", { textContent: value.toFixed(2).replace("-", "−") });
        // Up to 55 %, where the text keeps its contrast.
        cell.style.setProperty("--heat", 55 * Math.min(1, Math.max(0, value)));
        return cell;
      })));
    return element("table", {}, element("caption", { textContent: model.label }),
      element("thead", {}, element("tr", {}, element("td"), ...numbers)),
      element("tbody", {}, ...rows));
  }));
}

function drawCosines(manifest, models) {
  const compressed = models.slice(1);
  const row = (title, values) => element("tr", {}, element("th", { scope: "row", textContent: title }),
    ...values.map((value) => element("td", { textContent: value.toFixed(3) })));
  find("cosines").replaceChildren(
    element("thead", {}, element("tr", {}, element("th", { scope: "col", textContent: "Sentence" }),
      ...compressed.map((model) => element("th", { scope: "col", textContent: model.label })))),
    element("tbody", {},
      ...manifest.sentences.map(({ text }, i) => row(text, compressed.map((model) => model.cosines[i]))),
      row("Mean", compressed.map((model) => model.cosine))));
  const worst = Math.max(...compressed.map((model) => Math.abs(model.cosine - model.expected)));
  const agrees = worst <= TOLERANCE;
  find("check").replaceChildren(
    element("strong", { className: agrees ? "good" : "bad", textContent: agrees ? "Agrees with Python. " : "Differs from Python. " }),
    `The means differ by at most ${worst.toExponential(0)} from those that ONNX Runtime in Python computed from the same files.`);
}

function draw(message) {
  const { manifest, runtime, rounds } = message;
  const models = summarise(message);
  find("model").textContent = manifest.model;
  drawCards(models);
  find("timing-note").textContent =
    `Median of ${rounds} runs of one text of ${manifest.timed_ids.length} tokens, the models in turns. ` +
    "The embedding table, most of each file, is as it was; only linear layers are compressed.";
  find("sentences").replaceChildren(
    ...manifest.sentences.map(({ text }) => element("li", { textContent: text })));
  drawHeat(models);
  drawCosines(manifest, models);
  find("versions").textContent =
    `onnxruntime-web ${runtime} · exported with ` +
    Object.entries(manifest.versions).map(([name, version]) => `${name} ${version}`).join(", ");
  document.querySelector("main").hidden = false;
  globalThis.results = models;
  const best = models.reduce((a, b) => (b.speedup > a.speedup ? b : a));
  setState("done", best.reduction === null
    ? "Done." : `Done: ${best.label} is ${best.speedup.toFixed(1)}× as fast as dense.`);
}

worker.onmessage = ({ data }) => {
  if (data.kind === "progress") setState("loading", data.text, data.share);
  else if (data.kind === "failed") setState("failed", `Failed: ${data.text}`);
  else draw(data);
};
worker.onerror = (event) => setState("failed", `Failed: ${event.message || "the worker did not start"}`);
find("run").addEventListener("click", () => {
  setState("loading", "Running…", 0.6);
  worker.postMessage("run");
});
worker.postMessage("run");
