// A reference: which of its tokens the heads of its memory keep, where it stands, and what it is nearly the same as.

import { getJson, hasKey } from "./api.js";
import {
  attempt, cleanText, cloneTemplate, count, find, formatBytes, formatNumber, linkReference, makeElement, makeLink, ROOT,
  setText, setTitle, shorten,
} from "./page.js";

const ALL = "all";
const PLACES_A_PAGE = 20;
const PAIRS_A_PAGE = 5;
const PROMPT_TOKENS = 24;

const STATES = {
  live: ["live", "good"],
  near_duplicate: ["near-duplicate", "bad"],
  contaminated: ["contaminated", "bad"],
  deleted: ["deleted", "bad"],
};

const asked = new URLSearchParams(location.search);
const refId = location.pathname.slice(`${ROOT}/references/`.length);
const version = asked.get("version");
const base = `/v1/explore/references/${encodeURIComponent(refId)}`;

function linkOther(other, shown) {
  return linkReference(other, shown.version, shown.served_version);
}

// The head of the page.

function explainState(shown) {
  if (shown.state === "near_duplicate") {
    return [
      `It was dropped as a near-duplicate (Jaccard similarity ${shown.jaccard.toFixed(3)}); search and generation use `,
      makeLink("the reference that was kept for it", linkOther(shown.kept_ref_id, shown)),
      " instead.",
    ];
  }
  if (shown.state === "contaminated") {
    return [`It was left out: ${(100 * shown.overlap).toFixed(0)} % of it stand in the test text ${cleanText(shown.matched_doc_id)}.`];
  }
  if (shown.state === "deleted") {
    return ["It stands in no document any more. Its text stays in the files until they are compacted or purged."];
  }
  return [];
}

function showHead(shown) {
  const [label, className] = STATES[shown.state];
  setTitle(shorten(shown.text, 40));
  setText(find("title"), shorten(shown.text, 70));
  const badge = setText(find("state"), label);
  badge.classList.add(className);
  setText(find("ref-id"), shown.ref_id);
  const memory = shown.memory_bytes ? ` · memory of ${formatBytes(shown.memory_bytes)}` : "";
  const older = shown.version === shown.served_version ? "" : ` (served is version ${shown.served_version})`;
  setText(find("facts"), `· ${count(shown.num_tokens, "token")}${memory} · version ${shown.version}${older}`);
  const note = explainState(shown);
  find("state-note").hidden = note.length === 0;
  find("state-note").append(...note);
}

// The text with its marks.

function countKept(shown, layer, head) {
  const chosen = shown.kept.filter(
    (one) => (layer === ALL || one.layer === Number(layer)) && (head === ALL || one.head === Number(head)),
  );
  const counts = shown.tokens.map(() => 0);
  for (const one of chosen) for (const token of one.tokens) counts[token] += 1;
  return { counts, numHeads: chosen.length };
}

function mark(shown, spans) {
  const [layer, head] = [find("layer").value, find("head").value];
  const { counts, numHeads } = countKept(shown, layer, head);
  const most = Math.max(1, ...counts);
  spans.forEach((span, place) => {
    const share = counts[place] / most;
    span.className = counts[place] ? "kept" : "";
    span.style.setProperty("--share", share.toFixed(3));
    span.dataset.kept = counts[place];
    span.title = numHeads > 1 ? `kept by ${counts[place]} of ${count(numHeads, "head")}` : "";
  });
  const numKept = counts.filter((one) => one > 0).length;
  const ofLayers = layer === ALL ? "of all layers" : `of layer ${layer}`;
  const who = head === ALL ? `The heads ${ofLayers} together keep` : `Head ${head} ${ofLayers} keeps`;
  setText(find("kept-note"), `${who} ${numKept} of ${count(shown.num_tokens, "token")}.`);
  find("legend").hidden = numHeads <= 1;
  setText(
    find("kept-list"),
    shown.tokens
      .map((text, place) => [text, counts[place]])
      .filter(([, times]) => times > 0)
      .map(([text, times]) => (numHeads > 1 ? `${JSON.stringify(text)} ${times}×` : JSON.stringify(text)))
      .join("   "),
  );
  for (const row of find("map").querySelectorAll("button")) {
    const isIn =
      (layer === ALL || row.dataset.layer === layer) && (head === ALL || row.dataset.head === head);
    row.setAttribute("aria-pressed", String(isIn && layer !== ALL && head !== ALL));
    row.classList.toggle("out", !isIn);
  }
  const parameters = new URLSearchParams(location.search);
  for (const [name, value] of [["layer", layer], ["head", head]]) {
    parameters.delete(name);
    if (value !== ALL) parameters.set(name, value);
  }
  const query = parameters.toString();
  history.replaceState(null, "", query ? `?${query}` : location.pathname);
}

