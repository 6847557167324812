// What every page shares: rendering, language, requests, and the live state of the console.
import { h } from "preact";
import htm from "htm";
import { batch, signal } from "@preact/signals";

export const html = htm.bind(h);

// Settings, form and machine as the server told them at the start.
export const hello = signal(null);
export const language = signal("en");
export const theme = signal("auto");
const catalogue = signal({});

// Live state: path -> run, commands, API servers, memory and GPUs; whether the console answers.
export const runs = signal(null);
export const jobs = signal([]);
export const servers = signal([]);
export const machine = signal(null);
export const connected = signal(true);

/** `sentence` in the language in use, with {name} places filled from `values`. */
export function t(sentence, values) {
  const text = (language.value === "zh" && catalogue.value[sentence]) || sentence;
  return values ? text.replace(/\{(\w+)\}/g, (place, name) => values[name] ?? place) : text;
}

class ApiError extends Error {
  constructor(message, failure, status) {
    super(message);
    this.failure = failure;
    this.status = status;
  }
}

/** Ask the server: GET without `body`, else POST. Throws ApiError with its words. */
export async function api(path, body, options = {}) {
  let response;
  try {
    response = await fetch(`/api/${path}`, {
      ...(body === undefined ? {} : { method: "POST", body: JSON.stringify(body) }),
      headers: { "Content-Type": "application/json", "X-Rookery": "1" },
      ...options,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(t("The console does not answer: is `rookery ui` still running?"), null, 0);
  }
  if (!response.ok) {
    const told = await response.json().catch(() => ({}));
    throw new ApiError(told.error?.message || told.error || told.detail || response.statusText, told.failure, response.status);
  }
  if (options.raw) return response;
  const type = response.headers.get("content-type") || "";
  return type.startsWith("application/json") ? response.json() : response.text();
}

export function query(values) {
  const given = Object.entries(values).filter(([, value]) => value !== undefined && value !== null && value !== "");
  return new URLSearchParams(given).toString();
}

/** Load the sentences of `name` and change over; nothing that was typed is touched. */
async function useLanguage(name) {
  if (name === "zh" && !Object.keys(catalogue.value).length) catalogue.value = await api("catalogue");
  language.value = name;
  document.documentElement.lang = name === "zh" ? "zh-CN" : "en";
}

export async function setPreference(values) {
  try {
    const settings = await api("settings", values);
    hello.value = { ...hello.value, settings };
    if (settings.language !== language.value) await useLanguage(settings.language);
    useTheme(settings.theme);
    return true;
  } catch (error) {
    complain(error);
    return false;
  }
}

function useTheme(name) {
  theme.value = name;
  document.documentElement.dataset.theme = name;
}

const darkSystem = matchMedia("(prefers-color-scheme: dark)");
const systemIsDark = signal(darkSystem.matches);
darkSystem.addEventListener("change", () => { systemIsDark.value = darkSystem.matches; });
export const isDark = () => (theme.value === "auto" ? systemIsDark.value : theme.value === "dark");

// Short messages in a corner; errors stay until they are closed.
export const toasts = signal([]);
let toastNumber = 0;
export function toast(text, kind = "info") {
  const id = ++toastNumber;
  toasts.value = [...toasts.value.slice(-3), { id, text, kind }];
  if (kind !== "error") setTimeout(() => closeToast(id), 5000);
}
export function closeToast(id) {
  toasts.value = toasts.value.filter((one) => one.id !== id);
}
export const complain = (error) => { if (error.name !== "AbortError") toast(error.message, "error"); };

// The stream of events. A page that shows a run gets its new steps and its log as well.
let source = null;
let watched = null;

/** Watch `run` ({path, count, generation, on}) or, with null, only what every page shows. */
export function watch(run) {
  watched = run;
  openStream();
}

function openStream() {
  source?.close();
  source = null;
  // A browser keeps only six connections to a server: a page that nobody sees needs none.
  if (document.hidden) return;
  const words = watched ? query({ run: watched.path, count: watched.count(), generation: watched.generation() }) : "";
  source = new EventSource(`/api/events?${words}`);
  const mine = source;
  source.onopen = () => { connected.value = true; };
  source.onerror = () => {
    if (mine !== source) return;
    // A browser would ask again for what this page has got meanwhile; and not at all after an answer like 401.
    mine.close();
    connected.value = false;
    setTimeout(() => mine === source && openStream(), 1500);
  };
  const on = (name, take) => mine.addEventListener(name, (event) => mine === source && take(JSON.parse(event.data)));
  let first = true;
  on("runs", (changed) => {
    // What was deleted while this page heard nothing is not among the first.
    const next = first ? {} : { ...runs.value };
    first = false;
    for (const [path, run] of Object.entries(changed)) {
      if (run) next[path] = run;
      else delete next[path];
    }
    runs.value = next;
  });
  on("jobs", (list) => { jobs.value = list; });
  on("servers", (list) => { servers.value = list; });
  on("machine", (facts) => { machine.value = facts; });
  on("run", (news) => watched?.on(news));
}
document.addEventListener("visibilitychange", () => hello.value && openStream());

export async function begin() {
  const facts = await api("hello");
  const guess = navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
  // The server speaks the language of the page too.
  if (!facts.settings.language) facts.settings = await api("settings", { language: guess });
  await useLanguage(facts.settings.language);
  batch(() => {
    hello.value = facts;
    machine.value = facts.machine;
    useTheme(facts.settings.theme);
  });
  watch(null);
}

// Places in the console: #/runs?run=...
export const place = signal(readPlace());
function readPlace() {
  const [path, words] = location.hash.replace(/^#\/?/, "").split("?");
  return { page: path || "train", words: Object.fromEntries(new URLSearchParams(words || "")) };
}
addEventListener("hashchange", () => { place.value = readPlace(); });
export const link = (page, words) => `#/${page}${words && query(words) ? `?${query(words)}` : ""}`;
export const go = (page, words) => { location.hash = link(page, words); };

// Numbers for people.
const locale = () => (language.value === "zh" ? "zh-CN" : "en-US");
export const count = (value) => (value == null ? "–" : Math.round(value).toLocaleString(locale()));
export function short(value) {
  if (value == null || !isFinite(value)) return "–";
  for (const [size, unit] of [[1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
    if (Math.abs(value) >= size) return `${+(value / size).toPrecision(3)}${unit}`;
  }
  if (value && Math.abs(value) < 1e-3) return value.toExponential(1);
  return String(+value.toPrecision(3));
}
export function bytes(value) {
  if (value == null) return "–";
  for (const [size, unit] of [[2 ** 40, "TB"], [2 ** 30, "GB"], [2 ** 20, "MB"], [2 ** 10, "KB"]]) {
    if (value >= size) return `${+(value / size).toPrecision(3)} ${unit}`;
  }
  return `${value} B`;
}
export function duration(seconds) {
  if (seconds == null || !isFinite(seconds)) return "–";
  const s = Math.max(0, Math.round(seconds));
  const two = (n) => String(n).padStart(2, "0");
  return `${Math.floor(s / 3600)}:${two(Math.floor(s / 60) % 60)}:${two(s % 60)}`;
}
export function figure(value, digits = 4) {
  if (value == null || !isFinite(value)) return "–";
  return Math.abs(value) >= 1000 ? short(value) : value.toFixed(Math.abs(value) >= 100 ? 1 : Math.abs(value) >= 10 ? Math.min(3, digits) : digits);
}
export const rate = (value) => (value == null ? "–" : value === 0 || Math.abs(value) >= 1e-2 ? String(+value.toPrecision(3)) : value.toExponential(2));
export const date = (seconds) =>
  seconds
    ? new Date(seconds * 1000).toLocaleString(locale(), { month: "short", day: "numeric", hour: "2-digit", minute: "2-digit", hour12: false })
    : "–";
export const fileName = (path) => (path || "").split(/[\\/]/).filter(Boolean).pop() || "";

export const ACTIVE = ["starting", "preparing", "training", "evaluating", "saving"];
export const isActive = (run) => ACTIVE.includes(run?.phase);

/** A value kept in this browser, so that a reload loses nothing. */
export function kept(name, otherwise) {
  let first = otherwise;
  try {
    first = JSON.parse(localStorage.getItem(`rookery.${name}`)) ?? otherwise;
  } catch { /* what is stored is not ours to understand */ }
  const own = signal(first);
  own.subscribe((value) => {
    try { localStorage.setItem(`rookery.${name}`, JSON.stringify(value)); } catch { /* storage is full or forbidden */ }
  });
  return own;
}
