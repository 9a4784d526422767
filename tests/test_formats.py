"""The files of a corpus: found by path, folder and pattern, each once; their lines whole, from any place on."""

import glob
import itertools
import os
import random
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import formats, records
from pipelines.formats import CorpusFile, DamagedLineError, iterate_lines, list_corpus_files
from pipelines.reading import read_records
from pipelines.storage import matches_parts, split_pattern
from schemas.errors import CorpusError
from tests.test_reading import (
    CONFIG,
    DOCUMENTS,
    check_documents,
    read,
    read_file,
    write_documents,
    write_lines,
)

# Lines ----------------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(lines=st.lists(st.binary(max_size=12).map(lambda line: line.replace(b"\n", b" ")), max_size=12), data=st.data())
def test_lines_match_a_split_of_the_whole_file(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], data: st.DataObject
) -> None:
    content = b"\n".join(lines)
    bound = data.draw(st.integers(1, 14))
    after = data.draw(st.integers(0, 14))
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    path.write_bytes(content)
    whole = content.split(b"\n")
    expected = [
        (number, line if len(line) <= bound else None, len(line))
        for number, line in enumerate(whole, 1)
        if number > after and (number < len(whole) or line)
    ]
    assert list(iterate_lines(CorpusFile(str(path), "jsonl", None, len(content)), bound, after)) == expected


def test_blocks_that_end_anywhere_give_the_same_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_documents(tmp_path / "a.jsonl.zst")
    for block_bytes in (1, 3, 1000):
        monkeypatch.setattr(formats, "BLOCK_BYTES", block_bytes)
        check_documents(read(path), DOCUMENTS, range(1, len(DOCUMENTS) + 1))


@pytest.mark.parametrize("block_bytes", [1, 7, 100, 1 << 17])
def test_lines_can_be_passed_over_in_blocks_that_end_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr(formats, "BLOCK_BYTES", block_bytes)
    generator = random.Random(block_bytes)
    lines = [b"x" * generator.choice([0, 0, 1, 5, 60, 300]) for _ in range(40)]
    path = write_lines(tmp_path / "a.jsonl.gz", [*lines, b"last"])
    (file,) = list_corpus_files([path])
    whole = list(iterate_lines(file, 200))
    assert [size_bytes for _, _, size_bytes in whole] == [len(line) for line in [*lines, b"last"]]
    for after in range(len(whole) + 3):
        assert list(iterate_lines(file, 200, after)) == whole[after:]


@pytest.mark.parametrize("after", [0, 2, 4, 5, 9])
def test_damage_names_the_line_that_is_not_whole_wherever_reading_begins(tmp_path: Path, after: int) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(b"1\n2\n3\n4\nhalf") + b"no frame at all")
    (file,) = list_corpus_files([tmp_path])
    lines = iterate_lines(file, 100, after)
    assert [next(lines)[0] for _ in range(after + 1, 5)] == list(range(after + 1, 5))
    with pytest.raises(DamagedLineError) as caught:
        next(lines)
    assert caught.value.number == 5


# The list of files ----------------------------------------------------------------------------------------------------


def make_folder(folder: Path) -> Path:
    (folder / "b" / "deep").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for name in ("z.jsonl", "b/a.txt", "b/deep/c.parquet", "b/deep/d.jsonl.zst", "e.csv", ".f.txt", ".hidden/g.txt"):
        (folder / name).write_bytes(b"x" * len(name))
    (folder / "b" / "loop").symlink_to(folder)
    (folder / "b" / "gone.txt").symlink_to(folder / "nothing")
    return folder


def test_folders_are_walked_once_without_hidden_files(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "corpus")
    files = list_corpus_files([folder])
    assert [(file.name, file.format, file.doc_id, file.size_bytes) for file in files] == [
        ("b/a.txt", "text", "b/a.txt", 7),
        ("b/deep/c.parquet", "parquet", None, 16),
        ("b/deep/d.jsonl.zst", "jsonl.zst", None, 18),
        ("b/gone.txt", "unknown", None, 0),
        ("e.csv", "unknown", None, 5),
        ("z.jsonl", "jsonl", None, 7),
    ]
    assert [file.path for file in files] == [f"{folder}/{file.name}" for file in files]
    (row,) = read_file(files[4])
    assert (row["reason"], row["position"]) == (records.UNKNOWN_FORMAT, 1)


