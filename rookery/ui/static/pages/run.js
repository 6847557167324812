// One run, live: curves, log, figures, and what can be done with it.
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { ACTIVE, api, bytes, complain, count, date, duration, fileName, figure, go, html, isActive, kept, link, query, rate, runs, short, t, toast, watch } from "../core.js";
import { Chart, smooth, withoutOutliers } from "../chart.js";
import { Bar, Code, Icon, Phase, Problem, confirm, methodName } from "../widgets.js";
import { adopt } from "./train.js";

const look = kept("look", { smoothing: 0.9, log: false, clip: true });
const NAMES = ["loss", "low", "high", "lr", "grad_norm", "tok_s", "memory", "time"];
const empty = () => ({ step: [], ...Object.fromEntries(NAMES.map((name) => [name, []])), validations: [], group: 1, generation: 0, count: 0 });
const POINTS = 2000;

/** The metrics of the run, complete and then growing. */
function useMetrics(path, zoom) {
  const [series, setSeries] = useState(null);
  const [log, setLog] = useState("");
  const [memory, setMemory] = useState(null);
  const held = useRef(empty());
  const waiting = useRef(0);
  const zoomed = useRef(zoom);
  zoomed.current = zoom;

  const load = async () => {
    const [first, last] = zoomed.current || [];
    try {
      const found = await api(`runs/metrics?${query({ run: path, first, last, points: POINTS })}`);
      held.current = found;
      setSeries(found);
      return found;
    } catch (error) {
      complain(error);
      setSeries(empty());
    }
  };
  const loadSoon = () => {
    if (!waiting.current) waiting.current = setTimeout(() => { waiting.current = 0; load(); }, 2500);
  };
  const take = (news) => {
    if (news.memory) setMemory(news.memory);
    if (news.log) setLog((before) => (news.log.whole ? news.log.text : (before + news.log.text).slice(-400_000)));
    if (news.reset) return load();
    if (!news.steps) return;
    const now = held.current;
    // Of groups of steps, or of a part of the run, the server makes a new picture.
    if (now.group > 1 || zoomed.current || now.step.length > 1.5 * POINTS) return loadSoon();
    const add = { ...news.steps, low: news.steps.loss, high: news.steps.loss };
    const next = { ...now, validations: news.steps.validations, count: news.steps.count };
    for (const name of ["step", ...NAMES]) next[name] = now[name].concat(add[name] || []);
    held.current = next;
    setSeries(next);
  };
  useEffect(() => {
    let mine = true;
    load().then(() => {
      if (mine) watch({ path, count: () => held.current.count, generation: () => held.current.generation, on: (news) => mine && take(news) });
    });
    return () => { mine = false; clearTimeout(waiting.current); waiting.current = 0; watch(null); };
  }, [path]);
  const firstZoom = useRef(true);
  useEffect(() => {
    if (firstZoom.current) { firstZoom.current = false; return; }
    if (held.current.group > 1 || !zoom || held.current.step[0] > zoom[0] || held.current.step.at(-1) < zoom[1]) load();
  }, [zoom && zoom.join()]);
  return { series, log, memory };
}

export function Run({ run: path }) {
  const [zoom, setZoom] = useState(null);
  const { series, log, memory } = useMetrics(path, zoom);
  const run = runs.value?.[path];
  if (runs.value && !run) {
    return html`<h1>${fileName(path)}</h1><${Problem} text=${t("There is no run in {path} any more.", { path })} /><p><a class="button" href=${link("runs")}>${t("All runs")}</a></p>`;
  }
  if (!run || !series) return html`<h1>${fileName(path)}</h1><p class="muted" aria-busy="true">${t("Loading…")}</p>`;
  return html`
    <${Head} run=${run} memory=${memory} />
    ${run.failure && html`<${Problem} failure=${run.failure} text=${run.exit_reason} />`}
    ${!run.failure && run.warnings.map((warning) => html`<${Problem} failure=${warning} kind="warning" />`)}
    <div class="run-grid">
      <${Curves} run=${run} series=${series} zoom=${zoom} setZoom=${setZoom} memory=${memory} />
      <div class="run-side">
        <${Log} text=${log} active=${isActive(run)} />
        <${Facts} run=${run} />
      </div>
    </div>`;
}

