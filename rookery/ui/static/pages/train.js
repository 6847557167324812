// The form of a training run, what is known about it before it starts, and the start.
import { effect, signal, untracked } from "@preact/signals";
import { useEffect } from "preact/hooks";
import { api, bytes, complain, count, duration, fileName, go, hello, html, isActive, kept, language, link, machine, runs, short, t, toast } from "../core.js";
import { Card, Choice, Code, Icon, PathField, Problem, Said, SelectField, SwitchField, TextField, ask } from "../widgets.js";
import { factsOf, models, modelName, needModels, mergeDialog } from "./models.js";

// What a person typed: setting -> text. The rest are the method's defaults. Kept through reloads.
const touched = kept("form", {});
const method = kept("method", "lora");
const check = signal({ state: "idle" });
const starting = signal(false);
const filter = signal("");

const PRECISION_HERE = () => (hello.value.machine.gpus.length ? {} : { precision: "" });
// As in RWKV Runner, the first base model that is found stands in the form.
const firstModel = () => {
  const found = models.value.find((file) => file.kind === "model" && !file.run);
  return found && modelName(found);
};
const MODEL_HERE = () => (method.value !== "pretrain" && firstModel() ? { load_model: firstModel() } : {});
const start = (leaf) => ({ ...hello.value.form.defaults[method.value], ...PRECISION_HERE(), ...MODEL_HERE() })[leaf] ?? "";
const text = (leaf) => touched.value[leaf] ?? start(leaf);
const put = (leaf) => (value) => {
  const written = typeof value === "boolean" ? (value ? "1" : "0") : value;
  const next = { ...touched.value, [leaf]: written };
  if (written === start(leaf)) delete next[leaf];
  touched.value = next;
};

/** Take values from elsewhere: a recipe, a command line, another run. */
export function adopt(values, name) {
  const { peft, ...others } = values;
  method.value = name;
  const own = {};
  for (const [leaf, value] of Object.entries(others)) if (value !== start(leaf)) own[leaf] = value;
  touched.value = own;
}

/** Change single fields from another page. */
export function change(values) {
  for (const [leaf, value] of Object.entries(values)) put(leaf)(value);
}

/** Fine-tune this model: any method but the one that makes a new one. */
export function useModel(path) {
  if (method.value === "pretrain") method.value = "lora";
  change({ load_model: path });
}

const ADAPTERS = ["lora", "dora", "pissa", "miss"];
const NEW_MODEL = ["version", "n_layer", "n_embd", "vocab_size"];

/** Whether a setting has a meaning with the method. */
function applies(leaf) {
  const name = method.value;
  if (leaf === "load_model") return name !== "pretrain";
  if (NEW_MODEL.includes(leaf)) return name === "pretrain";
  if (leaf === "quant") return ADAPTERS.includes(name) || name === "state";
  if (["lora_alpha", "lora_dropout", "rslora"].includes(leaf)) return ["lora", "dora"].includes(name);
  if (leaf === "lora_plus_ratio") return ["lora", "dora", "pissa"].includes(name);
  if (leaf === "miss_mode") return name === "miss";
  if (["pissa_init", "svd_niter"].includes(leaf)) return name === "pissa";
  const { sections } = hello.value.form;
  return !sections.find((one) => one.name === "adapter").leaves.includes(leaf) || leaf === "peft" || ADAPTERS.includes(name);
}

/** Every value that says something, as the server wants it. */
function values() {
  const { fields } = hello.value.form;
  const found = {};
  for (const leaf of Object.keys(fields)) {
    if (leaf !== "peft" && applies(leaf) && text(leaf).trim()) found[leaf] = text(leaf).trim();
  }
  found.peft = hello.value.form.defaults[method.value].peft;
  return found;
}

/** Why nothing can start yet, before anybody has to be asked. */
function missing() {
  if (!text("data_file").trim()) return t("Choose training data.");
  if (method.value !== "pretrain" && !text("load_model").trim()) return t("Choose a base model.");
  return "";
}

