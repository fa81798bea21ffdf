// The server, as the page sees it: models, replies as they come, the end of thoughts. Errors are its own sentences.

import { keep, recall } from "./store.js";

let key = recall("key", "sessionStorage") ?? recall("key") ?? "";

export class ApiError extends Error {
  constructor(message, status = 0, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

export const hasKey = () => key !== "";

export function useKey(text, isKept) {
  key = text.trim();
  keep("key", key, "sessionStorage");
  keep("key", isKept && key ? key : null);
}

async function ask(path, options = {}) {
  const headers = options.body ? { "content-type": "application/json" } : {};
  if (key) headers.authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, credentials: "omit", cache: "no-store", redirect: "error" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(
      /[^\x20-\xff]/.test(key) ? "the API key holds a character that no header can carry" : "the server does not answer",
    );
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response) {
  const { message, code } = (await response.json().catch(() => null))?.error ?? {};
  return new ApiError(message ?? `the server answered ${response.status} ${response.statusText}`, response.status, code);
}

export async function models() {
  return (await (await ask("v1/models")).json()).data;
}

export async function endThinking(id) {
  await ask(`v1/chat/completions/${encodeURIComponent(id)}/end_thinking`, { method: "POST" });
}

/** The chunks of a streamed reply. Throws `ApiError`; an "AbortError" when `signal` stops it. */
export async function* chat(body, signal) {
  const response = await ask("v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    while (true) {
      const { done, value } = await reader.read();
      if (done) break;
      const frames = (rest + value).split(/\r?\n\r?\n/);
      rest = frames.pop();
      for (const frame of frames) {
        const data = frame.match(/^data: ?(.*)$/m)?.[1];
        if (!data) continue; // a comment: the server is alive
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new ApiError(chunk.error.message, 500, chunk.error.code);
        yield chunk;
      }
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
    throw new ApiError("the connection to the server was lost");
  } finally {
    reader.cancel().catch(() => {});
  }
  throw new ApiError("the connection to the server was lost");
}