def test_the_list_depends_on_neither_order_nor_repetition(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "corpus")
    paths: list[str | Path] = [
        folder,
        folder / "b",
        str(folder / "b" / "a.txt"),
        f"{folder}/b/../z.jsonl",
        folder / "b" / "deep",
    ]
    expected = list_corpus_files(paths)
    assert len(expected) == 6
    assert next(file.doc_id for file in expected if file.format == "text") == "b/a.txt"
    for seed in range(10):
        random.Random(seed).shuffle(paths)
        assert list_corpus_files([*paths, paths[0]]) == expected


def test_links_are_read_by_a_name_that_tells_the_format(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0123").write_bytes(b'{"text": "x"}')
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "data.jsonl").symlink_to(tmp_path / "blobs" / "0123")
    assert [(file.name, file.format) for file in list_corpus_files([tmp_path])] == [("snapshot/data.jsonl", "jsonl")]


def test_files_of_one_name_in_two_folders_have_different_ids(tmp_path: Path) -> None:
    for name in ("de", "en"):
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "part.jsonl", [b'{"text": "x"}'])
    rows = [row for file in list_corpus_files([tmp_path]) for row in read_file(file)]
    assert [row["doc_id"] for row in rows] == ["de/part.jsonl:1", "en/part.jsonl:1"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no corpus was given"),
        (["missing.jsonl"], "missing.jsonl does not exist"),
        (["table.csv"], "format that is not known; the formats are .jsonl .jsonl.zst"),
        (["empty"], "holds no file that can be read"),
        (["unknown"], "holds no file that can be read"),
    ],
)
def test_a_corpus_that_cannot_be_read_is_one_sentence(tmp_path: Path, names: list[str], message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "unknown").mkdir()
    (tmp_path / "table.csv").touch()
    (tmp_path / "unknown" / "table.csv").touch()
    with pytest.raises(CorpusError, match=message) as caught:
        list_corpus_files([tmp_path / name for name in names])
    assert "\n" not in str(caught.value)


