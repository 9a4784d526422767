// What all views have in common: the head of the page, how values are written, and how texts get into it.

import { getJson } from "./api.js";

export const ROOT = document.body.dataset.root;

// Letters that cannot be seen, or that turn the direction of all that follows them, are shown as what they are: as in
// flows/reporting/marking.py.
const UNFIT =
  /[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufff9-\uffff]/gu;

function showUnfit(letter) {
  const code = letter.codePointAt(0);
  if (code < 0x20) return String.fromCodePoint(0x2400 + code);
  const isSteering =
    [0x61c, 0x200e, 0x200f].includes(code) || (code >= 0x202a && code <= 0x202e) || (code >= 0x2066 && code <= 0x2069);
  return isSteering ? `[U+${code.toString(16).toUpperCase().padStart(4, "0")}]` : "\ufffd";
}

export function cleanText(text) {
  return text.replaceAll("\r\n", "\n").replaceAll("\r", "\n").replace(UNFIT, showUnfit);
}

export function find(id) {
  return document.getElementById(id);
}

export function setText(element, text) {
  element.textContent = cleanText(String(text));
  return element;
}

export function cloneTemplate(id) {
  return find(id).content.firstElementChild.cloneNode(true);
}

export function makeElement(name, text = "", className = "") {
  const element = document.createElement(name);
  if (text !== "") setText(element, text);
  if (className) element.className = className;
  return element;
}

export function makeLink(text, address) {
  const link = makeElement("a", text);
  link.href = address;
  return link;
}

export function formatNumber(value) {
  return value === null || value === undefined ? "-" : value.toLocaleString("en-US");
}

export function formatPercent(share) {
  return `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;
}

export function formatBytes(size) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (size >= 1000 && unit < units.length - 1) {
    size /= 1000;
    unit += 1;
  }
  return `${unit === 0 ? size : size.toFixed(1)} ${units[unit]}`;
}

export function formatMoment(moment) {
  return `${moment.slice(0, 19).replace("T", " ")} UTC`;
}

export function count(number, noun) {
  return `${formatNumber(number)} ${noun}${number === 1 ? "" : "s"}`;
}

// The first words of a text, as a title.
export function shorten(text, limit) {
  const line = text.split(/\s+/).filter(Boolean).join(" ");
  const letters = [...line];
  return letters.length <= limit ? line : `${letters.slice(0, limit - 1).join("")}…`;
}

export function linkReference(refId, version, served) {
  const address = `${ROOT}/references/${refId}`;
  return version === undefined || version === served ? address : `${address}?version=${version}`;
}

export function setTitle(text) {
  document.title = `${cleanText(text)} - memory3`;
}

export function addTiles(list, tiles) {
  for (const [value, label] of tiles) {
    const tile = cloneTemplate("tile-template");
    setText(tile.querySelector("b"), value);
    setText(tile.querySelector("span"), label);
    list.append(tile);
  }
}

// Runs what a view does; what goes wrong is said where everybody sees it.
export async function attempt(work) {
  try {
    setText(find("problem"), "");
    await work();
  } catch (error) {
    if (error.name === "AbortError") return;
    setText(find("problem"), error.message);
    if (error.status === undefined) throw error;
  }
}

let described = null;

export function getBank() {
  described ??= getJson("/v1/explore/bank");
  return described;
}

attempt(async () => {
  const bank = await getBank();
  setText(find("bank-name"), bank.bank);
  setText(find("bank-version"), `version ${bank.version}`);
});
