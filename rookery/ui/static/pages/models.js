// What the weight files in the folders hold, which fits which, and what can be made of them.
import { signal } from "@preact/signals";
import { useEffect } from "preact/hooks";
import { api, bytes, complain, date, go, html, isActive, jobs, link, runs, short, t, toast } from "../core.js";
import { Card, Empty, Jobs, ask, methodName } from "../widgets.js";

export const models = signal([]);
const loading = signal(false);
let asked = 0;
let outdated = false;

/** Look at the folders, unless that was done a moment ago; `again` looks at what there is from now on. */
export async function needModels(again = false) {
  if (loading.value) {
    outdated ||= again;
    return;
  }
  if (!again && Date.now() - asked < 5000) return;
  loading.value = true;
  try {
    do {
      outdated = false;
      asked = Date.now();
      models.value = await api("models");
    } while (outdated);
  } catch (error) {
    complain(error);
  } finally {
    loading.value = false;
  }
}

export const modelName = (file) => `${file.folder === "." ? "" : `${file.folder}/`}${file.name}`;

/** Whether `file` was trained on `model`, as its run or the file itself says. */
function isBase(model, file) {
  const name = runs.value?.[file.run]?.config.load_model || file.base?.file || "";
  const plain = (path) => path.replaceAll("\\", "/").replace(/^\.\//, "");
  return Boolean(name) && `/${plain(model.file)}`.endsWith(`/${plain(name)}`.replace("//", "/"));
}

/** Models that a state or an adapter can be put on, by their dimensions; the one it was trained on first. */
const fitting = (file) =>
  models.value.filter((model) => model.kind === "model" && fits(model, file)).sort((a, b) => isBase(b, file) - isBase(a, file));

function fittingSaid(file, bases) {
  if (!bases.length) return t("no base model here fits it");
  if (!isBase(bases[0], file)) return t("fits {names}", { names: bases.slice(0, 3).map(modelName).join(", ") + (bases.length > 3 ? ` +${bases.length - 3}` : "") });
  return t("trained on {name}", { name: modelName(bases[0]) }) + (bases.length > 1 ? ` · ${t("others of this shape: {n}", { n: bases.length - 1 })}` : "");
}

function fits(model, file) {
  if (file.kind === "state") {
    const [heads, size] = file.state.shape;
    return file.state.layers === model.n_layer && heads === model.n_head && size === model.head_size;
  }
  // An adapter that says nothing of its base may fit any: the merge looks at every tensor.
  return ["version", "n_layer", "n_embd", "vocab_size"].every((name) => file.base?.[name] == null || file.base[name] === model[name]);
}

/** Of the files of one run the best to show, and the others: those of its mini-epochs. */
function ofRuns(files) {
  const groups = new Map();
  for (const file of files) {
    const key = file.run || file.file;
    groups.set(key, [...(groups.get(key) || []), file]);
  }
  const rank = (file) => (/-final\./.test(file.name) ? Infinity : /-init\./.test(file.name) ? -1 : file.modified);
  return [...groups.values()].map((group) => group.sort((a, b) => rank(b) - rank(a)));
}

const KINDS = [
  ["model", () => t("Base models")],
  ["adapter", () => t("Adapters")],
  ["state", () => t("States")],
  ["unknown", () => t("Not understood")],
];

export function Models() {
  const finished = jobs.value.filter((job) => ["merge", "convert"].includes(job.kind));
  const ended = finished.filter((job) => job.state === "done").length;
  const trained = Object.values(runs.value || {}).filter((run) => !isActive(run)).length;
  // What there is when the page opens, and when something that writes models ends.
  useEffect(() => { needModels(true); }, [ended, trained]);
  return html`
    <header class="page-head"><h1>${t("Models")}</h1>
      <div class="row"><button class="button" disabled=${loading.value} onClick=${() => needModels(true)}>${loading.value ? t("Looking…") : t("Look again")}</button></div></header>
    ${finished.length > 0 && html`<${Card} title=${t("Work")}><${Jobs} jobs=${finished}>${(job) => html`<p class="path-line">${job.result}</p>`}</${Jobs}></${Card}>`}
    ${!models.value.length && !loading.value && html`<${Empty} title=${t("No model files in these folders.")}><p class="muted">${t("Put .pth or .safetensors files there, or add their folder under Settings.")}</p>
      <a class="button primary" href=${link("settings")}>${t("Settings")}</a></${Empty}>`}
    ${!models.value.length && loading.value && html`<p class="muted" aria-busy="true">${t("Reading the headers of the model files…")}</p>`}
    ${KINDS.map(([kind, title]) => {
      const files = models.value.filter((file) => (KINDS.some(([known]) => known === file.kind) ? file.kind : "unknown") === kind);
      const groups = ofRuns(files);
      return files.length > 0 && html`<${Card} title=${`${title()} · ${groups.length}`}><ul class="model-list">${groups.map(([first, ...others]) => html`
        <${ModelRow} key=${first.file} file=${first} />
        ${others.length > 0 && html`<li class="model-more"><details><summary>${t("{n} more files of this run", { n: others.length })}</summary><ul>${others.map((file) => html`<${ModelRow} key=${file.file} file=${file} />`)}</ul></details></li>`}`)}</ul></${Card}>`;
    })}`;
}

function ModelRow({ file }) {
  const bases = file.kind === "state" || file.kind === "adapter" ? fitting(file) : [];
  return html`
    <li class="model-row">
      <div class="model-name"><strong>${file.name}</strong><span class="muted path-line">${file.folder}</span></div>
      <div class="model-facts">
        ${file.error && html`<span class="fault">${file.error}</span>`}
        ${factsOf(file).map((fact) => html`<span class="chip">${fact}</span>`)}
        ${(file.kind === "state" || file.kind === "adapter") && html`<p class="muted">${fittingSaid(file, bases)}</p>`}
      </div>
      <span class="muted model-date">${date(file.modified)}</span>
      <div class="row model-tools">
        ${file.kind === "model" && html`<a class="button small" href=${link("chat", { model: file.file })}>${t("Chat")}</a>
          <button class="button small" onClick=${() => useAsBase(file)}>${t("Train from it")}</button>`}
        ${file.kind === "state" && bases.length > 0 && html`<a class="button small" href=${link("chat", { model: bases[0].file, state: file.file })}>${t("Mount and chat")}</a>`}
        ${file.kind === "adapter" && bases.length > 0 && html`<a class="button small" href=${link("chat", { model: bases[0].file, adapter: file.file })}>${t("Mount and chat")}</a>`}
        ${(file.kind === "adapter" || file.kind === "state") && html`<button class="button small" disabled=${!bases.length} onClick=${() => mergeDialog(bases[0].file, file.file, bases)}>${t("Merge")}</button>`}
        ${["model", "adapter", "state"].includes(file.kind) && html`<button class="button small" onClick=${() => convertDialog(file)}>${t("Convert")}</button>`}
      </div>
    </li>`;
}

export function factsOf(file) {
  const size = bytes(file.bytes);
  const dtypes = Object.keys(file.dtypes || {}).join(" + ");
  if (file.kind === "model") {
    return [`RWKV-${file.version[2]}`, `${short(file.parameters)} ${t("parameters")}`, `L${file.n_layer} D${file.n_embd}`, t("heads {n} × {size}", { n: file.n_head, size: file.head_size }),
      t("vocabulary {n}", { n: file.vocab_size }), dtypes, size, file.state && t("with a tuned state")].filter(Boolean);
  }
  if (file.kind === "state") return [`L${file.state.layers} H${file.state.shape[0]} N${file.state.shape[1]}`, dtypes, size];
  if (file.kind === "adapter") {
    const { method, kinds = [], ranks = [], modules = [], alpha } = file.adapter || {};
    return [method ? methodName(method) : kinds.join(" + "), ranks.length && `r ${ranks.join(", ")}`, alpha && `α ${alpha}`, modules.length > 4 ? t("{n} kinds of matrices", { n: modules.length }) : modules.join(" "), dtypes, size].filter(Boolean);
  }
  return [size];
}

async function useAsBase(file) {
  const { useModel } = await import("./train.js");
  useModel(modelName(file));
  go("train");
}

export async function mergeDialog(base, adapter, bases = []) {
  const values = await ask({
    title: t("Merge into a model of its own"),
    about: t("The strength is read from the adapter file. The base stays as it is."),
    fields: [
      bases.length > 1 ? ["base", t("Base model"), "choice", bases.map((file) => [file.file, modelName(file)])] : ["base", t("Base model"), "text"],
      ["adapter", t("Adapter or state"), "text"],
      ["output", t("File to write"), "text"],
    ],
    start: { base, adapter, output: mergedName(base, adapter) },
    action: t("Merge"),
  });
  if (values) await run("models/merge", values);
}

const stem = (path) => path.replace(/\.(pth|safetensors|st)$/i, "");
const mergedName = (base, adapter) => {
  const folder = adapter.replace(/[^\\/]*$/, "");
  return `${folder}${stem(base).split(/[\\/]/).pop()}-merged.pth`;
};

// What a file can become: format -> [name, ending, precisions]; "" keeps that of the file.
const PRECISIONS = ["", "bf16", "fp16", "fp32"];
const FORMATS = {
  model: {
    pth: [".pth (RWKV-LM, Runner)", ".pth", PRECISIONS],
    safetensors: [".safetensors", ".safetensors", PRECISIONS],
    st: [".st (Ai00)", ".st", ["fp16"]],
    gguf: [".gguf (llama.cpp)", ".gguf", [...PRECISIONS, "q8_0"]],
    hf: ["Hugging Face", "-hf", PRECISIONS],
  },
  adapter: {
    safetensors: [".safetensors (Rookery)", ".safetensors", PRECISIONS],
    pth: [".pth (RWKV-PEFT)", ".pth", PRECISIONS],
    hf: ["Hugging Face peft", "-peft", PRECISIONS],
  },
  state: {
    pth: [".pth (RWKV-LM, Runner)", ".pth", PRECISIONS],
    safetensors: [".safetensors", ".safetensors", PRECISIONS],
    st: [".state (Ai00)", ".state", ["fp16"]],
    rwkv: ["rwkv (pip)", "-rwkv.pth", PRECISIONS],
  },
};

async function convertDialog(file) {
  const formats = FORMATS[file.kind];
  const named = (format) => {
    const name = `${stem(modelName(file))}${formats[format][1]}`;
    return name === modelName(file) ? `${stem(name)}-converted${formats[format][1]}` : name;
  };
  const first = Object.keys(formats).find((format) => !file.name.toLowerCase().endsWith(formats[format][1]));
  const values = await ask({
    title: t("Convert {name}", { name: file.name }),
    about: file.kind === "model" ? t("GGUF and Hugging Face carry the vocabulary, which is looked for beside the model.") : "",
    fields: (now) => [
      ["to", t("Format"), "choice", Object.entries(formats).map(([format, [name]]) => [format, name])],
      ["output", now.to === "hf" ? t("Folder to write") : t("File to write"), "text"],
      ["dtype", t("Precision"), "choice", formats[now.to][2].map((name) => [name, name || t("as in the file")])],
    ],
    start: { to: first, output: named(first), dtype: formats[first][2][0] },
    put: (before, name, value) => (name === "to" ? { to: value, output: named(value), dtype: formats[value][2][0] } : { ...before, [name]: value }),
    action: t("Convert"),
  });
  if (values) await run("models/convert", { ...values, source: file.file });
}

async function run(path, values) {
  try {
    await api(path, values);
    toast(t("Begun; the Models page shows how far it is."));
    go("models");
  } catch (error) {
    complain(error);
  }
}
