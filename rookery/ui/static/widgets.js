// Small parts that several pages are made of.
import { useEffect, useId, useRef, useState } from "preact/hooks";
import { signal } from "@preact/signals";
import { api, bytes, closeToast, complain, html, query, t, toast, toasts } from "./core.js";

const ICONS = {
  train: "M4 19V5m0 14h16M7 15l4-5 3 3 5-7",
  chat: "M4 5h16v11H9l-5 4z",
  runs: "M4 6h16M4 12h16M4 18h10",
  models: "M12 3l8 4.5v9L12 21l-8-4.5v-9zM4 7.5l8 4.5 8-4.5M12 12v9",
  data: "M4 6c0-1.7 3.6-3 8-3s8 1.3 8 3-3.6 3-8 3-8-1.3-8-3zm0 0v12c0 1.7 3.6 3 8 3s8-1.3 8-3V6M4 12c0 1.7 3.6 3 8 3s8-1.3 8-3",
  serve: "M4 4h16v6H4zm0 10h16v6H4zM8 7h.01M8 17h.01",
  settings: "M12 15.5a3.5 3.5 0 100-7 3.5 3.5 0 000 7zM19 12l2-1.5-2-3.5-2.4.8-2-1.2L14 4h-4l-.6 2.6-2 1.2L5 7l-2 3.5L5 12l-2 1.5L5 17l2.4-.8 2 1.2L10 20h4l.6-2.6 2-1.2 2.4.8 2-3.5z",
  folder: "M3 6h6l2 2h10v11H3z",
  file: "M6 3h8l4 4v14H6zM14 3v4h4",
  up: "M12 19V5m-6 6l6-6 6 6",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  check: "M5 13l4 4L19 7",
  cross: "M6 6l12 12M18 6L6 18",
  stop: "M6 6h12v12H6z",
  play: "M7 5l12 7-12 7z",
  warn: "M12 4l9 16H3zM12 10v4m0 3h.01",
  info: "M12 21a9 9 0 100-18 9 9 0 000 18zM12 11v5m0-8h.01",
  trash: "M5 7h14M10 7V4h4v3m-7 0l1 13h8l1-13",
  wait: "M12 21a9 9 0 100-18 9 9 0 000 18zM12 7v5l3 2",
  more: "M6 9l6 6 6-6",
  plus: "M12 5v14M5 12h14",
};

export const Icon = ({ name, filled }) =>
  html`<svg class="icon" viewBox="0 0 24 24" aria-hidden="true" fill=${filled ? "currentColor" : "none"}
    stroke="currentColor" stroke-width="1.8" stroke-linecap="round" stroke-linejoin="round"><path d=${ICONS[name]} /></svg>`;

export const Card = ({ title, actions, children, ...rest }) => html`
  <section class=${`card ${rest.class || ""}`} aria-label=${title}>
    ${(title || actions) && html`<header class="card-head"><h2>${title}</h2><div class="row">${actions}</div></header>`}
    ${children}
  </section>`;

/** A sentence with commands in it, which stand between backquotes. */
export const Said = ({ text }) => text.split("`").map((part, at) => (at % 2 ? html`<code>${part}</code>` : part));

export const Empty = ({ title, children }) => html`<div class="empty"><p class="empty-title">${title}</p>${children}</div>`;

const PHASES = {
  starting: ["wait", () => t("starting")],
  preparing: ["wait", () => t("preparing")],
  training: ["play", () => t("training")],
  evaluating: ["play", () => t("validating")],
  saving: ["play", () => t("saving")],
  done: ["check", () => t("done")],
  stopped: ["stop", () => t("stopped")],
  failed: ["cross", () => t("failed")],
  killed: ["cross", () => t("killed")],
  unknown: ["info", () => t("unknown")],
};
export const Phase = ({ phase }) => {
  const [icon, name] = PHASES[phase] || PHASES.unknown;
  return html`<span class=${`phase phase-${phase}`}><${Icon} name=${icon} />${name()}</span>`;
};

const METHODS = {
  pretrain: () => t("Pretrain"), full: () => t("Full"), state: () => t("State"),
  lora: () => t("LoRA"), pissa: () => t("PiSSA"), dora: () => t("DoRA"), miss: () => t("MiSS"),
};
export const methodName = (method) => (METHODS[method] ? METHODS[method]() : method);

/** What went wrong: a stable code, the cause, the remedy, and the words of whoever failed. */
export function Problem({ failure, text, kind = "error" }) {
  // Of a traceback, the last line says most.
  const traceback = text?.includes("Traceback (most recent call last)");
  const words = html`<pre class="problem-text" tabindex="0" aria-label=${t("What was said")}>${text}</pre>`;
  return html`
  <div class=${`problem problem-${kind}`} role=${kind === "error" ? "alert" : "status"}>
    <${Icon} name="warn" />
    <div>
      ${failure && html`<p class="problem-cause"><strong>${t(failure.cause)}</strong> <code>${failure.code}</code></p>
        <p>${t(failure.remedy)}</p>`}
      ${text && (traceback ? html`<p class="problem-line">${text.trimEnd().split("\n").pop()}</p><details><summary>${t("All of it")}</summary>${words}</details>` : words)}
    </div>
  </div>`;
}

