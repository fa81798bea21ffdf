// The page: which conversation is shown, which replies are in the making, and what each button does.

import { models } from "./api.js";
import * as talk from "./conversation.js";
import { atFrameRate, icon, make } from "./render.js";
import { Run } from "./run.js";
import { askForKey, drawEffort, lastSettings, wireKey, wireSettings, wireTheme } from "./settings.js";
import { drawList } from "./sidebar.js";
import * as store from "./store.js";
import { ResultView } from "./tools.js";
import { QuestionView, ReplyView, fitHeight, isTouch, number, sends } from "./view.js";

const $ = (id) => document.getElementById(id);
const EXAMPLES = [
  ["A puzzle", "A bat and a ball cost $1.10 together. The bat costs one dollar more than the ball. What does the ball cost?"],
  ["A proof", "Prove that the square root of 2 is irrational."],
  ["A program", "Write a Python function that tells whether a text is a palindrome, and explain it."],
];
const SAVE_EVERY_MS = 1500;
const VIEWS = { user: QuestionView, assistant: ReplyView, tool: ResultView };

let current = talk.create(lastSettings());
let views = new Map(); // message id -> its view; of the conversation that is shown
let served = []; // the models
const runs = new Map(); // conversation id -> the reply in the making
const tabs = new BroadcastChannel("stillhouse");

// Models

let loadAgain = 0;
async function loadModels() {
  clearTimeout(loadAgain);
  try {
    served = await models();
    banner(null);
    drawModels();
  } catch (error) {
    if (error.status === 401) return askForKey(`${capital(error.message.split(";")[0])}.`);
    banner(error.message);
    if (error.status === 0 || error.status === 503) loadAgain = setTimeout(loadModels, 2500);
  }
}

const capital = (text) => text[0].toUpperCase() + text.slice(1);
const model = () => served.find(({ id }) => id === $("model").value);

function drawModels() {
  const chosen = $("model").value || store.recall("model");
  $("model").replaceChildren(...served.map(({ id }) => make("option", { value: id }, id)));
  $("model").value = served.some(({ id }) => id === chosen) ? chosen : served[0]?.id;
  drawModel();
}

function drawModel() {
  const thinks = model()?.meta?.thinks !== false;
  $("effort-label").hidden = $("budget-label").hidden = !thinks;
  drawContext();
}

function drawContext() {
  const limit = model()?.max_model_len;
  const used = talk.path(current).findLast(({ stats }) => stats?.context)?.stats.context ?? 0;
  $("context").hidden = !limit;
  if (!limit) return;
  $("context-bar").max = limit;
  $("context-bar").value = used;
  $("context-text").textContent = `${number(used)} / ${number(limit)}`;
}

// What is shown

function drawConversation() {
  const nodes = talk.path(current);
  const run = runs.get(current.id);
  const elements = nodes.map((node, at) => {
    if (!views.has(node.id)) views.set(node.id, new VIEWS[node.role](node, actions));
    const view = views.get(node.id);
    view.draw({
      siblings: talk.siblings(current, node),
      isLast: at === nodes.length - 1,
      run: run?.node === node ? run : node.role === "user" ? run : null,
      contextLength: model()?.max_model_len,
    });
    return view.element;
  });
  const box = $("messages");
  for (const child of [...box.children]) if (!elements.includes(child)) child.remove();
  elements.forEach((element, at) => box.children[at] !== element && box.insertBefore(element, box.children[at] ?? null));
  $("welcome").hidden = nodes.length > 0;
  document.title = current.title ? `${current.title} · Stillhouse` : "Stillhouse";
  drawContext();
  drawButtons();
}

function drawButtons() {
  const run = runs.get(current.id);
  $("stop").hidden = !run;
  $("send").hidden = Boolean(run);
  $("send").disabled = !$("input").value.trim();
  $("answer-now").hidden = run?.phase !== "thinking";
  $("answer-now").disabled = Boolean(run?.ending);
}

