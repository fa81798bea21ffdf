// What is kept in this browser: conversations (IndexedDB) and small choices; in memory only where that is forbidden.

const memory = new Map();
let database = null;
export let isKept = false; // whether conversations outlive the page

const done = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

/** A choice kept by name: until the tab is closed in `sessionStorage`, else in `localStorage`. */
export function recall(name, place = "localStorage") {
  try {
    return globalThis[place].getItem(`stillhouse.${name}`);
  } catch {
    return null;
  }
}

export function keep(name, value, place = "localStorage") {
  try {
    if (value === null) globalThis[place].removeItem(`stillhouse.${name}`);
    else globalThis[place].setItem(`stillhouse.${name}`, value);
  } catch {} // forbidden, or full: the choice holds as long as the page
}

export async function open() {
  try {
    const request = indexedDB.open("stillhouse", 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("heads", { keyPath: "id" });
      request.result.createObjectStore("conversations", { keyPath: "id" });
    };
    database = await done(request);
    isKept = true;
  } catch {
    database = null;
  }
}

const stores = (mode) => {
  const change = database.transaction(["heads", "conversations"], mode);
  return [change.objectStore("heads"), change.objectStore("conversations")];
};

const headOf = ({ id, title, updated }) => ({ id, title, updated });

/** `{id, title, updated}` of all, the newest first. */
export async function list() {
  const heads = database ? await done(stores("readonly")[0].getAll()) : [...memory.values()].map(headOf);
  return heads.sort((a, b) => b.updated - a.updated);
}

export async function get(id) {
  return database ? done(stores("readonly")[1].get(id)) : memory.get(id);
}

export async function all() {
  return database ? done(stores("readonly")[1].getAll()) : [...memory.values()];
}

export async function put(conversation) {
  if (!database) return void memory.set(conversation.id, conversation);
  const [heads, conversations] = stores("readwrite");
  await Promise.all([done(heads.put(headOf(conversation))), done(conversations.put(conversation))]);
}

export async function remove(id) {
  if (!database) return void memory.delete(id);
  const [heads, conversations] = stores("readwrite");
  await Promise.all([done(heads.delete(id)), done(conversations.delete(id))]);
}
