"""From a corpus and a bank to a dataset by the real jobs: leak rule, place rule, equal bytes, resume, damage."""

import functools
import hashlib
import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.building import build
from flows.config import BuildConfig, MemoryConfig
from flows.preparing import PrepareConfig, find_special_ids, prepare_sequences
from flows.steps import Steps
from model.locating import SHIPPED_MODEL, find_checkpoint
from model.tokenizing import load_tokenizer
from model.training.batches import IGNORED
from model.training.drawing import DrawingConfig
from model.training.streaming import SequenceDataset, SequenceSource, StreamConfig
from pipelines import sequencing
from pipelines.candidates import CandidateConfig, is_strict, select_candidates, split_chunks
from pipelines.records import ReadingConfig
from pipelines.running import EngineConfig, Unit, clear_stop, request_stop
from schemas.bank import Bank
from schemas.errors import DatasetFormatError, InputError, NothingLeftError, StoppedError, WrongModelError
from schemas.overlap import bound_overlap, exceeds_overlap, measure_overlap, shares_run
from schemas.reference_tokens import ReferenceTokens
from schemas.stores import LocalStore
from tests.corpora import CHINESE, write_lines
from tests.models import train_tokenizer
from tests.test_decontaminating import find_longest_match_slowly

LOOP = EngineConfig(runner="loop")
READING = ReadingConfig(batch_text_bytes=30_000)


def make_config(**changes: Any) -> PrepareConfig:
    return PrepareConfig(**{"sequence_tokens": 128, "reading": READING, "engine": LOOP, **changes})


def make_documents() -> list[dict[str, Any]]:
    names = sorted(topics)[:24]
    documents: list[dict[str, Any]] = [{"id": name, "text": topics[name]} for name in names]
    near = {"id": "near", "text": topics[names[3]].replace(" the ", " a ", 3)}
    return [*documents, near, {"id": "law", "text": CHINESE}, {"id": "empty", "text": " "}, {"id": "near", "text": "x"}]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("corpus") / "docs.jsonl", make_documents())