const drawRunning = atFrameRate(() => {
  const run = runs.get(current.id);
  if (!run) return;
  views.get(run.node.id)?.drawText(run);
  drawButtons();
  if (stick) toEnd();
  else drawToEnd();
});

async function drawHeads() {
  drawList(await store.list(), current.id, runs, listActions);
}

// The end of the conversation stays in sight while the reader is there, and only then.

const scroll = $("scroll");
let stick = true;
let lastTop = 0;
const toEnd = () => (scroll.scrollTop = scroll.scrollHeight);
const gapBelow = () => scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight;
const drawToEnd = () => ($("to-end").hidden = gapBelow() < 160);
scroll.onscroll = () => {
  const gap = gapBelow();
  if (scroll.scrollTop < lastTop - 1 && gap > 1) stick = false;
  else if (gap < 40) stick = true;
  lastTop = scroll.scrollTop;
  drawToEnd();
};
scroll.addEventListener("wheel", (event) => event.deltaY < 0 && (stick = false), { passive: true });
new ResizeObserver(() => stick && toEnd()).observe(scroll);
$("to-end").onclick = () => {
  stick = true;
  toEnd();
  $("input").focus();
};

// Asking

async function ask(text) {
  talk.add(current, current.leaf, { role: "user", content: text });
  await answer(current.leaf);
}

function answer(parent) {
  if (runs.has(current.id)) return;
  const node = talk.add(current, parent, { role: "assistant", model: $("model").value, stats: {} });
  return run(node);
}

async function run(node) {
  const conversation = current;
  if (runs.has(conversation.id)) return;
  let phase = null;
  const reply = new Run(conversation, node, $("model").value || undefined, () => {
    if (conversation !== current) return;
    if (phase !== reply.phase) say({ thinking: "Thinking", answering: "Answering" }[(phase = reply.phase)]);
    drawRunning();
  });
  runs.set(conversation.id, reply);
  stick = true;
  if (location.hash.slice(1) !== conversation.id) history.pushState(null, "", `#${conversation.id}`);
  const saving = setInterval(() => save(conversation, false), SAVE_EVERY_MS);
  const clock = setInterval(drawRunning, 500); // the seconds of its thoughts go on between two tokens
  const work = reply.start();
  drawConversation();
  toEnd();
  void save(conversation).then(drawHeads);
  try {
    await work;
  } finally {
    clearInterval(saving);
    clearInterval(clock);
    runs.delete(conversation.id);
    conversation.updated = Date.now();
    if (conversation === current) {
      drawConversation();
      if (stick) toEnd();
      say(node.error ?? `Answer: ${node.content.slice(0, 400)}`);
    }
    await save(conversation);
    void drawHeads();
  }
  if (reply.error?.status === 401) askForKey(`${capital(reply.error.message.split(";")[0])}.`);
  else if (reply.error) void loadModels(); // it may be another one by now
}

async function save(conversation, isTold = true) {
  await store.put(structuredClone(conversation)).catch((error) => toast(`this conversation could not be kept: ${error.message}`));
  if (isTold) tabs.postMessage(conversation.id);
}

// What the buttons of a message do

const actions = {
  show(node, label) {
    talk.show(current, node);
    drawConversation();
    void save(current);
    const buttons = views.get(node.id).element.querySelectorAll(".versions button");
    ([...buttons].find((button) => button.title === label && !button.disabled) ?? [...buttons].find((b) => !b.disabled))?.focus();
  },
  async edit(node, text) {
    runs.get(current.id)?.stop();
    await idle(current);
    const next = talk.add(current, node.parent, { role: "user", content: text });
    views.delete(node.id); // its editor is open
    $("input").focus();
    await answer(next.id);
  },
  answer: (node) => answer(node.id),
  parentOf: (node) => current.nodes[node.parent],
  retry(node) {
    node.content = "";
    node.reasoning = "";
    node.stats = {};
    delete node.calls;
    views.delete(node.id);
    return run(node);
  },
  goOn: (node) => run(node),
  sendResults(node, results) {
    node.calls.forEach(({ id, name }, at) => talk.add(current, current.leaf, { role: "tool", content: results[at], call_id: id, name }));
    $("input").focus();
    return answer(current.leaf);
  },
  copy,
  isFolded: () => store.recall("folded") === "yes",
  keepFolded: (folded) => store.keep("folded", folded ? "yes" : "no"),
};