export const Toasts = () => html`
  <div class="toasts" role="status" aria-live="polite">
    ${toasts.value.map((one) => html`
      <div class=${`toast toast-${one.kind}`} key=${one.id}>
        <${Icon} name=${one.kind === "error" ? "warn" : "info"} /><span>${one.text}</span>
        <button class="icon-button" onClick=${() => closeToast(one.id)} aria-label=${t("Close")}><${Icon} name="cross" /></button>
      </div>`)}
  </div>`;

async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without https, a browser has no clipboard for pages from other machines.
    const area = Object.assign(document.createElement("textarea"), { value: text });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  toast(t("Copied."));
}

/** A command line breaks before a flag, never inside one. */
const unbroken = (text) => (text.startsWith("rookery ") ? text.split(/ (?=--)/).map((part, at) => html`${at ? " " : ""}<span>${part}</span>`) : text);

export const Code = ({ text, label }) => html`
  <div class="code">
    <pre tabindex="0" aria-label=${label}>${unbroken(text)}</pre>
    <button class="icon-button" onClick=${() => copyText(text)} title=${t("Copy")} aria-label=${t("Copy")}><${Icon} name="copy" /></button>
  </div>`;

/** A field with its label, help and fault. `control` gets the attributes that tie them together. */
export function Field({ label, name, help, title, error, wide, control, children }) {
  const id = useId();
  const describedBy = error ? `${id}-e` : help ? `${id}-h` : undefined;
  return html`
    <div class=${`field ${wide ? "wide" : ""} ${error ? "invalid" : ""}`}>
      <label for=${id} title=${title || undefined}>${label}${name && html` <code class="leaf">${name}</code>`}</label>
      ${control({ id, "aria-describedby": describedBy, "aria-invalid": error ? "true" : undefined })}
      ${error ? html`<p class="fault" id=${`${id}-e`}>${error}</p>` : help && html`<p class="help" id=${`${id}-h`}>${help}</p>`}
      ${children}
    </div>`;
}

export const TextField = ({ value, onInput, placeholder, number, password, ...rest }) =>
  html`<${Field} ...${rest} control=${(tie) => html`
    <input ...${tie} type=${password ? "password" : "text"} value=${value} placeholder=${placeholder} spellcheck="false" autocomplete="off"
      inputmode=${number ? "decimal" : undefined} onInput=${(e) => onInput(e.currentTarget.value)} />`} />`;

/** Text of several lines, typed, pasted or read from a file. */
const AreaField = ({ value, onInput, ...rest }) =>
  html`<${Field} ...${rest} control=${(tie) => html`
    <textarea ...${tie} class="mono" rows="9" spellcheck="false" value=${value} onInput=${(e) => onInput(e.currentTarget.value)}></textarea>`}>
    <label class="muted">${t("Or a file")} <input type="file" accept=".toml,.sh,.bat,.txt" onChange=${async (e) => {
      const file = e.currentTarget.files[0];
      if (file) onInput(await file.text());
    }} /></label>
  </${Field}>`;

export const SelectField = ({ value, onInput, options, ...rest }) =>
  html`<${Field} ...${rest} control=${(tie) => html`
    <select ...${tie} value=${value} onChange=${(e) => onInput(e.currentTarget.value)}>
      ${options.map(([key, name]) => html`<option value=${key} selected=${key === value}>${name}</option>`)}
    </select>`} />`;

export const SwitchField = ({ value, onInput, ...rest }) =>
  html`<${Field} ...${rest} control=${(tie) => html`
    <input ...${tie} class="switch" type="checkbox" role="switch" checked=${value} onChange=${(e) => onInput(e.currentTarget.checked)} />`} />`;

/** A path: typed, chosen from what was found (`options`: [path, name]), or browsed for. */
export function PathField({ value, onInput, kind, options = [], placeholder, extra, ...rest }) {
  const list = useId();
  return html`<${Field} ...${rest} control=${(tie) => html`
    <div class="path">
      <input ...${tie} type="text" value=${value} placeholder=${placeholder} list=${options.length ? list : undefined}
        spellcheck="false" autocomplete="off" onInput=${(e) => onInput(e.currentTarget.value)} />
      ${options.length > 0 && html`<datalist id=${list}>${options.map(([path, name]) => html`<option value=${path}>${name}</option>`)}</datalist>`}
      <button type="button" class="button" aria-label=${t("Browse")} onClick=${async () => {
        const path = await chooseFile({ kind, start: value, title: rest.label });
        if (path !== null) onInput(path);
      }}><${Icon} name="folder" /><span>${t("Browse")}</span></button>
      ${extra}
    </div>`} />`;
}

