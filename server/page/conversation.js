// What a conversation is: a tree of messages, one path through it shown. Pure data; knows of no page and no server.
//
// An edited question or a reply made again is a sibling of the old one, which stays and can be gone back to.

export const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed", "budget"];
export const TEXTS = ["system", "tools", "schema"];

export const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(12)), (b) => b.toString(36).padStart(2, "0")).join("");

export function create(settings = {}) {
  const now = Date.now();
  return { id: newId(), title: "", created: now, updated: now, settings: { ...settings }, nodes: {}, leaf: null };
}

/** Put a message under `parent` (an id, or null at the top) and show it. */
export function add(conversation, parent, fields) {
  const node = { id: newId(), parent, content: "", created: Date.now(), ...fields };
  conversation.nodes[node.id] = node;
  conversation.leaf = node.id;
  conversation.updated = Date.now();
  if (!conversation.title && node.role === "user") conversation.title = titleOf(node.content);
  return node;
}

export const titleOf = (text) => {
  const line = text.trim().replace(/\s+/g, " ");
  return line.length > 60 ? `${line.slice(0, 58).trimEnd()}…` : line;
};

/** The messages that are shown, first to last; or those up to `leaf`. */
export function path(conversation, leaf = conversation.leaf) {
  const nodes = [];
  for (let node = conversation.nodes[leaf]; node; node = conversation.nodes[node.parent]) nodes.unshift(node);
  return nodes;
}

const children = (conversation, parent) => Object.values(conversation.nodes).filter((node) => node.parent === parent);

export const siblings = (conversation, node) => children(conversation, node.parent);

/** Show the path through `node`, down to the newest message under it. */
export function show(conversation, node) {
  for (let next = node; next; next = children(conversation, next.id).at(-1)) conversation.leaf = next.id;
}

/** The body of `POST /v1/chat/completions` for a reply after `leaf`; a reply there is gone on with. Throws a sentence. */
export function requestBody(conversation, leaf, model) {
  const { system, effort, budget, tools, schema, ...numbers } = conversation.settings;
  const messages = path(conversation, leaf).map((node) => asMessage(node, node.id === leaf));
  if (system?.trim()) messages.unshift({ role: "system", content: system });
  const body = { model, messages, stream: true, stream_options: { include_usage: true }, ...numbers };
  if (budget != null) body.thinking_budget = budget;
  else if (effort) body.reasoning_effort = effort;
  if (tools?.trim()) body.tools = readTools(tools);
  if (schema?.trim()) body.response_format = { type: "json_schema", json_schema: { name: "answer", schema: readSchema(schema) } };
  return body;
}

function asMessage({ role, content, reasoning, calls, call_id: tool_call_id }, isResumed) {
  if (role === "tool") return { role, tool_call_id, content };
  if (role === "user") return { role, content };
  const message = isResumed && reasoning ? { role, content, reasoning_content: reasoning } : { role, content };
  if (calls?.length) message.tool_calls = calls.map(({ id, name, arguments: text }) => ({ id, type: "function", function: { name, arguments: text } }));
  return message;
}

/** The tools that a text lists: an array of OpenAI's tools, or of bare functions. Throws a sentence. */
export function readTools(text) {
  let data;
  try {
    data = JSON.parse(text);
  } catch (error) {
    throw new Error(`the tools are no JSON: ${error.message}`);
  }
  const list = Array.isArray(data) ? data : [data];
  if (!list.every((tool) => tool?.function?.name || tool?.name)) throw new Error("a tool is an object with a name and parameters");
  return list.map((tool) => (tool.function ? tool : { type: "function", function: tool }));
}

/** A JSON schema out of a text. Throws a sentence. */
export function readSchema(text) {
  try {
    const schema = JSON.parse(text);
    if (schema && typeof schema === "object" && !Array.isArray(schema)) return schema;
  } catch (error) {
    throw new Error(`the schema is no JSON: ${error.message}`);
  }
  throw new Error('a schema is an object, such as {"type": "object"}');
}

