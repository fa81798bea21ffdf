// How a message looks. Knows what can be done with one by the names of the `actions` it is given, not how.

import { Markdown, icon, make } from "./render.js";
import { Calls } from "./tools.js";

export const number = (value, digits = 0) =>
  value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits }).replaceAll(",", " ");
const seconds = (s) => (s < 10 ? `${number(s, 1)} s` : s < 90 ? `${number(s)} s` : `${Math.floor(s / 60)} min ${number(s % 60)} s`);
const counted = (count, word) => `${number(count)} ${word}${count === 1 ? "" : "s"}`;
const tool = (name, label, onclick) => make("button", { type: "button", class: "round", "aria-label": label, title: label, onclick }, icon(name));
const textButton = (text, onclick) => make("button", { type: "button", onclick }, text);

function versions(node, siblings, actions) {
  if (siblings.length < 2) return "";
  const at = siblings.indexOf(node);
  const to = (step, label) => {
    const button = tool(step < 0 ? "left" : "right", label, () => actions.show(siblings[at + step], label));
    button.disabled = !siblings[at + step];
    return button;
  };
  const place = make("span", {}, `${at + 1}/${siblings.length}`);
  return make("span", { class: "versions" }, to(-1, "Earlier version"), place, to(1, "Later version"));
}

export class QuestionView {
  constructor(node, actions) {
    Object.assign(this, { node, actions });
    this.element = make("article", { class: "message user", "aria-label": "You" });
    this.bubble = make("div", { class: "bubble" }, node.content);
    this.tools = make("div", { class: "tools" });
    this.element.append(this.bubble, this.tools);
  }

  draw({ siblings, isLast, run }) {
    this.tools.replaceChildren(
      versions(this.node, siblings, this.actions),
      ...(isLast && !run ? [tool("again", "Answer this", () => this.actions.answer(this.node))] : []),
      tool("copy", "Copy", (event) => this.actions.copy(this.node.content, event.currentTarget)),
      tool("edit", "Edit and ask again", () => this._edit()),
    );
  }

  _edit() {
    const text = make("textarea", { "aria-label": "Edit your message", rows: 1 });
    text.value = this.node.content;
    const close = () => {
      this.element.replaceChildren(this.bubble, this.tools);
      this.element.querySelector('[title="Edit and ask again"]').focus();
    };
    const send = () => text.value.trim() && this.actions.edit(this.node, text.value.trim());
    const buttons = make("div", { class: "row" }, textButton("Cancel", close), make("button", { type: "button", class: "primary", onclick: send }, "Send"));
    const fit = () => fitHeight(text);
    text.oninput = fit;
    text.onkeydown = (event) => {
      if (event.key === "Escape") close();
      else if (sends(event)) send();
      else return;
      event.preventDefault();
      event.stopPropagation();
    };
    this.element.replaceChildren(make("div", { class: "editor" }, text, buttons));
    fit();
    text.focus();
  }
}

export class ReplyView {
  constructor(node, actions) {
    Object.assign(this, { node, actions });
    this.touched = false; // whether the reader has folded or unfolded the thoughts
    this.summary = make("span");
    const summary = make("summary", {}, icon("right"), this.summary);
    summary.onclick = () => {
      this.touched = true;
      if (this.element.classList.contains("thinking")) actions.keepFolded(this.thoughts.open);
    };
    const inner = make("div", { tabindex: 0, "aria-label": "Thoughts" });
    this.thoughts = make("details", { class: "thoughts", hidden: true, ontoggle: () => this._drawThoughts(true) }, summary, inner);
    this.reasoning = new Markdown(inner);
    this.waiting = make("p", { class: "waiting", hidden: true }, "Reading…");
    const answer = make("div", { class: "answer" });
    this.answer = new Markdown(answer);
    this.calls = new Calls(node, actions);
    this.notice = make("div", { class: "notice", hidden: true });
    this.tools = make("div", { class: "tools" });
    this.stats = make("span", { class: "stats" });
    this.element = make("article", { class: "message assistant", "aria-label": "Reply" }, this.thoughts, this.waiting, answer, this.calls.element, this.notice, this.tools);
  }