// Whenever the form has changed and rests for a moment, the server says what the run would be: one question at a time,
// since large data may be long in the reading.
let waiting = 0;
let wanted = "";
let round = 0;
let asking = false;
let shownPage = false;
effect(() => {
  if (!hello.value) return;
  wanted = missing() ? "" : JSON.stringify(values());
  void language.value;
  round++;
  clearTimeout(waiting);
  if (!shownPage) return;
  untracked(() => {
    check.value = wanted ? { ...check.value, state: "asking" } : { state: "missing" };
    if (wanted && !asking) waiting = setTimeout(inquire, 450);
  });
});

async function inquire() {
  asking = true;
  let mine;
  let found;
  do {
    mine = round;
    try {
      found = await api("train/check", JSON.parse(wanted));
    } catch (error) {
      found = { error: error.message, failure: error.failure, fields: {} };
    }
  } while (wanted && round !== mine && shownPage);
  asking = false;
  if (wanted) check.value = { state: "known", ...found };
}

export function Train() {
  useEffect(() => {
    shownPage = true;
    needModels();
    touched.value = { ...touched.value };
    return () => { shownPage = false; clearTimeout(waiting); };
  }, []);
  const form = hello.value.form;
  const active = Object.values(runs.value || {}).filter(isActive);
  return html`
    <header class="page-head"><h1>${t("Train")}</h1>
      <div class="row actions">
        <button class="button" onClick=${loadRecipe}>${t("Load TOML or a command")}</button>
        <button class="button" onClick=${saveRecipe}>${t("Save TOML")}</button>
        <button class="button" onClick=${() => { touched.value = {}; toast(t("The form has its defaults again.")); }}>${t("Reset")}</button>
      </div>
    </header>
    ${active.map((run) => html`<a class="banner banner-run" href=${link("run", { run: run.path })}><${Icon} name="play" filled />
      <span>${t("{name} is training", { name: run.name })}${run.eta != null ? ` · ${t("{time} left", { time: duration(run.eta) })}` : ""}</span></a>`)}
    <div class="train-grid">
      <div class="train-form">
        <${Card} title=${t("Method")}>
          <${Choice} label=${t("Method")} value=${method.value} onInput=${(name) => { method.value = name; }}
            options=${form.methods.map((one) => [one.id, t(one.name), t(one.about)])} />
          <p class="help">${t(form.methods.find((one) => one.id === method.value).about)}</p>
        </${Card}>
        <${Card} title=${t("Data")}>
          <div class="fields">
            <${PathField} wide label=${t("Training data")} kind="data" value=${text("data_file")} onInput=${put("data_file")}
              placeholder=${t("a .jsonl file, a folder of .txt files, or converted data")} error=${fault("data_file")}
              help=${t("In a folder, each .txt file is one document.")} extra=${html`<${ConvertButton} />`} />
            <${Setting} leaf="tokenizer" />
            <${Setting} leaf="val_split" />
          </div>
        </${Card}>
        <${Card} title=${t("Model")}>
          <div class="fields">
            ${applies("load_model") && html`<${PathField} wide label=${t("Base model")} kind="model" value=${text("load_model")} onInput=${put("load_model")}
              options=${choices("model")} placeholder=${t("a .pth or .safetensors file")} error=${fault("load_model")} />`}
            ${applies("adapter_load") && html`<${PathField} wide label=${t("Adapter to continue from")} kind="model" value=${text("adapter_load")} onInput=${put("adapter_load")}
              options=${choices("adapter")} placeholder=${t("none: begin a new one")} error=${fault("adapter_load")}
              extra=${html`<button type="button" class="button" disabled=${!text("adapter_load") || !text("load_model")}
                title=${text("adapter_load") ? "" : t("Choose the adapter to merge first.")}
                onClick=${() => mergeDialog(text("load_model"), text("adapter_load"))}>${t("Merge")}</button>`} />`}
            ${applies("quant") && html`<${SelectField} label=${t("Base weights")} value=${text("quant")} onInput=${put("quant")} help=${t("How the weights that do not train are kept in memory.")}
              options=${[["none", t("as they are ({precision})", { precision: text("precision") || t("automatic") })], ["int8", "int8"], ["nf4", "nf4"]]} />`}
            ${form.groups.new_model.filter(applies).map((leaf) => html`<${Setting} key=${leaf} leaf=${leaf} />`)}
          </div>
        </${Card}>
        <${Card} title=${t("Training")}>
          <div class="fields two">${form.groups.training.filter(applies).map((leaf) => html`<${Setting} key=${leaf} leaf=${leaf} />`)}</div>
        </${Card}>
        <${Advanced} />
      </div>
      <div class="train-side"><${Readiness} /></div>
    </div>`;
}

