"""``memory3 train rank``: which layers and heads of a model use distant text, measured on a corpus.

The rows, the table and the picture of what :mod:`model.distance` measures; the layers it recommends are what
``memory3 train continual --memory-layers`` takes.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flows.console import print_rows
from flows.splitting import is_held_out
from model.distance import DISTANCE, DistanceReport, cut_sequences, measure_distance_use, recommend_layers
from pipelines.formats import list_corpus_files
from pipelines.reading import read_records
from pipelines.records import ReadingConfig
from schemas.errors import InputError

CHARS_PER_TOKEN = 16
"""Characters of a text that are tokenized for each token that is read: the rest of a book would be thrown away."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankingRequest:
    """What is to be measured.

    Attributes:
        model: ``memory3-tiny`` or the folder of a checkpoint.
        corpus: files, folders and globs of texts that the model has not seen.
        distance: tokens back from which a token is distant.
        num_sequences: texts that are read, each from its beginning; the first of the corpus that are long enough.
        sequence_tokens: tokens that are read of a text.
        held_out_only: True leaves out documents that the shipped model was trained on, see :mod:`flows.splitting`.
        text_column: the column that holds the text.
        device: where to compute.
        dtype: the type to compute in.
    """

    model: str
    corpus: tuple[str, ...]
    distance: int = DISTANCE
    num_sequences: int = 32
    sequence_tokens: int = 1024
    held_out_only: bool = False
    text_column: str = "text"
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: a number is out of bounds.
        """
        if self.distance < 1 or self.num_sequences < 1:
            raise InputError(
                f"rank: distance is {self.distance} and sequences {self.num_sequences}, must be at least 1"
            )
        if self.sequence_tokens < self.distance + 4:
            raise InputError(
                f"rank: sequence_tokens is {self.sequence_tokens}, must be at least {self.distance + 4}, the distance "
                "and what is predicted from beyond it"
            )


def rank_layers(request: RankingRequest) -> DistanceReport:
    """Measures a model on the texts of a corpus.

    Raises:
        InputError: the model cannot be loaded, takes no such sequences, or no text is long enough.
        CorpusError: the corpus cannot be read.
    """
    from model.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(request.model, device=request.device, dtype=request.dtype)
    limit = getattr(checkpoint.config, "max_position_embeddings", None) or request.sequence_tokens
    if request.sequence_tokens > limit:
        raise InputError(f"rank: sequence_tokens is {request.sequence_tokens}, must be at most {limit} for this model")
    sequences = []
    for text in _iterate_texts(request):
        sequences += cut_sequences(checkpoint, [text], num_tokens=request.sequence_tokens, distance=request.distance)
        if len(sequences) == request.num_sequences:
            break
    if not sequences:
        raise InputError(f"rank: no text of the corpus has {request.distance + 4} tokens; give longer ones")
    return measure_distance_use(checkpoint, sequences, distance=request.distance)


def _iterate_texts(request: RankingRequest) -> Iterator[str]:
    config = ReadingConfig(text_column=request.text_column)
    for file in list_corpus_files(request.corpus):
        for batch in read_records(file, config):
            for record in batch.select(["doc_id", "text"]).to_pylist():
                skipped = request.held_out_only and not is_held_out(record["doc_id"] or "")
                if record["text"] is not None and not skipped:
                    yield record["text"][: CHARS_PER_TOKEN * request.sequence_tokens]


def list_ranking(report: DistanceReport, num_layers: int | None = None) -> list[dict[str, Any]]:
    """Returns a row for each layer of the model, in order.

    Args:
        report: what was measured.
        num_layers: memory layers to recommend; half of the layers by default.
    """
    chosen = recommend_layers(report, num_layers or max(1, len(report.layers) // 2))
    return [
        {
            "layer": use.layer,
            "loss_increase": use.loss_increase,
            "distant_share": sum(use.distant_shares) / len(use.distant_shares),
            "most_distant_share": max(use.distant_shares),
            "most_distant_head": max(range(len(use.distant_shares)), key=use.distant_shares.__getitem__),
            "first_share": sum(use.first_shares) / len(use.first_shares),
            "recommended": use.layer in chosen,
        }
        for use in report.layers
    ]


def print_ranking(rows: Sequence[dict[str, Any]], report: DistanceReport) -> None:
    """Prints the rows of :func:`list_ranking` for people."""
    print(
        f"text more than {report.distance} tokens back; loss {report.loss:.4f} nats over {report.num_tokens:,} tokens"
    )
    cells = [
        [
            row["layer"],
            f"{row['loss_increase']:+.4f}",
            f"{row['distant_share']:.1%}",
            f"{row['most_distant_share']:.1%}",
            row["most_distant_head"],
            f"{row['first_share']:.1%}",
            "memory layer" if row["recommended"] else "",
        ]
        for row in rows
    ]
    columns = ["layer", "loss without it", "attention to it", "at most", "by head", "to the first token", ""]
    print_rows(columns, cells, numeric=set(range(6)))


def plot_ranking(report: DistanceReport, target: Path) -> None:
    """Draws the shares of all heads as a heat map, and the loss increase of each layer beside it, into a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shares = [use.distant_shares for use in report.layers]
    figure = Figure(figsize=(8, 1.5 + 0.22 * len(shares)), layout="constrained")
    FigureCanvasAgg(figure)
    heat, bars = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    image = heat.imshow(shares, aspect="auto", origin="lower", vmin=0.0, cmap="viridis")
    figure.colorbar(image, ax=heat, label=f"attention more than {report.distance} tokens back")
    heat.set_xlabel("query head")
    heat.set_ylabel("layer")
    bars.barh([use.layer for use in report.layers], [use.loss_increase for use in report.layers])
    bars.set_xlabel("loss increase, nats")
    figure.savefig(str(target), dpi=120)