  /** The text as it has come so far: all that changes from token to token. */
  drawText(run) {
    const { node } = this;
    const thinking = run?.phase === "thinking";
    const started = this.element.classList.contains("thinking") !== thinking;
    this.element.classList.toggle("thinking", thinking);
    this.waiting.hidden = run?.phase !== "waiting" || Boolean(node.content);
    if (run) this.calls.draw(run);
    if (node.reasoning?.trim()) {
      this.thoughts.hidden = false;
      if (started && !this.touched) this.thoughts.open = thinking && !this.actions.isFolded();
      this._drawSummary(run);
      this._drawThoughts(!thinking);
    }
    this.answer.set(node.content, { final: !run });
    if (run) this.stats.textContent = this._liveStats(run);
  }

  /** Everything. */
  draw({ siblings, isLast, run, contextLength }) {
    const { node, actions } = this;
    this.element.classList.toggle("live", Boolean(run));
    this.drawText(run);
    this.calls.draw(run, isLast);
    this._drawNotice(run, isLast, contextLength);
    if (run) return this.tools.replaceChildren(this.stats);
    this.stats.textContent = this._finalStats();
    this.tools.replaceChildren(
      ...(node.content ? [tool("copy", "Copy", (event) => actions.copy(node.content, event.currentTarget))] : []),
      tool("again", "Answer again", () => actions.answer(actions.parentOf(node))),
      versions(node, siblings, actions),
      this.stats,
    );
  }

  _drawSummary(run) {
    const { stats = {} } = this.node;
    const thinking = run?.phase === "thinking";
    const s = run ? run.thinking.seconds : stats.thinking_s;
    const tokens = run ? run.thinking.tokens : stats.reasoning_tokens;
    const words = thinking ? (run.ending ? "Coming to the answer" : "Thinking") : s ? `Thought for ${seconds(s)}` : "Thoughts";
    const parts = thinking && s >= 1 ? [words, `${number(s)} s`] : [words];
    this.summary.textContent = [...parts, ...(tokens ? [counted(tokens, "token")] : [])].join(" · ");
  }

  _drawThoughts(final) {
    if (!this.thoughts.open || !this.node.reasoning) return; // folded: nobody sees them
    const { element } = this.reasoning;
    const atEnd = element.scrollHeight - element.scrollTop - element.clientHeight < 24;
    this.reasoning.set(this.node.reasoning.trim(), { final: final && !this.element.classList.contains("thinking") });
    if (atEnd) element.scrollTop = element.scrollHeight;
  }

  _liveStats(run) {
    const parts = run.tokens ? [counted(run.tokens, "token")] : [];
    if (run.tokensPerSecond && run.tokens > 3) parts.push(`${number(run.tokensPerSecond, 1)} tokens/s`);
    return parts.join(" · ");
  }

  _finalStats() {
    const { tokens, tokens_per_s: speed, first_answer_s: first } = this.node.stats ?? {};
    const parts = tokens ? [counted(tokens, "token")] : [];
    if (speed) parts.push(`${number(speed, 1)} tokens/s`);
    if (first != null) parts.push(`answer after ${first < 1 ? `${number(first, 2)} s` : seconds(first)}`);
    return parts.join(" · ");
  }

  _drawNotice(run, isLast, contextLength) {
    const { node, actions } = this;
    const { finish, error, stats = {} } = node;
    const goOn = isLast && (node.content || node.reasoning) && !node.calls?.length ? [textButton("Continue", () => actions.goOn(node))] : [];
    const again = isLast ? [textButton("Try again", () => actions.retry(node))] : [];
    let parts = null;
    if (run) parts = null;
    else if (finish === "error") parts = [error, ...again, ...goOn];
    else if (finish === "length" && contextLength && stats.context >= contextLength) parts = [`Cut: the context of ${number(contextLength)} tokens is full.`];
    else if (finish === "length") parts = ["Cut at max_tokens.", ...(goOn.length ? goOn : again)];
    else if (finish === "stopped") parts = ["Stopped.", ...(goOn.length ? goOn : again)];
    this.notice.hidden = !parts;
    this.notice.classList.toggle("bad", finish === "error");
    if (parts) this.notice.replaceChildren(make("span", {}, parts[0]), ...parts.slice(1));
  }
}

export const isTouch = matchMedia("(hover: none) and (pointer: coarse)");

/** Whether a key press sends: Enter, but not within an input method, and not where a thumb writes. */
export const sends = (event) =>
  event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229 && (!isTouch.matches || event.ctrlKey);

export function fitHeight(textarea) {
  textarea.style.height = "auto";
  textarea.style.height = `${textarea.scrollHeight + textarea.offsetHeight - textarea.clientHeight}px`;
}