async function idle(conversation) {
  while (runs.has(conversation.id)) await new Promise((resolve) => setTimeout(resolve, 20));
}

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without HTTPS the clipboard has only this door.
    const area = make("textarea", { class: "unseen" });
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  say("Copied");
  const before = [...button.childNodes];
  if (button.dataset.copied) return;
  button.dataset.copied = "yes";
  button.replaceChildren(button.classList.contains("round") ? icon("check") : "Copied");
  setTimeout(() => {
    button.replaceChildren(...before);
    delete button.dataset.copied;
  }, 1500);
}

$("messages").onclick = (event) => {
  const button = event.target.closest(".copy-code");
  if (button) void copy(button.closest(".code").querySelector("code").textContent, button);
};

// Conversations

/** A conversation, the very object while a reply is in the making. */
const find = async (id) => runs.get(id)?.conversation ?? (await store.get(id).catch(() => null));

async function open(id) {
  if (id === current.id && current.leaf) return;
  const found = id && (await find(id));
  show(found || talk.create(lastSettings()));
  if (id && !found) history.replaceState(null, "", location.pathname);
}

function show(conversation) {
  current = conversation;
  views = new Map();
  $("messages").replaceChildren();
  stick = true;
  drawEffort(current.settings);
  drawConversation();
  toEnd();
  void drawHeads();
}

function startNew() {
  history.pushState(null, "", location.pathname);
  show(talk.create(lastSettings()));
  closeList();
  $("input").focus();
}

const listActions = {
  opened: closeList,
  async rename(id, title) {
    const conversation = id === current.id ? current : await find(id);
    conversation.title = title;
    await save(conversation);
    if (conversation === current) document.title = `${title} · Stillhouse`;
    await drawHeads();
  },
  async remove({ id, title }) {
    runs.get(id)?.stop();
    await idle({ id });
    const conversation = await store.get(id);
    await store.remove(id);
    tabs.postMessage(id);
    if (id === current.id) startNew();
    else await drawHeads();
    $("new").focus();
    toast(`“${talk.titleOf(title)}” is deleted.`, "Undo", async () => {
      await save(conversation);
      location.hash = id;
      await drawHeads();
    });
  },
  async exportMarkdown(id) {
    const conversation = await find(id);
    download(talk.asMarkdown(conversation), "text/markdown", `${fileName(conversation.title)}.md`);
  },
  async exportJson(id) {
    const conversation = await find(id);
    download(talk.asJson([conversation]), "application/json", `${fileName(conversation.title)}.json`);
  },
};

const fileName = (title) => title.normalize("NFKD").replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "").slice(0, 50) || "conversation";

