// Text into page: Markdown, code and LaTeX, block by block as the text grows. Knows nothing of chats.
//
// Three walls against what a model may write: raw HTML is shown as text, the rest goes through DOMPurify with a short
// list of tags, and the page's Content-Security-Policy would run nothing that came through both.

import { Marked } from "./vendor/marked-18.2.1/marked.esm.js";
import hljs from "./vendor/highlight-11.12.0/core.min.js";

const LANGUAGES = {
  bash: "bash", sh: "bash", shell: "bash", zsh: "bash", console: "bash", c: "c", h: "c", cpp: "cpp", "c++": "cpp",
  css: "css", diff: "diff", patch: "diff", go: "go", html: "xml", xml: "xml", svg: "xml", java: "java",
  javascript: "javascript", js: "javascript", jsx: "javascript", json: "json", python: "python", py: "python",
  rust: "rust", rs: "rust", sql: "sql", typescript: "typescript", ts: "typescript", tsx: "typescript",
  yaml: "yaml", yml: "yaml",
};
const ALLOWED = {
  ALLOWED_TAGS: (
    "a blockquote br code del div em h1 h2 h3 h4 h5 h6 hr kbd li ol p pre span strong sub sup " +
    "table tbody td th thead tr ul"
  ).split(" "),
  ALLOWED_ATTR: ["href", "class", "start", "align"],
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:)/i,
  ADD_URI_SAFE_ATTR: ["align", "start"], // no addresses, whatever is in them
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};
const MOST_COLOURED = 60_000; // characters of a code block; longer ones stay plain
const PLAIN_TAG = /^<\/?(?:br|sub|sup|kbd)\s*\/?>$/i;
const TEX_LINES = String.raw`(?:(?!\n[ \t]*\n)[^])`; // TeX knows no empty lines; this bounds a forgotten end

const escape = (text) => text.replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);
const texToken = (raw, tex, display) => ({ type: display ? "texBlock" : "tex", raw, tex, display });
const texHtml = ({ type, tex, display, open }) => {
  const tag = type === "texBlock" ? "div" : "span"; // a div would end the paragraph it stands in
  return `<${tag} class="tex${display ? " display" : ""}${open ? " open" : ""}">${escape(tex)}</${tag}>`;
};

let growing = false; // whether the text being read has its end still to come

const blockTex = new RegExp(String.raw`^ {0,3}(?:\$\$(${TEX_LINES}+?)\$\$|\\\[(${TEX_LINES}+?)\\\])[ \t]*(?:\n|$)`);
const openBlockTex = new RegExp(String.raw`^ {0,3}(?:\$\$|\\\[)(${TEX_LINES}*)$`);
const inlineTex = [
  [new RegExp(String.raw`^\$\$(${TEX_LINES}+?)\$\$`), true],
  [new RegExp(String.raw`^\\\[(${TEX_LINES}+?)\\\]`), true],
  [new RegExp(String.raw`^\\\((${TEX_LINES}+?)\\\)`), false],
  // Pandoc's rule: "$5 and $10" is money, not a formula.
  [/^\$(?![\s$])((?:\\.|[^\\$\n])*?[^\s\\$]|\\.)\$(?!\d)/, false],
];

