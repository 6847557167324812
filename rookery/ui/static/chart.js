// Charts over steps: uPlot, with one zoom for all that belong together.
import { useEffect, useRef } from "preact/hooks";
import { html, isDark, language, short } from "./core.js";

/* global uPlot */

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** Colours of overlaid runs; they differ in lightness too, for eyes that confuse hues. */
export const PALETTE = ["--c1", "--c2", "--c3", "--c4", "--c5", "--c6", "--c7", "--c8"];

/**
 * One chart.
 *
 * title, value: heading and the newest value, as text; both are what a screen reader gets.
 * x: steps. series: [{label, data, color (a CSS variable), width, dash, band: [low, high]}].
 * zoom: [first, last] or null; onZoom tells about a new one. range: [low, high] of y, or null.
 */
export function Chart({ title, value, x, series, zoom, onZoom, height = 150, log = false, range = null, format = short, stepSize = 0 }) {
  const box = useRef();
  const plot = useRef();
  const latest = useRef();
  latest.current = { onZoom, range, zoom, x };
  const dark = isDark();
  const shape = [dark, log, language.value, height, series.map((one) => [one.label, one.color, one.band ? 1 : 0].join()).join(";")].join("|");

  useEffect(() => {
    const ink = css("--muted");
    const grid = { stroke: css("--line"), width: 1 };
    const font = "11px system-ui, sans-serif";
    const axis = { stroke: ink, grid, ticks: { show: false }, font, gap: 4 };
    const bands = [];
    const drawn = [];
    for (const one of series) {
      const stroke = css(one.color);
      if (one.band) {
        drawn.push({ label: "", stroke: "transparent", points: { show: false } }, { label: "", stroke: "transparent", points: { show: false } });
        bands.push({ series: [drawn.length - 1, drawn.length], fill: `${stroke}22` });
      }
      drawn.push({
        label: one.label,
        stroke: one.faint ? `${stroke}55` : stroke,
        width: one.width || 1.5,
        dash: one.dash,
        spanGaps: true,
        points: { show: Boolean(one.points), size: 5, fill: stroke },
        value: (_self, shown) => (shown == null ? "–" : format(shown)),
      });
    }
    const options = {
      width: box.current.clientWidth || 300,
      height,
      padding: [8, 18, 0, 0],
      scales: {
        x: { time: false, range: (_u, low, high) => latest.current.zoom || [low ?? 0, Math.max(high ?? 1, (low ?? 0) + 1)] },
        y: {
          distr: log ? 3 : 1,
          range: (_u, low, high) => {
            const [bottom, top] = latest.current.range || [low, high];
            if (bottom == null) return [0, 1];
            if (log) return uPlot.rangeLog(bottom, top, 10, false);
            const room = (top - bottom || Math.abs(top) || 1) * 0.06;
            return [bottom >= 0 && bottom < room ? 0 : bottom - room, top + room];
          },
        },
      },
      axes: [
        { ...axis, size: 26, space: 60, values: (_u, ticks) => ticks.map((tick) => (tick % 1 ? "" : short(tick))) },
        { ...axis, size: 52, space: 28, values: (_u, ticks) => ticks.map((tick) => (tick == null ? "" : plain(format(tick)))) },
      ],
      series: [{ label: "" , value: (_u, step) => (step == null ? "" : `${step}`) }, ...drawn],
      bands,
      legend: { show: false },
      cursor: { sync: onZoom ? { key: "steps" } : undefined, drag: { x: true, y: false, setScale: false }, focus: { prox: 24 }, points: { size: 6 } },
      hooks: {
        setSelect: [(u) => {
          if (u.select.width > 4) latest.current.onZoom?.([u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x")]);
          u.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
        }],
        setCursor: [(u) => tell(u, box.current.parentElement.querySelector(".chart-tip"), series, format)],
      },
    };
    const chart = new uPlot(options, columns(x, series), box.current);
    plot.current = chart;
    const reset = () => latest.current.onZoom?.(null);
    chart.over.addEventListener("dblclick", reset);
    const sizes = new ResizeObserver(() => {
      const width = box.current?.clientWidth;
      if (width && Math.abs(width - chart.width) > 1) chart.setSize({ width, height });
    });
    sizes.observe(box.current);
    return () => { sizes.disconnect(); chart.destroy(); plot.current = null; };
  }, [shape]);

  useEffect(() => { plot.current?.setData(columns(x, series)); }, [x, zoom, range, ...series.map((one) => one.data)]);

  return html`
    <figure class="chart" aria-label=${`${title}: ${value}`} role="img" data-points=${x.length}>
      <figcaption><span>${title}</span><span class="chart-tip" aria-hidden="true"></span><b>${value}</b></figcaption>
      <div class="chart-box" ref=${box} style=${{ height: `${height}px` }}></div>
    </figure>`;
}

/** Without zeros that say nothing: 3.500 → 3.5, 2.00e-3 → 2e-3. */
const plain = (text) => text.replace(/(\.\d*?)0+(?=$|e|k|M)/, "$1").replace(/\.(?=$|e|k|M)/, "");

function columns(x, series) {
  const found = [x];
  for (const one of series) {
    if (one.band) found.push(one.band[1], one.band[0]);
    found.push(one.data);
  }
  return found;
}

/** Writes what lies under the pointer into the heading. */
function tell(u, place, series, format) {
  if (!place) return;
  const at = u.cursor.idx;
  if (at == null || u.cursor.left < 0) { place.textContent = ""; return; }
  let column = 1;
  const parts = [`#${u.data[0][at]}`];
  for (const one of series) {
    column += one.band ? 2 : 0;
    const value = u.data[column++][at];
    if (value != null && (!one.quiet || series.length < 3)) parts.push(`${one.label} ${format(value)}`);
  }
  place.textContent = parts.join("  ");
}

/**
 * A moving average that gives the past the share `weight` (0 to 1) a step; `group` steps stand in each value.
 * The first values are corrected for what they begin with, as TensorBoard does.
 */
export function smooth(values, weight, group = 1) {
  const past = weight ** group;
  let sum = 0;
  let share = 0;
  return values.map((value) => {
    if (value == null) return share ? sum / share : null;
    sum = past * sum + (1 - past) * value;
    share = past * share + (1 - past);
    return share ? sum / share : value;
  });
}

/** [low, high] without the few values that would flatten the curve. */
export function withoutOutliers(values) {
  const sorted = values.filter((value) => value != null).sort((a, b) => a - b);
  if (sorted.length < 20) return null;
  const at = (part) => sorted[Math.min(sorted.length - 1, Math.floor(part * sorted.length))];
  return [at(0.005), at(0.985)];
}