function Head({ run, memory }) {
  const active = isActive(run);
  const percent = 100 * (run.progress || 0);
  const begins = run.phase === "training" && !run.tok_s;
  const act = async (what, said) => {
    try {
      await api(`runs/${what}`, { run: run.path });
      toast(said);
    } catch (error) {
      complain(error);
    }
  };
  return html`
    <header class="page-head">
      <div>
        <p class="crumb"><a href=${link("runs")}>${t("Runs")}</a></p>
        <h1>${run.name} <span role="status"><${Phase} phase=${run.phase} /></span></h1>
      </div>
      <div class="row actions">
        ${active && run.host && html`<span class="muted">${t("It trains on {host}: stop it there.", { host: run.host })}</span>`}
        ${active && !run.host && html`<button class="button danger" onClick=${() => act("stop", t("Stopping: the step is finished and saved first."))}><${Icon} name="stop" filled />${t("Stop and save")}</button>`}
        ${run.resumable && html`<button class="button primary" onClick=${() => act("resume", t("Going on from the last checkpoint."))}><${Icon} name="play" filled />${t("Resume")}</button>`}
        ${run.weights && html`<a class=${`button ${run.phase === "done" ? "primary" : ""}`} href=${link("chat", { model: run.path })}><${Icon} name="chat" />${t("Try it")}</a>`}
        <button class="button" onClick=${() => cloneRun(run.path)}><${Icon} name="copy" />${t("Clone into the form")}</button>
        ${!active && html`<button class="button" onClick=${() => deleteRun(run).then((gone) => gone && go("runs"))}><${Icon} name="trash" />${t("Delete")}</button>`}
      </div>
    </header>
    <section class="progress-card" aria-label=${t("Progress")}>
      <${Bar} value=${begins || run.phase === "preparing" || run.phase === "starting" ? null : percent} />
      ${begins && html`<p class="help">${t("The first step also compiles.")}</p>`}
      <dl class="figures">
        <${Figure} name=${t("Done")} value=${`${percent.toFixed(percent < 10 ? 1 : 0)} %`} />
        <${Figure} name=${t("Step")} value=${`${count(run.step)} / ${count(run.total_steps)}`} />
        <${Figure} name=${t("Elapsed")} value=${duration(run.seconds)} />
        <${Figure} name=${t("Left")} value=${active ? duration(run.eta) : "–"} />
        <${Figure} name=${t("Loss")} value=${figure(run.loss)} />
        <${Figure} name=${t("Validation")} value=${figure(run.val_loss)} />
        <${Figure} name=${t("Tokens/s")} value=${short(run.tok_s)} />
        <${Figure} name=${t("Memory")} value=${active ? bytes(memory) : "–"} />
      </dl>
    </section>`;
}

const Figure = ({ name, value }) => html`<div><dt>${name}</dt><dd>${value}</dd></div>`;

function Curves({ run, series, zoom, setZoom }) {
  const { smoothing, log, clip } = look.value;
  const put = (change) => { look.value = { ...look.value, ...change }; };
  const steps = series.step;
  const smoothed = useMemo(() => smooth(series.loss, smoothing, series.group), [series.loss, smoothing, series.group]);
  const validation = useMemo(() => {
    // Validations are fewer than steps: each stands at the nearest step that is drawn.
    const places = new Array(steps.length).fill(null);
    let at = 0;
    for (const [step, loss] of series.validations) {
      while (at < steps.length - 1 && steps[at] < step) at++;
      if (steps.length && step >= steps[0] && step <= steps.at(-1)) places[at] = loss;
    }
    return places;
  }, [steps, series.validations]);
  const range = useMemo(() => (clip ? withoutOutliers([...series.loss, ...validation]) : null), [clip, series.loss, validation]);
  if (!steps.length && !zoom) {
    return html`<section class="card curves"><div class="empty"><p class="empty-title">${isActive(run) ? t("The first step comes soon.") : t("No step was made.")}</p>
      <p class="muted">${isActive(run) ? t("Data and model are being read; the log tells how far it is.") : ""}</p></div></section>`;
  }
  const last = (name) => series[name].findLast?.((value) => value != null) ?? null;
  const grouped = series.group > 1;
  const loss = [
    { label: grouped ? t("mean of {n} steps", { n: series.group }) : t("each step"), data: series.loss, color: "--accent", faint: true, width: 1, band: grouped ? [series.low, series.high] : null },
    { label: t("smoothed"), data: smoothed, color: "--accent", width: 2 },
  ];
  if (series.validations.length) loss.push({ label: t("validation"), data: validation, color: "--c2", width: 1.5, points: true });
  const small = [
    [t("Learning rate"), "lr", "--c3", rate],
    [t("Gradient norm"), "grad_norm", "--c4", short],
    [t("Tokens per second"), "tok_s", "--c5", short],
    [t("Memory"), "memory", "--c6", bytes],
  ].filter(([, name]) => series[name].some((value) => value != null));
  return html`
    <section class="card curves" aria-label=${t("Curves")}>
      <div class="row between curve-tools">
        <div class="row legend" aria-hidden="true">${loss.map((one) => html`<span><i style=${{ background: `var(${one.color})`, opacity: one.faint ? 0.4 : 1 }}></i>${one.label}</span>`)}</div>
        <div class="row">
          <label class="slider">${t("Smoothing")} <input type="range" min="0" max="0.99" step="0.01" value=${smoothing} onInput=${(e) => put({ smoothing: +e.currentTarget.value })} /><output>${smoothing.toFixed(2)}</output></label>
          <label class="tick"><input type="checkbox" checked=${log} onChange=${(e) => put({ log: e.currentTarget.checked })} />${t("Log scale")}</label>
          <label class="tick" title=${t("Draw the axis without the few values that would flatten the curve")}><input type="checkbox" checked=${clip} onChange=${(e) => put({ clip: e.currentTarget.checked })} />${t("Clip outliers")}</label>
        </div>
      </div>
      <${Chart} title=${t("Loss")} value=${`${t("smoothed")} ${figure(smoothed.at(-1))}`} x=${steps} series=${loss} zoom=${zoom} onZoom=${setZoom} height=${300} log=${log} range=${range} format=${(v) => figure(v, 4)} />
      <div class="row between zoom-tools">
        <span class="muted">${zoom ? t("Steps {a} to {b}", { a: count(zoom[0]), b: count(zoom[1]) }) : t("Drag over a chart to zoom; double-click shows all.")}</span>
        <span class="row">
          <button class="button small" onClick=${() => setZoom(nearer(zoom, steps, 0.5))}>${t("Last half")}</button>
          <button class="button small" disabled=${!zoom} onClick=${() => setZoom(null)}>${t("Show all")}</button>
        </span>
      </div>
      <div class="small-charts">
        ${small.map(([title, name, color, format]) => html`<${Chart} key=${name} title=${title} value=${format(last(name))} x=${steps}
          series=${[{ label: title, data: series[name], color, width: 1.25, quiet: true }]} zoom=${zoom} onZoom=${setZoom} height=${120} format=${format}
          range=${clip && name !== "lr" ? withoutOutliers(series[name]) : null} />`)}
      </div>
    </section>`;
}

