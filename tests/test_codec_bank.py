"""Banks with codecs through their life: built, updated, compacted, migrated, read, checked, and tampered with."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from typer.testing import CliRunner

from flows.building import build, update
from flows.cli import app
from flows.codec_training import CodecReport, CodecRequest, sample_references, train_on_bank
from flows.collecting import collect, plan_collection
from flows.compacting import compact_bank
from flows.config import BuildConfig, MemoryConfig
from flows.deleting import delete_documents
from flows.generation import open_generator, open_writer
from flows.migrating import Migration, migrate_bank
from flows.purging import purge_bank
from flows.steps import Steps
from flows.verifying import verify_bank
from model.codec_files import read_codec_name
from model.codec_training import train_codec
from model.fetching import BankMemories
from model.generating import GenerationConfig
from pipelines.inspecting import open_views, run_query
from pipelines.running import clear_stop, request_stop
from schemas.bank import Bank
from schemas.errors import BankError, BankFormatError, InputError, StoppedError, WrongModelError
from schemas.manifest import CODEC_KIND, FileEntry
from schemas.stores import LocalStore
from tests.bank_contents import assert_equal_banks, list_live
from tests.test_equality import change_word, make_config, write_corpus
from tests.test_verifying import believe, rewrite_manifest

CODEC = "PRQ2x2x4"

DOCUMENTS = {name: topics[name] for name in ("assert", "class", "for", "import", "with")}

LATER = {**DOCUMENTS, "while": topics["while"], "with": change_word(topics["with"], 30)}
del LATER["assert"]


def configure(codec: str, **memory: Any) -> BuildConfig:
    return make_config({"memory": {"codec": codec, "references_per_shard": 16, **memory}})


def build_bank(folder: Path, corpus: Path, codec: str, **memory: Any) -> Bank:
    build(LocalStore(folder), [str(corpus)], configure(codec, **memory), Steps())
    return Bank.open(folder)


def count_short(bank: Bank) -> int:
    """Returns how many references have fewer tokens than a memory keeps; a codec learns nothing from them."""
    lengths = bank.read_references(sorted(list_live(bank)), ["num_tokens"])["num_tokens"].to_pylist()
    return sum(length < bank.manifest.layout.num_slots for length in lengths)


def train(bank: Bank, out: Path, **changes: Any) -> CodecReport:
    return train_on_bank(bank, CodecRequest(**{"name": CODEC, "out": out, **changes}))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), DOCUMENTS)


@pytest.fixture(scope="module")
def plain(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return build_bank(tmp_path_factory.mktemp("plain") / "bank", corpus, "none")


@pytest.fixture(scope="module")
def codec_file(plain: Bank, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("codecs") / "codec.safetensors"
    train(plain, path)
    return path


@pytest.fixture(scope="module")
def other_file(plain: Bank, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("codecs") / "other.safetensors"
    train(plain, path, seed=1)
    return path


@pytest.fixture(scope="module")
def trained(corpus: Path, codec_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return build_bank(tmp_path_factory.mktemp("trained") / "bank", corpus, str(codec_file))


@pytest.fixture
def bank(trained: Bank, tmp_path: Path) -> Bank:
    """A copy of the bank with a trained codec, that may be changed."""
    shutil.copytree(trained.url, tmp_path / "bank")
    return Bank.open(tmp_path / "bank")


def find_codec(bank: Bank) -> FileEntry:
    (entry,) = bank.manifest.list_files(CODEC_KIND)
    return entry


def list_wrong(bank: Bank, *, deep: bool = True) -> dict[str, str]:
    return {check.name: check.detail for check in verify_bank(bank, deep=deep) if not check.passed}


def fetch(bank: Bank, ref_ids: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    fetched = BankMemories(bank, open_writer(bank, "memory3-tiny")).fetch(ref_ids)
    return torch.stack((fetched.keys_LBHSD, fetched.values_LBHSD)), fetched.offsets_LBHS


def generate(bank: Bank) -> str:
    generator = open_generator("memory3-tiny", bank.url)
    text = "".join(
        piece.text
        for piece in generator.generate("The import statement is used to find", GenerationConfig(max_new_tokens=4))
    )
    assert sum(generator.traces[0].attention) == pytest.approx(1.0, abs=1e-3)
    return text


# Build ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("codec", "most"), [("int8", 0.01), ("turbo4", 0.12), ("none/int8", 0.01)])
def test_a_codec_that_is_not_trained(corpus: Path, plain: Bank, codec: str, most: float, tmp_path: Path) -> None:
    bank = build_bank(tmp_path / "bank", corpus, codec)
    assert bank.manifest.layout == dataclasses.replace(plain.manifest.layout, codec=codec)
    assert bank.manifest.fingerprint.storage["codec"] == bank.manifest.config["memory"]["codec"] == codec
    assert bank.manifest.list_files(CODEC_KIND) == []
    shards, plain_shards = (sum(file.size_bytes for file in one.manifest.list_files("shard")) for one in (bank, plain))
    assert shards < plain_shards
    assert list_wrong(bank) == {}
    ref_ids = sorted(list_live(bank))
    (found, offsets), (exact, exact_offsets) = fetch(bank, ref_ids), fetch(plain, ref_ids)
    assert torch.equal(offsets, exact_offsets)
    assert 0 < float((found - exact).norm() / exact.norm()) < most
    assert generate(bank)
    # Neither reads the other's memories.
    with pytest.raises(WrongModelError, match="storage differ"):
        BankMemories(plain, open_writer(bank, "memory3-tiny"))


def test_a_trained_codec_is_part_of_the_bank(
    corpus: Path, plain: Bank, trained: Bank, codec_file: Path, tmp_path: Path
) -> None:
    entry, layout = find_codec(trained), trained.manifest.layout
    assert (Path(trained.url) / entry.path).read_bytes() == codec_file.read_bytes()
    assert (entry.num_rows, entry.path.rpartition("/")[2]) == (0, "codec.safetensors")
    assert layout.codec.startswith(f"{CODEC}@")
    assert trained.manifest.config["memory"]["codec"] == trained.manifest.fingerprint.storage["codec"] == layout.codec
    assert "codec_file" not in trained.manifest.config
    assert str(codec_file) not in trained.manifest.to_json()
    assert (layout.key_bytes, layout.value_bytes) == (2, 2)
    assert list_wrong(trained) == {}
    assert list_wrong(trained, deep=False) == {}
    ref_ids = sorted(list_live(trained))
    (found, _), (exact, _) = fetch(trained, ref_ids), fetch(plain, ref_ids)
    assert 0.2 < float((found - exact).norm() / exact.norm()) < 0.9
    shown = run_query(open_views(trained), "select kind, path from files where kind = 'codec'").to_pylist()
    assert shown == [{"kind": "codec", "path": entry.path}]
    # The same again changes nothing, by whatever path the file is given; and it is the same bank elsewhere.
    moved = tmp_path / "moved.safetensors"
    shutil.copyfile(codec_file, moved)
    assert build_bank(Path(trained.url), corpus, str(moved)).manifest.version == 1
    fresh = build_bank(tmp_path / "fresh", corpus, str(moved))
    assert fresh.manifest.files == trained.manifest.files
    assert fresh.manifest.config == trained.manifest.config


def test_the_life_of_a_bank_needs_no_file_of_the_user(codec_file: Path, tmp_path: Path) -> None:
    mine, copy = tmp_path / "mine.safetensors", tmp_path / "copy.safetensors"
    for path in (mine, copy):
        shutil.copyfile(codec_file, path)
    path = write_corpus(tmp_path, DOCUMENTS)
    built = build_bank(tmp_path / "bank", path, str(mine))
    store, entry = LocalStore(built.url), find_codec(built)
    mine.unlink()
    write_corpus(tmp_path, LATER)
    summary = update(store, None, {}, Steps())
    assert summary["counts"]["changes"]["references"]["encoded"] > 0
    updated = Bank.open(store)
    assert find_codec(updated) == entry
    assert_equal_banks(updated, build_bank(tmp_path / "fresh", path, str(copy)))
    assert list_wrong(updated) == {}

    # A version that has the codec serves a build, too, that names it with its digest alone.
    write_corpus(tmp_path, DOCUMENTS)
    named = build_bank(tmp_path / "bank", path, built.manifest.layout.codec)
    assert (named.manifest.version, find_codec(named)) == (3, entry)
    with pytest.raises(InputError, match="are not in .*nowhere; give the file of the codec"):
        build_bank(tmp_path / "nowhere", path, built.manifest.layout.codec)

    delete_documents(store, ["for"])
    compact_bank(store)
    compacted = Bank.open(store)
    assert len({file.path.rpartition("/")[0] for file in compacted.manifest.files}) == 2
    assert find_codec(compacted) == entry
    assert compact_bank(store)["unchanged"]
    collect(store, plan_collection(store, keep=1))
    assert list_wrong(Bank.open(store), deep=False) == {}
    assert purge_bank(store, ["class"]).num_forgotten > 0
    purged = Bank.open(store)
    assert (find_codec(purged), list_wrong(purged)) == (entry, {})
    assert generate(purged)


def test_a_cold_bank_with_a_codec(corpus: Path, codec_file: Path, trained: Bank, tmp_path: Path) -> None:
    bank = build_bank(tmp_path / "bank", corpus, str(codec_file), cold=True)
    ref_ids = sorted(list_live(bank))
    memories = BankMemories(bank, open_writer(bank, "memory3-tiny"))
    memories.fetch(ref_ids)
    assert memories.statistics.num_encoded == len(ref_ids)
    stored = BankMemories(trained, open_writer(trained, "memory3-tiny")).fetch_records(ref_ids)
    found = BankMemories(bank, open_writer(bank, "memory3-tiny")).fetch_records(ref_ids)
    assert np.mean((found == stored).all(1)) > 0.9  # some vectors lie between two codes
    assert list_wrong(bank) == {}


# Migration ------------------------------------------------------------------------------------------------------------


def test_to_a_codec_and_back(plain: Bank, trained: Bank, codec_file: Path, tmp_path: Path) -> None:
    shutil.copytree(plain.url, tmp_path / "bank")
    store = LocalStore(tmp_path / "bank")
    num_live = len(list_live(plain))
    summary = migrate_bank(store, Migration(codec=str(codec_file)))
    assert summary["counts"]["changes"]["references"] == {"encoded": num_live, "not_encoded": 0}
    coded = Bank.open(store)
    assert_equal_banks(coded, trained)
    assert find_codec(coded) == find_codec(trained)
    for kind in ("references", "embeddings", "index"):
        assert coded.manifest.list_files(kind) == plain.manifest.list_files(kind)
    assert migrate_bank(store, Migration(codec=str(codec_file)))["unchanged"]
    assert migrate_bank(store, Migration(model="memory3-tiny"))["unchanged"]

    assert migrate_bank(store, Migration(codec="int8"))["version"] == 3
    assert migrate_bank(store, Migration(codec="none"))["version"] == 4
    back = Bank.open(store)
    assert back.manifest.layout == plain.manifest.layout
    assert back.manifest.fingerprint == plain.manifest.fingerprint
    assert back.manifest.list_files(CODEC_KIND) == []
    assert_equal_banks(back, plain)
    assert [list_wrong(Bank.open(store, version)) for version in (2, 4)] == [{}] * 2
    ref_ids = sorted(list_live(plain))
    assert torch.equal(fetch(Bank.open(store, 2), ref_ids)[0], fetch(coded, ref_ids)[0])

    # A few first: the rest of them are coded when they are retrieved.
    migrate_bank(store, Migration(codec=str(codec_file), limit=5))
    partly = Bank.open(store)
    memories = BankMemories(partly, open_writer(partly, "memory3-tiny"))
    memories.fetch(ref_ids)
    assert (memories.statistics.num_read, memories.statistics.num_encoded) == (5, num_live - 5)
    # What no version names any more goes, the codec too.
    collect(store, plan_collection(store, keep=1))
    assert find_codec(Bank.open(store)) == find_codec(trained)
    migrate_bank(store, Migration(codec="none"))
    collect(store, plan_collection(store, keep=1))
    assert not list(Path(store.path).rglob("codec.safetensors"))


def test_what_cannot_be_asked_for_changes_nothing(bank: Bank, tmp_path: Path) -> None:
    store = LocalStore(bank.url)
    for codec, message in (
        ("zip", "there is no codec 'zip'"),
        ("PRQ2x7x8", "has to be trained; give the file"),
        (str(tmp_path / "nothing.safetensors"), "nothing.safetensors"),
        ("PRQ2x2x4@" + "0" * 32, "are not in"),
    ):
        with pytest.raises(InputError, match=message):
            migrate_bank(store, Migration(codec=codec))
    with pytest.raises(InputError, match="give a model, a codec or both"):
        Migration()
    with pytest.raises(InputError, match="no codec 'zip'"):
        MemoryConfig(codec="zip")
    assert Bank.open(store).manifest.version == 1


# Damage and malice ----------------------------------------------------------------------------------------------------


def replace_codec(bank: Bank, content: bytes) -> Bank:
    """Puts other bytes in the place of the codec, with a manifest that promises them."""
    entry = find_codec(bank)
    (Path(bank.url) / entry.path).write_bytes(content)
    return believe(bank, entry)


def refuse(bank: Bank, message: str) -> None:
    """Makes sure that nothing takes the bank for a good one."""
    assert message in list_wrong(bank, deep=False)["codec"]
    assert message in list_wrong(bank)["codec"]
    with pytest.raises(BankFormatError, match=message) as refused:
        open_generator("memory3-tiny", bank.url)
    assert "\n" not in str(refused.value)
    with pytest.raises(BankError, match=message):
        update(LocalStore(bank.url), [str(write_corpus(Path(bank.url).parent, LATER))], {}, Steps())


def test_a_flipped_bit_is_found(bank: Bank) -> None:
    path = Path(bank.url) / find_codec(bank).path
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    changed = Bank.open(bank.url)
    assert "codec.safetensors has other bytes" in list_wrong(changed)["files"]
    refuse(Bank.open(bank.url), "other bytes than when it was written")
    path.unlink()
    refuse(Bank.open(bank.url), "is missing from the bank")


def test_the_codec_of_another_bank_is_refused(bank: Bank, other_file: Path) -> None:
    refuse(replace_codec(bank, other_file.read_bytes()), f"has the parameters of {CODEC}@")


def change_tables(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> bytes:
    """Returns the file of a codec with other tables, but what it says of itself as it was."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tables = load_file(path)
    change(tables)
    return save(tables, metadata)