@pytest.fixture(scope="module")
def bank(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    folder = tmp_path_factory.mktemp("banks") / "bank"
    build(LocalStore(folder), [str(corpus)], BuildConfig(engine=LOOP, memory=MemoryConfig(cold=True)), Steps())
    return Bank.open(folder)


@pytest.fixture(scope="module")
def dataset(corpus: Path, bank: Bank, tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    folder = tmp_path_factory.mktemp("datasets") / "dataset"
    prepare_sequences([str(corpus)], folder, bank.url, config=make_config())
    return SequenceDataset.open(folder)


def read_rows(dataset: SequenceDataset) -> list[dict[str, Any]]:
    paths = [dataset.folder / shard.path for shard in dataset.manifest.shards]
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def hash_files(folder: Path) -> dict[str, str]:
    """SHA-256 by path of everything but the manifest, which names the corpus, and scratch."""
    names = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in names.items()
        if name != "dataset.json" and not name.startswith("work/")
    }


# The leak rule --------------------------------------------------------------------------------------------------------


def measure_common_subsequence(left: list[int], right: list[int]) -> int:
    lengths = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            lengths[i + 1][j + 1] = lengths[i][j] + 1 if a == b else max(lengths[i][j + 1], lengths[i + 1][j])
    return lengths[-1][-1]


few_tokens = st.lists(st.integers(0, 5), max_size=90)


@given(few_tokens, few_tokens.filter(bool), st.sampled_from([0.3, 2 / 3, 0.9]))
def test_the_bound_is_the_overlap_without_a_window(text: list[int], reference: list[int], limit: float) -> None:
    tokens, others = np.array(text, np.int32), np.array(reference, np.int32)
    exact = find_longest_match_slowly(text, reference) / len(reference)
    assert bound_overlap(tokens, others) == measure_common_subsequence(text, reference) / len(reference)
    assert exact <= bound_overlap(tokens, others) <= 1
    assert exceeds_overlap(tokens, others, limit) == (exact > limit)


def shares_run_slowly(text: list[int], reference: list[int], length: int) -> bool:
    """Compares every two places."""
    return any(
        text[start : start + length] == reference[place : place + length]
        for start in range(len(text) - length + 1)
        for place in range(len(reference) - length + 1)
    )


@given(few_tokens, few_tokens, st.integers(1, 8))
def test_runs_are_found_wherever_they_stand(text: list[int], reference: list[int], length: int) -> None:
    found = shares_run(np.array(text, np.int32), np.array(reference, np.int32), length)
    assert found == shares_run_slowly(text, reference, length)


references_of_few = st.dictionaries(
    st.sampled_from(["a", "b", "c", "d"]), st.lists(st.integers(0, 3), min_size=1, max_size=20), min_size=1
)


@given(
    few_tokens.filter(lambda tokens: len(tokens) > 1), references_of_few, st.sets(st.sampled_from("abcd")), st.data()
)
def test_candidates_are_those_of_the_definition(
    text: list[int], references: dict[str, list[int]], own: set[str], data: st.DataObject
) -> None:
    hits = st.lists(st.tuples(st.sampled_from(sorted(references)), st.floats(0, 1, width=32)), max_size=4)
    found = data.draw(st.lists(hits, max_size=3))
    limit = data.draw(st.sampled_from([0.4, 0.9]))
    arrays = {ref_id: np.array(tokens, np.int32) for ref_id, tokens in references.items()}
    run = data.draw(st.sampled_from([None, 2, 6]))
    sequence = np.array(text, np.int32)
    selected, num_leaking, num_own = select_candidates(sequence, found, own, arrays, limit, shared_run=run)
    exact = {key: find_longest_match_slowly(text, tokens) / len(tokens) for key, tokens in references.items()}
    leaking = {
        key
        for key, tokens in references.items()
        if exact[key] > limit or (run is not None and shares_run_slowly(text, tokens, run))
    }
    expected = [[hit for hit in hits if hit[0] not in leaking | own] for hits in found]
    assert [[(ref_id, similarity) for ref_id, _, similarity in hits] for hits in selected] == expected
    for ref_id, overlap, _ in (hit for hits in selected for hit in hits):
        assert exact[ref_id] <= overlap <= limit
    flat = [ref_id for hits in found for ref_id, _ in hits]
    assert num_leaking == sum(ref_id in leaking for ref_id in flat)
    assert num_own == sum(ref_id in own - leaking for ref_id in flat)


# The dataset ----------------------------------------------------------------------------------------------------------


def test_what_is_read_is_kept_or_dropped_and_every_token_counts(dataset: SequenceDataset, corpus: Path) -> None:
    counts = dataset.manifest.counts
    assert counts["documents"] == {"read": 28, "kept": 26, "dropped": {"conflicting_id": 1, "empty": 1}}
    rows = read_rows(dataset)
    assert [row["sequence"] for row in rows] == list(range(len(rows))) == list(range(dataset.manifest.num_sequences))
    tokenizer = load_tokenizer(SHIPPED_MODEL)
    kept = {document["id"]: document["text"] for document in make_documents()[:-2]}  # the last two are dropped
    num_tokens = sum(len(ids) + 2 for ids in tokenizer.encode(list(kept.values())))
    num_streams = len(dataset.manifest.shards)
    assert num_streams > 3
    assert counts["targets"] == sum(row["num_tokens"] - 1 for row in rows) == num_tokens - num_streams
    assert counts["chunks"] == sum(len(row["ref_ids"]) for row in rows)
    assert {span["doc_id"] for row in rows for span in row["documents"]} == set(kept)


def test_chunks_carry_what_they_retrieve_but_nothing_that_leaks_or_is_theirs(
    dataset: SequenceDataset, bank: Bank
) -> None:
    manifest = dataset.manifest
    assert manifest.bank is not None
    assert manifest.bank.version == bank.manifest.version
    from flows.searching import open_retriever

    retriever, tokenizer = open_retriever(bank), load_tokenizer(SHIPPED_MODEL)
    stored = bank.read_table("references", ["ref_id", "token_ids"]).to_pylist()
    tokens_of = {row["ref_id"]: row["token_ids"] for row in stored}
    places = bank.read_table("occurrences").to_pylist()
    num_leaking = num_own = 0
    for row in read_rows(dataset):
        chunks = split_chunks(np.array(row["tokens"], np.int32))
        found = retriever.search([tokenizer.decode(chunk) for chunk in chunks], 12)
        own = {
            place["ref_id"]
            for place in places
            for span in row["documents"]
            if place["doc_id"] == span["doc_id"]
            and max(place["start_char"], span["start_char"]) < min(place["end_char"], span["end_char"])
        }
        sequence = np.array(row["tokens"], np.int32)
        exact = {
            hit.ref_id: measure_overlap(sequence, np.array(tokens_of[hit.ref_id], np.int32))
            for hits in found
            for hit in hits
        }
        leaking = {ref_id for ref_id, overlap in exact.items() if overlap > 0.9}
        for ref_ids, overlaps in zip(row["ref_ids"], row["overlaps"], strict=True):
            assert all(exact[ref_id] <= overlap + 1e-6 for ref_id, overlap in zip(ref_ids, overlaps, strict=True))
        expected = [[hit for hit in hits if hit.ref_id not in own | leaking] for hits in found]
        assert row["ref_ids"] == [[hit.ref_id for hit in hits] for hits in expected]
        assert row["similarities"] == [pytest.approx([hit.score for hit in hits], abs=1e-6) for hits in expected]
        assert row["num_leaking"] == sum(hit.ref_id in leaking for hits in found for hit in hits)
        assert not own & {ref_id for of_chunk in row["ref_ids"] for ref_id in of_chunk}
        assert row["num_leaking"] + row["num_own_place"] + sum(map(len, row["ref_ids"])) == 12 * len(chunks)
        num_leaking, num_own = num_leaking + row["num_leaking"], num_own + row["num_own_place"]
    assert (num_leaking, num_own) == (manifest.counts["leaking"], manifest.counts["own_place"])
    assert num_leaking > 50
    assert num_own > 50


def test_the_references_are_those_of_the_bank(dataset: SequenceDataset, bank: Bank) -> None:
    references = dataset.references
    assert references is not None
    dropped = set(bank.read_dropped_ids().to_pylist())
    stored = bank.read_table("references").to_pylist()
    live = {row["ref_id"]: row["token_ids"] for row in stored if row["ref_id"] not in dropped}
    assert dropped
    assert {references.get_ref_id(row): references.get_tokens(row).tolist() for row in range(len(references))} == live
    assert references.find_rows(pa.array(sorted(live))).tolist() == list(range(len(live)))
    with pytest.raises(DatasetFormatError, match="has no reference"):
        references.find_rows(pa.array([next(iter(dropped))]))


def test_of_a_large_bank_candidates_and_a_sample_are_taken_along(corpus: Path, bank: Bank, tmp_path: Path) -> None:
    few = CandidateConfig(num_candidates=1, num_distractors=10)
    prepare_sequences([str(corpus)], tmp_path / "few", bank.url, config=make_config(candidates=few))
    dataset = SequenceDataset.open(tmp_path / "few")
    used = {ref_id for row in read_rows(dataset) for of_chunk in row["ref_ids"] for ref_id in of_chunk}
    assert dataset.references is not None
    found = [dataset.references.get_ref_id(row) for row in range(len(dataset.references))]
    assert found == sorted(found)
    assert used < set(found)
    assert len(found) == len(used) + 10


def test_without_the_place_rule_only_the_leak_rule_holds(corpus: Path, bank: Bank, tmp_path: Path) -> None:
    config = make_config(candidates=CandidateConfig(exclude_own_place=False))
    manifest = prepare_sequences([str(corpus)], tmp_path / "d", bank.url, config=config)
    assert manifest.counts["own_place"] == 0
    assert manifest.counts["leaking"] > 50


def test_a_share_of_the_sequences_reads_nothing_of_its_documents(
    dataset: SequenceDataset, corpus: Path, bank: Bank, tmp_path: Path
) -> None:
    config = make_config(candidates=CandidateConfig(strict_share=0.5))
    prepare_sequences([str(corpus)], tmp_path / "d", bank.url, config=config)
    mixed = SequenceDataset.open(tmp_path / "d")
    stored = bank.read_table("references", ["ref_id", "token_ids"]).to_pylist()
    tokens_of = {row["ref_id"]: row["token_ids"] for row in stored}
    kept_of = {row["ref_id"]: row["kept_ref_id"] for row in bank.read_table("duplicates").to_pylist()}
    documents_of: dict[str, set[str]] = {}
    for place in bank.read_table("occurrences").to_pylist():
        for ref_id in (place["ref_id"], kept_of.get(place["ref_id"], place["ref_id"])):
            documents_of.setdefault(ref_id, set()).add(place["doc_id"])
    assert kept_of
    num_less = {False: 0, True: 0}
    num_sequences = {False: 0, True: 0}
    for row, usual in zip(read_rows(mixed), read_rows(dataset), strict=True):
        strictly = is_strict(row["sequence"], 0.5)
        num_sequences[strictly] += 1
        documents = {span["doc_id"] for span in row["documents"]}
        kept = [
            [
                ref_id
                for ref_id in of_chunk
                if not strictly
                or not (documents & documents_of[ref_id] or shares_run_slowly(row["tokens"], tokens_of[ref_id], 13))
            ]
            for of_chunk in usual["ref_ids"]
        ]
        assert row["ref_ids"] == kept
        num_less[strictly] += sum(map(len, usual["ref_ids"])) - sum(map(len, kept))
    assert min(num_sequences.values()) > 10
    assert num_less[True] > 50
    assert not num_less[False]


def test_the_same_bytes_whatever_the_engine_and_after_a_stop(
    dataset: SequenceDataset, corpus: Path, bank: Bank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = hash_files(dataset.folder)
    assert len(expected) == len(dataset.manifest.shards) + 1
    for num_workers in (1, 2):
        folder = tmp_path / f"workers-{num_workers}"
        config = make_config(engine=EngineConfig(num_workers=num_workers))
        again = prepare_sequences([str(corpus)], folder, bank.url, config=config)
        assert hash_files(folder) == expected
        assert again == dataset.manifest

    folder, write_unit = tmp_path / "stopped", sequencing._write_shard
    written: list[str] = []

    def stop_after_two(unit: Unit, **options: Any) -> None:
        write_unit(unit, **options)
        written.append(unit.target.name)
        if len(written) == 2:
            request_stop()

    monkeypatch.setattr(sequencing, "_write_shard", stop_after_two)
    try:
        with pytest.raises(StoppedError, match="finished work is kept"):
            prepare_sequences([str(corpus)], folder, bank.url, config=make_config())
    finally:
        clear_stop()
    with pytest.raises(DatasetFormatError, match=r"there is no dataset\.json"):
        SequenceDataset.open(folder)
    (folder / "sequences").mkdir()  # as if a crash had come between the move and the manifest
    (folder / "sequences" / "000000.parquet").write_bytes(b"other")
    assert prepare_sequences([str(corpus)], folder, bank.url, config=make_config()) == dataset.manifest
    assert sorted(written) == [shard.path.rpartition("/")[2] for shard in dataset.manifest.shards]  # each once
    assert hash_files(folder) == expected
    assert not [path for path in (folder / "work").rglob("*") if path.name != "LOCK"]


def test_what_is_prepared_is_not_prepared_again(dataset: SequenceDataset, corpus: Path, bank: Bank) -> None:
    before = (dataset.folder / "dataset.json").stat().st_mtime_ns
    assert prepare_sequences([str(corpus)], dataset.folder, bank.url, config=make_config()) == dataset.manifest
    assert (dataset.folder / "dataset.json").stat().st_mtime_ns == before
    for changes in ({"seed": 1}, {"sequence_tokens": 192}, {"candidates": CandidateConfig(num_candidates=3)}):
        with pytest.raises(InputError, match="prepared otherwise"):
            prepare_sequences([str(corpus)], dataset.folder, bank.url, config=make_config(**changes))
    with pytest.raises(InputError, match="prepared otherwise"):
        prepare_sequences([str(corpus)], dataset.folder, config=make_config())


def test_a_dataset_without_a_bank_is_for_warmup(corpus: Path, dataset: SequenceDataset, tmp_path: Path) -> None:
    manifest = prepare_sequences([str(corpus)], tmp_path / "plain", config=make_config())
    plain = SequenceDataset.open(tmp_path / "plain")
    assert (manifest.bank, manifest.references, plain.references) == (None, None, None)
    assert [row["tokens"] for row in read_rows(plain)] == [row["tokens"] for row in read_rows(dataset)]
    assert manifest.counts["chunks_without_candidate"] == manifest.counts["chunks"]
    stream = StreamConfig(sequences_per_step=4, sequences_per_batch=2)
    (first, _) = SequenceSource(plain, DrawingConfig(stage="warmup"), stream).draw(0, 0, 1)
    assert not first.with_prefix
    assert not first.references
    with pytest.raises(InputError, match="has no references; prepare it with a bank"):
        SequenceSource(plain, DrawingConfig(), stream)


def test_batches_of_a_real_dataset_are_made_of_its_rows(dataset: SequenceDataset) -> None:
    stream = StreamConfig(sequences_per_step=8, sequences_per_batch=4)
    source = SequenceSource(dataset, DrawingConfig(begins_with_bos=False), stream)
    rows = {tuple(row["tokens"]): row for row in read_rows(dataset)}
    assert dataset.references is not None
    num_read = 0
    for step in range(3):
        for batch in source.draw(step, 0, 1):
            for number in range(4):
                is_target = batch.targets_BT[number] != IGNORED
                tokens = [*batch.tokens_BT[number][is_target].tolist(), int(batch.targets_BT[number][is_target][-1])]
                row = rows[tuple(tokens)]
                best = [of_chunk[0] if of_chunk else None for of_chunk in row["ref_ids"]]
                for chunk, of_chunk in enumerate(batch.index_BCM[number][: len(best)].tolist()):
                    window = [ref_id for ref_id in best[max(0, chunk - 4) : chunk + 1][::-1] if ref_id]
                    expected = [
                        dataset.references.get_tokens(place).tolist()
                        for place in dataset.references.find_rows(pa.array(dict.fromkeys(window), pa.string()))
                    ]
                    assert [batch.references[place].tolist() for place in of_chunk if place >= 0] == expected
                    num_read += len(expected)
    assert num_read > 24


# What cannot be used --------------------------------------------------------------------------------------------------


def copy_dataset(dataset: SequenceDataset, folder: Path) -> Path:
    for name in [*hash_files(dataset.folder), "dataset.json"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((dataset.folder / name).read_bytes())
    return folder


def draw_some(folder: Path) -> None:
    dataset = SequenceDataset.open(folder)
    source = SequenceSource(dataset, DrawingConfig(), StreamConfig(sequences_per_step=64, sequences_per_batch=64))
    for step in range(int(source.steps_per_epoch) + 1):
        source.draw(step, 0, 1)


def test_foreign_and_damaged_datasets_are_refused(dataset: SequenceDataset, tmp_path: Path) -> None:
    shard = dataset.manifest.shards[1].path

    def change_byte(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    def change_manifest(folder: Path, **changes: object) -> None:
        values = json.loads((folder / "dataset.json").read_bytes())
        (folder / "dataset.json").write_text(json.dumps({**values, **changes}))

    damages: list[tuple[str, functools.partial[None]]] = []

    def add(message: str, damage: Any, *arguments: Any, **options: Any) -> None:
        damages.append((message, functools.partial(damage, *arguments, **options)))

    folders = [copy_dataset(dataset, tmp_path / str(number)) for number in range(8)]
    add("there is no dataset.json", (folders[0] / "dataset.json").unlink)
    add("is of format version 2, this release reads 1", change_manifest, folders[1], format_version=2)
    add("is damaged", change_manifest, folders[2], colour="red")
    add("is damaged", (folders[3] / "dataset.json").write_text, "{")
    add(f"{shard} has other bytes than when it was written", change_byte, folders[4] / shard)
    add(f"{shard} is missing", (folders[5] / shard).unlink)
    add(f"{shard} has 3 bytes, not", (folders[6] / shard).write_bytes, b"abc")
    add("references.arrow has other bytes", change_byte, folders[7] / "references.arrow")
    for (message, damage), folder in zip(damages, folders, strict=True):
        draw_some(folder)
        damage()
        with pytest.raises(DatasetFormatError, match=message):
            draw_some(folder)
    (tmp_path / "no.arrow").write_bytes(b"no")
    with pytest.raises(DatasetFormatError, match="cannot be read"):
        ReferenceTokens(tmp_path / "no.arrow")


def test_what_cannot_be_prepared_is_refused_before_any_work(corpus: Path, bank: Bank, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds something else \(notes.txt\)"):
        prepare_sequences([str(corpus)], tmp_path / "taken", bank.url, config=make_config())
    with pytest.raises(InputError, match="is a file"):
        prepare_sequences([str(corpus)], tmp_path / "taken" / "notes.txt", config=make_config())
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").write_text(train_tokenizer()._tokenizer.to_str())
    config = make_config(model=str(other), bos_token_id=1, eos_token_id=2)
    with pytest.raises(WrongModelError, match="was cut by another tokenizer"):
        prepare_sequences([str(corpus)], tmp_path / "wrong", bank.url, config=config)
    blank = write_lines(tmp_path / "blank.jsonl", [{"id": 1, "text": " "}])
    with pytest.raises(NothingLeftError, match="all of its documents were dropped"):
        prepare_sequences([str(blank)], tmp_path / "nothing", config=make_config())
    with pytest.raises(InputError, match="max_overlap is 1.5"):
        CandidateConfig(max_overlap=1.5)
    with pytest.raises(InputError, match="strict_share is 2"):
        CandidateConfig(strict_share=2)


def test_a_folder_with_a_tokenizer_alone_will_do(corpus: Path, dataset: SequenceDataset, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((find_checkpoint(SHIPPED_MODEL) / name).read_bytes())
    assert find_special_ids(str(tmp_path)) == find_special_ids(SHIPPED_MODEL) == (1, 2)
    manifest = prepare_sequences([str(corpus)], tmp_path / "d", config=make_config(model=str(tmp_path)))
    assert manifest.counts["tokens"] == dataset.manifest.counts["tokens"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"bos_token_id": 5, "eos_token_id": 6}, (5, 6)),
        ({"bos_token_id": None, "eos_token_id": 6}, (6, 6)),
        ({"eos_token_id": [1, 106], "text_config": {"bos_token_id": 2, "eos_token_id": 9}}, (2, 1)),
    ],
)
def test_special_tokens_are_those_of_the_model(
    settings: dict[str, Any], expected: tuple[int, int], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert find_special_ids(str(tmp_path)) == expected
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="names no token that ends a text"):
        find_special_ids(str(tmp_path))
