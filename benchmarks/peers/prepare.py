"""The inputs that all tools get: samples of the corpora, each as JSON lines and as Parquet with columns id and text."""

import dataclasses
import hashlib
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import zstandard

CORPORA = ("psdocs", "laws", "rfcs", "peps-2025-08", "peps-2026-08")
"""Near-duplicates by product version, Chinese statutes, English prose, and one corpus a year apart."""


class Text(NamedTuple):
    """A document or a reference."""

    id: str
    text: str

    @property
    def size_bytes(self) -> int:
        """Bytes of its UTF-8."""
        return len(self.text.encode())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Input:
    """A set of texts on disk.

    Attributes:
        name: what a table calls it.
        jsonl: its JSON lines.
        parquet: the same as Parquet.
        texts: the texts, in the order of the files.
    """

    name: str
    jsonl: Path
    parquet: Path
    texts: Sequence[Text]

    @property
    def size_mb(self) -> float:
        """Megabytes of text."""
        return sum(text.size_bytes for text in self.texts) / 1e6

    @property
    def digest(self) -> str:
        """What names the contents, for what is worked out of them once."""
        return hashlib.sha256(self.jsonl.read_bytes()).hexdigest()[:16]


def read_corpora(folder: Path, names: Sequence[str] = CORPORA) -> dict[str, list[Text]]:
    """Reads the corpora; ids get the corpus in front, since both years of one corpus have the same."""
    corpora = {}
    for name in names:
        with zstandard.open(folder / f"{name}.jsonl.zst", "rb") as stream:
            rows = [orjson.loads(line) for line in stream.read().splitlines()]
        corpora[name] = [Text(f"{name}/{row['id']}", row["text"]) for row in rows]
    return corpora


def sample_texts(texts: Sequence[Text], size_mb: float) -> list[Text]:
    """Returns about that much of the texts, in their order; all if ``size_mb`` is 0.

    What has the same file name up to the first full stop or bracket is taken or left as a whole: versions of a page, of
    a law and of a proposal stay together, so that a sample has the near-duplicates of the whole.
    """
    if not size_mb:
        return list(texts)
    names = [text.id.rpartition("/")[2].split(".")[0].split("(")[0] for text in texts]
    sizes: dict[str, int] = {}
    for name, text in zip(names, texts, strict=True):
        sizes[name] = sizes.get(name, 0) + text.size_bytes
    left, chosen = size_mb * 1e6, set()
    for name in sorted(sizes, key=lambda name: (zlib.crc32(name.encode()), name)):
        if sizes[name] <= left:
            left -= sizes[name]
            chosen.add(name)
    return [text for name, text in zip(names, texts, strict=True) if name in chosen]


def write_input(name: str, texts: Sequence[Text], folder: Path) -> Input:
    """Writes texts for all tools to read, into a folder of their own: a pattern for a file's name can match others."""
    own = folder / name.replace(", ", "-").replace(" ", "-")
    own.mkdir(parents=True, exist_ok=True)
    jsonl, parquet = own / "texts.jsonl", own / "texts.parquet"
    with jsonl.open("wb") as stream:
        for text in texts:
            stream.write(orjson.dumps({"id": text.id, "text": text.text}, option=orjson.OPT_APPEND_NEWLINE))
    pq.write_table(pa.table({"id": [text.id for text in texts], "text": [text.text for text in texts]}), parquet)
    return Input(name=name, jsonl=jsonl, parquet=parquet, texts=texts)


def read_references(chunks: Path, documents: Sequence[Text]) -> list[Text]:
    """Returns the distinct references of some of the documents of a table of chunks, in the order of their places."""
    table = pq.read_table(chunks, columns=["doc_id", "ref_id", "text"])
    table = table.filter(pc.is_in(table["doc_id"], pa.array([document.id for document in documents], pa.string())))
    distinct = dict(zip(table["ref_id"].to_pylist(), table["text"].to_pylist(), strict=True))
    return [Text(ref_id, text) for ref_id, text in distinct.items()]