function addOptions(select, label, values, wanted) {
  select.append(new Option(`all ${label}`, ALL));
  for (const value of values) select.append(new Option(String(value), String(value)));
  select.value = values.map(String).includes(wanted) ? wanted : ALL;
}

const SVG = "http://www.w3.org/2000/svg";

// A row of the map: runs of kept tokens as rectangles.
function drawRow(tokens, numTokens) {
  const picture = document.createElementNS(SVG, "svg");
  picture.setAttribute("viewBox", `0 0 ${numTokens} 1`);
  picture.setAttribute("preserveAspectRatio", "none");
  picture.setAttribute("aria-hidden", "true");
  for (const token of tokens) {
    const box = document.createElementNS(SVG, "rect");
    for (const [name, value] of [["x", token + 0.06], ["width", 0.88], ["y", 0], ["height", 1]]) {
      box.setAttribute(name, value);
    }
    picture.append(box);
  }
  return picture;
}

function drawMap(shown, select) {
  for (const one of shown.kept) {
    const row = makeElement("button");
    row.type = "button";
    row.dataset.layer = one.layer;
    row.dataset.head = one.head;
    row.setAttribute("aria-label", `Layer ${one.layer}, head ${one.head}: ${count(one.tokens.length, "token")} kept`);
    const label = makeElement("span", `layer ${one.layer} · head ${one.head}`);
    label.setAttribute("aria-hidden", "true");
    row.append(label, drawRow(one.tokens, shown.num_tokens));
    row.addEventListener("click", () => select(row));
    find("map").append(row);
  }
  find("map-figure").hidden = false;
}

function showTokens(shown) {
  const spans = shown.tokens.map((text) => makeElement("span", text));
  find("tokens").append(...spans);
  const isKnown = shown.kept.length > 0;
  find("selectors").hidden = !isKnown;
  find("list-details").hidden = !isKnown;
  if (!isKnown) {
    const reason =
      shown.state === "live"
        ? "Which tokens are kept is not known here: this version was written by another model, or encodes its memories when they are first read. Open the reference in the version that is served."
        : "A reference that is not live has no memory.";
    setText(find("memory-note"), reason);
    return;
  }
  setText(
    find("memory-note"),
    `The model read this text once. In ${count(shown.memory_layers.length, "layer")}, each of ` +
      `${count(shown.num_heads, "head")} then kept the keys and values of at most ${count(shown.num_slots, "token")}: ` +
      `those that got the most attention. Only these marked tokens are in the memory; the rest is forgotten.`,
  );
  const [layer, head] = [find("layer"), find("head")];
  addOptions(layer, "layers", shown.memory_layers, asked.get("layer"));
  addOptions(head, "heads", Array.from({ length: shown.num_heads }, (_, place) => place), asked.get("head"));
  drawMap(shown, (row) => {
    const isChosen = row.getAttribute("aria-pressed") === "true";
    layer.value = isChosen ? ALL : row.dataset.layer;
    head.value = isChosen ? ALL : row.dataset.head;
    mark(shown, spans);
  });
  for (const select of [layer, head]) select.addEventListener("change", () => mark(shown, spans));
  mark(shown, spans);
}

