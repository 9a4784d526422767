// What the page asks the server: JSON, and streams of completions. The key, where the server has one, is kept in the
// session storage of the tab.

const KEY_NAME = "memory3-key";

export class ApiProblem extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export function hasKey() {
  return sessionStorage.getItem(KEY_NAME) !== null;
}

function makeHeaders() {
  const key = sessionStorage.getItem(KEY_NAME);
  return key === null ? {} : { Authorization: `Bearer ${key}` };
}

let asking = null; // several requests may be refused at once, and one key serves them all

function askForKey() {
  asking ??= new Promise((resolve, reject) => {
    const dialog = document.getElementById("key-dialog");
    const field = document.getElementById("key");
    document.getElementById("key-problem").textContent = hasKey() ? "The key was not accepted." : "";
    field.value = "";
    dialog.addEventListener(
      "close",
      () => {
        asking = null;
        const key = field.value.trim();
        // A header holds no other letters.
        if (/^[\x21-\x7e]+$/.test(key)) {
          sessionStorage.setItem(KEY_NAME, key);
          resolve();
        } else {
          reject(new ApiProblem(401, "The server shows nothing without its key. Load the page again to give it."));
        }
      },
      { once: true },
    );
    dialog.showModal();
    field.focus();
  });
  return asking;
}

async function explainFailure(response) {
  const body = await response.json().catch(() => null);
  return new ApiProblem(response.status, body?.error?.message ?? `the server answered ${response.status}`);
}

async function send(path, options = {}) {
  for (;;) {
    const used = sessionStorage.getItem(KEY_NAME);
    let response;
    try {
      response = await fetch(path, { ...options, headers: { ...options.headers, ...makeHeaders() } });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiProblem(0, "The server does not answer. Is it still running?");
    }
    if (response.status === 401) {
      if (used === sessionStorage.getItem(KEY_NAME)) await askForKey();
      continue;
    }
    if (!response.ok) throw await explainFailure(response);
    return response;
  }
}

export async function getJson(path, parameters = {}) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(parameters)) {
    for (const one of Array.isArray(value) ? value : [value]) {
      if (one !== null && one !== undefined) query.append(name, one);
    }
  }
  const text = query.toString();
  return (await send(text ? `${path}?${text}` : path)).json();
}

function post(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  return send(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

export async function postJson(path, body) {
  return (await post(path, body)).json();
}

// Calls onEvent with each event of a streamed completion.
export async function streamCompletion(body, onEvent, signal) {
  const response = await post("/v1/completions", { ...body, stream: true }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    const events = (waiting + value).split("\n\n");
    waiting = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const parsed = JSON.parse(data);
      if (parsed.error) throw new ApiProblem(500, parsed.error.message);
      onEvent(parsed);
    }
  }
  throw new ApiProblem(0, "The stream ended before the text did. Is the server still running?");
}
