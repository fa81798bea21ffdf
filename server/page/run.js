// One reply in the making: what comes from the server goes into its message, and what happened when is kept with it.

import { ApiError, chat, endThinking } from "./api.js";
import { requestBody } from "./conversation.js";

function bodyOf(conversation, leaf, model) {
  try {
    return requestBody(conversation, leaf, model);
  } catch (error) {
    throw new ApiError(error.message, 400);
  }
}

export class Run {
  /** `changed(run)` is called for every piece, and once more when it has ended. */
  constructor(conversation, node, model, changed) {
    Object.assign(this, { conversation, node, model, changed });
    this.phase = "waiting"; // then "thinking", "answering", "ended"
    this.id = null; // the server's name for the reply
    this.ending = false; // whether its thoughts were told to end
    this.error = null;
    this._abort = new AbortController();
    this._thinkingSince = null;
    this._before = node.stats ?? {};
    this._tokens = { reasoning: 0, content: 0 }; // pieces that came: what the server counts comes last
    this._first = this._last = null;
  }

  async start() {
    const { node } = this;
    const resumed = node.content || node.reasoning;
    node.finish = "stopped"; // until it ends: so a page that is closed meanwhile leaves it
    delete node.error;
    node.stats = { ...this._before };
    this._start = performance.now();
    let usage = null;
    try {
      const body = bodyOf(this.conversation, resumed ? node.id : node.parent, this.model);
      for await (const chunk of chat(body, this._abort.signal)) {
        this.id = chunk.id;
        usage = chunk.usage ?? usage;
        const choice = chunk.choices[0];
        if (choice) this._take(choice);
      }
    } catch (error) {
      if (error.name === "AbortError") return;
      if (typeof error.status !== "number") throw error;
      this.error = error;
      node.finish = "error";
      node.error = error.message;
    } finally {
      this._close(usage);
    }
  }

  stop() {
    this._abort.abort();
  }

  async answerNow() {
    this.ending = true;
    this.changed(this);
    try {
      await endThinking(this.id);
    } catch (error) {
      if (error.status !== 404 && error.status !== 409) throw error; // it came to the answer by itself
    }
  }

  /** Seconds and tokens of its thoughts so far. */
  get thinking() {
    const now = this._thinkingSince === null ? 0 : (performance.now() - this._thinkingSince) / 1000;
    const { thinking_s = 0, reasoning_tokens = 0 } = this._before;
    return {
      seconds: this.node.stats.thinking_s ?? thinking_s + now,
      tokens: reasoning_tokens + this._tokens.reasoning,
    };
  }

  get tokens() {
    return (this._before.tokens ?? 0) + this._tokens.reasoning + this._tokens.content;
  }

  get tokensPerSecond() {
    const count = this._tokens.reasoning + this._tokens.content;
    return count > 1 ? ((count - 1) * 1000) / (this._last - this._first) : null;
  }

  _take({ delta = {}, finish_reason: finish }) {
    const { node } = this;
    const now = performance.now();
    if (delta.reasoning_content) {
      node.reasoning = (node.reasoning ?? "") + delta.reasoning_content;
      delete node.stats.thinking_s;
      this._thinkingSince ??= now;
      this.phase = "thinking";
      this._count("reasoning", now);
    }
    if (delta.content) {
      if (this.phase !== "answering") this._endThoughts();
      node.stats.first_answer_s ??= (now - this._start) / 1000;
      node.content += delta.content;
      this.phase = "answering";
      this._count("content", now);
    }
    for (const piece of delta.tool_calls ?? []) {
      if (this.phase !== "answering") this._endThoughts();
      node.stats.first_answer_s ??= (now - this._start) / 1000;
      node.calls ??= [];
      if (piece.id) node.calls[piece.index] = { id: piece.id, name: piece.function.name, arguments: "" };
      node.calls[piece.index].arguments += piece.function.arguments ?? "";
      this.phase = "answering";
      this._count("content", now);
    }
    if (finish) node.finish = finish;
    this.changed(this);
  }

  _count(channel, now) {
    this._tokens[channel] += 1;
    this._first ??= now;
    this._last = now;
  }

  _endThoughts() {
    if (this._thinkingSince !== null) this.node.stats.thinking_s = this.thinking.seconds;
    this._thinkingSince = null;
  }

  _close(usage) {
    const { stats } = this.node;
    this._endThoughts();
    stats.tokens = (this._before.tokens ?? 0) + (usage?.completion_tokens ?? this._tokens.reasoning + this._tokens.content);
    stats.reasoning_tokens =
      (this._before.reasoning_tokens ?? 0) +
      (usage?.completion_tokens_details?.reasoning_tokens ?? this._tokens.reasoning);
    if (usage) stats.context = usage.total_tokens;
    if (this.tokensPerSecond) {
      const exact = usage ? usage.completion_tokens / (this._tokens.reasoning + this._tokens.content) : 1;
      stats.tokens_per_s = this.tokensPerSecond * exact;
    }
    this.phase = "ended";
    this.changed(this);
  }
}
