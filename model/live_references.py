"""The live references of one version of a bank, as columns: what searches without embeddings are made from."""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from model.retrieving import read_part
from schemas.bank import Bank
from schemas.errors import InputError


def read_live_references(bank: Bank, columns: Sequence[str]) -> pa.Table:
    """Returns columns of a version's live references, ascending by id, with ``ref_id`` first.

    Ids are hashes of their text, so that the first rows are as good a sample as any.

    Raises:
        InputError: there are none.
        BankFormatError: a table is missing or damaged.
    """
    wanted = list(dict.fromkeys(["ref_id", *columns]))
    tables = [read_part(bank, file, wanted) for file in bank.manifest.list_files("references")]
    if tables:
        table = pa.concat_tables(tables)
        live = table.filter(pc.invert(pc.is_in(table["ref_id"], value_set=bank.read_dropped_ids())))
        if len(live):
            return live.sort_by("ref_id")
    raise InputError(f"version {bank.manifest.version} of bank {bank.url} has no live references to search")