/** The last `part` of what is shown: zooming without a pointer. */
function nearer(zoom, steps, part) {
  const [first, last] = zoom || [steps[0] ?? 0, steps.at(-1) ?? 1];
  return [last - (last - first) * part, last];
}

function Log({ text, active }) {
  const box = useRef();
  const follow = useRef(true);
  useEffect(() => { if (box.current && follow.current) box.current.scrollTop = box.current.scrollHeight; }, [text]);
  return html`
    <section class="card log-card" aria-label=${t("Log")}>
      <header class="card-head"><h2>${t("Log")}</h2></header>
      <pre class="log" ref=${box} tabindex="0" role="log" aria-live="off" onScroll=${(e) => {
        const { scrollTop, scrollHeight, clientHeight } = e.currentTarget;
        follow.current = scrollHeight - scrollTop - clientHeight < 30;
      }}>${text || (active ? t("Nothing was printed yet.") : t("There is no log."))}</pre>
    </section>`;
}

function Facts({ run }) {
  const c = run.config;
  const rows = [
    [t("Method"), methodName(run.method) + (c.quant && c.quant !== "none" ? `, ${c.quant}` : "")],
    [t("Base model"), fileName(c.load_model)],
    [t("Training data"), fileName(c.data_file)],
    [t("Model"), c.version && `${c.version} L${c.n_layer ?? "?"} D${c.n_embd ?? "?"}`],
    [t("Context length"), c.ctx_len],
    [t("Batch"), c.micro_bsz && `${c.micro_bsz} × ${c.accumulate_grad_batches ?? 1}`],
    [t("Learning rate"), c.lr_init != null && `${rate(c.lr_init)} → ${rate(c.lr_final)}`],
    [t("Precision"), c.precision],
    [t("Started"), date(run.started)],
    [t("Directory"), run.path],
  ].filter(([, value]) => value);
  return html`
    <section class="card" aria-label=${t("About this run")}>
      <header class="card-head"><h2>${t("About this run")}</h2></header>
      <dl class="facts">${rows.map(([name, value]) => html`<dt>${name}</dt><dd>${value}</dd>`)}</dl>
      ${!ACTIVE.includes(run.phase) && run.exit_reason && !run.failure && html`<p class="help">${run.exit_reason}</p>`}
      ${run.weights && html`<${Code} text=${run.chat} label=${t("Command")} />`}
    </section>`;
}

export async function cloneRun(path) {
  try {
    const { asked, method } = await api(`runs/config?${query({ run: path })}`);
    adopt({ ...asked, proj_dir: "" }, method);
    go("train");
  } catch (error) {
    complain(error);
  }
}

export async function deleteRun(run) {
  try {
    const contents = await api(`runs/contents?${query({ run: run.path })}`);
    const total = contents.reduce((sum, entry) => sum + entry.bytes, 0);
    const sure = await confirm({
      title: t("Delete {name}?", { name: run.name }),
      children: html`<p>${t("This removes the folder and everything in it, {size} altogether. It cannot be undone.", { size: bytes(total) })}</p>
        <p class="path-line muted">${run.path}</p>
        <ul class="files short">${contents.map((entry) => html`<li><span>${entry.name}</span><span class="muted">${bytes(entry.bytes)}</span></li>`)}</ul>`,
      action: t("Delete"),
      danger: true,
    });
    if (!sure) return false;
    await api("runs/delete", { run: run.path });
    toast(t("{name} was deleted.", { name: run.name }));
    return true;
  } catch (error) {
    complain(error);
    return false;
  }
}
