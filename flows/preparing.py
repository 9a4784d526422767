"""``memory3 train prepare``: a corpus, and a bank to retrieve from, become a folder of training sequences.

    corpus -> records -> packed sequences -> candidates of each chunk -> dataset (:mod:`schemas.sequences`)

Nothing is in the folder but unfinished work before its ``dataset.json`` is written; a run that was stopped goes on from
the files that are finished.
"""

import dataclasses
import functools
import json
import os
import shutil
from pathlib import Path
from typing import Any

from flows import stages
from flows.building import check_input, make_absolute
from flows.config import BuildConfig, MemoryConfig
from flows.progress import show_stage
from flows.workplace import BUILD_ID, lock_bank, open_workspace
from model.locating import SHIPPED_MODEL, find_checkpoint
from model.tokenizing import load_tokenizer
from pipelines import sequencing
from pipelines.assembling import hash_file
from pipelines.candidates import CandidateConfig, CandidateSource
from pipelines.filtering import FilterConfig
from pipelines.jobs import list_row_groups
from pipelines.packing import PackingConfig
from pipelines.records import ReadingConfig
from pipelines.running import EngineConfig, check_stop
from pipelines.workspace import WORKSPACE_FORMAT, Workspace, list_finished
from schemas.bank import WORK_FOLDER, Bank
from schemas.errors import InputError, NothingLeftError
from schemas.identifiers import hash_json
from schemas.protocols import TokenizerFactory
from schemas.sequences import (
    MANIFEST_NAME,
    REFERENCES_NAME,
    SEQUENCES_FORMAT,
    SHARDS_FOLDER,
    BankSource,
    DatasetFile,
    DatasetManifest,
    read_manifest,
    write_manifest,
)
from schemas.stores import LocalStore, open_store
from schemas.tags import find_version


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Everything that determines a dataset besides its corpus and bank, and the engine that prepares it.

    Attributes:
        model: ``memory3-tiny`` or the folder of a checkpoint, for its tokenizer; a folder with a tokenizer will do.
        bos_token_id: the token each document begins with; None for the model's.
        eos_token_id: the token each document ends with; None for the model's.
        sequence_tokens: tokens of a sequence, whole chunks of 64.
        seed: seed of the order of documents, and of the choice of distractors.
        reading: how the corpus is read.
        filtering: which documents are left out.
        candidates: what chunks retrieve.
        engine: where and how wide the jobs run.
    """

    model: str = SHIPPED_MODEL
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    sequence_tokens: int = 512
    seed: int = 0
    reading: ReadingConfig = dataclasses.field(default_factory=ReadingConfig)
    filtering: FilterConfig = dataclasses.field(default_factory=FilterConfig)
    candidates: CandidateConfig = dataclasses.field(default_factory=CandidateConfig)
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)

    def to_json(self) -> dict[str, Any]:
        """Returns the settings that determine the dataset as JSON values."""
        values = dataclasses.asdict(self)
        del values["engine"]
        return json.loads(json.dumps(values))  # type: ignore[no-any-return]


def find_special_ids(model: str) -> tuple[int, int]:
    """Returns the ids of ``<s>`` and ``</s>`` of a checkpoint, or of a folder with nothing but a tokenizer.

    The files are read as they are: importing transformers for it takes seconds. A model without ``<s>`` has ``</s>``
    in its place, as :func:`model.checkpoint.load_checkpoint` has it.

    Raises:
        InputError: no file says which token ends a text.
    """
    path = find_checkpoint(model)
    config, names = (_read_json(path / name) for name in ("config.json", "tokenizer_config.json"))
    bos, eos = (_find_special_id(path, f"{name}_token", config, names) for name in ("bos", "eos"))
    if eos is None:
        raise InputError(f"{model} names no token that ends a text; give the ids of <s> and </s>")
    return eos if bos is None else bos, eos


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}; give the folder of a whole model") from error
    return values if isinstance(values, dict) else {}


def _find_special_id(path: Path, name: str, config: dict[str, Any], names: dict[str, Any]) -> int | None:
    """Returns the id of a special token from the model's settings, or by its name from those of the tokenizer."""
    for settings in (config, config.get("text_config") or {}):
        value = settings.get(f"{name}_id")
        if isinstance(value, list):
            value = value[0]  # the first is that of a text's end; others end an answer
        if value is not None:
            return int(value)
    token = names.get(name)
    if token is None:
        return None
    content = token["content"] if isinstance(token, dict) else token
    added = _read_json(path / "tokenizer.json").get("added_tokens", ())
    return next((int(entry["id"]) for entry in added if entry["content"] == content), None)