const choices = (kind) => models.value.filter((file) => file.kind === kind).map((file) => [modelName(file), factsOf(file).slice(0, 3).join(" · ")]);
const fault = (leaf) => check.value.fields?.[leaf];

/** Open fields whose name and default do not say enough; the others tell when the pointer rests on them. */
const EXPLAINED = ["tokenizer", "val_split"];

/** One setting, drawn by what the configuration tree says of it. */
function Setting({ leaf, plain }) {
  const field = hello.value.form.fields[leaf];
  const words = {
    label: plain ? html`<code>${leaf}</code>` : t(field.label || leaf),
    name: plain ? "" : leaf,
    help: plain || EXPLAINED.includes(leaf) ? t(field.help) : "",
    title: plain ? "" : t(field.help),
    error: fault(leaf),
  };
  const found = check.value.values?.[leaf];
  const automatic = found != null && found !== "" ? t("automatic: {value}", { value: shown(found) }) : t("automatic");
  if (field.kind === "switch") return html`<${SwitchField} ...${words} value=${text(leaf) === "1"} onInput=${put(leaf)} />`;
  if (field.kind === "choice") {
    const list = field.choices.map((choice) => [choice, choice]);
    return html`<${SelectField} ...${words} value=${text(leaf)} onInput=${put(leaf)} options=${field.open ? [["", automatic], ...list] : list} />`;
  }
  if (hello.value.form.paths.includes(leaf)) {
    return html`<${PathField} ...${words} kind=${leaf.endsWith("_dir") ? "folder" : "any"} value=${text(leaf)} onInput=${put(leaf)} wide />`;
  }
  const number = field.kind === "int" || field.kind === "float";
  return html`<${TextField} ...${words} number=${number} value=${text(leaf)} onInput=${put(leaf)}
    placeholder=${field.open || text(leaf) === "" ? automatic : ""} />`;
}

const shown = (value) => (typeof value === "number" && !Number.isInteger(value) && Math.abs(value) < 1e-3 ? value.toExponential() : Array.isArray(value) ? value.join(" ") : String(value));

/** Everything else the tree has, folded, section by section. */
function Advanced() {
  const form = hello.value.form;
  const open = new Set([...form.hidden, ...form.groups.data, ...form.groups.model, ...form.groups.new_model, ...form.groups.training, "val_split", "proj_dir"]);
  const words = filter.value.toLowerCase();
  const fits = (leaf) => !open.has(leaf) && applies(leaf) && (!words || `${leaf} ${form.fields[leaf].help} ${t(form.fields[leaf].help)}`.toLowerCase().includes(words));
  const changed = Object.keys(touched.value).filter((leaf) => !open.has(leaf) && applies(leaf)).length;
  return html`
    <details class="card advanced" open=${Object.keys(check.value.fields || {}).some((leaf) => !open.has(leaf)) || undefined}>
      <summary><h2>${t("Advanced")}</h2><span class="muted">${changed ? t("{n} changed", { n: changed }) : t("every other setting")}</span></summary>
      <input type="search" class="search" placeholder=${t("Find a setting")} aria-label=${t("Find a setting")} value=${filter.value} onInput=${(e) => { filter.value = e.currentTarget.value; }} />
      ${form.sections.map((section) => [section, section.leaves.filter(fits)]).filter(([, leaves]) => leaves.length).map(([section, leaves]) => html`
        <fieldset key=${section.name}><legend><code>[${section.name}]</code> <${Said} text=${t(section.about)} /></legend>
          <div class="fields two">${leaves.map((leaf) => html`<${Setting} key=${leaf} leaf=${leaf} plain />`)}</div></fieldset>`)}
    </details>`;
}

