"""text-dedup's near-duplicate removal: the TOML file of its README, at the benchmark's threshold, and its module run.

    python text_dedup_minhash.py INPUT.parquet FOLDER
    python text_dedup_minhash.py --list FOLDER

Verification (``check_false_positive``) is on. With 128 permutations and a threshold of 0.8 text-dedup chooses its bands
itself. ``--list`` writes ``removed.txt`` from the clusters it saved.
"""

import argparse
import os
import pickle
import runpy
import sys
from pathlib import Path

CONFIG = """
[input]
input_type = "local_files"
file_type = "parquet"

[input.read_arguments]
path = "parquet"
data_files = "{source}"
split = "train"

[algorithm]
algorithm_name = "minhash"
text_column = "text"
seed = 42
batch_size = 10000
num_perm = 128
threshold = 0.8
false_positive_weight = 0.5
false_negative_weight = 0.5
hash_bits = 64
ngram_size = 5
check_false_positive = true
num_proc = 0

[output]
output_dir = "{folder}/output"
clean_cache = false
save_clusters = true

[debug]
enable_profiling = false
"""


def remove_duplicates(source: Path, folder: Path) -> None:
    """Runs ``python -m text_dedup.minhash`` in a folder with the configuration, in this process."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(CONFIG.format(source=source, folder=folder))
    (folder / "source.txt").write_text(str(source))
    os.chdir(folder)
    sys.argv = ["text_dedup.minhash"]
    runpy.run_module("text_dedup.minhash", run_name="__main__")


def list_removed(folder: Path) -> None:
    """Writes the ids of the removed documents."""
    import pyarrow.parquet as pq

    # Written by the run before in this folder: a plain dict of integers, row to kept row.
    clusters: dict[int, int] = pickle.loads((folder / "output" / "clusters.pickle").read_bytes())
    ids = pq.read_table((folder / "source.txt").read_text(), columns=["id"])["id"].to_pylist()
    removed = sorted(row for row, kept in clusters.items() if row != kept)
    (folder / "removed.txt").write_text("".join(f"{ids[row]}\n" for row in removed))


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("paths", nargs="+", type=Path)
    arguments = parser.parse_args()
    if arguments.list:
        list_removed(arguments.paths[0])
    else:
        source, folder = arguments.paths
        remove_duplicates(source.resolve(), folder.resolve())


if __name__ == "__main__":
    main()
