// The playground: a prompt continued with and without memory, and what each chunk of 64 tokens has read.

import { getJson, streamCompletion } from "./api.js";
import {
  attempt, cleanText, cloneTemplate, count, find, formatPercent, getBank, linkReference, makeElement, ROOT, setText,
} from "./page.js";

const CHUNK_TOKENS = 64;
const MAX_SNIPPETS = 100; // as in flows/exploring/routes.py
const FIELDS = { prompt: "prompt", max_tokens: "max-tokens", temperature: "temperature", penalty: "penalty", seed: "seed" };

function formatNats(support) {
  return `${Math.abs(support).toFixed(2)} nats ${support < 0 ? "less likely" : "likelier"}`;
}

// One of the two texts. What it is told is kept as it came, so that it can be shown again after the back button.
class Column {
  constructor(element) {
    this.element = element;
    this.output = element.querySelector(".output");
    this.fact = element.querySelector(".fact");
  }

  begin(prompt) {
    this.saved = { prompt, events: [], end: "" };
    this.numTokens = 0;
    this.text = makeElement("span");
    this.output.replaceChildren(makeElement("span", prompt, "prompt"), this.text);
    this.output.setAttribute("aria-busy", "true");
    setText(this.fact, "waits");
  }

  add(event) {
    this.saved.events.push(event);
    this.numTokens = event.numTokens;
    this.show(event);
    setText(this.fact, count(this.numTokens, "token"));
  }

  show(event) {
    this.text.append(cleanText(event.text));
  }

  end(how) {
    this.saved.end = how;
    this.output.setAttribute("aria-busy", "false");
    setText(this.fact, `${count(this.numTokens, "token")}${how}`);
  }

  replay(saved) {
    this.begin(saved.prompt);
    for (const event of saved.events) this.add(event);
    this.end(saved.end);
  }
}

// The text that reads memories: cut into chunks, each with a card that says what it has read.
class ReadingColumn extends Column {
  constructor(element) {
    super(element);
    this.list = element.querySelector(".reads");
    this.note = element.querySelector(".note");
    for (const [place, name] of [[this.output, "pointerover"], [this.output, "focusin"], [this.list, "pointerover"], [this.list, "focusin"]]) {
      place.addEventListener(name, (event) => this.point(event.target.closest("[data-chunk]")));
    }
    this.output.addEventListener("click", (event) => {
      const chunk = event.target.closest("[data-chunk]");
      if (chunk) this.chunks[Number(chunk.dataset.chunk)].card.scrollIntoView({ block: "nearest" });
    });
  }

  begin(prompt) {
    super.begin(prompt);
    this.list.replaceChildren();
    setText(this.note, "");
    this.chunks = [];
    this.numPrompt = 0;
    this.snippets = new Map();
    this.wanted = new Map(); // ids of references whose texts are to be asked for, by version
  }

  show(event) {
    let ended = event.trace ?? [];
    if (this.saved.events.length === 1) {
      // The chunks of the prompt have been read before its first token is there; one without tokens is behind them.
      const ofPrompt = ended.filter((chunk) => chunk.num_tokens > 0);
      ended = [];
      this.output.replaceChildren();
      for (const chunk of ofPrompt) {
        const made = this.addChunk("prompt");
        made.span.append(cleanText(chunk.text));
        this.fill(made, chunk);
      }
      this.numPrompt = ofPrompt.length;
    }
    if (event.text) {
      const place = this.numPrompt + Math.floor((event.numTokens - 1) / CHUNK_TOKENS);
      while (this.chunks.length <= place) this.addChunk("generated");
      this.chunks[place].span.append(cleanText(event.text));
    }
    for (const chunk of ended) {
      const made = this.chunks.find((one) => !one.isRead);
      if (made) this.fill(made, chunk);
    }
    for (const [number, part] of (event.citations ?? []).entries()) {
      const made = this.chunks[this.numPrompt + number];
      if (!made) continue;
      // A chunk of a single token has no trace of its own.
      if (!made.isRead) this.fill(made, { ...part, memories: part.citations, version: event.version });
      this.cite(made, part);
    }
    if (event.problem) setText(this.note, event.problem);
  }

