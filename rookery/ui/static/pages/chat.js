// Talking to a model, or to two with the same words and the same seed.
import { signal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import { api, fileName, html, kept, t } from "../core.js";
import { Card, Empty, Icon, PathField, Problem, SwitchField, TextField } from "../widgets.js";
import { needModels } from "./models.js";
import { filesOf, talkers } from "./serve.js";

const SIDE = { model: "", adapter: "", state: "" };
const sides = kept("sides", [{ ...SIDE }, { ...SIDE }]);
const compare = kept("compare", false);
const sampling = kept("sampling", { temperature: "1.0", top_p: "0.7", presence_penalty: "0.1", frequency_penalty: "0.1", max_tokens: "500", seed: "1", system: "" });
// Turns of the conversation: {question, answers: [{text, state, error, failure}]}.
const turns = signal([]);
const draft = signal("");
const busy = signal(false);
let stopping = null;

const putSide = (at, name) => (value) => {
  sides.value = sides.value.map((side, n) => (n === at ? { ...side, [name]: value } : side));
};
const put = (name) => (value) => { sampling.value = { ...sampling.value, [name]: value }; };

export function Chat({ model, adapter, state }) {
  useEffect(() => {
    needModels();
    if (!model) return;
    // "Try it" of a run, or a file of the Models page.
    sides.value = [{ model, adapter: adapter || "", state: state || "" }, sides.value[1]];
    turns.value = [];
  }, [model, adapter, state]);
  const end = useRef();
  useEffect(() => { end.current?.scrollIntoView({ block: "nearest" }); }, [turns.value]);
  const active = compare.value ? [0, 1] : [0];
  const lacks = active.some((at) => !sides.value[at].model.trim());
  return html`
    <header class="page-head"><h1>${t("Chat")}</h1>
      <div class="row actions"><button class="button" disabled=${!turns.value.length || busy.value} onClick=${() => { turns.value = []; }}>${t("New conversation")}</button></div></header>
    <div class="chat-grid">
      <div class="chat-side">
        <${Card} title=${t("Model")}>
          ${active.map((at) => html`<div class="fields" key=${at}>
            <${PathField} wide label=${compare.value ? t("Model {letter}", { letter: "AB"[at] }) : t("Model or run")} kind="model" value=${sides.value[at].model} onInput=${putSide(at, "model")} options=${talkers()} placeholder=${t("choose one")} />
            <${PathField} wide label=${t("Adapter")} kind="model" value=${sides.value[at].adapter} onInput=${putSide(at, "adapter")} options=${filesOf("adapter")} placeholder=${t("none")} />
            <${PathField} wide label=${t("State")} kind="model" value=${sides.value[at].state} onInput=${putSide(at, "state")} options=${filesOf("state")} placeholder=${t("none")} />
          </div>`)}
          <${SwitchField} label=${t("Compare two side by side")} value=${compare.value} onInput=${(on) => { compare.value = on; turns.value = []; }} />
        </${Card}>
        <details class="card" open=${innerWidth > 980}>
          <summary><h2>${t("Answers")}</h2></summary>
          <div class="fields two">
            <${TextField} label=${t("Temperature")} number value=${sampling.value.temperature} onInput=${put("temperature")} />
            <${TextField} label=${t("Top-p")} number value=${sampling.value.top_p} onInput=${put("top_p")} />
            <${TextField} label=${t("Presence penalty")} number value=${sampling.value.presence_penalty} onInput=${put("presence_penalty")} />
            <${TextField} label=${t("Frequency penalty")} number value=${sampling.value.frequency_penalty} onInput=${put("frequency_penalty")} />
            <${TextField} label=${t("Longest answer")} number value=${sampling.value.max_tokens} onInput=${put("max_tokens")} />
            <${TextField} label=${t("Seed")} number value=${sampling.value.seed} onInput=${put("seed")} placeholder=${t("random")} />
            <${TextField} wide label=${t("System message")} value=${sampling.value.system} onInput=${put("system")} placeholder=${t("none")} />
          </div>
        </details>
      </div>
      <section class="card conversation" aria-label=${t("Conversation")}>
        <div class="turns" role="log" aria-live="polite">
          ${!turns.value.length && html`<${Empty} title=${lacks ? t("Choose a model to talk to.") : t("Say something.")}><p class="muted">${lacks ? t("Every run with weights is in the list.") : t("The first answer takes longer: the model is loaded then.")}</p></${Empty}>`}
          ${turns.value.map((turn, at) => html`
            <div class="turn" key=${at}>
              <div class="bubble question">${turn.question}</div>
              <div class=${`answers ${turn.answers.length > 1 ? "pair" : ""}`}>
                ${turn.answers.map((answer, side) => html`<${Answer} key=${side} answer=${answer} label=${turn.answers.length > 1 ? "AB"[side] : ""} />`)}
              </div>
            </div>`)}
          <div ref=${end}></div>
        </div>
        <form class="ask" onSubmit=${(e) => { e.preventDefault(); send(active); }}>
          <textarea rows="2" value=${draft.value} placeholder=${t("Your message; Enter sends, Shift-Enter begins a new line")} aria-label=${t("Your message")}
            onInput=${(e) => { draft.value = e.currentTarget.value; }}
            onKeyDown=${(e) => { if (e.key === "Enter" && !e.shiftKey && !e.isComposing) { e.preventDefault(); send(active); } }}></textarea>
          ${busy.value ? html`<button type="button" class="button danger" onClick=${() => stopping?.abort()}><${Icon} name="stop" filled />${t("Stop")}</button>`
            : html`<button type="submit" class="button primary" disabled=${lacks || !draft.value.trim()}><${Icon} name="chat" />${t("Send")}</button>`}
        </form>
      </section>
    </div>`;
}

const Answer = ({ answer, label }) => html`
  <div class="bubble answer">
    ${(label || answer.model) && html`<p class="muted who">${label ? `${label} · ` : ""}${fileName(answer.model)}</p>`}
    ${answer.text && html`<div class="said">${answer.text}</div>`}
    ${answer.state === "loading" && html`<p class="muted" role="status">${t("The model is being loaded…")}</p>`}
    ${answer.state === "waiting" && !answer.text && html`<p class="muted typing" aria-label=${t("thinking")}><i></i><i></i><i></i></p>`}
    ${answer.state === "stopped" && html`<p class="muted">${t("Stopped.")}</p>`}
    ${answer.error && html`<${Problem} failure=${answer.failure} text=${answer.error} />`}
    ${answer.rate && html`<p class="muted who">${answer.rate}</p>`}
  </div>`;

async function send(active) {
  const question = draft.value.trim();
  if (!question || busy.value || active.some((at) => !sides.value[at].model.trim())) return;
  draft.value = "";
  busy.value = true;
  stopping = new AbortController();
  const number = turns.value.length;
  const before = turns.value;
  turns.value = [...before, { question, answers: active.map((at) => ({ text: "", state: "loading", model: sides.value[at].model })) }];
  const change = (side, news) => {
    turns.value = turns.value.map((turn, at) => (at !== number ? turn
      : { ...turn, answers: turn.answers.map((one, n) => (n === side ? { ...one, ...(typeof news === "function" ? news(one) : news) } : one)) }));
  };
  await Promise.all(active.map((at, side) => answer(sides.value[at], before, question, side, (news) => change(side, news), stopping.signal)));
  busy.value = false;
}

/** One model's answer, streamed into its bubble. */
async function answer(side, before, question, column, change, signal) {
  try {
    const server = await ready(side, signal);
    change({ state: "waiting" });
    const messages = sampling.value.system ? [{ role: "system", content: sampling.value.system }] : [];
    for (const turn of before) {
      messages.push({ role: "user", content: turn.question }, { role: "assistant", content: turn.answers[column]?.text || "" });
    }
    messages.push({ role: "user", content: question });
    const number = (name) => (sampling.value[name].trim() === "" ? undefined : Number(sampling.value[name]));
    const body = {
      messages, stream: true,
      temperature: number("temperature"), top_p: number("top_p"), seed: number("seed"), max_tokens: number("max_tokens"),
      presence_penalty: number("presence_penalty"), frequency_penalty: number("frequency_penalty"),
    };
    const response = await api("chat", { id: server.id, body }, { raw: true, signal });
    const begun = performance.now();
    let tokens = 0;
    for await (const part of lines(response.body)) {
      if (part.error) throw new Error(part.error.message || String(part.error));
      const said = part.choices?.[0]?.delta?.content;
      if (!said) continue;
      tokens++;
      change((one) => ({ text: one.text + said }));
    }
    const seconds = (performance.now() - begun) / 1000;
    change({ state: "done", rate: tokens ? t("{n} tokens, {rate} a second", { n: tokens, rate: (tokens / seconds).toFixed(1) }) : "" });
  } catch (error) {
    if (error.name === "AbortError") change({ state: "stopped" });
    else if (error.name === "TypeError") change({ state: "failed", error: t("The answer broke off: the process of the model ended. Send again to load it anew.") });
    else change({ state: "failed", error: error.message, failure: error.failure });
  }
}

/** A server for the model that answers; one that serves it already is taken. */
async function ready(side, signal) {
  let server = await api("servers/start", { ...side, port: 0 }, { signal });
  while (server.state === "starting") {
    await new Promise((resolve) => setTimeout(resolve, 400));
    if (signal.aborted) throw new DOMException("", "AbortError");
    server = await api(`servers/state?id=${server.id}`, undefined, { signal });
  }
  if (server.state !== "ready") throw Object.assign(new Error(server.output || t("The model could not be loaded.")), { failure: server.failure });
  return server;
}

/** The JSON of each `data:` line of a stream. */
async function* lines(body) {
  const decoder = new TextDecoder();
  let rest = "";
  for await (const chunk of read(body)) {
    rest += decoder.decode(chunk, { stream: true });
    const whole = rest.split("\n");
    rest = whole.pop();
    for (const line of whole) {
      if (line.startsWith("data:") && line.slice(5).trim() !== "[DONE]") yield JSON.parse(line.slice(5));
    }
  }
}

async function* read(body) {
  const reader = body.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
