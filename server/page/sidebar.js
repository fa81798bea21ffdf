// The list of conversations and what can be done with each.

import { icon, make } from "./render.js";

const DAY = 24 * 60 * 60 * 1000;
const list = document.getElementById("list");
const menu = document.getElementById("menu");

function ageOf(time) {
  const days = Math.round((new Date().setHours(0, 0, 0, 0) - new Date(time).setHours(0, 0, 0, 0)) / DAY);
  return days < 1 ? "Today" : days < 2 ? "Yesterday" : days < 8 ? "The last seven days" : "Before";
}

/** Draw the list. `heads`: `{id, title, updated}`, the newest first. */
export function drawList(heads, current, busy, actions) {
  if (list.querySelector("input")) return; // a name is being written
  const focused = list.contains(document.activeElement) ? document.activeElement.closest(".entry")?.dataset.id : null;
  const parts = [];
  let age = null;
  for (const head of heads) {
    if (ageOf(head.updated) !== age) parts.push(make("h2", {}, (age = ageOf(head.updated))));
    parts.push(entry(head, head.id === current, busy.has(head.id), actions));
  }
  if (!heads.length) parts.push(make("p", { class: "muted" }, "Your conversations will be listed here."));
  list.replaceChildren(...parts);
  if (focused) list.querySelector(`[data-id="${focused}"] a`)?.focus();
}

function entry(head, isCurrent, isBusy, actions) {
  const title = head.title || "Untitled";
  const link = make("a", { href: `#${head.id}`, title, "aria-current": isCurrent && "page" }, title);
  link.onclick = () => actions.opened();
  const box = make("div", { class: `entry${isCurrent ? " current" : ""}${isBusy ? " busy" : ""}`, "data-id": head.id }, link);
  const more = make("button", { type: "button", class: "round", "aria-label": `More about ${title}`, "aria-haspopup": "menu" }, icon("more"));
  const commands = [
    ["Rename", () => rename(box, head, actions)],
    ["Export as Markdown", () => actions.exportMarkdown(head.id)],
    ["Export as JSON", () => actions.exportJson(head.id)],
    ["Delete", () => actions.remove(head), "bad"],
  ];
  more.onclick = () => openMenu(more, commands);
  link.onkeydown = (event) => {
    if (event.key === "F2") rename(box, head, actions);
    else if (event.key === "Delete") actions.remove(head);
    else return;
    event.preventDefault();
  };
  box.append(more);
  return box;
}

function rename(box, head, actions) {
  const input = make("input", { "aria-label": "Name of the conversation", maxlength: 200 });
  input.value = head.title;
  const [link] = box.children;
  let isOpen = true;
  const close = (keep) => {
    if (!isOpen) return;
    isOpen = false;
    input.replaceWith(link);
    link.focus();
    if (keep && input.value.trim()) actions.rename(head.id, input.value.trim());
  };
  input.onblur = () => close(true);
  input.onkeydown = (event) => {
    if (event.key === "Enter") close(true);
    else if (event.key === "Escape") close(false);
    else return;
    event.preventDefault();
    event.stopPropagation();
  };
  link.replaceWith(input);
  input.focus();
  input.select();
}

function openMenu(button, commands) {
  menu.replaceChildren(
    ...commands.map(([name, act, kind = ""]) => {
      const onclick = () => {
        menu.hidePopover();
        act();
      };
      return make("button", { type: "button", role: "menuitem", class: kind, onclick }, name);
    }),
  );
  menu.showPopover();
  const place = button.getBoundingClientRect();
  menu.style.left = `${Math.max(8, Math.min(place.left, innerWidth - menu.offsetWidth - 8))}px`;
  menu.style.top = `${Math.min(place.bottom + 4, innerHeight - menu.offsetHeight - 8)}px`;
  menu.firstChild.focus();
  menu.onkeydown = (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    const items = [...menu.children];
    items.at((items.indexOf(document.activeElement) + step) % items.length).focus();
    event.preventDefault();
  };
}