  addChunk(kind) {
    const number = this.chunks.length;
    const span = makeElement("span", "", `chunk ${kind}`);
    const card = cloneTemplate("read-template");
    for (const element of [span, card]) element.dataset.chunk = number;
    card.querySelector("h4").id = `read-${number}`;
    setText(card.querySelector("h4"), `Chunk ${number + 1} · ${kind}`);
    setText(card.querySelector(".wait"), "What it reads is known when it ends.");
    span.tabIndex = 0;
    span.setAttribute("role", "group");
    span.setAttribute("aria-label", `Chunk ${number + 1}, ${kind}`);
    span.setAttribute("aria-describedby", `read-${number}`);
    this.output.append(span);
    this.list.append(card);
    const made = { span, card, kind, isRead: false };
    this.chunks.push(made);
    return made;
  }

  fill(made, chunk) {
    made.isRead = true;
    setText(made.card.querySelector("h4"), `${made.card.querySelector("h4").textContent}, ${count(chunk.num_tokens, "token")}`);
    made.card.querySelector(".wait").remove();
    const largest = Math.max(...chunk.memories.map((memory) => memory.attention));
    for (const memory of chunk.memories) {
      const item = cloneTemplate("memory-template");
      item.querySelector(".bar > span").style.width = `${(100 * memory.attention) / largest}%`;
      setText(item.querySelector(".n"), formatPercent(memory.attention));
      setText(item.querySelector(".score"), `similarity ${memory.score.toFixed(3)}`);
      const link = setText(item.querySelector("a"), memory.ref_id.slice(0, 8));
      link.href = linkReference(memory.ref_id, chunk.version);
      made.card.querySelector(".memories").append(item);
      this.name(memory.ref_id, chunk.version, item);
    }
  }

  // Says of each memory of a chunk by how much the chunk is likelier with it, as the server found by leaving it out.
  cite(made, part) {
    const all = made.card.querySelector(".all");
    setText(all, `${formatNats(part.support)} with its memories than with none; up to ${part.noise.toFixed(2)} nats is noise.`);
    all.hidden = false;
    for (const item of made.card.querySelectorAll(".memories > li")) {
      const cited = part.citations.find((one) => one.ref_id === item.dataset.refId);
      const verdict = item.querySelector(".verdict");
      setText(verdict, `${cited.verdict}: ${formatNats(cited.support)}`);
      verdict.classList.add(cited.verdict);
      verdict.hidden = false;
    }
  }

  // Asks for the texts of all memories of a moment at once, version by version.
  name(refId, version, item) {
    if (!this.snippets.has(refId)) {
      this.snippets.set(refId, null);
      if (this.wanted.size === 0) queueMicrotask(() => attempt(() => this.loadSnippets()));
      if (!this.wanted.has(version)) this.wanted.set(version, []);
      this.wanted.get(version).push(refId);
    }
    item.dataset.refId = refId;
    this.writeName(item);
  }

  writeName(item) {
    const snippet = this.snippets.get(item.dataset.refId);
    if (!snippet) return;
    setText(item.querySelector("a"), snippet.doc_id || item.dataset.refId.slice(0, 8));
    setText(item.querySelector("p"), snippet.text);
  }

  async loadSnippets() {
    const { wanted } = this;
    this.wanted = new Map();
    for (const [version, refIds] of wanted) {
      for (let start = 0; start < refIds.length; start += MAX_SNIPPETS) {
        const some = refIds.slice(start, start + MAX_SNIPPETS);
        const found = await getJson("/v1/explore/references", { ref_id: some, version });
        for (const snippet of found.references) this.snippets.set(snippet.ref_id, snippet);
      }
    }
    for (const item of this.list.querySelectorAll("[data-ref-id]")) this.writeName(item);
  }

