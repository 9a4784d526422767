"""Near-duplicate removal by jobs over files: the same as in memory, however texts are spread over files."""

import functools
import random
import shutil
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.clustering import DeduplicationConfig, find_duplicates
from pipelines.comparing import Comparison, compare_all, plan_comparison, read_signed
from pipelines.running import EngineConfig, Unit
from pipelines.words import Indices
from tests.test_deduplicating import make_corpus, make_id


def read_file(unit: Unit) -> pa.Table:
    return pq.ParquetFile(unit.source).read_row_group(unit.part)


def prefer_longest(lengths: dict[str, int], ids: pa.Array) -> Indices:
    return -np.array([lengths[key] for key in ids.to_pylist()], np.int64)


def write_texts(texts: list[str], folder: Path, num_files: int) -> list[tuple[Path, int]]:
    """Writes texts, in their order, into files of two row groups each."""
    folder.mkdir()
    for number, part in enumerate(np.array_split(np.array(texts, object), num_files)):
        table = pa.table({"id": [make_id(text) for text in part], "text": pa.array(part.tolist(), pa.string())})
        pq.write_table(table, folder / f"{number}.parquet", row_group_size=max(1, len(part) // 2 + 1))
    return [(path, part) for path in sorted(folder.iterdir()) for part in range(pq.read_metadata(path).num_row_groups)]


def run(comparison: Comparison, lengths: dict[str, int]) -> tuple[pa.Table, int]:
    return compare_all(comparison, functools.partial(prefer_longest, lengths))


@pytest.mark.parametrize("config", [DeduplicationConfig(), DeduplicationConfig(strict=True, max_bucket=16)])
@pytest.mark.parametrize(("num_files", "num_workers"), [(1, 1), (5, 2)])
def test_jobs_find_what_is_found_in_memory(
    tmp_path: Path, config: DeduplicationConfig, num_files: int, num_workers: int
) -> None:
    words = topics["assignment"].split()[:120]
    templates = [" ".join([*words[:60], f"number{number}", *words[60:]]) for number in range(40)]
    texts = make_corpus() + templates + [" ", "\n"]
    random.Random(num_files).shuffle(texts)
    lengths = {make_id(text): len(text) for text in texts}
    expected = find_duplicates(list(lengths), texts, -np.array(list(lengths.values())), config)
    sources = write_texts(texts, tmp_path / "texts", num_files)
    engine = EngineConfig(num_workers=num_workers)
    comparison = plan_comparison(tmp_path / "work", sources, read_file, config, engine)
    found, num_left_out = run(comparison, lengths)
    assert found.equals(expected)
    assert len(found) > 150
    assert (num_left_out > 0) == (config.max_bucket < len(templates))
    assert sorted(read_signed(comparison, ["id"])["id"].to_pylist()) == sorted(lengths)


def test_an_interrupted_comparison_goes_on_with_what_is_there(tmp_path: Path) -> None:
    texts = make_corpus()
    lengths = {make_id(text): len(text) for text in texts}
    sources = write_texts(texts, tmp_path / "texts", 3)
    comparison = plan_comparison(tmp_path / "work", sources, read_file, DeduplicationConfig(), EngineConfig())
    expected, _ = run(comparison, lengths)
    signed = comparison.list_files("signed")[0]
    inode = signed.stat().st_ino
    # What a kill leaves behind: a file of each step is missing, and one half written has another name.
    for step in ("pairs", "sets", "measured"):
        comparison.list_files(step)[-1].unlink()
    (comparison.root / "sets.bin").unlink()
    (comparison.get_folder("measured") / "000000.npy.x.tmp").write_bytes(b"half")
    assert run(comparison, lengths)[0].equals(expected)
    assert signed.stat().st_ino == inode
    shutil.rmtree(comparison.root)


def test_no_text_and_no_pair(tmp_path: Path) -> None:
    sources = write_texts(["a lone text", " "], tmp_path / "texts", 1)
    comparison = plan_comparison(tmp_path / "work", sources, read_file, DeduplicationConfig(), EngineConfig())
    found, num_left_out = run(comparison, {make_id(text): 1 for text in ("a lone text", " ")})
    assert (len(found), num_left_out) == (0, 0)
    comparison = plan_comparison(tmp_path / "nothing", [], read_file, DeduplicationConfig(), EngineConfig())
    assert len(run(comparison, {})[0]) == 0