def test_a_file_that_is_gone_is_a_known_error(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet", "a.txt"):
        (tmp_path / name).write_bytes(b"")
        (file,) = list_corpus_files([tmp_path / name])
        (tmp_path / name).unlink()
        with pytest.raises(CorpusError, match=r"cannot be opened"):
            list(read_records(file, CONFIG))


# Patterns -------------------------------------------------------------------------------------------------------------

NAMES = ("a", "ab", "b.jsonl", "c.txt", ".h", "[x]")
PARTS = st.sampled_from(["a", "*", "**", "?", "a?", "*b", "[ab]*", "*.jsonl", "*.txt", ".*", ".h", "[!a]*", "[[]x]"])


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every name is a folder above and a file below, two folders deep."""
    root = tmp_path_factory.mktemp("tree")
    for depth in range(3):
        for parts in itertools.product(NAMES[:2] + NAMES[4:], repeat=depth):
            folder = root.joinpath(*parts)
            folder.mkdir(exist_ok=True)
            for name in NAMES[2:4]:
                (folder / name).write_bytes(b"{}")
            (folder / ".hidden.txt").write_bytes(b"")
    return root


def list_by_glob(root: Path, pattern: str) -> set[str]:
    """The files that Python's glob finds, and those without a dot in folders that it finds."""
    found = set()
    for path in glob.glob(f"{glob.escape(str(root))}/{pattern}", recursive=True):
        if os.path.isfile(path):
            found.add(path)
        for folder, subfolders, names in os.walk(path):
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            found |= {os.path.join(folder, name) for name in names if not name.startswith(".")}
    return found


@settings(max_examples=150, deadline=None)
@given(parts=st.lists(PARTS, min_size=1, max_size=4))
def test_patterns_match_what_pythons_glob_matches(tree: Path, parts: list[str]) -> None:
    pattern = "/".join(parts)
    expected = list_by_glob(tree, pattern)
    every = {os.path.join(folder, name) for folder, _, names in os.walk(tree) for name in names}
    of_names = {path for path in every if matches_parts(os.path.relpath(path, tree).split("/"), parts)}
    assert of_names == expected
    if os.path.exists(tree / pattern) or split_pattern(pattern)[0] == pattern:
        return
    if not expected:
        with pytest.raises(CorpusError, match="no file matches"):
            list_corpus_files([f"{tree}/{pattern}"])
        return
    assert {file.path for file in list_corpus_files([f"{tree}/{pattern}"])} == expected


def test_patterns_name_files_as_their_folder_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("de/a.jsonl", "en/deep/a.jsonl", "en/b.txt", "a.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"text": "x"}')
    by_pattern = list_corpus_files([f"{tmp_path}/**/*.jsonl"])
    assert by_pattern == [file for file in list_corpus_files([tmp_path]) if file.format == "jsonl"]
    assert [file.name for file in list_corpus_files([tmp_path / "e*"])] == ["en/b.txt", "en/deep/a.jsonl"]
    assert [file.name for file in list_corpus_files([tmp_path / "??" / "*.txt"])] == ["en/b.txt"]
    monkeypatch.chdir(tmp_path)
    for pattern, paths in {
        "**/*.jsonl": ["a.jsonl", "de/a.jsonl", "en/deep/a.jsonl"],
        "*.jsonl": ["a.jsonl"],
        "**": ["a.jsonl", "de/a.jsonl", "en/b.txt", "en/deep/a.jsonl"],
        "d*": ["de/a.jsonl"],
        "./d*": ["./de/a.jsonl"],
    }.items():
        assert [file.path for file in list_corpus_files([pattern])] == paths, pattern


def test_a_path_that_exists_wins_over_its_reading_as_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("literal")
    (tmp_path / "a1.txt").write_text("matched")
    assert [file.name for file in list_corpus_files([tmp_path / "a[1].txt"])] == ["a[1].txt"]
    (tmp_path / "a[1].txt").unlink()
    assert [file.name for file in list_corpus_files([tmp_path / "a[1].txt"])] == ["a1.txt"]


def test_patterns_end_in_folders_that_loop(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "corpus")
    (folder / "b" / "deep" / "again").symlink_to(folder / "b")
    files = list_corpus_files([f"{folder}/**/*"])
    assert len(files) == len(list_corpus_files([folder])) == 6
    expected = {os.path.realpath(file.path) for file in list_corpus_files([folder])}
    assert {os.path.realpath(file.path) for file in files} == expected


@pytest.mark.parametrize("pattern", ["*.parquet", "nothing/**/*.jsonl", "a.txt/*", "**/nothing", "x*/**"])
def test_a_pattern_without_a_match_is_one_sentence(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(CorpusError, match=r"^no file matches .*; check the pattern") as caught:
        list_corpus_files([tmp_path / pattern])
    assert "\n" not in str(caught.value)
    (tmp_path / "a.csv").touch()
    with pytest.raises(CorpusError, match=r"holds no file that can be read"):
        list_corpus_files([tmp_path / "*.csv"])


# What identifies the content ------------------------------------------------------------------------------------------


def test_the_fingerprint_of_a_file_changes_with_its_content(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    os.utime(path, ns=(1, 1))
    (first,) = list_corpus_files([path])
    assert list_corpus_files([path]) == [first]
    assert first.fingerprint == "3 1"
    os.utime(path, ns=(1, 2))
    assert list_corpus_files([path])[0].fingerprint == "3 2"
    path.write_text("four")
    os.utime(path, ns=(1, 1))
    assert list_corpus_files([path])[0].fingerprint == "4 1"
