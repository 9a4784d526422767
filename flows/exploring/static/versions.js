// The versions of the bank, the newest first, and the choice of two to compare.

import { getJson } from "./api.js";
import {
  attempt, cloneTemplate, count, find, formatBytes, formatMoment, formatNumber, makeElement, makeLink, ROOT, setText,
} from "./page.js";

const VERSIONS_A_PAGE = 20;

let numShown = 0;

function makeRow(line, served) {
  const row = cloneTemplate("version-template");
  const head = row.querySelector("th");
  head.append(`${line.version}`);
  if (line.version === served) head.append(" ", makeElement("span", "served", "badge good"));
  const texts = {
    operation: line.operation,
    when: formatMoment(line.created_at),
    documents: formatNumber(line.num_documents),
    references: formatNumber(line.num_references),
    size: formatBytes(line.size_bytes),
    new: formatBytes(line.new_size_bytes),
    tags: line.tags.join(", "),
  };
  for (const [name, text] of Object.entries(texts)) setText(row.querySelector(`.${name}`), text);
  if (line.parent !== null) {
    const link = makeLink(`from version ${line.parent}`, `${ROOT}/versions/${line.parent}/${line.version}`);
    row.querySelector(".changes").append(link);
  }
  return row;
}

async function showMore() {
  const page = await getJson("/v1/explore/versions", { start: numShown, limit: VERSIONS_A_PAGE });
  const isFirst = numShown === 0;
  numShown += page.versions.length;
  setText(find("versions").caption, count(page.total, "version"));
  for (const line of page.versions) {
    find("versions").tBodies[0].append(makeRow(line, page.served_version));
    for (const name of ["before", "after"]) find(name).append(new Option(String(line.version), String(line.version)));
  }
  if (isFirst && page.versions.length > 1) find("before").value = String(page.versions[1].version);
  find("compare").hidden = page.total < 2;
  find("more").hidden = numShown >= page.total || page.versions.length === 0;
}

find("more").addEventListener("click", () => attempt(showMore));
find("compare").addEventListener("submit", (event) => {
  event.preventDefault();
  location.href = `${ROOT}/versions/${find("before").value}/${find("after").value}`;
});
attempt(showMore);
