// Language, theme and folders.
import { hello, html, language, setPreference, t, theme } from "../core.js";
import { Card, Choice, Icon, TextField } from "../widgets.js";
import { useState } from "preact/hooks";

export function Settings() {
  const { settings, version } = hello.value;
  const [folder, setFolder] = useState("");
  const added = settings.folders.filter((path) => !settings.given.includes(path));
  const add = async () => {
    if (folder.trim() && (await setPreference({ folders: [...added, folder.trim()] }))) setFolder("");
  };
  return html`
    <header class="page-head"><h1>${t("Settings")}</h1></header>
    <div class="narrow">
      <${Card} title=${t("Appearance")}>
        <div class="setting"><span>${t("Language")}</span>
          <${Choice} label=${t("Language")} value=${language.value} onInput=${(name) => setPreference({ language: name })} options=${[["en", "English"], ["zh", "中文"]]} /></div>
        <div class="setting"><span>${t("Theme")}</span>
          <${Choice} label=${t("Theme")} value=${theme.value} onInput=${(name) => setPreference({ theme: name })} options=${[["auto", t("System theme")], ["light", t("Light")], ["dark", t("Dark")]]} /></div>
      </${Card}>
      <${Card} title=${t("Folders")}>
        <p class="muted">${t("Runs, models and data are looked for in these folders and below. Nothing outside them is read or written.")}</p>
        <ul class="folder-list">
          ${settings.folders.map((path) => html`<li key=${path}><${Icon} name="folder" /><span class="path-line">${path}</span>
            ${settings.given.includes(path) ? html`<span class="muted">${t("from the command line")}</span>`
              : html`<button class="icon-button" aria-label=${t("Remove {path}", { path })} title=${t("Remove")} disabled=${!settings.local} onClick=${() => setPreference({ folders: added.filter((one) => one !== path) })}><${Icon} name="cross" /></button>`}</li>`)}
        </ul>
        ${settings.local ? html`<form class="inline-form" onSubmit=${(e) => { e.preventDefault(); add(); }}>
            <${TextField} label=${t("Add a folder")} value=${folder} onInput=${setFolder} placeholder=${t("its full path")} />
            <button class="button" type="submit" disabled=${!folder.trim()}><${Icon} name="plus" />${t("Add")}</button></form>`
          : html`<p class="muted">${t("From another machine folders cannot be changed; start the console with --folder.")}</p>`}
      </${Card}>
      <${Card} title=${t("About")}>
        <p>Rookery ${version}</p>
        <p class="muted">${t("The console owns no training: closing it leaves every run going, and opening it again finds them all. Its libraries and their licences are in rookery/ui/static/vendor.")}</p>
      </${Card}>
    </div>`;
}
