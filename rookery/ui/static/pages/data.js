// Looking into training data before they are trained on, and turning text into tokens.
import { signal } from "@preact/signals";
import { useEffect } from "preact/hooks";
import { api, complain, count, go, html, jobs, kept, query, t, toast } from "../core.js";
import { Card, Empty, Jobs, PathField, Problem, SelectField, SwitchField, TextField } from "../widgets.js";
import { change } from "./train.js";

const form = kept("data", { path: "", format: "auto", mask: "auto", template: "world", ctx_len: "1024" });
const make = kept("make", { epochs: "1", tokenizer: "world", shuffle: true, skip: false, output: "" });
const found = signal({ state: "idle" });
const putForm = (name) => (value) => { form.value = { ...form.value, [name]: value }; };
const putMake = (name) => (value) => { make.value = { ...make.value, [name]: value }; };

export function Data({ path }) {
  useEffect(() => {
    if (!path || path === form.value.path) return;
    form.value = { ...form.value, path };
    make.value = { ...make.value, output: "" };
  }, [path]);
  useEffect(() => { if (form.value.path && found.value.path !== form.value.path.trim()) look(); }, [path]);
  const own = jobs.value.filter((job) => job.kind === "data");
  const facts = found.value;
  return html`
    <header class="page-head"><h1>${t("Data")}</h1></header>
    <div class="split">
      <div>
        <${Card} title=${t("Source")}>
          <form class="fields" onSubmit=${(e) => { e.preventDefault(); look(); }}>
            <${PathField} wide label=${t("File or folder")} kind="data" value=${form.value.path} onInput=${putForm("path")} placeholder=${t("a .jsonl file, or a folder of .txt files")} />
            <${SelectField} label=${t("Rows are")} value=${form.value.format} onInput=${putForm("format")} options=${[["auto", t("detected")], ...["text", "messages", "sharegpt", "alpaca", "prompt"].map((one) => [one, one])]} />
            <${SelectField} label=${t("Loss mask")} value=${form.value.mask} onInput=${putForm("mask")} options=${[["auto", t("automatic")], ...["none", "answer", "qa"].map((one) => [one, one])]} />
            <${SelectField} label=${t("Template")} value=${form.value.template} onInput=${putForm("template")} options=${[["world", "world"], ["g1", "g1"]]} />
            <${TextField} label=${t("Context length")} number value=${form.value.ctx_len} onInput=${putForm("ctx_len")} />
            <div class="field wide"><button class="button" type="submit" disabled=${!form.value.path.trim() || facts.state === "asking"}>${facts.state === "asking" ? t("Reading…") : t("Preview")}</button></div>
          </form>
        </${Card}>
        <${Card} title=${t("Convert")}>
          <p class="muted">${t("Writes NAME.bin and NAME.idx, as every RWKV trainer reads them. Each document gets its end mark.")}</p>
          <form class="fields two" onSubmit=${(e) => { e.preventDefault(); convert(); }}>
            <${SelectField} label=${t("Vocabulary")} value=${make.value.tokenizer} onInput=${putMake("tokenizer")} options=${[["world", "World"], ["char", t("characters of the data")], ["compact", t("compact: bytes, marks and characters")]]} />
            <${TextField} label=${t("Copies of each document")} number value=${make.value.epochs} onInput=${putMake("epochs")} />
            <${TextField} label=${t("Write to")} value=${make.value.output} onInput=${putMake("output")} placeholder=${t("beside the source")} />
            <${SwitchField} label=${t("Shuffle documents")} value=${make.value.shuffle} onInput=${putMake("shuffle")} />
            <${SwitchField} label=${t("Leave out bad lines")} value=${make.value.skip} onInput=${putMake("skip")} />
            <div class="field wide"><button class="button primary" type="submit" disabled=${!form.value.path.trim()}>${t("Convert")}</button></div>
          </form>
          <${Jobs} jobs=${own}>${(job) => html`
            <div class="row"><button class="button small primary" onClick=${() => { adoptData(job.result); }}>${t("Train on it")}</button><span class="muted path-line">${job.result}</span></div>`}</${Jobs}>
        </${Card}>
      </div>
      <div>
        ${facts.state === "failed" && html`<${Problem} failure=${facts.failure} text=${facts.error} />`}
        ${facts.state === "idle" && html`<${Empty} title=${t("See what the model will read.")}><p class="muted">${t("Rows, what of them is trained, how long they are, and lines that cannot be read.")}</p></${Empty}>`}
        ${facts.state === "asking" && html`<p class="muted" aria-busy="true">${t("Reading…")}</p>`}
        ${facts.state === "known" && html`<${Preview} data=${facts.data} />`}
      </div>
    </div>`;
}

function adoptData(path) {
  change({ data_file: path, tokenizer: "" });
  go("train");
}