def train_on_noise(tmp_path: Path, head_dim: int) -> bytes:
    """Returns the file of a codec for vectors of another size."""
    vectors = torch.randn((64, 4, 2, 8, head_dim), generator=torch.Generator().manual_seed(0))
    train_codec(CODEC, vectors, vectors).save(tmp_path / "noise.safetensors")
    return (tmp_path / "noise.safetensors").read_bytes()


@pytest.mark.parametrize(
    "name", ["empty", "zeros", "ones", "text", "cut off", "a number changed", "no number", "another size", "no table"]
)
def test_garbage_is_no_codec(bank: Bank, name: str, tmp_path: Path) -> None:
    path = Path(bank.url) / find_codec(bank).path
    content: dict[str, Callable[[], bytes]] = {
        "empty": lambda: b"",
        "zeros": lambda: b"\0" * 100,
        "ones": lambda: b"\xff" * 4096,
        "text": lambda: b"{}\n",
        "cut off": lambda: path.read_bytes()[:-1],
        "a number changed": lambda: change_tables(path, lambda tables: tables["keys.stages"][0, 0].mul_(1.01)),
        "no number": lambda: change_tables(path, lambda tables: tables["keys.stages"][0, 0].fill_(torch.nan)),
        "another size": lambda: train_on_noise(tmp_path, 16),
        "no table": lambda: change_tables(path, lambda tables: tables.pop("values.stages")),
    }
    refuse(replace_codec(bank, content[name]()), "codec.safetensors")


