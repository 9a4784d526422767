"""rensa's near-duplicate removal, in the three ways its documentation has.

    python rensa_lsh.py [--way lsh|deduplicator|rho] [--words split|characters] INPUT.jsonl FOLDER

- ``lsh``: R-MinHash of the whole shingle sets, an LSH index of 16 bands, and the texts that share a band joined to
  clusters, of which the first is kept;
- ``deduplicator``: ``RMinHashDeduplicator.add_pairs`` with LSH, the example of its README. It compares candidates by
  their estimated similarity and keeps what resembles nothing before it;
- ``rho``: the pipeline of its own benchmark, which samples positions of the text and flags every text that shares a
  band with another, the one to keep included. It finds no clusters, so that its flags are no removals yet.

Shingles are runs of 5 words of the lower-cased text, made lazily, so that only one text's are in memory at a time.
Words are those of ``str.split``, to which a Chinese clause is one word and most Chinese text no work at all; with
``--words characters`` every Chinese character is a word, as for the tools that look into such text.
"""

import argparse
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import orjson
from rensa import RMinHash, RMinHashDeduplicator, RMinHashLSH  # type: ignore[import-not-found]

NUM_WORDS = 5
NUM_PERMUTATIONS = 128
NUM_BANDS = 16
THRESHOLD = 0.8
SEED = 42
RHO_PROBES = 4


CHARACTERS = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]|[^\\s\u3400-\u4dbf\u4e00-\u9fff]+")

Split = Callable[[str], list[str]]


def make_shingles(texts: Iterable[str], split: Split) -> Iterator[list[str]]:
    """Yields the shingles of each text, as they stand."""
    for text in texts:
        words = split(text.lower())
        if len(words) <= NUM_WORDS:
            yield [" ".join(words)]
        else:
            yield list(map(" ".join, zip(*(words[place:] for place in range(NUM_WORDS)), strict=False)))


def find_by_lsh(shingles: Iterable[list[str]]) -> list[int]:
    """Returns the rows of the texts that share a band with another, without the first of each cluster."""
    sketches = RMinHash.from_token_sets(shingles, num_perm=NUM_PERMUTATIONS, seed=SEED)
    index = RMinHashLSH(threshold=THRESHOLD, num_perm=NUM_PERMUTATIONS, num_bands=NUM_BANDS)
    index.insert_many(sketches)
    parents = list(range(len(sketches)))

    def find_root(row: int) -> int:
        while parents[row] != row:
            parents[row] = parents[parents[row]]
            row = parents[row]
        return row

    for row, candidates in enumerate(index.query_all(sketches)):
        for candidate in candidates:
            if candidate < row:
                left, right = find_root(row), find_root(candidate)
                parents[max(left, right)] = min(left, right)
    return [row for row in range(len(parents)) if find_root(row) != row]


def find_by_deduplicator(shingles: Iterable[list[str]]) -> list[int]:
    """Returns the rows of the texts that resemble one kept before."""
    deduplicator = RMinHashDeduplicator(
        threshold=THRESHOLD, num_perm=NUM_PERMUTATIONS, use_lsh=True, num_bands=NUM_BANDS, seed=SEED
    )
    kept = deduplicator.add_pairs((str(row), tokens) for row, tokens in enumerate(shingles))
    return [row for row, is_kept in enumerate(kept) if not is_kept]


def find_by_rho(shingles: Iterable[list[str]]) -> list[int]:
    """Returns the rows of all texts that share a band with another."""
    matrix = RMinHash.digest_matrix_from_token_sets_rho(
        shingles, num_perm=NUM_PERMUTATIONS, seed=SEED, probes=RHO_PROBES
    )
    index = RMinHashLSH(threshold=THRESHOLD, num_perm=NUM_PERMUTATIONS, num_bands=NUM_BANDS)
    return [row for row, flag in enumerate(index.query_duplicate_flags_matrix_one_shot(matrix)) if flag]


def main() -> None:
    """Runs what the command line asks for."""
    ways = {"lsh": find_by_lsh, "deduplicator": find_by_deduplicator, "rho": find_by_rho}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--way", choices=ways, default="lsh")
    parser.add_argument("--words", choices=("split", "characters"), default="split")
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    ids, texts = [], []
    with arguments.source.open("rb") as lines:
        for line in lines:
            row = orjson.loads(line)
            ids.append(row["id"])
            texts.append(row["text"])
    split: Split = str.split if arguments.words == "split" else CHARACTERS.findall
    removed = ways[arguments.way](make_shingles(texts, split))
    arguments.folder.mkdir(parents=True, exist_ok=True)
    (arguments.folder / "removed.txt").write_text("".join(f"{ids[row]}\n" for row in removed))


if __name__ == "__main__":
    main()