function ConvertButton() {
  const path = text("data_file").trim();
  const converted = check.value.values?.data_type === "binidx";
  return html`<button type="button" class="button" disabled=${!path || converted}
    title=${converted ? t("These data are converted already.") : t("Turn text into tokens once, so that each run starts at once")}
    onClick=${() => go("data", { path, then: "train" })}>${t("Convert")}</button>`;
}

/** What is known about the run, what stands in its way, and the button. */
function Readiness() {
  const facts = check.value;
  const lacks = missing();
  const asking = facts.state === "asking";
  const wrong = Object.keys(facts.fields || {});
  const blocked = lacks
    || (wrong.length ? t("Mend the fields marked in red: {names}.", { names: wrong.join(", ") }) : "")
    || (facts.error && !asking ? t("The run cannot start: see above.") : "")
    || (starting.value ? t("Starting…") : "");
  return html`
    <${Card} title=${t("Ready?")} class="readiness" actions=${asking && html`<span class="muted" role="status">${t("checking…")}</span>`}>
      <ul class="checks">
        <${Check} ok=${Boolean(facts.values)} name=${t("Data")}>${dataFacts(facts)}</${Check}>
        <${Check} ok=${Boolean(facts.values)} name=${t("Model")}>${modelFacts(facts)}</${Check}>
        ${facts.values && html`<${Check} ok=${facts.values.accelerator !== "cpu" || !machine.value?.gpus.length} name=${t("Device")}>${deviceFacts(facts)}</${Check}>`}
        ${facts.values && html`<${Check} ok name=${t("Length")}>${lengthFacts(facts)}</${Check}>`}
        ${facts.values && html`<${Check} ok=${fitsMemory(facts)} name=${t("Memory")}>${memoryFacts(facts)}</${Check}>`}
        ${facts.values && html`<${Check} ok name=${t("Time")}>${timeFacts(facts)}</${Check}>`}
      </ul>
      ${facts.error && !asking && html`<${Problem} failure=${facts.failure} text=${facts.error} />`}
      ${facts.notes?.length > 0 && !asking && html`<ul class="notes">${facts.notes.map((note) => html`<li>${note}</li>`)}</ul>`}
      <${TextField} label=${t("Run directory")} name="proj_dir" value=${text("proj_dir")} onInput=${put("proj_dir")} placeholder=${facts.proj_dir || t("a new one")} error=${fault("proj_dir")} />
      <button class="button primary big" disabled=${Boolean(blocked)} aria-describedby="why-not" onClick=${startRun}><${Icon} name="play" filled />${t("Train")}</button>
      <p id="why-not" class="why" role="status">${blocked}</p>
      ${facts.command && html`<details><summary>${t("The same from a terminal")}</summary><${Code} text=${facts.command} label=${t("Command")} /></details>`}
    </${Card}>`;
}

const Check = ({ ok, name, children }) => html`<li class=${ok ? "ok" : "open"}><${Icon} name=${ok ? "check" : "info"} /><span><b>${name}</b> ${children}</span></li>`;

function dataFacts({ values: found, data }) {
  const path = text("data_file").trim();
  if (!path) return t("none chosen");
  if (!found) return fileName(path);
  const type = found.data_type === "binidx" ? t("converted") : t("text, read when the run starts");
  return `${fileName(path)}: ${[t("{n} tokens", { n: count(data.tokens) }), data.documents ? t("{n} documents", { n: count(data.documents) }) : "", type].filter(Boolean).join(", ")}`;
}

function modelFacts({ values: found }) {
  const path = text("load_model").trim();
  if (method.value !== "pretrain" && !path) return t("none chosen");
  const name = method.value === "pretrain" ? t("new") : fileName(path);
  if (!found) return name;
  return `${name}: RWKV-${found.version.slice(2, 3)} (${found.version}), ${t("{n} layers", { n: found.n_layer })}, ${t("width {n}", { n: found.n_embd })}, ${t("vocabulary {n}", { n: found.vocab_size })}, ${found.precision}`;
}

