// Tool calls: how one looks folded and unfolded, and the form in which a reader says what it returned.
//
// The page runs nothing: a call is shown, and whoever reads it writes the result.

import { Markdown, icon, make } from "./render.js";

function asCode(text) {
  try {
    return `\`\`\`json\n${JSON.stringify(JSON.parse(text), null, 2)}\n\`\`\``;
  } catch {
    return null; // not JSON, or not all of it yet
  }
}

/** One folded block: a name, a line of what is in it, and all of it inside. */
class Block {
  constructor(kind, symbol) {
    this.name = make("b");
    this.line = make("span", { class: "line" });
    this.inner = make("div", { class: "inner" });
    this.element = make("details", { class: `call ${kind}` }, make("summary", {}, icon(symbol), this.name, this.line, icon("right")), this.inner);
    this.element.ontoggle = () => this._drawInner();
  }

  draw(name, text) {
    if (this.text === text && this.name.textContent === name) return;
    this.name.textContent = name;
    this.text = text;
    this.line.textContent = text.replace(/\s+/g, " ").slice(0, 200);
    this._drawInner();
  }

  _drawInner() {
    if (!this.element.open || this.shown === this.text) return; // folded: nobody sees it
    this.shown = this.text;
    const code = asCode(this.text);
    if (code) new Markdown(this.inner).set(code);
    else this.inner.replaceChildren(make("pre", { tabindex: 0 }, this.text));
  }
}

/** The calls of one reply, and below them what they returned is asked for. */
export class Calls {
  constructor(node, actions) {
    Object.assign(this, { node, actions });
    this.blocks = [];
    this.list = make("div");
    this.element = make("div", { class: "calls", hidden: true }, this.list);
  }

  draw(run, isLast) {
    const { calls = [], finish } = this.node;
    this.element.hidden = !calls.length;
    while (this.blocks.length > calls.length) this.blocks.pop().element.remove();
    calls.forEach((call, at) => {
      if (!this.blocks[at]) {
        this.blocks.push(new Block("asked", "tool"));
        this.list.append(this.blocks[at].element);
      }
      this.blocks[at].draw(call.name, call.arguments);
    });
    const asks = calls.length > 0 && !run && isLast && finish === "tool_calls";
    if (!asks) {
      this.form?.remove();
      this.form = null;
    } else if (!this.form) this.element.append((this.form = this._form(calls)));
  }

  _form(calls) {
    const fields = calls.map(({ name }) => make("textarea", { rows: 1, placeholder: "What it returned: text or JSON", "aria-label": `Result of ${name}` }));
    const send = () => this.actions.sendResults(this.node, fields.map(({ value }) => value));
    const rows = calls.map(({ name }, at) => make("label", {}, make("span", {}, "Result of ", make("b", {}, name)), fields[at]));
    const form = make("form", { class: "results" }, ...rows, make("button", { class: "primary" }, calls.length > 1 ? "Send results" : "Send result"));
    form.onsubmit = (event) => {
      event.preventDefault();
      send();
    };
    form.onkeydown = (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.target.tagName !== "TEXTAREA") return;
      event.preventDefault();
      const next = fields[fields.indexOf(event.target) + 1];
      if (next) next.focus();
      else send();
    };
    return form;
  }
}

/** What a call returned, as a message of its own. */
export class ResultView {
  constructor(node) {
    this.node = node;
    this.block = new Block("returned", "check");
    this.element = make("article", { class: "message tool", "aria-label": `Result of ${node.name}` }, this.block.element);
  }

  draw() {
    this.block.draw(this.node.name ?? "result", this.node.content);
  }
}