export function asMarkdown(conversation) {
  const parts = [`# ${conversation.title}`];
  if (conversation.settings.system) parts.push(`> ${conversation.settings.system.replaceAll("\n", "\n> ")}`);
  for (const { role, content, reasoning, model, calls = [], name } of path(conversation)) {
    parts.push({ user: "## You", tool: `## Result of ${name}` }[role] ?? `## ${model || "Assistant"}`);
    if (reasoning) parts.push(`<details><summary>Thoughts</summary>\n\n${reasoning.trim()}\n\n</details>`);
    if (content.trim()) parts.push(content.trim());
    for (const call of calls) parts.push(`Calls \`${call.name}\`:\n\n\`\`\`json\n${call.arguments}\n\`\`\``);
  }
  return `${parts.join("\n\n")}\n`;
}

export const asJson = (conversations) => JSON.stringify({ stillhouse: 1, conversations }, null, 1);

/** Conversations from a file's text: ours, or OpenAI's `messages`. Throws a sentence. */
export function fromJson(text) {
  let data;
  try {
    data = JSON.parse(text);
  } catch {
    throw new Error("it is not JSON");
  }
  if (Array.isArray(data?.conversations)) return data.conversations.map(checked);
  const messages = Array.isArray(data) ? data : data?.messages;
  if (!Array.isArray(messages)) throw new Error("it holds neither conversations nor messages");
  return [fromMessages(messages)];
}

function checked(data) {
  const conversation = create(checkedSettings(data?.settings));
  const ids = new Map([[null, null]]);
  for (const node of Object.values(data?.nodes ?? {})) {
    if (!["user", "assistant", "tool"].includes(node?.role) || typeof node.content !== "string" || !ids.has(node.parent)) {
      throw new Error("a message in it is not one of this page's");
    }
    const fields = { role: node.role, content: node.content };
    for (const name of ["reasoning", "model", "finish", "error", "call_id", "name"]) if (typeof node[name] === "string") fields[name] = node[name];
    if (node.calls) fields.calls = node.calls.map(checkedCall);
    if (Number.isFinite(node.created)) fields.created = node.created;
    fields.stats = {};
    for (const [name, value] of Object.entries(node.stats ?? {})) if (Number.isFinite(value)) fields.stats[name] = value;
    ids.set(node.id, add(conversation, ids.get(node.parent), fields).id);
  }
  conversation.leaf = ids.get(data.leaf) ?? conversation.leaf;
  if (typeof data.title === "string") conversation.title = data.title;
  for (const name of ["created", "updated"]) if (Number.isFinite(data[name])) conversation[name] = data[name];
  return conversation;
}

function checkedSettings(data) {
  const settings = {};
  for (const name of [...TEXTS, "effort"]) if (typeof data?.[name] === "string") settings[name] = data[name];
  for (const name of NUMBERS) if (Number.isFinite(data?.[name])) settings[name] = data[name];
  return settings;
}

function checkedCall({ id, name, arguments: text } = {}) {
  if (typeof id !== "string" || typeof name !== "string" || typeof text !== "string") throw new Error("a tool call in it is not whole");
  return { id, name, arguments: text };
}

function fromMessages(messages) {
  const conversation = create();
  const names = new Map(); // of the functions, by the ids of their calls
  for (const { role, content: given, reasoning_content: reasoning, tool_calls: made, tool_call_id } of messages) {
    const calls = (made ?? []).map((call) => checkedCall({ id: call?.id, ...call?.function }));
    for (const { id, name } of calls) names.set(id, name);
    const content = given ?? (calls.length ? "" : given);
    if (typeof content !== "string") throw new Error("a message in it has no text");
    if (role === "system" || role === "developer") conversation.settings.system = content;
    else if (role === "user" || role === "assistant") {
      const more = { ...(typeof reasoning === "string" && { reasoning }), ...(calls.length && { calls, finish: "tool_calls" }) };
      add(conversation, conversation.leaf, { role, content, ...more });
    } else if (role === "tool" && names.has(tool_call_id)) {
      add(conversation, conversation.leaf, { role, content, call_id: tool_call_id, name: names.get(tool_call_id) });
    } else throw new Error(`a message in it is of the role ${String(role)}`);
  }
  if (!conversation.leaf) throw new Error("it holds no messages");
  return conversation;
}