// One dialog at a time; what opens it waits for its answer.
const dialog = signal(null);
const openDialog = (kind, words) => new Promise((resolve) => { dialog.value = { kind, words, resolve, opener: document.activeElement }; });
const chooseFile = (words) => openDialog("file", words);
export const confirm = (words) => openDialog("confirm", words);
export const ask = (words) => openDialog("form", words);

export function Dialogs() {
  const open = dialog.value;
  const element = useRef();
  useEffect(() => {
    if (!open) return undefined;
    element.current?.showModal();
    return () => open.opener?.focus();
  }, [open]);
  if (!open) return null;
  const answer = (value) => { dialog.value = null; open.resolve(value); };
  const Body = { file: FileDialog, confirm: ConfirmDialog, form: FormDialog }[open.kind];
  return html`<dialog ref=${element} class=${`dialog dialog-${open.kind}`} aria-label=${open.words.title}
      onCancel=${(e) => { e.preventDefault(); answer(null); }}
      onClick=${(e) => { if (e.target === element.current) answer(null); }}>
    <${Body} ...${open.words} answer=${answer} />
  </dialog>`;
}

const ConfirmDialog = ({ title, children, action, danger, answer }) => html`
  <form class="dialog-body" onSubmit=${(e) => { e.preventDefault(); answer(true); }}>
    <h2>${title}</h2>${children}
    <div class="dialog-foot">
      <button type="button" class="button" autofocus onClick=${() => answer(null)}>${t("Cancel")}</button>
      <button type="submit" class=${`button ${danger ? "danger" : "primary"}`}>${action}</button>
    </div>
  </form>`;

/** A small form: `fields` are [name, label, kind, options], or a function that gives them for the values; `put` makes new
 * values of those before, a name and what was chosen. Answers with the values. */
function FormDialog({ title, about, fields, start, put: change, action, answer }) {
  const [values, setValues] = useState(start);
  const put = (name) => (value) => setValues((before) => (change ? change(before, name, value) : { ...before, [name]: value }));
  const shown = typeof fields === "function" ? fields(values) : fields;
  return html`
    <form class="dialog-body" onSubmit=${(e) => { e.preventDefault(); answer(values); }}>
      <h2>${title}</h2>${about && html`<p class="muted">${about}</p>`}
      ${shown.map(([name, label, kind, options]) =>
        kind === "choice" ? html`<${SelectField} label=${label} value=${values[name]} onInput=${put(name)} options=${options} />`
        : kind === "area" ? html`<${AreaField} label=${label} value=${values[name]} onInput=${put(name)} />`
        : html`<${TextField} label=${label} value=${values[name]} onInput=${put(name)} />`)}
      <div class="dialog-foot">
        <button type="button" class="button" onClick=${() => answer(null)}>${t("Cancel")}</button>
        <button type="submit" class="button primary">${action}</button>
      </div>
    </form>`;
}

function FileDialog({ title, kind, start, answer }) {
  const [listing, setListing] = useState(null);
  const [error, setError] = useState("");
  const visit = async (path) => {
    try {
      setListing(await api(`files?${query({ path, kind })}`));
      setError("");
    } catch (problem) {
      if (path) return visit("");
      setError(problem.message);
    }
  };
  useEffect(() => { visit(start || ""); }, []);
  const folders = kind === "folder" || kind === "data" || (kind === "model" && listing?.weights);
  return html`
    <div class="dialog-body">
      <h2>${title}</h2>
      <p class="muted path-line">${listing?.path || t("Folders")}</p>
      ${error && html`<${Problem} text=${error} />`}
      <ul class="files">
        ${listing?.parent != null && html`<li><button onClick=${() => visit(listing.parent)}><${Icon} name="up" /><span>${t("Up")}</span></button></li>`}
        ${listing?.entries.map((entry) => html`
          <li key=${entry.path}><button onClick=${() => (entry.folder ? visit(entry.path) : answer(entry.path))}>
            <${Icon} name=${entry.folder ? "folder" : "file"} /><span>${entry.name}</span>
            <span class="muted">${entry.folder ? (entry.run ? t("run") : "") : bytes(entry.bytes)}</span>
          </button></li>`)}
        ${listing && !listing.entries.length && html`<li class="muted">${t("Nothing here that could be chosen.")}</li>`}
      </ul>
      <div class="dialog-foot">
        <button class="button" onClick=${() => answer(null)}>${t("Cancel")}</button>
        ${folders && listing?.path && html`<button class="button primary" onClick=${() => answer(listing.path)}>${t("Use this folder")}</button>`}
      </div>
    </div>`;
}

