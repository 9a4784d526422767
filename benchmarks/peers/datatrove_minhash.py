"""datatrove's near-duplicate removal, as its example of MinHash deduplication has it: four pipelines in turn, one task.

    python datatrove_minhash.py [--words default|split] INPUT.jsonl FOLDER
    python datatrove_minhash.py --list FOLDER

The settings are datatrove's own: 14 buckets of 8 values, shingles of 5 words, its tokenizer of English (spaCy). With
``--words split`` the words are those of ``str.split``, after datatrove's own simplification of the text. The exclusion
writer writes what is removed; the kept documents are not written again. ``--list`` makes ``removed.txt`` of that.
"""

import argparse
import json
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor  # type: ignore[import-not-found]
from datatrove.pipeline.dedup import (  # type: ignore[import-not-found]
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.minhash import MinhashConfig  # type: ignore[import-not-found]
from datatrove.pipeline.readers import JsonlReader  # type: ignore[import-not-found]
from datatrove.pipeline.writers import JsonlWriter  # type: ignore[import-not-found]
from datatrove.utils.typeshelper import Languages  # type: ignore[import-not-found]
from datatrove.utils.word_tokenizers import WordTokenizer  # type: ignore[import-not-found]


class SplitWords(WordTokenizer):  # type: ignore[misc]
    """Words between white space."""

    def word_tokenize(self, text: str) -> list[str]:
        """Returns the words."""
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        """Returns the text as one sentence; deduplication never asks."""
        return [text]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """Returns the span of the text; deduplication never asks."""
        return [(0, len(text))]


def remove_duplicates(source: Path, folder: Path, words: str) -> None:
    """Runs the four pipelines."""
    config = MinhashConfig()
    reader = JsonlReader(str(source.parent), glob_pattern=source.name)
    signatures, buckets, clusters, removed = (
        str(folder / name) for name in ("signatures", "buckets", "remove", "removed")
    )
    language = SplitWords() if words == "split" else Languages.english
    pipelines = (
        (1, [reader, MinhashDedupSignature(signatures, config=config, language=language)]),
        (config.num_buckets, [MinhashDedupBuckets(signatures, buckets, config=config)]),
        (1, [MinhashDedupCluster(buckets, clusters, config=config)]),
        (1, [reader, MinhashDedupFilter(clusters, exclusion_writer=JsonlWriter(removed, compression=None))]),
    )
    for number, (tasks, pipeline) in enumerate(pipelines):
        LocalPipelineExecutor(pipeline, tasks=tasks, workers=1, logging_dir=str(folder / f"logs{number}")).run()


def list_removed(folder: Path) -> None:
    """Writes the ids of the removed documents."""
    lines = [line for path in sorted((folder / "removed").glob("*.jsonl")) for line in path.read_text().splitlines()]
    (folder / "removed.txt").write_text("".join(f"{json.loads(line)['id']}\n" for line in lines))


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--words", choices=("default", "split"), default="default")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("paths", nargs="+", type=Path)
    arguments = parser.parse_args()
    if arguments.list:
        list_removed(arguments.paths[0])
    else:
        source, folder = arguments.paths
        remove_duplicates(source, folder, arguments.words)


if __name__ == "__main__":
    main()
