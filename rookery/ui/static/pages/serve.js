// An API for other programs: start, stop, and how to call it.
import { signal } from "@preact/signals";
import { useEffect } from "preact/hooks";
import { api, bytes, complain, fileName, html, kept, machine, runs, servers, t, toast } from "../core.js";
import { Card, Choice, Code, Empty, Icon, PathField, Problem, Said, TextField } from "../widgets.js";
import { models, modelName, needModels } from "./models.js";

const form = kept("serve", { model: "", adapter: "", state: "", port: "8000" });
const sample = signal("curl");
const put = (name) => (value) => { form.value = { ...form.value, [name]: value }; };

/** What can be talked to: model files, and runs that have weights. */
export const talkers = () => [
  ...Object.values(runs.value || {}).filter((run) => run.weights).map((run) => [run.path, `${run.name} (${t("run")})`]),
  ...models.value.filter((file) => file.kind === "model" && !file.run).map((file) => [file.file, modelName(file)]),
];
export const filesOf = (kind) => models.value.filter((file) => file.kind === kind).map((file) => [file.file, modelName(file)]);

export function Serve() {
  useEffect(() => { needModels(); }, []);
  const values = form.value;
  const startServer = () => api("servers/start", { ...values }).then(() => toast(t("Starting: the model is being loaded."))).catch(complain);
  return html`
    <header class="page-head"><h1>${t("Serve")}</h1></header>
    <div class="split">
      <${Card} title=${t("Start an API")}>
        <p class="muted">${t("Any program that speaks to OpenAI can speak to your model.")}</p>
        <form class="fields" onSubmit=${(e) => { e.preventDefault(); startServer(); }}>
          <${PathField} wide label=${t("Model or run")} kind="model" value=${values.model} onInput=${put("model")} options=${talkers()} placeholder=${t("choose one")} />
          <${PathField} wide label=${t("Adapter")} kind="model" value=${values.adapter} onInput=${put("adapter")} options=${filesOf("adapter")} placeholder=${t("none")} />
          <${PathField} wide label=${t("State")} kind="model" value=${values.state} onInput=${put("state")} options=${filesOf("state")} placeholder=${t("none")} />
          <${TextField} label=${t("Port")} number value=${values.port} onInput=${put("port")} help=${t("on this machine only")} />
          <div class="field wide"><button class="button primary" type="submit" disabled=${!values.model.trim()}><${Icon} name="play" filled />${t("Start")}</button></div>
        </form>
      </${Card}>
      <div>
        ${servers.value.length ? servers.value.map((server) => html`<${Server} key=${server.id} server=${server} />`)
          : html`<${Empty} title=${t("No API runs.")}><p class="muted"><${Said} text=${t("APIs that this console started end with it; start `rookery serve` in a terminal for one that stays.")} /></p></${Empty}>`}
      </div>
    </div>`;
}

function Server({ server }) {
  const running = ["starting", "ready"].includes(server.state);
  const state = { starting: ["training", "wait", t("loading")], ready: ["done", "check", t("ready")], failed: ["failed", "cross", t("failed")], stopped: ["stopped", "stop", t("stopped")] }[server.state];
  return html`
    <${Card} title=${fileName(server.model)} actions=${html`<span class=${`phase phase-${state[0]}`}><${Icon} name=${state[1]} />${state[2]}</span>
      ${running && html`<button class="button small" onClick=${() => api("servers/stop", { id: server.id }).catch(complain)}><${Icon} name="stop" filled />${t("Stop")}</button>`}`}>
      <p class="path-line">${server.url} ${server.memory && html`<span class="muted">${bytes(server.memory)}</span>`}</p>
      ${server.failure && html`<${Problem} failure=${server.failure.code === "RK900" ? null : server.failure} text=${server.output} />`}
      ${server.state === "ready" && html`
        <${Choice} label=${t("Example")} value=${sample.value} onInput=${(name) => { sample.value = name; }} options=${[["curl", "curl"], ["python", "Python"], ["command", t("Command")]]} />
        <${Code} text=${example(server, sample.value)} label=${t("Example")} />`}
    </${Card}>`;
}

function example(server, kind) {
  if (kind === "command") return server.command;
  if (kind === "python") {
    return `from openai import OpenAI

client = OpenAI(base_url="${server.url}", api_key="none")
answer = client.chat.completions.create(
    model="${server.name}",
    messages=[{"role": "user", "content": "1+1=?"}],
    stream=True,
)
for part in answer:
    print(part.choices[0].delta.content or "", end="", flush=True)`;
  }
  if (machine.value?.windows) {
    return `curl.exe ${server.url}/chat/completions -H "Content-Type: application/json" -d "{\\"model\\": \\"${server.name}\\", \\"messages\\": [{\\"role\\": \\"user\\", \\"content\\": \\"1+1=?\\"}]}"`;
  }
  return `curl ${server.url}/chat/completions \\
  -H "Content-Type: application/json" \\
  -d '{"model": "${server.name}", "messages": [{"role": "user", "content": "1+1=?"}]}'`;
}