// Lists that come in pages.

function listInPages(button, numAPage, load) {
  let numShown = 0;
  async function showMore() {
    const { total, added } = await load(numShown, numAPage);
    numShown += added;
    button.hidden = numShown >= total || added === 0;
  }
  button.addEventListener("click", () => attempt(showMore));
  return showMore();
}

function showPlaces(shown) {
  return listInPages(find("more-places"), PLACES_A_PAGE, async (start, limit) => {
    const page = await getJson(`${base}/places`, { version, start, limit });
    setText(find("places").caption, page.total ? count(page.total, "place") : "It stands in no document of this version.");
    for (const place of page.places) {
      const row = cloneTemplate("place-template");
      setText(row.querySelector(".document"), place.title ? `${place.title} (${place.doc_id})` : place.doc_id);
      setText(row.querySelector(".path"), place.path);
      setText(row.querySelector(".source"), place.source || "-");
      setText(row.querySelector(".ordinal"), `${formatNumber(place.ordinal + 1)} of ${formatNumber(place.num_references)}`);
      setText(row.querySelector(".bytes"), `${formatNumber(place.start_byte)}-${formatNumber(place.end_byte)}`);
      setText(row.querySelector(".chars"), `${formatNumber(place.start_char)}-${formatNumber(place.end_char)}`);
      const around = row.querySelector(".around");
      for (const [label, other] of [["before", place.previous_ref_id], ["after", place.next_ref_id]]) {
        if (other !== null) around.append(makeLink(label, linkOther(other, shown)), " ");
      }
      find("places").tBodies[0].append(row);
    }
    return { total: page.total, added: page.places.length };
  });
}

function fillStretches(element, stretches) {
  element.append(...stretches.map((one) => makeElement(one.differs ? "mark" : "span", one.text)));
}

function showPairs(shown) {
  return listInPages(find("more-pairs"), PAIRS_A_PAGE, async (start, limit) => {
    const page = await getJson(`${base}/duplicates`, { version, start, limit });
    const note = page.total
      ? "Of references that are nearly the same one is kept and stands for the others. Words that differ are marked."
      : "The bank has no reference that is nearly the same as this one.";
    setText(find("pairs-note"), note);
    for (const pair of page.pairs) {
      const box = cloneTemplate("pair-template");
      setText(box.querySelector("h4"), `Jaccard similarity ${pair.jaccard.toFixed(3)}`);
      setText(box.querySelector(".role"), pair.is_kept ? "kept:" : "dropped:");
      const link = setText(box.querySelector("a"), pair.ref_id);
      link.href = linkOther(pair.ref_id, shown);
      fillStretches(box.querySelector(".own"), pair.own);
      fillStretches(box.querySelector(".other"), pair.other);
      find("pairs").append(box);
    }
    return { total: page.total, added: page.pairs.length };
  });
}

function showFurther(shown) {
  find("similar").href = `${ROOT}/?${new URLSearchParams({ q: shown.text })}`;
  const beginning = shown.tokens.slice(0, PROMPT_TOKENS).join("");
  find("continue").href = `${ROOT}/playground?${new URLSearchParams({ prompt: beginning })}`;
  const address = `/v1/memories/${shown.ref_id}`;
  // A link sends no key, and the API tells of the version that is served.
  find("raw").href = address;
  find("raw-item").hidden = hasKey() || shown.version !== shown.served_version;
  const isServed = shown.version === shown.served_version;
  find("raw-details").addEventListener(
    "toggle",
    () => attempt(async () => setText(find("raw-json"), JSON.stringify(isServed ? await getJson(address) : shown, null, 1))),
    { once: true },
  );
}

attempt(async () => {
  const shown = await getJson(base, { version });
  showHead(shown);
  showTokens(shown);
  showFurther(shown);
  find("shown").hidden = false;
  await showPlaces(shown);
  await showPairs(shown);
});