const JOB_STATES = {
  running: ["training", "wait", () => t("working")],
  cancelling: ["training", "wait", () => t("cancelling…")],
  done: ["done", "check", () => t("done")],
  failed: ["failed", "cross", () => t("failed")],
  cancelled: ["stopped", "stop", () => t("cancelled")],
};

/** A command that runs: its progress, its output, its end. */
const Job = ({ job, children }) => {
  const [look, icon, name] = JOB_STATES[job.state];
  const active = job.state === "running" || job.state === "cancelling";
  const newest = job.output.trimEnd().split("\n").pop();
  return html`
  <div class="job" data-state=${job.state} role="group" aria-label=${job.title}>
    <div class="row between">
      <strong>${job.title}</strong>
      <span class="row">
        ${job.state === "running" && html`<button class="button small" aria-label=${t("Cancel {name}", { name: job.title })} onClick=${() => api("jobs/cancel", { id: job.id }).catch(complain)}>${t("Cancel")}</button>`}
        <span role="status"><span class=${`phase phase-${look}`}><${Icon} name=${icon} />${name()}</span></span>
      </span>
    </div>
    ${active && html`<${Bar} value=${job.percent} label=${job.title} />${newest && html`<p class="help">${newest}</p>`}`}
    ${job.state === "cancelled" && html`<p class="help">${t("What was half written is removed.")}</p>`}
    ${job.failure && html`<${Problem} failure=${job.failure.code === "RK900" ? null : job.failure} text=${job.output} />`}
    ${!job.failure && html`<details><summary>${t("Output")}</summary><${Code} text=${`$ ${job.command}\n${job.output}`} label=${t("Output")} /></details>`}
    ${job.state === "done" && children}
  </div>`;
};

/** Commands, newest first: those that run and the newest, the others folded. `children` gives what is shown of
 * one that is done. */
export function Jobs({ jobs, children }) {
  const shown = jobs.filter((job, at) => at === 0 || ["running", "cancelling"].includes(job.state));
  const others = jobs.filter((job) => !shown.includes(job));
  const place = useRef();
  const newest = jobs[0];
  useEffect(() => {
    // One that was just begun may lie below what is seen.
    if (newest?.state === "running" && Date.now() / 1000 - newest.started < 5) place.current.scrollIntoView({ block: "nearest" });
  }, [newest?.id]);
  const draw = (job) => html`<${Job} key=${job.id} job=${job}>${children(job)}</${Job}>`;
  return html`<div ref=${place}>${shown.map(draw)}</div>${others.length > 0 && html`<details class="earlier"><summary>${t("{n} earlier", { n: others.length })}</summary>${others.map(draw)}</details>`}`;
}

/** Progress in percent; null = going on, nobody knows how far. */
export const Bar = ({ value, label }) => html`
  <div class=${`bar ${value == null ? "bar-waiting" : ""}`} role="progressbar" aria-label=${label || t("Progress")}
    aria-valuemin="0" aria-valuemax="100" aria-valuenow=${value == null ? undefined : Math.round(value)}>
    <div style=${{ width: value == null ? "30%" : `${Math.min(100, value)}%` }}></div>
  </div>`;

/** The course of a loss as a small picture. */
export function Spark({ values, width = 120, height = 28 }) {
  const known = values.filter((value) => value != null);
  if (known.length < 2) return html`<svg class="spark" width=${width} height=${height} aria-hidden="true"></svg>`;
  const low = Math.min(...known);
  const span = Math.max(...known) - low || 1;
  const step = width / (values.length - 1);
  const points = values.map((v, i) => v == null ? null : `${(i * step).toFixed(1)},${(2 + (height - 4) * (1 - (v - low) / span)).toFixed(1)}`);
  return html`<svg class="spark" viewBox=${`0 0 ${width} ${height}`} width=${width} height=${height} aria-hidden="true">
    <polyline points=${points.filter(Boolean).join(" ")} fill="none" stroke="currentColor" stroke-width="1.5" stroke-linejoin="round" /></svg>`;
}

/** Tabs that arrow keys move along. */
export function Choice({ label, value, options, onInput }) {
  const move = (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const at = options.findIndex(([key]) => key === value);
    onInput(options[(at + step + options.length) % options.length][0]);
    event.currentTarget.querySelectorAll("button")[(at + step + options.length) % options.length].focus();
  };
  return html`<div class="choice" role="radiogroup" aria-label=${label} onKeyDown=${move}>
    ${options.map(([key, name, title]) => html`<button type="button" role="radio" aria-checked=${key === value ? "true" : "false"}
      tabindex=${key === value ? 0 : -1} title=${title} onClick=${() => onInput(key)}>${name}</button>`)}
  </div>`;
}
