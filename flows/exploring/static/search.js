// The first view: a search, and what the bank is where nothing has been searched for.

import { postJson } from "./api.js";
import {
  addTiles, attempt, cloneTemplate, count, find, formatBytes, formatMoment, formatNumber, getBank, linkReference, ROOT,
  setText, setTitle, shorten,
} from "./page.js";

const STEP = 10;
const MOST = 100;
const TITLE_LETTERS = 90;

function makeHit(hit) {
  const item = cloneTemplate("hit-template");
  const open = item.querySelector(".open");
  setText(open, shorten(hit.title, TITLE_LETTERS));
  open.href = linkReference(hit.refId);
  setText(item.querySelector("p"), hit.facts.filter(Boolean).join(" · "));
  setText(item.querySelector("blockquote"), hit.text);
  return item;
}

function describeHit(hit) {
  const [first] = hit.sources;
  const facts = [`similarity ${hit.score.toFixed(3)}`];
  if (first?.title) facts.push(first.doc_id);
  if (first) facts.push(first.source, `reference ${first.ordinal + 1}`);
  if (hit.num_sources > 1) facts.push(`and in ${count(hit.num_sources - 1, "other place")}`);
  return { refId: hit.ref_id, title: first?.title || first?.doc_id || hit.ref_id, text: hit.text, facts };
}

async function search(query, numHits) {
  setTitle(`${shorten(query, 40)}: search`);
  find("query").value = query;
  find("results").hidden = false;
  setText(find("results-note"), "Searching…");
  const found = await postJson("/v1/search", { query, num_hits: numHits });
  const note = `${count(found.hits.length, "reference")} of version ${found.version}, the most similar first.`;
  setText(find("results-note"), found.hits.length ? note : "The bank holds no live reference.");
  for (const hit of found.hits) {
    find("hits").append(makeHit(describeHit(hit)));
  }
  const more = find("more");
  more.hidden = found.hits.length < numHits || numHits >= MOST;
  more.href = `${ROOT}/?${new URLSearchParams({ q: query, n: Math.min(numHits + STEP, MOST) })}`;
}

async function describe() {
  const bank = await getBank();
  const numPairs = bank.memory_layers.length * bank.num_heads;
  find("about").hidden = false;
  addTiles(find("tiles"), [
    [formatNumber(bank.num_documents), "documents"],
    [formatNumber(bank.num_references), "live references"],
    [formatBytes(bank.memory_bytes), "a memory"],
    [`${bank.version}`, `version, of ${formatMoment(bank.created_at).slice(0, 10)}`],
    [bank.model, "model"],
  ]);
  setText(
    find("about-text"),
    `A reference is a piece of at most 128 tokens of a document. The model has read each of them once and left an ` +
      `explicit memory: in each of ${count(bank.memory_layers.length, "layer")}, each of ${count(bank.num_heads, "head")} ` +
      `has kept the keys and values of at most ${count(bank.num_slots, "token")}, the ones it attends to most. That is ` +
      `${numPairs} small pictures of the same text, ${formatBytes(bank.memory_bytes)} in all (codec ${bank.codec}` +
      `${bank.is_cold ? "; encoded when they are first read" : ""}). While it generates, the model finds the five ` +
      `references that are nearest to the last 64 tokens, and attends to their memories as if they had just been said.`,
  );
  for (const one of bank.examples) {
    find("examples").append(makeHit({ refId: one.ref_id, title: one.doc_id || one.ref_id, text: one.text, facts: [] }));
  }
}

// Up and down go from hit to hit, "/" to the search.
document.addEventListener("keydown", (event) => {
  const isTyping = ["INPUT", "TEXTAREA", "SELECT"].includes(event.target.tagName);
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/" && !isTyping) {
    event.preventDefault();
    find("query").select();
  }
  const places = [find("query"), ...document.querySelectorAll(".hit a.open")];
  const place = places.indexOf(document.activeElement);
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (step && place >= 0 && places[place + step]) {
    event.preventDefault();
    places[place + step].focus();
  }
});

const asked = new URLSearchParams(location.search);
const query = (asked.get("q") ?? "").trim();
if (query) {
  const numHits = Math.min(Math.max(Number.parseInt(asked.get("n"), 10) || STEP, 1), MOST);
  attempt(() => search(query, numHits));
} else {
  find("query").focus();
  attempt(describe);
}