function download(text, type, name) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  make("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

async function importFiles(files) {
  let count = 0;
  for (const file of files) {
    try {
      const found = talk.fromJson(await file.text());
      for (const conversation of found) await save(conversation);
      count += found.length;
      if (found.length) location.hash = found[0].id;
    } catch (error) {
      toast(`${file.name} is not imported: ${error.message}.`);
      return;
    }
  }
  toast(`${count} ${count === 1 ? "conversation" : "conversations"} imported.`);
  await drawHeads();
}

// Small things

function say(words) {
  if (words) $("status").textContent = words;
}

function banner(words) {
  $("banner").hidden = !words;
  $("banner").textContent = words ?? "";
}

let toastEnd = 0;
function toast(words, name, act) {
  clearTimeout(toastEnd);
  const hide = () => ($("toast").hidden = true);
  const onclick = () => {
    hide();
    act();
  };
  $("toast").replaceChildren(words, ...(name ? [make("button", { type: "button", onclick }, name)] : []));
  $("toast").hidden = false;
  toastEnd = setTimeout(hide, 7000);
}

const narrow = matchMedia("(max-width: 760px)");

function toggleList() {
  if (narrow.matches) document.body.classList.toggle("list-open");
  else store.keep("list", document.body.classList.toggle("no-list") ? "no" : "yes");
  listToggled();
}

function closeList() {
  document.body.classList.remove("list-open");
  listToggled();
}

function listToggled() {
  const { classList } = document.body;
  const isOpen = narrow.matches ? classList.contains("list-open") : !classList.contains("no-list");
  $("toggle-list").setAttribute("aria-expanded", isOpen);
  if (isOpen && narrow.matches) $("new").focus();
}

function submit() {
  const text = $("input").value.trim();
  if (!text || runs.has(current.id)) return;
  $("input").value = "";
  fitHeight($("input"));
  void ask(text);
}

function useExample(text) {
  $("input").focus();
  void ask(text);
}

function wire() {
  $("composer").onsubmit = (event) => {
    event.preventDefault();
    submit();
  };
  $("input").oninput = () => {
    fitHeight($("input"));
    drawButtons();
  };
  $("input").onkeydown = (event) => {
    if (!sends(event)) return;
    event.preventDefault();
    submit();
  };
  $("stop").onclick = () => {
    runs.get(current.id)?.stop();
    $("input").focus();
  };
  if (isTouch.matches) $("input").enterKeyHint = "enter";
  $("answer-now").onclick = () => {
    $("input").focus();
    runs.get(current.id)?.answerNow().catch((error) => toast(error.message));
  };
  $("model").onchange = () => {
    store.keep("model", $("model").value);
    drawModel();
  };
  $("new").onclick = startNew;
  $("toggle-list").onclick = toggleList;
  $("shade").onclick = closeList;
  narrow.onchange = closeList;
  $("import").onclick = () => $("file").click();
  $("file").onchange = () => void importFiles([...$("file").files]).then(() => ($("file").value = ""));
  $("export-all").onclick = async () => download(talk.asJson(await store.all()), "application/json", "stillhouse.json");
  $("examples").append(
    ...EXAMPLES.map(([title, text]) => make("button", { type: "button", onclick: () => useExample(text) }, make("b", {}, title), make("small", {}, text))),
  );
  document.addEventListener("keydown", (event) => {
    const isWriting = event.target.closest?.("input, textarea, select, dialog, [popover]");
    if (event.key === "Escape" && document.body.classList.contains("list-open")) {
      closeList();
      $("toggle-list").focus();
    } else if (event.key === "Escape" && !event.target.closest?.("dialog, [popover]")) runs.get(current.id)?.stop();
    else if (event.key.toLowerCase() === "o" && event.ctrlKey && event.shiftKey) startNew();
    else if (event.key === "/" && !isWriting) $("input").focus();
    else return;
    event.preventDefault();
  });
  addEventListener("hashchange", () => void open(location.hash.slice(1)));
  addEventListener("popstate", () => void open(location.hash.slice(1)));
  addEventListener("pagehide", () => runs.has(current.id) && void save(current));
  tabs.onmessage = async ({ data: id }) => {
    await drawHeads();
    if (id !== current.id || runs.has(id) || document.querySelector(".editor")) return;
    const conversation = await store.get(id);
    if (conversation) show(conversation);
  };
  wireTheme();
  wireSettings(() => current, () => current.leaf && void save(current));
  wireKey(() => void loadModels());
}

async function start() {
  wire();
  if (store.recall("list") === "no") document.body.classList.add("no-list");
  listToggled();
  await store.open();
  if (!store.isKept) toast("This browser keeps no data here: conversations are lost when the page is closed.");
  if (location.hash.length > 1) await open(location.hash.slice(1));
  else show(current);
  $("input").focus();
  await loadModels();
}

void start();