function deviceFacts({ values: found }) {
  const gpus = machine.value?.gpus || [];
  if (found.accelerator !== "cpu") return `${found.devices} × ${gpus[0]?.name || found.accelerator}`;
  return gpus.length ? t("the CPU, since this PyTorch cannot use {name}: update its driver, or install the PyTorch that pytorch.org names for it", { name: gpus[0].name }) : t("the CPU; there is no NVIDIA GPU");
}

function steps(found) {
  const batch = (found.micro_bsz || check.value.memory?.micro_bsz || 1) * found.accumulate_grad_batches * found.devices * found.num_nodes;
  const each = batch * found.ctx_len;
  const all = Math.ceil(Math.abs(found.my_exit_tokens || 0) / each);
  const counted = (found.epoch_count || 0) * (found.epoch_steps || 0);
  return { batch, each, total: counted && all ? Math.min(all, counted) : all || counted };
}

function lengthFacts({ values: found, data }) {
  const { batch, each, total } = steps(found);
  const passes = (total * batch) / data.samples;
  return `${t("{steps} steps of {each} tokens: {all} tokens", { steps: count(total), each: count(each), all: short(total * each) })}${
    passes >= 0.01 ? `, ${t("{n} times the data", { n: passes < 10 ? +passes.toPrecision(2) : count(passes) })}` : ""}`;
}

/** Change the form as "--micro_bsz 4 --grad_cp 1" says. */
function obey(flags) {
  const { peft, ...others } = Object.fromEntries([...flags.matchAll(/--(\w+) (\S+)/g)].map(([, leaf, value]) => [leaf, value]));
  if (peft) method.value = peft;
  change(others);
}

function fitsMemory({ memory }) {
  return !memory || memory.verdict === "fits";
}

function memoryFacts({ memory }) {
  if (!memory) return t("known when the run has begun");
  const said = { fits: t("fits"), tight: t("tight"), "will not fit": t("will not fit") }[memory.verdict];
  return html`${t("about {need} of {free} free: {verdict}", { need: bytes(memory.need), free: bytes(memory.free), verdict: said })}
    ${memory.remedies.map(([flags, total]) => html`<button type="button" class="button small remedy" onClick=${() => obey(flags)}>
      ${t("with {flags}: {size}", { flags, size: bytes(total) })}</button>`)}`;
}

/** As fast as the last run of the same shape and method on this machine, when there was one. */
function timeFacts({ values: found }) {
  const { each, total } = steps(found);
  const like = Object.values(runs.value || {})
    .filter((run) => run.tok_s && run.method === method.value && ["version", "n_layer", "n_embd", "precision", "quant"].every((leaf) => run.config[leaf] === found[leaf]))
    .sort((a, b) => b.updated - a.updated)[0];
  if (!like) return t("known after the first steps");
  return t("about {time}, as fast as {name}", { time: duration((total * each) / like.tok_s), name: like.name });
}

async function startRun() {
  starting.value = true;
  try {
    const { run } = await api("train/start", values());
    // The next run gets a directory of its own.
    const { proj_dir: _used, ...rest } = touched.value;
    touched.value = rest;
    go("run", { run });
  } catch (error) {
    complain(error);
  } finally {
    starting.value = false;
  }
}

async function saveRecipe() {
  try {
    const text = await api("train/toml", values());
    const name = `${fileName(touched.value.data_file || "rookery").replace(/\.\w+$/, "")}-${method.value}.toml`;
    const file = URL.createObjectURL(new Blob([text], { type: "application/toml" }));
    Object.assign(document.createElement("a"), { href: file, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(file), 10_000);
  } catch (error) {
    complain(error);
  }
}

async function loadRecipe() {
  const answer = await ask({
    title: t("Load TOML or a command"),
    about: t("Choose a recipe, or paste its text or a command line of RWKV-LM, RWKV-PEFT or Rookery."),
    fields: [["text", t("Text"), "area"]],
    start: { text: "" },
    action: t("Load"),
  });
  if (!answer?.text.trim()) return;
  try {
    const found = await api("train/read", { text: answer.text });
    adopt(found.values, found.method);
    toast(t("Loaded."));
  } catch (error) {
    complain(error);
  }
}