def _make_packing(config: PrepareConfig) -> PackingConfig:
    bos, eos = config.bos_token_id, config.eos_token_id
    if bos is None or eos is None:
        found = find_special_ids(config.model)
        bos, eos = found[0] if bos is None else bos, found[1] if eos is None else eos
    return PackingConfig(bos_token_id=bos, eos_token_id=eos, sequence_tokens=config.sequence_tokens, seed=config.seed)


def _open_source(bank: Bank, config: PrepareConfig, work: Workspace) -> CandidateSource:
    from model.training.chunk_search import open_chunk_search

    settings = bank.manifest.config
    search = functools.partial(
        open_chunk_search,
        bank.url,
        bank.manifest.version,
        config.model,
        settings["embedding"]["embedder"],
        settings["memory"]["device"],
    )
    search()  # a bank that does not fit is told before any work is done
    return CandidateSource(
        search=search,
        bank=functools.partial(Bank.open, bank.url, bank.manifest.version),
        references=work.root / "bank-references.arrow",
        config=config.candidates,
    )


def _check_target(folder: Path) -> None:
    """Makes sure that a folder may become a dataset.

    Raises:
        InputError: it holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder for the training sequences")
    found = {path.name for path in folder.iterdir()} if folder.exists() else set()
    strangers = sorted(found - {WORK_FOLDER, SHARDS_FOLDER, REFERENCES_NAME})
    if strangers or (found and WORK_FOLDER not in found):
        raise InputError(
            f"{folder} holds something else ({', '.join(sorted(found)[:3])}); give an empty or new folder for the "
            "training sequences"
        )


def _describe(path: Path, root: Path, num_rows: int) -> DatasetFile:
    return DatasetFile(
        path=path.relative_to(root).as_posix(),
        num_rows=num_rows,
        size_bytes=path.stat().st_size,
        sha256=hash_file(path),
    )


def _write_all(
    work: Workspace,
    source: CandidateSource | None,
    tokens: TokenizerFactory,
    packing: PackingConfig,
    engine: EngineConfig,
) -> None:
    """Runs the jobs from records to shards."""
    with show_stage(
        "pack", len(list_row_groups(work)), "batches", lambda: len(work.list_files(sequencing.PACKED_FOLDER))
    ):
        sequencing.pack_corpus(work, tokens, packing, engine)
    units = sequencing.list_shard_units(work)
    if not units:
        raise NothingLeftError("nothing of the corpus is left: all of its documents were dropped; name others")
    with show_stage("retrieve", len(units), "shards", lambda: len(work.list_files(SHARDS_FOLDER))):
        sequencing.write_shards(work, source, engine)


def prepare_sequences(
    corpus: list[str],
    out: Path,
    bank: str | None = None,
    version: str | None = None,
    config: PrepareConfig | None = None,
) -> DatasetManifest:
    """Prepares training sequences; a folder that is finished and made of the same changes nothing.

    Args:
        corpus: files and folders, as for a bank.
        out: the folder to make.
        bank: the bank that chunks retrieve from; None prepares for warmup, without references.
        version: as :func:`schemas.tags.find_version`; by default the newest.
        config: everything else.

    Raises:
        InputError: the folder holds something else, or sequences that were prepared otherwise.
        WrongModelError: the bank was cut by another tokenizer.
        BankError: the corpus or the bank cannot be read; finished work is kept.
    """
    config = config or PrepareConfig()
    build = BuildConfig(
        memory=MemoryConfig(model=config.model),
        reading=config.reading,
        filtering=config.filtering,
        engine=config.engine,
    )
    places = make_absolute(corpus)
    files = check_input(places, build)
    packing = _make_packing(config)
    opened = None
    if bank is not None:
        store = open_store(make_absolute([bank])[0])
        opened = Bank.open(store, find_version(store, version))
    tokenizer_id = load_tokenizer(config.model).tokenizer_id
    settings = {**config.to_json(), "bos_token_id": packing.bos_token_id, "eos_token_id": packing.eos_token_id}
    prepare_id = hash_json(
        [
            SEQUENCES_FORMAT,
            WORKSPACE_FORMAT,
            {name: value for name, value in settings.items() if name != "model"},
            tokenizer_id,
            [(file.path, file.fingerprint) for file in files],
            opened.manifest.to_json() if opened else None,
        ]
    )
    if (out / MANIFEST_NAME).exists():
        finished = read_manifest(out)
        if finished.prepare_id == prepare_id:
            return finished
        raise InputError(f"{out} holds training sequences that were prepared otherwise; give another folder")
    _check_target(out)
    with lock_bank(LocalStore(out)), open_workspace(LocalStore(out), prepare_id) as work:
        source = _open_source(opened, config, work) if opened else None
        stages.read(files, work, build)
        if opened and source:
            with show_stage("references"):
                sequencing.write_bank_references(opened, source.references)
        _write_all(work, source, build.make_tokenizer_factory(), packing, config.engine)
        check_stop()
        with show_stage("finish"):
            manifest = DatasetManifest(
                prepare_id=prepare_id,
                tokenizer_id=tokenizer_id,
                bos_token_id=packing.bos_token_id,
                eos_token_id=packing.eos_token_id,
                sequence_tokens=config.sequence_tokens,
                max_overlap=config.candidates.max_overlap,
                bank=_describe_bank(opened) if opened else None,
                settings={"corpus": places, **settings},
                **_describe_files(work, source, config.seed),
            )
            _publish(work, out, manifest)
    return manifest


def _describe_bank(bank: Bank) -> BankSource:
    return BankSource(
        url=bank.url,
        version=bank.manifest.version,
        fingerprint=bank.manifest.fingerprint.digest,
        embedder_id=bank.manifest.embedder_id,
    )


def _describe_files(work: Workspace, source: CandidateSource | None, seed: int) -> dict[str, Any]:
    """Writes the references, and returns what the manifest says of the files and of what is in them."""
    units = sequencing.list_shard_units(work)
    ends = [*(unit.first_row for unit in units[1:]), None]
    paths = [unit.target for unit in units]
    counts = sequencing.count_sequences(paths)
    shards = [
        _describe(unit.target, work.root, (counts["sequences"] if end is None else end) - unit.first_row)
        for unit, end in zip(units, ends, strict=True)
    ]
    references = None
    if source is not None:
        target = work.root / REFERENCES_NAME
        num_references = sequencing.write_dataset_references(paths, source, target, seed)
        references = _describe(target, work.root, num_references)
    return {
        "counts": {"documents": sequencing.count_documents(work), **counts},
        "shards": tuple(shards),
        "references": references,
    }


def _publish(work: Workspace, out: Path, manifest: DatasetManifest) -> None:
    """Moves the finished files to their places and writes the manifest; what a crash has left there is replaced."""
    shutil.rmtree(out / SHARDS_FOLDER, ignore_errors=True)
    os.rename(work.get_folder(SHARDS_FOLDER), out / SHARDS_FOLDER)
    if manifest.references is not None:
        os.replace(work.root / REFERENCES_NAME, out / REFERENCES_NAME)
    write_manifest(out, manifest)
    for other in list_finished(out / WORK_FOLDER):
        if BUILD_ID.fullmatch(other.name) and other != work.root:
            shutil.rmtree(other)
