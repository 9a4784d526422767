"""This project's way from a corpus to live references, by its jobs, in one process.

    python -m benchmarks.peers.ours_references --runner FnApiRunner|loop INPUT.jsonl FOLDER

``loop`` calls the same functions on the same units without Beam. The settings are the defaults.
"""

import argparse
import functools
import shutil
from pathlib import Path

from model.locating import SHIPPED_MODEL
from model.tokenizing import load_tokenizer
from pipelines import jobs, referencing
from pipelines.chunking import ChunkingConfig
from pipelines.clustering import DeduplicationConfig
from pipelines.comparing import compare_all
from pipelines.documenting import write_document_tables
from pipelines.encoding import split_unembedded, split_unwritten
from pipelines.filtering import FilterConfig
from pipelines.formats import list_corpus_files
from pipelines.records import ReadingConfig
from pipelines.reusing import Base
from pipelines.running import EngineConfig
from pipelines.workspace import Workspace
from schemas.tables import DUPLICATES, write_table


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runner", required=True)
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    engine, config = EngineConfig(runner=arguments.runner, num_workers=1), DeduplicationConfig()
    shutil.rmtree(arguments.folder, ignore_errors=True)
    work = Workspace(arguments.folder)
    work.create()
    jobs.read_corpus(list_corpus_files([arguments.source]), work, ReadingConfig(), FilterConfig(), engine)
    jobs.drop_conflicts(work)
    referencing.chunk_corpus(work, functools.partial(load_tokenizer, SHIPPED_MODEL), ChunkingConfig(), engine)
    write_document_tables(work, Base())
    referencing.gather_references(work, Base(), engine)
    comparison = referencing.plan_references(work, Base(), config, engine)
    duplicates, _ = compare_all(comparison, functools.partial(referencing.prefer_references, work, config))
    write_table(duplicates.rename_columns(DUPLICATES.names).cast(DUPLICATES), work.duplicates_path)
    split_unembedded(work, Base(), references_per_shard=512)
    split_unwritten(work, Base(), references_per_shard=512)


if __name__ == "__main__":
    main()
