// The frame around the pages, and which page is shown.
import { render } from "preact";
import { signal } from "@preact/signals";
import { begin, bytes, connected, hello, html, isActive, language, link, machine, place, runs, setPreference, t, theme } from "./core.js";
import { Dialogs, Icon, Said, Toasts } from "./widgets.js";
import { Train } from "./pages/train.js";
import { Chat } from "./pages/chat.js";
import { Runs } from "./pages/runs.js";
import { Run } from "./pages/run.js";
import { Models } from "./pages/models.js";
import { Data } from "./pages/data.js";
import { Serve } from "./pages/serve.js";
import { Settings } from "./pages/settings.js";

const PAGES = {
  train: [Train, () => t("Train")],
  chat: [Chat, () => t("Chat")],
  runs: [Runs, () => t("Runs")],
  models: [Models, () => t("Models")],
  data: [Data, () => t("Data")],
  serve: [Serve, () => t("Serve")],
  settings: [Settings, () => t("Settings")],
};

const failed = signal("");

function App() {
  if (failed.value) return html`<main class="alone"><h1>Rookery</h1><p role="alert">${failed.value}</p></main>`;
  if (!hello.value) return html`<main class="alone" aria-busy="true"></main>`;
  const { page, words } = place.value;
  const [Page, name] = page === "run" ? [Run, () => t("Run")] : PAGES[page] || PAGES.train;
  const run = page === "run" ? runs.value?.[words.run] : null;
  document.title = run ? `${isActive(run) ? `${Math.floor(100 * run.progress)} % · ` : ""}${run.name} · Rookery` : `${name()} · Rookery`;
  return html`
    <a class="skip" href="#main" onClick=${(e) => { e.preventDefault(); document.getElementById("main").focus(); }}>${t("To the content")}</a>
    <${Sidebar} page=${page} />
    <main id="main" tabindex="-1">
      ${!connected.value && html`<div class="banner" role="alert"><${Icon} name="warn" /><span><${Said} text=${t("The console does not answer. Training goes on; start `rookery ui` again to see it.")} /></span></div>`}
      <${Page} key=${page === "run" ? words.run : page} ...${words} />
    </main>
    <${Dialogs} /><${Toasts} />`;
}

function Sidebar({ page }) {
  const active = Object.values(runs.value || {}).filter(isActive).length;
  return html`
    <aside class="sidebar">
      <a class="brand" href="#/train"><img src="/static/icon.svg" alt="" width="26" height="26" /><span>Rookery</span></a>
      <nav aria-label=${t("Pages")}>
        ${Object.entries(PAGES).map(([key, [, name]]) => html`
          <a href=${link(key)} aria-current=${key === page || (key === "runs" && page === "run") ? "page" : undefined}>
            <${Icon} name=${key} /><span>${name()}</span>
            ${key === "runs" && active > 0 && html`<b class="badge" title=${t("{n} training", { n: active })}>${active}</b>`}
          </a>`)}
      </nav>
      <div class="sidebar-foot">
        <${Meters} />
        <div class="row between">
          <button class="link" lang=${language.value === "zh" ? "en" : "zh-CN"} onClick=${() => setPreference({ language: language.value === "zh" ? "en" : "zh" })}>${language.value === "zh" ? "English" : "中文"}</button>
          <button class="link" onClick=${() => setPreference({ theme: { auto: "light", light: "dark", dark: "auto" }[theme.value] })}
            aria-label=${t("Theme: {theme}", { theme: themeName() })}>${themeName()}</button>
        </div>
      </div>
    </aside>`;
}

const themeName = () => ({ auto: t("System theme"), light: t("Light"), dark: t("Dark") })[theme.value];

function Meters() {
  const facts = machine.value;
  if (!facts) return null;
  const used = facts.memory - facts.free;
  return html`<div class="meters">
    <${Meter} name=${t("Memory")} part=${used / facts.memory} text=${`${bytes(used)} / ${bytes(facts.memory)}`} />
    ${facts.gpus.map((gpu) => html`<${Meter} name=${gpu.name} part=${gpu.used / gpu.memory} text=${`${bytes(gpu.used)} / ${bytes(gpu.memory)}, ${gpu.load} %, ${gpu.temperature} °C`} />`)}
  </div>`;
}

const Meter = ({ name, part, text }) => html`
  <div class="meter" title=${`${name}: ${text}`}>
    <div class="row between"><span>${name}</span><span class="muted">${text}</span></div>
    <div class="bar bar-thin" role="img" aria-label=${`${name}: ${text}`}><div class=${part > 0.92 ? "full" : ""} style=${{ width: `${Math.round(100 * part)}%` }}></div></div>
  </div>`;

render(html`<${App} />`, document.getElementById("app"));
begin().catch((error) => { failed.value = error.message; });
