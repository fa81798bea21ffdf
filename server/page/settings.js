// The parameters of a conversation, the API key and the colours.

import { hasKey, useKey } from "./api.js";
import { NUMBERS, TEXTS, readSchema, readTools } from "./conversation.js";
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
  for (const name of TEXTS) {
    $(`s-${name}`).oninput = ({ target }) => {
      set(name, target.value);
      drawTexts(current().settings);
    };
  }
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
  const open = () => {
    drawSettings(current().settings);
    $("settings").showModal();
  };
  $("open-settings").onclick = $("in-use").onclick = open;
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
  for (const name of TEXTS) $(`s-${name}`).value = settings[name] ?? "";
  drawTexts(settings);
  for (const name of NUMBERS) $(`s-${name}`).value = settings[name] ?? "";
  drawEffort(settings);
}

const READERS = { tools: readTools, schema: readSchema };

/** What is wrong with the tools and the schema, below them. */
function drawTexts(settings) {
  for (const [name, read] of Object.entries(READERS)) {
    let words = "";
    try {
      if (settings[name]?.trim()) read(settings[name]);
    } catch (error) {
      words = `${error.message}.`;
    }
    $(`s-${name}`).setCustomValidity(words);
    $(`s-${name}-wrong`).textContent = words;
  }
  drawInUse(settings);
}

/** Beside the message: what an answer is held to, or may call. */
export function drawInUse({ tools, schema }) {
  const parts = [tools?.trim() && "Tools", schema?.trim() && "JSON"].filter(Boolean);
  $("in-use").hidden = !parts.length;
  $("in-use").textContent = parts.join(" + ");
}

export function drawEffort(settings) {
  const { effort = "", budget } = settings;
  drawInUse(settings);
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
