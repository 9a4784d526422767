"""Banks of a catalogue: built, updated and deleted from as any other, and opened to be asked.

entries -> corpus file -> build, update, delete (the project's own flows) -> version -> asker
"""

import dataclasses
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from flows.building import build, update
from flows.config import BuildConfig, apply_changes
from flows.deleting import delete_documents
from flows.evaluating.knowledge.asking import Asker, open_asker
from flows.steps import Steps
from model.training.chat import ChatTemplate
from pipelines.running import LOOP_RUNNER
from schemas.atomic import write_bytes_atomically
from schemas.bank import Bank
from schemas.errors import InputError
from schemas.stores import LocalStore


@dataclasses.dataclass(frozen=True, kw_only=True)
class FactModel:
    """The model that writes and reads the banks of an evaluation.

    Attributes:
        name: ``memory3-tiny`` or the folder of a checkpoint.
        device: where to compute; None for where banks are written by default.
        chat: the template to ask with; None to have texts continued.
    """

    name: str
    device: str | None = None
    chat: ChatTemplate | None = None

    def make_config(self) -> BuildConfig:
        """Returns how the banks are built.

        Near-duplicates are kept: entries that differ in a number are what is asked for. Memories are written when they
        are first read, since not all are.
        """
        memory = {"model": self.name, "cold": True, **({} if self.device is None else {"device": self.device})}
        changes = {
            "memory": memory,
            "deduplication": {"enabled": False},
            "engine": {"runner": LOOP_RUNNER, "num_workers": 1},
        }
        return apply_changes(BuildConfig(), changes)


class FactBank:
    """A bank in a folder, with the corpus file that it is made of."""

    def __init__(self, folder: Path, model: FactModel) -> None:
        """Names the folder, which need not exist yet."""
        self.folder, self.model = folder, model

    @property
    def store(self) -> LocalStore:
        """Where the bank is."""
        return LocalStore(self.folder / "bank")

    def build(self, documents: Mapping[str, str]) -> "FactBank":
        """Builds the first version.

        Args:
            documents: texts by id.

        Raises:
            InputError: there is a bank in the folder.
        """
        if self.folder.exists():
            raise InputError(f"{self.folder} exists; name an empty folder with --work, or remove it")
        self.folder.mkdir(parents=True)
        build(self.store, [self._write_corpus(documents)], self.model.make_config(), Steps())
        return self

    def copy(self, folder: Path) -> "FactBank":
        """Returns a copy of the bank, to go another way from here."""
        shutil.copytree(self.folder, folder)
        return FactBank(folder, self.model)

    def update(self, documents: Mapping[str, str]) -> None:
        """Makes the bank equal to other documents: the corpus file is edited and the bank updated."""
        update(self.store, [self._write_corpus(documents)], {}, Steps())

    def delete(self, doc_ids: Iterable[str]) -> None:
        """Deletes documents from the bank."""
        delete_documents(self.store, sorted(doc_ids))

    def open(self) -> Asker:
        """Opens the newest version."""
        return open_asker(Bank.open(self.store), self.model.name, device=self.model.device, chat=self.model.chat)

    def list_references(self, doc_ids: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Returns by document the references that it consists of, in their order."""
        table = Bank.open(self.store).read_table("occurrences", ["doc_id", "ref_id"])
        wanted = pa.compute.is_in(table["doc_id"], value_set=pa.array(sorted(set(doc_ids)), pa.string()))
        found: dict[str, list[str]] = {}
        for row in table.filter(wanted).to_pylist():
            found.setdefault(row["doc_id"], []).append(row["ref_id"])
        return {doc_id: tuple(ref_ids) for doc_id, ref_ids in found.items()}

    def read_texts(self, ref_ids: Iterable[str]) -> dict[str, str]:
        """Returns the texts of references of the newest version."""
        wanted = sorted(set(ref_ids))
        texts = Bank.open(self.store).read_references(wanted, ["text"])["text"].to_pylist()
        return dict(zip(wanted, texts, strict=True))

    def _write_corpus(self, documents: Mapping[str, str]) -> str:
        path = self.folder / "corpus.jsonl"
        rows = [{"id": doc_id, "text": text} for doc_id, text in sorted(documents.items())]
        write_bytes_atomically(path, b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))
        return str(path)