async function look() {
  const { format, mask, template, ctx_len } = form.value;
  const path = form.value.path.trim();
  found.value = { state: "asking", path };
  try {
    found.value = { state: "known", path, data: await api(`data/preview?${query({ path, format, mask, template, ctx_len })}`) };
  } catch (error) {
    found.value = { state: "failed", path, error: error.message, failure: error.failure };
  }
}

async function convert() {
  try {
    await api("data/make", { ...make.value, source: form.value.path.trim(), ctx_len: form.value.ctx_len });
    toast(t("Converting."));
  } catch (error) {
    complain(error);
  }
}

function Preview({ data }) {
  const part = data.tokens ? (100 * data.trained) / data.tokens : 0;
  const facts = [
    [t("documents"), count(data.documents)],
    [t("tokens"), count(data.tokens)],
    [t("trained"), `${count(data.trained)} (${part.toFixed(0)} %)`],
    [t("median length"), count(data.median)],
    [t("longest"), count(data.longest)],
    [t("cut at {n}", { n: count(data.ctx_len) }), count(data.cut)],
  ];
  const read = [data.data_type, data.data_format, data.template, `loss_mask ${data.loss_mask}`, `dataload ${data.dataload}`, data.tokenizer].filter(Boolean);
  return html`
    <${Card} title=${t("What is in it")}>
      <p>${read.map((one) => html`<span class="chip">${one}</span>`)}</p>
      ${!data.complete && html`<p class="muted">${t("These figures are about the beginning of a large file.")}</p>`}
      <dl class="figures">${facts.map(([name, value]) => html`<div><dt>${name}</dt><dd>${value}</dd></div>`)}</dl>
      <${Histogram} bins=${data.histogram} limit=${data.ctx_len} cuts=${data.cut > 0} />
      ${data.left_out > 0 && html`<${Problem} kind="warning" text=${t("Documents in which nothing is trained and which are left out: {n}", { n: count(data.left_out) })} />`}
      ${data.thoughts_lost > 0 && html`<${Problem} kind="warning" text=${t("Conversations whose thoughts this template leaves out (template g1 keeps them): {n}", { n: count(data.thoughts_lost) })} />`}
      ${data.fault_count > 0 && html`<${Problem} kind="warning" text=${[t("Lines that cannot be read: {n}", { n: count(data.fault_count) }), ...data.faults].join("\n")} />`}
    </${Card}>
    <${Card} title=${t("Rows")} actions=${html`<span class="row legend"><span><i class="trained"></i>${t("trained")}</span><span><i class="read"></i>${t("only read")}</span></span>`}>
      ${data.rows.map((row) => html`
        <article class="document" key=${row.number} aria-label=${t("Row {n}", { n: row.number })}>
          <header class="row between"><b>#${row.number}</b><span class="muted">${t("{n} tokens, {m} trained", { n: count(row.tokens), m: count(row.trained) })}</span></header>
          <p class="spans" tabindex="0">${row.spans.map((span) => html`<${Span} span=${span} />`)}</p>
        </article>`)}
    </${Card}>`;
}

function Span({ span }) {
  if (span.kind === "end") return html`<span class=${`mark ${span.trained ? "trained" : ""}`} title=${t("end of the document")}>${t("end")}</span>`;
  if (span.kind === "gap") return html`<span class="mark">${t("… {n} tokens …", { n: span.text })}</span>`;
  if (span.kind === "cut") return html`<span class="mark cut">${t("{n} tokens beyond the context length are cut", { n: span.text })}</span>`;
  return span.trained ? html`<mark>${span.text}</mark>` : html`<span>${span.text}</span>`;
}

/** Documents by their length; where samples are documents, those that are longer than one stand out. */
function Histogram({ bins, limit, cuts }) {
  if (bins.length < 2) return null;
  const most = Math.max(...bins.map((bin) => bin.documents)) || 1;
  const said = bins.map((bin) => t("{a} to {b} tokens: {n} documents", { a: bin.first, b: bin.last, n: bin.documents })).join("; ");
  return html`<figure class="histogram" role="img" aria-label=${`${t("Documents by their length")}: ${said}`}>
    <figcaption class="muted">${t("Documents by their length in tokens; the context holds {n}", { n: count(limit) })}</figcaption>
    <div class="bins">${bins.map((bin) => html`<div class="bin" title=${t("{a} to {b} tokens: {n} documents", { a: bin.first, b: bin.last, n: bin.documents })}>
      <span class="muted">${bin.documents ? count(bin.documents) : ""}</span>
      <i class=${cuts && bin.cut ? "cut" : ""} style=${{ height: `${Math.max(bin.documents ? 2 : 0, (72 * bin.documents) / most)}px` }}></i><span class="muted">≤${bin.last}</span></div>`)}</div>
  </figure>`;
}
