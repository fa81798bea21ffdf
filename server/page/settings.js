// The parameters of a conversation, the API key and the colours.

import { hasKey, useKey } from "./api.js";
import { NUMBERS } from "./conversation.js";
import { make } from "./render.js";
import { keep, recall } from "./store.js";
import { number } from "./view.js";

const $ = (id) => document.getElementById(id);
const EFFORTS = { "": "Auto", none: "Off", minimal: "Minimal", low: "Low", medium: "Medium", high: "High" };
const THEMES = { "": "as the system", light: "light", dark: "dark" };

/** What new conversations begin with: the settings that were used last. */
export function lastSettings() {
  try {
    return JSON.parse(recall("settings")) ?? {};
  } catch {
    return {};
  }
}

/** Wire the panel. `current()` is the conversation; `changed()` is called after each change of its settings. */
export function wireSettings(current, changed) {
  const take = () => {
    keep("settings", JSON.stringify(current().settings));
    changed();
  };
  const set = (name, value) => {
    if (value === "" || value == null) delete current().settings[name];
    else current().settings[name] = value;
    take();
  };
  $("s-system").oninput = (event) => set("system", event.target.value);
  for (const name of NUMBERS) {
    $(`s-${name}`).oninput = ({ target }) => {
      if (target.validity.badInput) return;
      set(name, target.value === "" ? null : Number(target.value));
      drawEffort(current().settings);
    };
  }
  $("effort").onchange = ({ target }) => {
    delete current().settings.budget;
    set("effort", target.value);
    drawEffort(current().settings);
  };
  $("reset").onclick = () => {
    current().settings = {};
    take();
    drawSettings(current().settings);
  };
  $("open-settings").onclick = () => {
    drawSettings(current().settings);
    $("settings").showModal();
  };
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.querySelector("[data-close]").onclick = () => dialog.close();
    dialog.addEventListener("click", (event) => {
      if (event.target === dialog && isOutside(dialog, event)) dialog.close();
    });
  }
}

const isOutside = (dialog, { clientX: x, clientY: y }) => {
  const box = dialog.getBoundingClientRect();
  return x < box.left || x > box.right || y < box.top || y > box.bottom;
};

function drawSettings(settings) {
  $("s-system").value = settings.system ?? "";
  for (const name of NUMBERS) $(`s-${name}`).value = settings[name] ?? "";
  drawEffort(settings);
}

export function drawEffort({ effort = "", budget }) {
  const options = Object.entries(EFFORTS).map(([value, text]) => make("option", { value }, text));
  if (budget != null) options.push(make("option", { value: "budget" }, `${number(budget)} tokens`));
  $("effort").replaceChildren(...options);
  $("effort").value = budget != null ? "budget" : effort;
}

/** Wire the dialog of the key. `used()` is called when there is another. */
export function wireKey(used) {
  const open = () => askForKey(hasKey() ? "There is one; another takes its place, an empty one removes it." : "It is sent to this server only.");
  $("open-key").onclick = () => {
    $("settings").close();
    open();
  };
  $("key").querySelector("form").onsubmit = (event) => {
    event.preventDefault();
    useKey($("key-input").value, $("key-keep").checked);
    $("key").close();
    used();
  };
}

/** Ask for a key, with the words that say why. */
export function askForKey(words) {
  $("key-words").textContent = words;
  $("key-input").value = "";
  if (!$("key").open) $("key").showModal();
  $("key-input").focus();
}

export function wireTheme() {
  const names = Object.keys(THEMES);
  let theme = document.documentElement.dataset.theme ?? "";
  const draw = () => {
    if (theme) document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
    const next = THEMES[names[(names.indexOf(theme) + 1) % names.length]];
    $("theme").title = `Colours: ${THEMES[theme]}. Change to ${next}`;
    $("theme").setAttribute("aria-label", $("theme").title);
  };
  $("theme").onclick = () => {
    theme = names[(names.indexOf(theme) + 1) % names.length];
    keep("theme", theme);
    draw();
  };
  draw();
}