def test_a_manifest_with_too_many_or_too_few_codecs_is_refused(bank: Bank, plain: Bank, tmp_path: Path) -> None:
    entry, others = find_codec(bank), [file for file in bank.manifest.files if file.kind != CODEC_KIND]
    forgeries = {
        "it names 0 files of a codec": others,
        "it names 2 files of a codec": [
            *others,
            entry,
            dataclasses.replace(entry, path="segments/other/codec.safetensors"),
        ],
        "must be at most": [*others, dataclasses.replace(entry, size_bytes=1 << 40)],
    }
    for message, files in forgeries.items():
        with pytest.raises(BankFormatError, match=message):
            rewrite_manifest(bank, files=files)
    shutil.copytree(plain.url, tmp_path / "plain")
    with pytest.raises(BankFormatError, match="it names 1 files of a codec, but its codec none has 0"):
        rewrite_manifest(Bank.open(tmp_path / "plain"), files=[*plain.manifest.files, entry])


# Training -------------------------------------------------------------------------------------------------------------


def test_training_is_repeatable_and_measured_on_other_references(plain: Bank, codec_file: Path, tmp_path: Path) -> None:
    report = train(plain, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == codec_file.read_bytes()
    num_live = len(list_live(plain))
    num_short = count_short(plain)
    assert num_short == 1
    assert (report.num_held_out, report.num_references) == (num_live // 5, num_live - num_live // 5 - num_short)
    chosen, held_out = sample_references(plain, 10, seed=3)
    assert (len(chosen), len({*chosen, *held_out})) == (10, 10 + num_live // 5)
    assert {*chosen, *held_out} <= list_live(plain)
    assert sample_references(plain, 10, seed=3) == (chosen, held_out)
    assert sample_references(plain, 10, seed=4)[0] != chosen
    assert (report.key_bytes, report.value_bytes, report.factor) == (2, 2, 32.0)
    better = train(plain, tmp_path / "better.safetensors", name="mapped-turbo4")
    assert 0 < better.attention_error < 0.2 < report.attention_error < 1
    assert better.key_snr_db > report.key_snr_db > 0
    assert better.value_snr_db > report.value_snr_db > 0
    assert better.codec == read_codec_name(tmp_path / "better.safetensors")


def test_what_cannot_be_trained_leaves_no_file(plain: Bank, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "codec.safetensors"
    with pytest.raises(InputError, match="no codec 'zip'"):
        train(plain, out, name="zip")
    with pytest.raises(InputError, match="name is 'int8', must be one that has parameters"):
        train(plain, out, name="int8")
    with pytest.raises(InputError, match="must be a file in a folder, with a name ending in .safetensors"):
        train(plain, tmp_path / "nowhere" / "codec.safetensors")
    with pytest.raises(InputError, match="references is 0"):
        train(plain, out, num_references=0)
    with pytest.raises(InputError, match="is for vectors of 80, the model has 32"):
        train(plain, out, name="OPQ20x80-Residual2x14-PQ8x10")
    with pytest.raises(InputError, match="a codebook of 16384 rows cannot be trained on .* vectors"):
        train(plain, out, name="OPQ8x32-Residual2x14-PQ8x10", num_references=20)
    with pytest.raises(InputError, match="nothing-there"):
        train(plain, out, model="nothing-there")
    small = build_bank(tmp_path / "small", write_corpus(tmp_path, {"one": topics["assert"]}), "none", cold=True)
    with pytest.raises(InputError, match="live references, a codec needs at least 20"):
        train(small, out)
    request_stop()
    try:
        with pytest.raises(StoppedError):
            train(plain, out)
    finally:
        clear_stop()
    assert not list(tmp_path.glob("codec*"))


def test_the_commands(trained: Bank, corpus: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> Any:
        done = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
        assert done.exit_code == 0
        return json.loads(done.stdout)

    listed = {codec["name"]: codec for codec in run("codec", "list", "--head-dim", "80")}
    assert (listed["none"]["memory_bytes"], listed["none"]["factor"], listed["none"]["trained"]) == (450_560, 1, False)
    paper = listed["OPQ20x80-Residual2x14-PQ8x10"]
    assert (paper["key_bytes"], paper["memory_bytes"], paper["factor"], paper["trained"]) == (14, 39_424, 11.43, True)
    of_bank = {codec["name"]: codec for codec in run("codec", "list", "--bank", trained.url)}
    assert of_bank["none"]["memory_bytes"] == dataclasses.replace(trained.manifest.layout, codec="none").payload_bytes
    # On a bank that has a codec already, and on a corpus: the same references, so the same codec.
    commands = (("--bank", trained.url), ("--corpus", str(corpus)))
    reports = []
    for number, place in enumerate(commands):
        out = tmp_path / f"{number}.safetensors"
        reports.append(run("codec", "train", "--name", CODEC, "--out", str(out), "--references", "30", *place))
        assert reports[-1].pop("file") == str(out)
    assert reports[0] == reports[1]
    assert reports[0]["num_references"] == 30 - count_short(trained)
    with pytest.raises(InputError, match="either --bank BANK or --corpus PATH"):
        CliRunner().invoke(app, ["codec", "train", "--name", CODEC, "--out", "x.safetensors"], catch_exceptions=False)
    shown = CliRunner().invoke(app, ["codec", "list"]).stdout
    assert "PRQ2x7x8" in shown
    assert "22 layers x 8 heads x 8 tokens x 80" in shown
