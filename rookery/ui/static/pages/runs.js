// Every run in the folders: a list, an overlay of several, and what differs between them.
import { useEffect, useMemo, useState } from "preact/hooks";
import { signal } from "@preact/signals";
import { api, complain, count, date, duration, fileName, figure, html, isActive, kept, link, query, runs, t, toast } from "../core.js";
import { Chart, PALETTE, smooth, withoutOutliers } from "../chart.js";
import { Bar, Card, Empty, Icon, Phase, Spark, methodName } from "../widgets.js";
import { cloneRun, deleteRun } from "./run.js";

const chosen = signal([]);
const find = signal("");
const look = kept("overlay", { smoothing: 0.9, log: false, clip: true });

export function Runs() {
  const all = Object.values(runs.value || {}).sort((a, b) => isActive(b) - isActive(a) || (b.updated || 0) - (a.updated || 0));
  const words = find.value.toLowerCase();
  const shown = all.filter((run) => !words || `${run.path} ${run.method} ${run.config.data_file} ${run.config.load_model}`.toLowerCase().includes(words));
  const selected = chosen.value.filter((path) => runs.value?.[path]);
  const toggle = (path) => {
    const now = chosen.value;
    chosen.value = now.includes(path) ? now.filter((one) => one !== path) : [...now, path].slice(-PALETTE.length);
  };
  return html`
    <header class="page-head"><h1>${t("Runs")}</h1>
      <div class="row"><input type="search" class="search" placeholder=${t("Find a run")} aria-label=${t("Find a run")} value=${find.value} onInput=${(e) => { find.value = e.currentTarget.value; }} /></div>
    </header>
    ${selected.length > 0 && html`<${Compare} paths=${selected} />`}
    ${runs.value && !all.length && html`<${Empty} title=${t("There are no runs yet.")}>
      <p class="muted">${t("Runs in these folders appear here by themselves, also those started in a terminal.")}</p>
      <a class="button primary" href=${link("train")}>${t("Train a model")}</a></${Empty}>`}
    <ul class="run-list">
      ${shown.map((run) => html`<${Row} key=${run.path} run=${run} color=${selected.indexOf(run.path)} toggle=${() => toggle(run.path)} />`)}
    </ul>`;
}

function Row({ run, color, toggle }) {
  const act = (what, said) => api(`runs/${what}`, { run: run.path }).then(() => toast(said)).catch(complain);
  return html`
    <li class="run-row" style=${color >= 0 ? { "--mark": `var(${PALETTE[color]})` } : {}}>
      <input type="checkbox" checked=${color >= 0} onChange=${toggle} aria-label=${t("Compare {name}", { name: run.name })} />
      <a class="run-name" href=${link("run", { run: run.path })}><strong>${run.name}</strong>
        <span class="muted">${[methodName(run.method), fileName(run.config.load_model), fileName(run.config.data_file)].filter(Boolean).join(" · ")}</span></a>
      <span class="run-phase"><${Phase} phase=${run.phase} />${run.failure && html` <code>${run.failure.code}</code>`}</span>
      <span class="run-spark"><${Spark} values=${run.spark} /></span>
      <span class="run-loss"><b>${figure(run.loss)}</b><span class="muted">${t("loss")}</span></span>
      <span class="run-steps">${isActive(run) ? html`<${Bar} value=${100 * run.progress} /><span class="muted">${run.eta != null ? t("{time} left", { time: duration(run.eta) }) : `${count(run.step)} / ${count(run.total_steps)}`}</span>`
        : html`<b>${count(run.step)}</b><span class="muted">${t("steps")}</span>`}</span>
      <span class="run-date muted">${date(run.updated)}</span>
      <span class="row run-tools">
        ${isActive(run) && !run.host && html`<button class="icon-button" title=${t("Stop and save")} aria-label=${t("Stop and save {name}", { name: run.name })} onClick=${() => act("stop", t("Stopping: the step is finished and saved first."))}><${Icon} name="stop" filled /></button>`}
        ${run.resumable && html`<button class="icon-button" title=${t("Resume")} aria-label=${t("Resume {name}", { name: run.name })} onClick=${() => act("resume", t("Going on from the last checkpoint."))}><${Icon} name="play" filled /></button>`}
        ${run.weights && html`<a class="icon-button" title=${t("Try it")} aria-label=${t("Try {name}", { name: run.name })} href=${link("chat", { model: run.path })}><${Icon} name="chat" /></a>`}
        <button class="icon-button" title=${t("Clone into the form")} aria-label=${t("Clone {name} into the form", { name: run.name })} onClick=${() => cloneRun(run.path)}><${Icon} name="copy" /></button>
        ${!isActive(run) && html`<button class="icon-button" title=${t("Delete")} aria-label=${t("Delete {name}", { name: run.name })} onClick=${() => deleteRun(run)}><${Icon} name="trash" /></button>`}
      </span>
    </li>`;
}