  point(target) {
    if (!target) return;
    for (const [number, chunk] of this.chunks.entries()) {
      const isMeant = number === Number(target.dataset.chunk);
      chunk.span.classList.toggle("meant", isMeant);
      chunk.card.classList.toggle("meant", isMeant);
    }
  }

  end(how) {
    super.end(how);
    for (const wait of this.list.querySelectorAll(".wait")) setText(wait, "It was stopped before it ended.");
  }
}

const columns = { with: new ReadingColumn(find("with")), without: new Column(find("without")) };
// Stops the generation under way; null once another entry of the history is shown in its place.
let running = null;

function readAddress() {
  const asked = new URLSearchParams(location.search);
  for (const [name, id] of Object.entries(FIELDS)) if (asked.has(name)) find(id).value = asked.get(name);
  find("cite").checked = asked.get("cite") === "1";
}

function writeAddress() {
  const entries = Object.entries(FIELDS).map(([name, id]) => [name, find(id).value]);
  if (find("cite").checked) entries.push(["cite", "1"]);
  return `${ROOT}/playground?${new URLSearchParams(entries)}`;
}

async function generate(column, memory, model, mine) {
  const body = {
    model,
    prompt: find("prompt").value,
    max_tokens: find("max-tokens").valueAsNumber,
    temperature: find("temperature").valueAsNumber,
    seed: find("seed").valueAsNumber,
    memory3: { memory, trace: memory, cite: memory && find("cite").checked, repetition_penalty: find("penalty").valueAsNumber },
  };
  let reason = null;
  try {
    await streamCompletion(
      body,
      (event) => {
        if (running !== mine) return;
        const [choice] = event.choices;
        const told = choice.memory3;
        reason = choice.finish_reason ?? reason;
        column.add({
          text: choice.text,
          numTokens: told.num_tokens,
          trace: told.trace,
          citations: told.citations,
          problem: told.citation_problem,
          version: told.version,
        });
      },
      mine.signal,
    );
    column.end(reason === "stop" ? ", ended by itself" : "");
  } catch (error) {
    if (running === mine) column.end(error.name === "AbortError" ? ", stopped" : ", failed");
    throw error;
  }
}

function showRunning(isRunning) {
  find("generate").disabled = isRunning;
  find("stop").disabled = !isRunning;
}

async function run() {
  const bank = await getBank();
  const mine = new AbortController();
  running = mine;
  find("columns").hidden = false;
  showRunning(true);
  setText(find("progress"), "Generating…");
  const address = writeAddress();
  // The settings have an address, so that they can be sent to somebody; going back leads to those before.
  history.pushState(null, "", address);
  for (const column of Object.values(columns)) column.begin(find("prompt").value);
  const done = await Promise.allSettled([
    generate(columns.with, true, bank.model, mine),
    generate(columns.without, false, bank.model, mine),
  ]);
  if (running !== mine) return;
  showRunning(false);
  const failed = done.find((one) => one.status === "rejected" && one.reason.name !== "AbortError");
  setText(find("progress"), failed ? "Failed." : mine.signal.aborted ? "Stopped." : "Done.");
  history.replaceState({ with: columns.with.saved, without: columns.without.saved }, "", address);
  if (failed) throw failed.reason;
}

function showState(state) {
  readAddress();
  find("columns").hidden = !state;
  if (state) for (const [name, column] of Object.entries(columns)) column.replay(state[name]);
}

find("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!find("generate").disabled) attempt(run);
});
find("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) find("ask").requestSubmit();
});
find("stop").addEventListener("click", () => running?.abort());
addEventListener("popstate", (event) => {
  running?.abort();
  running = null;
  showRunning(false);
  setText(find("progress"), "");
  showState(event.state);
});
attempt(async () => {
  const bank = await getBank();
  find("max-tokens").max = bank.model_tokens - 1;
  showState(history.state);
});
