"""The perplexity suite: the loss of held-out text in every way of knowing, item by item.

    held-out passages -> the same tokens scored in each way -> losses by document -> gains over no memory

All ways see the same tokens of the same passages, all but the first 64 of each. Retrieval is the same for memories and
for text: what is scored does not choose what is read, and references that hold more than 2/3 of their words in order
from the passage are left out (:mod:`model.overlap_filter`), and so are all of its own document in any version. An item
is a document. Each corpus has the same weight in the figures over all.
"""

import dataclasses
import shlex
import time
from collections.abc import Sequence

import numpy as np

from flows.config import NO_SETTING
from flows.evaluating.measurements import Measurement
from flows.evaluating.perplexity.passages import NUM_DOCUMENTS, NUM_PASSAGES, Passage, draw_passages
from flows.evaluating.perplexity.reporting import make_report
from flows.evaluating.perplexity.ways import (
    PASSAGES_AT_ONCE,
    Contestants,
    WayOptions,
    list_variants,
    name_variant,
)
from flows.evaluating.suite_reports import SuiteReport
from flows.generation import open_writer
from flows.progress import show_stage
from flows.splitting import find_family
from model.loglikelihoods import ScoredSequence
from model.overlap_filter import Questions
from model.reading import CHUNK_TOKENS
from schemas.bank import Bank
from schemas.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerplexityOptions:
    """What is measured.

    Attributes:
        corpus: files and folders of held-out text; each file of many documents is a corpus of its own.
        num_documents: documents of each corpus at most.
        num_passages: passages of 512 tokens of a document at most.
        ways: what is compared.
    """

    corpus: tuple[str, ...] = dataclasses.field(metadata=NO_SETTING)
    num_documents: int = NUM_DOCUMENTS
    num_passages: int = NUM_PASSAGES
    ways: WayOptions = dataclasses.field(default_factory=WayOptions)

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: a value is out of its bounds.
        """
        if not self.corpus:
            raise InputError("give held-out text with --corpus: files or folders the model has not seen")
        for name in ("num_documents", "num_passages"):
            if getattr(self, name) < 1:
                raise InputError(f"evaluation: {name} is {getattr(self, name)}, must be at least 1")


def find_own_references(bank: Bank, passages: Sequence[Passage]) -> dict[Questions, frozenset[str]]:
    """Returns for each passage the live references of its own document, in any version, and of what is nearly the same.

    A bank that holds a document would else give away what follows a passage: a reference that begins within it overlaps
    it too little for the filter.
    """
    duplicates = bank.read_table("duplicates", ["ref_id", "kept_ref_id"])
    kept = dict(zip(duplicates["ref_id"].to_pylist(), duplicates["kept_ref_id"].to_pylist(), strict=True))
    wanted = {find_family(passage.doc_id) for passage in passages}
    found: dict[str, set[str]] = {family: set() for family in wanted}
    table = bank.read_table("occurrences", ["doc_id", "ref_id"])
    for doc_id, ref_id in zip(table["doc_id"].to_pylist(), table["ref_id"].to_pylist(), strict=True):
        family = find_family(doc_id)
        if family in found:
            found[family].add(kept.get(ref_id, ref_id))
    own = {family: frozenset(ref_ids) for family, ref_ids in found.items()}
    return {(tuple(passage.tokens.tolist()),): own[find_family(passage.doc_id)] for passage in passages}


def score_passages(
    passages: Sequence[Passage], contestants: Contestants, variants: Sequence[tuple[str, int]]
) -> dict[str, list[float]]:
    """Returns for each variant the loss of each passage in nats, the first chunk aside."""
    scorers = {
        name_variant(*variant): scorer
        for variant in variants
        if (scorer := contestants.make_scorer(*variant)) is not None
    }
    sums: dict[str, list[float]] = {name: [] for name in scorers}
    num_scored = 0
    with show_stage("score", len(passages), "passages", lambda: num_scored):
        for start in range(0, len(passages), PASSAGES_AT_ONCE):
            tokens = [tuple(passage.tokens.tolist()) for passage in passages[start : start + PASSAGES_AT_ONCE]]
            sequences = [
                ScoredSequence(
                    context=passage[:CHUNK_TOKENS],
                    continuation=passage[CHUNK_TOKENS:],
                    earlier=(),
                    questions=(passage,),
                )
                for passage in tokens
            ]
            for name, scorer in scorers.items():
                sums[name] += [-scores.total for scores in scorer.score(sequences)]
            num_scored += len(tokens)
    return sums


def measure_losses_of(passages: Sequence[Passage], sums: dict[str, list[float]]) -> dict[str, Measurement]:
    """Returns the loss of each variant, documents as items and corpora as strata."""
    keys = list(dict.fromkeys((passage.source, passage.doc_id) for passage in passages))
    row_of = {key: row for row, key in enumerate(keys)}
    rows = [row_of[passage.source, passage.doc_id] for passage in passages]
    counts = np.bincount(rows, [len(passage.tokens) - CHUNK_TOKENS for passage in passages], len(keys))
    return {
        name: Measurement(
            name="loss",
            way=name,
            unit="nats a token",
            better="lower",
            keys=tuple(f"{source}/{doc_id}" for source, doc_id in keys),
            totals=np.bincount(rows, of_passages, len(keys)).astype(np.float64),
            weights=counts.astype(np.float64),
            strata=tuple(source for source, _ in keys),
        )
        for name, of_passages in sums.items()
    }


def run_perplexity(
    bank: Bank, model: str | None, options: PerplexityOptions, *, device: str | None = None
) -> SuiteReport:
    """Measures losses in each way of knowing.

    Args:
        bank: where references come from.
        model: the checkpoint, by name or folder; None for the one that wrote the bank.
        options: what is measured.
        device: where to compute; None for where the bank was written.

    Raises:
        InputError: no text is long enough, or an option does not fit the model.
        WrongModelError: the model cannot read the bank.
        CorpusError: a corpus cannot be read.
    """
    name = model or str(bank.manifest.config["memory"]["model"])
    with show_stage("model"):
        writer = open_writer(bank, name, device=device)
    sample = draw_passages(
        writer.checkpoint, options.corpus, num_documents=options.num_documents, num_passages=options.num_passages
    )
    excluded = {} if options.ways.own_document else find_own_references(bank, sample.passages)
    contestants = Contestants(bank, writer, options.ways, excluded)
    known = set(bank.read_table("documents", ["content_hash"])["content_hash"].to_pylist())
    data = {
        "model": name,
        "fingerprint": dataclasses.asdict(writer.fingerprint),
        "bank": bank.url,
        "version": bank.manifest.version,
        "num_references_in_bank": bank.manifest.counts["references"]["kept"],
        "corpora_sha256": sample.digest,
        "num_records": sample.num_read,
        "num_left_out": sample.num_dropped,
        "num_too_short": sample.num_short,
        "num_documents": len(sample.content_hashes),
        "num_documents_in_bank": len(known & set(sample.content_hashes)),
        "num_references_of_own_documents": len(set().union(*excluded.values())),
        "num_passages": len(sample.passages),
        "num_tokens": sum(len(passage.tokens) - CHUNK_TOKENS for passage in sample.passages),
    }
    started = time.monotonic()
    sums = score_passages(sample.passages, contestants, list_variants(contestants.ways, options.ways.num_references))
    losses = measure_losses_of(sample.passages, sums)
    seconds = time.monotonic() - started
    data["skipped"] = contestants.skipped
    data["filter"] = dataclasses.asdict(contestants.filtered.counts)
    data["filter"]["num_dropped_references"] = len(contestants.filtered.dropped_ids)
    return make_report(
        sample,
        losses,
        contestants.ways,
        options.ways,
        data=data,
        settings=dataclasses.asdict(options),
        command=make_command(bank, name, options),
        seconds=seconds,
    )


def make_command(bank: Bank, model: str, options: PerplexityOptions) -> str:
    """Returns the command that repeats a measurement."""
    ways = options.ways
    words = ["memory3", "eval", "perplexity", "--bank", bank.url, "--at", str(bank.manifest.version), "--model", model]
    words += [word for path in options.corpus for word in ("--corpus", path)]
    words += ["--documents", str(options.num_documents), "--passages", str(options.num_passages)]
    words += ["--references", ",".join(map(str, ways.num_references)), "--ways", ",".join(ways.ways)]
    words += [] if ways.codecs is None else ["--codecs", ",".join(ways.codecs)]
    words += ["--max-overlap", f"{ways.max_overlap:g}", "--shared-run", str(ways.shared_run)]
    words += [*(["--own-document"] if ways.own_document else [])]
    words += [] if ways.max_prompt_tokens is None else ["--max-prompt", str(ways.max_prompt_tokens)]
    return shlex.join(words)
