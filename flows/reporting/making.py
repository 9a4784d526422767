"""The sections of a report, put together from a version's manifest, tables, indexes and model."""

import dataclasses
import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, ParamSpec, TypeVar

from flows.history import describe_versions, flatten_settings
from flows.progress import show_stage
from flows.reporting.approximations import measure_codec, measure_index
from flows.reporting.changes import describe_changes
from flows.reporting.contents import CodecError, Head, Part, Report, Skipped, Stage, Storage, Tally, Verification
from flows.verifying import get_release, verify_bank
from model.recall import IndexRecall
from pipelines.duplicate_clusters import ClusterSurvey, survey_clusters
from pipelines.indexing import explain_merge
from pipelines.inspecting import open_views
from pipelines.running import check_stop
from pipelines.surveying import Bin, Survey, survey_version
from schemas.bank import CHECKS_FOLDER, Bank
from schemas.errors import BankError, BankFormatError, InputError, StoppedError
from schemas.manifest import Manifest, list_versions, read_manifest
from schemas.tags import list_tags

P = ParamSpec("P")
T = TypeVar("T")

NUM_LISTED_VERSIONS = 10

MAX_RESULT_BYTES = 1 << 20

NO_SAMPLE = Skipped(skipped="not measured, because no sample was asked for")

STAGE_ORDER = (
    "models",
    "read",
    "score",
    "deduplicate documents",
    "chunk",
    "tables",
    "gather",
    "decontaminate",
    "sign",
    "deduplicate",
    "embed",
    "embeddings",
    "write",
    "memories",
    "assemble",
)
"""A manifest sorts its keys, so the order in which stages ran is not in it."""

GROUPS = {"shard": "memories", "memories": "memories", "index": "index", "codec": "codec"}
"""Which part of a bank a kind of file belongs to, if it is not a table."""

STAGE_ITEMS = {
    "read": ("documents.read", "records"),
    "chunk": ("changes.documents.chunked", "documents"),
    "gather": ("references.read", "references"),
    "deduplicate": ("references.read", "references"),
    "embed": ("changes.references.embedded", "references"),
    "write": ("changes.references.encoded", "references"),
}
"""Where a manifest counts what a stage has worked through, and what that is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportRequest:
    """What a report is to hold.

    Attributes:
        deep: verify every byte.
        model: the model to measure the codec with; None for that of the bank, without which the section is skipped.
        num_samples: references that codec and index are measured on; 0 measures neither.
        seed: of every sample.
    """

    deep: bool = False
    model: str | None = None
    num_samples: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: a number below 0.
        """
        for name in ("num_samples", "seed"):
            if getattr(self, name) < 0:
                raise InputError(f"report: {name} is {getattr(self, name)}, must be at least 0")


def make_report(bank: Bank, wanted: ReportRequest) -> Report:
    """Computes everything a report says of a version; what cannot be computed is skipped with its reason.

    Raises:
        BankError: the model that was asked for by name cannot be used.
        BankFormatError: the manifest lacks what every version says of itself.
        StoppedError: a stop was asked for.
    """
    head = describe_head(bank, wanted.seed)
    verification = _verify(bank, deep=wanted.deep)
    with show_stage("tables"):
        survey, clusters = _survey(bank, wanted.seed)
    with show_stage("changes"):
        changes = _attempt(describe_changes, bank, wanted.seed)
        versions = _attempt(describe_versions, bank.store)
    codec: CodecError | Skipped = NO_SAMPLE
    index: IndexRecall | Skipped = NO_SAMPLE
    if wanted.num_samples:
        index = _attempt(measure_index, bank, num_queries=wanted.num_samples, seed=wanted.seed)
        sample = {"num_references": wanted.num_samples, "seed": wanted.seed}
        if wanted.model is None:
            codec = _attempt(measure_codec, bank, head.model, **sample)
        else:
            codec = measure_codec(bank, wanted.model, **sample)
    return Report(
        head=head,
        verification=verification,
        tallies=[tally_counts(bank.manifest, noun) for noun in ("documents", "references")],
        survey=survey,
        clusters=clusters,
        storage=measure_storage(bank),
        codec=codec,
        index=index,
        stages=list_stages(bank.manifest),
        changes=changes,
        versions=versions if isinstance(versions, Skipped) else versions[-NUM_LISTED_VERSIONS:],
    )