/** Curves of several runs over each other, and the settings in which they differ. */
function Compare({ paths }) {
  const [found, setFound] = useState({});
  const [zoom, setZoom] = useState(null);
  const { smoothing, log, clip } = look.value;
  const put = (change) => { look.value = { ...look.value, ...change }; };
  const progress = paths.map((path) => runs.value[path].step).join();
  useEffect(() => {
    const read = async (path) => {
      const [metrics, config] = await Promise.all([
        api(`runs/metrics?${query({ run: path, points: 1000 })}`),
        found[path]?.config ? { values: found[path].config } : api(`runs/config?${query({ run: path })}`),
      ]);
      setFound((before) => ({ ...before, [path]: { metrics, config: config.values } }));
    };
    const fresh = paths.filter((path) => !found[path]);
    fresh.forEach((path) => read(path).catch(complain));
    if (fresh.length) return undefined;
    const wait = setTimeout(() => paths.forEach((path) => read(path).catch(complain)), 1500);
    return () => clearTimeout(wait);
  }, [paths.join(), progress]);
  const ready = paths.filter((path) => found[path]);
  const { x, series, range } = useMemo(() => overlay(ready, paths, found, smoothing, clip), [ready.join(), found, smoothing, clip]);
  const differing = differences(ready.map((path) => found[path].config));
  return html`
    <${Card} title=${paths.length > 1 ? t("{n} runs compared", { n: paths.length }) : t("Tick a second run to compare")} actions=${html`<button class="button small" onClick=${() => { chosen.value = []; }}>${t("Close")}</button>`}>
      <div class="row between curve-tools">
        <div class="row legend">${paths.map((path, at) => html`<span><i style=${{ background: `var(${PALETTE[at]})` }}></i>${fileName(path)}</span>`)}</div>
        <div class="row">
          <label class="slider">${t("Smoothing")} <input type="range" min="0" max="0.99" step="0.01" value=${smoothing} onInput=${(e) => put({ smoothing: +e.currentTarget.value })} /><output>${smoothing.toFixed(2)}</output></label>
          <label class="tick"><input type="checkbox" checked=${log} onChange=${(e) => put({ log: e.currentTarget.checked })} />${t("Log scale")}</label>
          <label class="tick"><input type="checkbox" checked=${clip} onChange=${(e) => put({ clip: e.currentTarget.checked })} />${t("Clip outliers")}</label>
        </div>
      </div>
      ${series.length > 0 && html`<${Chart} title=${t("Loss, smoothed")} value="" x=${x} series=${series} zoom=${zoom} onZoom=${setZoom} height=${260} log=${log} range=${range} format=${(v) => figure(v, 3)} />`}
      ${ready.length > 1 && html`
        <h3>${t("What differs")}</h3>
        ${differing.length ? html`<div class="table-box"><table class="table"><thead><tr><th scope="col">${t("setting")}</th>${ready.map((path) => html`<th scope="col">${fileName(path)}</th>`)}</tr></thead>
          <tbody>${differing.map((leaf) => html`<tr><th scope="row"><code>${leaf}</code></th>${ready.map((path) => html`<td>${found[path].config[leaf] || "–"}</td>`)}</tr>`)}</tbody></table></div>`
        : html`<p class="muted">${t("Their settings are the same.")}</p>`}`}
    </${Card}>`;
}

/** One axis of steps for all, with a hole where a run has no such step. */
function overlay(ready, paths, found, smoothing, clip) {
  const steps = [...new Set(ready.flatMap((path) => found[path].metrics.step))].sort((a, b) => a - b);
  const index = new Map(steps.map((step, at) => [step, at]));
  const series = ready.map((path) => {
    const { metrics } = found[path];
    const data = new Array(steps.length).fill(null);
    smooth(metrics.loss, smoothing, metrics.group).forEach((value, at) => { data[index.get(metrics.step[at])] = value; });
    return { label: fileName(path), data, color: PALETTE[paths.indexOf(path)], width: 1.75 };
  });
  return { x: steps, series, range: clip ? withoutOutliers(series.flatMap((one) => one.data)) : null };
}

// Two runs always differ in these.
const NAMES = ["run_name", "proj_dir"];

function differences(configs) {
  const leaves = [...new Set(configs.flatMap(Object.keys))];
  return leaves.filter((leaf) => !NAMES.includes(leaf) && new Set(configs.map((config) => config[leaf] ?? "")).size > 1);
}
