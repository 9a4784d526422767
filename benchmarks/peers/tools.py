"""The tools that are compared: a script of this folder each, and the targets this project has set itself."""

import dataclasses
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

OURS = "memory3"
"""What the tables call this project."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tool:
    """One way of doing a step.

    Attributes:
        name: what a table calls it.
        script: its file in this folder.
        arguments: what the script gets before input and output.
        peer: the peer whose environment it runs in; "" for this project's own.
        reads: ``jsonl`` or ``parquet``.
        has_list: a second, unmeasured call with ``--list`` writes the ids of what was removed.
        is_slow: gets a sample rather than the whole data.
        is_complete: removes all but one of a cluster; False for what only flags similar texts.
        target: how many times as fast this project must be, 0 for no such target.
    """

    name: str
    script: str
    arguments: tuple[str, ...] = ()
    peer: str = ""
    reads: str = "jsonl"
    has_list: bool = False
    is_slow: bool = False
    is_complete: bool = True
    target: float = 0.0


RENSA_LSH = Tool(name="rensa LSH", script="rensa_lsh.py", peer="rensa", target=3.0)
RENSA_CHARACTERS = dataclasses.replace(
    RENSA_LSH, name="rensa LSH, Chinese by character", arguments=("--words", "characters")
)
RENSA = (
    RENSA_LSH,
    RENSA_CHARACTERS,
    dataclasses.replace(RENSA_LSH, name="rensa deduplicator", arguments=("--way", "deduplicator"), target=0.0),
    dataclasses.replace(
        RENSA_LSH, name="rensa rho, flags only", arguments=("--way", "rho"), target=0.0, is_complete=False
    ),
)
DATATROVE = Tool(
    name="datatrove", script="datatrove_minhash.py", peer="datatrove", has_list=True, is_slow=True, target=25.0
)
DATATROVE_SPLIT = dataclasses.replace(
    DATATROVE, name="datatrove, split words", arguments=("--words", "split"), is_slow=False, target=8.0
)
TEXT_DEDUP = Tool(
    name="text-dedup, verified", script="text_dedup_minhash.py", peer="text-dedup", reads="parquet", has_list=True,
    is_slow=True, target=10.0,
)  # fmt: skip
OUR_DOCUMENTS = Tool(name=OURS, script="ours_duplicates.py")
OUR_REFERENCES = Tool(name=OURS, script="ours_duplicates.py", reads="parquet")
OUR_CHUNKING = Tool(name=OURS, script="ours_chunking.py")
TOKENIZERS = Tool(
    name="tokenizers encode_batch",
    script="tokenizers_offsets.py",
    arguments=("--tokenizer", str(ROOT / "model" / "checkpoints" / "memory3-tiny" / "tokenizer.json")),
    peer="tokenizers",
    target=4.0,
)
OUR_BEAM = Tool(name="memory3, FnApiRunner", script="ours_references.py", arguments=("--runner", "FnApiRunner"))
OUR_LOOP = Tool(name="memory3, plain loop", script="ours_references.py", arguments=("--runner", "loop"))

DOCUMENT_PEERS = (DATATROVE, DATATROVE_SPLIT, TEXT_DEDUP, *RENSA)
REFERENCE_PEERS = (DATATROVE, *(dataclasses.replace(tool, target=min(tool.target, 2.5)) for tool in RENSA))
