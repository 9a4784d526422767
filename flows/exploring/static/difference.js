// How two versions of the bank differ.

import { getJson } from "./api.js";
import {
  addTiles, attempt, cloneTemplate, count, find, formatBytes, formatNumber, getBank, linkReference, makeElement,
  makeLink, ROOT, setText, setTitle,
} from "./page.js";

const [before, after] = location.pathname.slice(`${ROOT}/versions/`.length).split("/");

function showDocuments(title, listed) {
  if (listed.count === 0) return;
  const box = cloneTemplate("documents-template");
  setText(box.querySelector("h3"), `${formatNumber(listed.count)} ${title}`);
  box.querySelector("ul").append(
    ...listed.doc_ids.map((docId) => {
      const item = makeElement("li");
      item.append(makeElement("bdi", docId));
      return item;
    }),
  );
  const numLeft = listed.count - listed.doc_ids.length;
  setText(box.querySelector("p"), numLeft ? `and ${count(numLeft, "further document")}` : "");
  find("documents").append(box);
}

function showReferences(title, listed, version, served) {
  if (listed.count === 0) return;
  const box = cloneTemplate("references-template");
  setText(box.querySelector("h3"), `${formatNumber(listed.count)} ${title}`);
  for (const sample of listed.samples) {
    const item = cloneTemplate("sample-template");
    const link = setText(item.querySelector("a"), sample.ref_id);
    link.href = linkReference(sample.ref_id, version, served);
    setText(item.querySelector("bdi"), sample.doc_id);
    setText(item.querySelector("blockquote"), sample.text);
    box.querySelector(".samples").append(item);
  }
  const numLeft = listed.count - listed.samples.length;
  setText(box.querySelector(":scope > p"), numLeft ? `and ${count(numLeft, "further reference")}` : "");
  find("references").append(box);
}

function showSettings(found) {
  const parts = found.fingerprint.join(", ").replaceAll("_", " ");
  const model = parts
    ? `The model differs in: ${parts}. Memories of the one version are not read with the other's model.`
    : "The same model wrote both.";
  setText(find("fingerprint"), `${model}${found.settings.length ? "" : " No setting differs."}`);
  find("settings").hidden = found.settings.length === 0;
  for (const setting of found.settings) {
    const row = cloneTemplate("setting-template");
    setText(row.querySelector("th"), setting.name);
    setText(row.querySelector(".before"), setting.before ?? "-");
    setText(row.querySelector(".after"), setting.after ?? "-");
    find("settings").tBodies[0].append(row);
  }
}

attempt(async () => {
  setText(find("title"), `Version ${before} to version ${after}`);
  setTitle(`Version ${before} to ${after}`);
  find("turn").append("· ", makeLink("the other way round", `${ROOT}/versions/${after}/${before}`));
  const found = await getJson(`/v1/explore/differences/${encodeURIComponent(before)}/${encodeURIComponent(after)}`);
  const served = (await getBank()).version;
  addTiles(find("tiles"), [
    [`+${formatNumber(found.documents_added.count)}`, "documents added"],
    [formatNumber(found.documents_changed.count), "changed"],
    [`−${formatNumber(found.documents_removed.count)}`, "removed"],
    [`+${formatNumber(found.references_added.count)}`, "references came"],
    [`−${formatNumber(found.references_removed.count)}`, "went"],
    [`+${formatBytes(found.added_size_bytes)}`, "files added"],
    [`−${formatBytes(found.removed_size_bytes)}`, "no longer used"],
  ]);
  showDocuments("added", found.documents_added);
  showDocuments("changed", found.documents_changed);
  showDocuments("removed", found.documents_removed);
  if (!find("documents").childElementCount) find("documents").append(makeElement("p", "The documents are the same."));
  showReferences("came", found.references_added, found.after, served);
  showReferences("went", found.references_removed, found.before, served);
  if (!find("references").childElementCount) find("references").append(makeElement("p", "The live references are the same."));
  showSettings(found);
  find("shown").hidden = false;
});