def _attempt(compute: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | Skipped:
    """Returns a section, or why it cannot be there.

    Raises:
        StoppedError: a stop was asked for.
    """
    check_stop()
    try:
        return compute(*args, **kwargs)
    except StoppedError:
        raise
    except BankError as error:
        return Skipped(skipped=" ".join(str(error).split()))


def _survey(bank: Bank, seed: int) -> tuple[Survey | Skipped, ClusterSurvey | Skipped]:
    views = _attempt(open_views, bank)
    if isinstance(views, Skipped):
        return views, views
    with views:
        return _attempt(survey_version, views), _attempt(survey_clusters, views, seed)


def describe_head(bank: Bank, seed: int) -> Head:
    """Says which version it is.

    Raises:
        BankFormatError: the manifest names no models, which every version does.
    """
    manifest, layout = bank.manifest, bank.manifest.layout
    settings = dict(flatten_settings(manifest.config))
    model, corpus = settings.get("memory.model"), settings.pop("corpus", None)
    if not isinstance(model, str) or not isinstance(corpus, list) or "embedding.embedder" not in settings:
        raise BankFormatError(f"version {manifest.version} of bank {bank.url} names no models; build the bank again")
    numbers = f"{layout.num_layers} layers x {layout.num_kv_heads} heads x {layout.num_slots} tokens x 2"
    return Head(
        bank=bank.url,
        version=manifest.version,
        parent=manifest.parent,
        newest=list_versions(bank.store)[-1],
        tags=[name for name, version in list_tags(bank.store).items() if version == manifest.version],
        operation=manifest.operation,
        created_at=manifest.created_at,
        model=model,
        fingerprint=manifest.fingerprint.digest,
        embedder=manifest.embedder_id,
        codec=layout.codec,
        layout=f"{numbers} vectors of {layout.head_dim} numbers",
        memory_bytes=layout.payload_bytes,
        is_cold=manifest.cold,
        corpus=[str(path) for path in corpus],
        settings=settings,
        reported_at=datetime.now(UTC).isoformat(timespec="seconds"),
        release=get_release(),
        seed=seed,
    )


def _verify(bank: Bank, *, deep: bool) -> Verification:
    """Checks the bank; a quick look does not take the place of a deep one that was kept."""
    kept = _read_kept_result(bank)
    checks = verify_bank(bank, deep=deep, keep=deep)
    return Verification(deep=deep, passed=all(check.passed for check in checks), checks=checks, kept=kept)


def _read_kept_result(bank: Bank) -> dict[str, Any] | None:
    """Returns what ``memory3 verify`` found last, None if it was never run or its file is not whole."""
    try:
        content = bank.store.read_range(f"{CHECKS_FOLDER}/{bank.manifest.version:08d}.json", 0, MAX_RESULT_BYTES)
        result = json.loads(content)
        return {name: result[name] for name in ("checked_at", "release", "deep", "passed")}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def tally_counts(manifest: Manifest, noun: str) -> Tally:
    """Returns what a manifest counts of documents or references."""
    counts = manifest.counts.get(noun, {})
    dropped = sorted(counts.get("dropped", {}).items(), key=lambda reason: (-reason[1], reason[0]))
    return Tally(
        noun=noun,
        read=counts.get("read", 0),
        kept=counts.get("kept", 0),
        dropped=[Bin(label=reason, count=count) for reason, count in dropped],
    )


def measure_storage(bank: Bank) -> Storage:
    """Adds up the files of a version by kind; what is new is what the parent does not name."""
    manifest = bank.manifest
    known: set[str] = set()
    if manifest.parent is not None and manifest.parent in list_versions(bank.store):
        known = {file.path for file in read_manifest(bank.store, manifest.parent).files}
    parts = []
    for kind in {file.kind for file in manifest.files}:
        files = manifest.list_files(kind)
        parts.append(
            Part(
                kind=kind,
                group=GROUPS.get(kind, "tables"),
                num_files=len(files),
                num_rows=sum(file.num_rows for file in files),
                size_bytes=sum(file.size_bytes for file in files),
                new_size_bytes=sum(file.size_bytes for file in files if file.path not in known),
            )
        )
    size_bytes = sum(part.size_bytes for part in parts)
    num_live = manifest.counts.get("references", {}).get("kept", 0)
    reason = explain_merge([file.num_rows for file in manifest.list_files("index")], num_live)
    return Storage(
        parts=sorted(parts, key=lambda part: (-part.size_bytes, part.kind)),
        num_segments=len({file.path.rpartition("/")[0] for file in manifest.files}),
        size_bytes=size_bytes,
        new_size_bytes=sum(part.new_size_bytes for part in parts),
        bytes_a_reference=size_bytes / num_live if num_live else None,
        advice=f"run memory3 compact: {reason}" if reason else "",
    )


def list_stages(manifest: Manifest) -> list[Stage]:
    """Returns the stages of the run that made a version, in the order they are run; none if it had none."""
    order = {name: place for place, name in enumerate(STAGE_ORDER)}
    names = sorted(manifest.seconds, key=lambda name: (order.get(name, len(order)), name))
    return [
        Stage(
            name=name,
            seconds=manifest.seconds[name],
            num_items=_find_count(manifest.counts, STAGE_ITEMS[name][0]) if name in STAGE_ITEMS else None,
            noun=STAGE_ITEMS[name][1] if name in STAGE_ITEMS else "",
        )
        for name in names
    ]


def _find_count(counts: dict[str, Any], path: str) -> int | None:
    """Returns a count by its dotted name, None if it was not taken."""
    value: Any = counts
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, int) else None