const marked = new Marked({
  gfm: true,
  breaks: true,
  extensions: [
    {
      name: "texBlock",
      level: "block",
      start: (text) => text.match(/(?:^|\n) {0,3}(?:\$\$|\\\[)/)?.index,
      tokenizer(text) {
        const found = blockTex.exec(text);
        if (found) return texToken(found[0], found[1] ?? found[2], true);
        const begun = growing && openBlockTex.exec(text);
        if (begun) return { ...texToken(begun[0], begun[1], true), open: true };
      },
      renderer: texHtml,
    },
    {
      name: "tex",
      level: "inline",
      start: (text) => text.match(/\$|\\[[(]/)?.index,
      tokenizer(text) {
        for (const [pattern, display] of inlineTex) {
          const found = pattern.exec(text);
          if (found) return { ...texToken(found[0], found[1], display), type: "tex" };
        }
        const begun = growing && /^\\\(([^\n]*)$/.exec(text);
        if (begun) return { ...texToken(begun[0], begun[1], false), open: true };
      },
      renderer: texHtml,
    },
  ],
  tokenizer: {
    // GFM strikes out between single tildes too; but "~5 or ~6" says "about".
    del(text) {
      const found = /^~~(?=\S)([^]*?\S)~~(?!~)/.exec(text);
      if (found) return { type: "del", raw: found[0], text: found[1], tokens: this.lexer.inlineTokens(found[1]) };
    },
  },
  renderer: {
    html: ({ text, block }) => (PLAIN_TAG.test(text.trim()) ? text : block ? `<p>${escape(text)}</p>` : escape(text)),
    // A picture would be fetched from another's server; a link says the same and asks first.
    image: ({ href, text }) => `<a href="${escape(href)}">${escape(text || href)}</a>`,
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
    code: ({ text, lang }) => `<pre><code class="${escape((lang || "").split(/\s/)[0])}">${escape(text)}</code></pre>`,
  },
});

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("class", "icon");
  svg.append(document.createElementNS("http://www.w3.org/2000/svg", "use"));
  svg.firstChild.setAttribute("href", `#i-${name}`);
  return svg;
}

/** An element: `make("button", {class: "round", onclick}, "text", child)`. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element[name] = value;
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** Markdown in an element. While the text grows only its last blocks are read and drawn again. */
export class Markdown {
  constructor(element) {
    this.element = element;
    element.classList.add("md");
    this._clear();
  }

  set(text, { final = true } = {}) {
    text = text.replace(/\r\n?/g, "\n");
    if (text === this.text && final === this.final) return;
    if (!text.startsWith(this.text)) this._clear();
    this.text = text;
    this.final = final;
    growing = !final;
    const tokens = marked.lexer(text.slice(this.settled));
    // 1. What is as it was stays in the page.
    let same = 0;
    while (same < this.tail.length && this.tail[same].raw === tokens[same]?.raw && !this.tail[same].open) same += 1;
    // 2. A code block that only became longer keeps its element: its place and its scrolling stay.
    const [old, now] = [this.tail[same], tokens[same]];
    if (old?.code && now?.type === "code" && same === this.tail.length - 1 && now.lang === old.lang) {
      setCode(old.nodes[0], now.text, now.lang);
      old.raw = now.raw;
      same += 1;
    }
    // 3. The rest is made anew.
    for (const block of this.tail.splice(same)) for (const node of block.nodes) node.remove();
    for (const token of tokens.slice(same)) {
      const nodes = draw(Object.assign([token], { links: tokens.links }));
      this.element.append(...nodes);
      const code = token.type === "code" && nodes.length === 1;
      this.tail.push({ raw: token.raw, nodes, code, lang: token.lang, open: token.open ?? final !== true });
    }
    for (const block of this.tail.slice(0, -1)) block.open = false;
    // 4. A block with two more behind it is finished; it is never read again.
    while (!final && this.tail.length > 3) {
      const block = this.tail.shift();
      this.settled += block.raw.length;
      growing = false;
      if (block.code) colour(block.nodes[0].querySelector("code"), block.lang);
    }
  }

  _clear() {
    this.text = "";
    this.final = undefined;
    this.settled = 0; // characters whose blocks are finished
    this.tail = [];
    this.element.replaceChildren();
  }
}

function draw(tokens) {
  const fragment = DOMPurify.sanitize(marked.parser(tokens), ALLOWED);
  for (const link of fragment.querySelectorAll("a")) {
    if (!link.hasAttribute("href")) {
      link.replaceWith(...link.childNodes);
      continue;
    }
    link.target = "_blank";
    link.rel = "noopener noreferrer";
  }
  for (const table of fragment.querySelectorAll("table")) {
    const box = make("div", { class: "scroll", tabindex: 0 });
    table.replaceWith(box);
    box.append(table);
  }
  for (const pre of fragment.querySelectorAll("pre")) {
    const code = pre.querySelector("code");
    if (!code) continue;
    const name = code.className;
    const button = make("button", { type: "button", class: "copy-code" }, "Copy");
    const box = make("div", { class: "code" }, make("div", { class: "code-head" }, make("span", {}, name), button));
    pre.replaceWith(box);
    pre.tabIndex = 0;
    box.append(pre);
    code.removeAttribute("class");
    setCode(box, code.textContent, name);
  }
  for (const element of fragment.querySelectorAll(".tex:not(.open)")) drawTex(element);
  return [...fragment.childNodes].filter((node) => node.nodeType !== Node.TEXT_NODE || node.data.trim());
}

function setCode(box, text, name) {
  const code = box.querySelector("code");
  const shown = code.textContent;
  if (shown && text.startsWith(shown) && text.length > 4000) code.append(text.slice(shown.length));
  else if (shown !== text) code.textContent = text;
  colour(code, name);
}

function colour(code, name) {
  const language = LANGUAGES[(name || "").toLowerCase().split(/\s/)[0]];
  const text = code.textContent;
  if (!language || text.length > (growing ? 4000 : MOST_COLOURED)) return;
  if (!hljs.getLanguage(language)) {
    import(`./vendor/highlight-11.12.0/${language}.min.js`).then((module) => {
      hljs.registerLanguage(language, module.default);
      colour(code, name);
    });
    return;
  }
  const html = hljs.highlight(text, { language, ignoreIllegals: true }).value;
  code.replaceChildren(DOMPurify.sanitize(html, ALLOWED));
}

const formulas = new Map(); // TeX -> its element; a growing list is drawn many times

function drawTex(element) {
  const display = element.classList.contains("display");
  const key = `${display}${element.textContent}`;
  let drawn = formulas.get(key);
  if (!drawn) {
    drawn = element.cloneNode(true);
    try {
      katex.render(element.textContent, drawn, { displayMode: display, strict: false, trust: false, maxExpand: 500, maxSize: 30 });
    } catch (error) {
      drawn.classList.add("wrong");
      drawn.title = error.message;
    }
    if (formulas.size > 500) formulas.clear();
    formulas.set(key, drawn);
  }
  element.replaceWith(drawn.cloneNode(true));
}

/** Calls `draw` at most once a frame, and less often when drawing is slow. */
export function atFrameRate(draw) {
  let waiting = false;
  let pause = 0; // ms, so that drawing takes a quarter of the time at most
  const frame = () => {
    waiting = false;
    const start = performance.now();
    draw();
    pause = Math.min(400, 3 * (performance.now() - start));
  };
  return () => {
    if (waiting) return;
    waiting = true;
    if (pause > 16) setTimeout(() => requestAnimationFrame(frame), pause);
    else requestAnimationFrame(frame);
  };
}
