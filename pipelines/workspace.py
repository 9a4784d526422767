"""Where an unfinished build keeps its files: one folder a stage, one file a unit.

A workspace belongs to one build of one corpus with one configuration, so whatever stands in it may be used again after
a stop or a crash.
"""

import dataclasses
from pathlib import Path

WORKSPACE_FORMAT = 1
"""Raised with every change of what a stage writes: a workspace of another release is not gone on with."""

STAGES = ("records", "chunks", "references", "signed", "pairs", "live", "embeddings", "shards", "segment")


@dataclasses.dataclass(frozen=True)
class Workspace:
    """The folders of one build.

    Attributes:
        root: the folder that holds them.
    """

    root: Path

    def create(self) -> None:
        """Makes the folders that are not there yet."""
        for stage in STAGES:
            (self.root / stage).mkdir(parents=True, exist_ok=True)

    def get_folder(self, stage: str) -> Path:
        """Returns the folder of a stage."""
        return self.root / stage

    def list_files(self, stage: str) -> list[Path]:
        """Returns the finished files of a stage, in the order of their names."""
        return sorted(path for path in self.get_folder(stage).iterdir() if path.suffix != ".tmp")

    @property
    def drops_path(self) -> Path:
        """The records that are dropped for their id."""
        return self.root / "drops.parquet"

    @property
    def compared_path(self) -> Path:
        """The rows of references that are compared with others: the first of each equal shingle set."""
        return self.root / "compared.npy"

    @property
    def duplicates_path(self) -> Path:
        """The near-duplicates."""
        return self.root / "duplicates.parquet"
