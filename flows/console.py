"""What the commands print: for people by rich, for programs as JSON."""

import json
import sys
from collections.abc import Set
from typing import TYPE_CHECKING, Any

import pyarrow as pa

if TYPE_CHECKING:
    from flows.aligning import AlignmentResult
    from flows.benching import BenchReport
    from flows.citing import CitingText
    from flows.codec_listing import ListedCodec
    from flows.codec_training import CodecReport
    from flows.collecting import Collection
    from flows.evaluating.harness.harness_runs import HarnessReport
    from flows.grading import GradingResult
    from flows.history import VersionDifference, VersionSummary
    from flows.purging import PurgeResult
    from flows.reporting.contents import Report
    from flows.searching import FoundReference
    from flows.showing import ShownReference
    from flows.training import TrainingResult
    from model.chunk_memories import ChunkTrace
    from model.planning import PlanRow
    from schemas.records import RecordLayout
    from schemas.sequences import DatasetManifest


def print_json(value: Any) -> None:
    """Prints a value as one JSON document."""
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def format_bytes(size_bytes: float) -> str:
    """Returns a size as people read it, in decimal units."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size_bytes < 1000:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.1f} PB"


def print_rows(columns: list[str], rows: list[list[Any]], *, numeric: Set[int] = frozenset()) -> None:
    """Prints a table for people; columns named in ``numeric`` stand right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place in numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text("" if value is None else str(value)) for value in row))
    # A pipe has no width of its own; a wide one keeps the rows whole for whoever reads them.
    console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(table)


def print_arrow(table: pa.Table) -> None:
    """Prints a query's result for people."""
    numeric = {
        place
        for place, field in enumerate(table.schema)
        if pa.types.is_integer(field.type) or pa.types.is_floating(field.type)
    }
    rows = [[_shorten(value) for value in row.values()] for row in table.to_pylist()]
    print_rows(table.column_names, rows, numeric=numeric)
    print(f"{len(table):,} row{'' if len(table) == 1 else 's'}")


def _shorten(value: Any, limit: int = 120) -> str:
    text = (
        "" if value is None else f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    )
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def describe_counts(counts: dict[str, int] | int) -> str:
    """Returns counts by name as a phrase, those that are 0 left out."""
    if isinstance(counts, int):
        return str(counts)
    return ", ".join(f"{number:,} {name.replace('_', ' ')}" for name, number in counts.items() if number) or "none"


def _join_changes(changes: dict[str, Any]) -> str:
    """Returns all changes as one line."""
    return "; ".join(f"{name.replace('_', ' ')}: {describe_counts(counts)}" for name, counts in changes.items())


def print_changes(changes: dict[str, Any], heading: str) -> None:
    """Prints by what a version differs from the one before, or would."""
    print(heading if changes else heading.replace("would change:", "would stay as it is"))
    for name, counts in changes.items():
        print(f"  {name:<11} {describe_counts(counts)}")


def print_log(versions: "list[VersionSummary]") -> None:
    """Prints the versions of a bank, the newest first."""
    columns = ["version", "made by", "at", "documents", "references", "size", "new", "changes", "tags"]
    rows = [
        [
            version.version,
            version.operation,
            version.created_at[:19].replace("T", " "),
            "" if version.num_documents is None else f"{version.num_documents:,}",
            "" if version.num_references is None else f"{version.num_references:,}",
            format_bytes(version.size_bytes),
            format_bytes(version.new_size_bytes),
            "; ".join(
                f"{name.replace('_', ' ')}: {describe_counts(counts)}" for name, counts in version.changes.items()
            ),
            ", ".join(version.tags),
        ]
        for version in reversed(versions)
    ]
    print_rows(columns, rows, numeric={0, 3, 4, 5, 6})


def print_codecs(codecs: "list[ListedCodec]", layout: "RecordLayout") -> None:
    """Prints codecs with the bytes they take."""
    rows = [
        [
            codec.name,
            codec.key_bytes,
            codec.value_bytes,
            f"{codec.memory_bytes:,}",
            f"{codec.factor:.2f}",
            "yes" if codec.trained else "",
        ]
        for codec in codecs
    ]
    columns = ["codec", "bytes a key", "a value", "a reference", "times smaller", "to be trained"]
    print_rows(columns, rows, numeric={1, 2, 3, 4})
    shape = f"{layout.num_layers} layers x {layout.num_kv_heads} heads x {layout.num_slots} tokens x {layout.head_dim}"
    print(f"for memories of {shape} numbers, in {layout.dtype} where they are stored as they are")


def print_codec_report(report: "CodecReport", path: str) -> None:
    """Prints what a trained codec takes and loses."""
    rows = [
        ["codec", report.codec],
        ["trained on", f"{report.num_references:,} references"],
        ["bytes a vector", f"{report.key_bytes} a key, {report.value_bytes} a value"],
        ["bytes a reference", f"{report.memory_bytes:,}, {report.factor:.2f} times smaller"],
        ["signal to noise", f"{report.key_snr_db:.1f} dB keys, {report.value_snr_db:.1f} dB values"],
        ["error of attention", f"{report.attention_error:.2%}"],
        ["measured on", f"{report.num_held_out:,} other references"],
        ["file", f"{path}, {format_bytes(report.file_bytes)}"],
    ]
    print_rows(["", ""], rows)
    for note in report.notes:
        print(note)


MAX_LISTED_IDS = 10


def print_difference(difference: "VersionDifference") -> None:
    """Prints how two versions differ."""
    print(f"from version {difference.before} to version {difference.after}")
    for name in ("added", "changed", "removed"):
        ids = getattr(difference, f"documents_{name}")
        shown = ", ".join(ids[:MAX_LISTED_IDS].to_pylist()) + (", ..." if len(ids) > MAX_LISTED_IDS else "")
        print(f"  documents {name:<8} {len(ids):>9,}  {shown}")
    for name in ("added", "removed"):
        print(f"  references {name:<7} {len(getattr(difference, f'references_{name}')):>9,}")
    for name in ("added", "removed"):
        size = format_bytes(getattr(difference, f"{name}_size_bytes"))
        print(f"  files {name:<12} {len(getattr(difference, f'files_{name}')):>9,}  {size}")
    for name, (before, after) in difference.config.items():
        print(f"  setting {name}: {before} -> {after}")
    if difference.fingerprint:
        print(f"  the model differs in: {', '.join(difference.fingerprint)}")


def print_collection(done: "Collection", bank: str, *, dry_run: bool) -> None:
    """Prints what gc removed, or would."""
    verb = "would be removed from" if dry_run else "removed from"
    versions = f"versions {', '.join(map(str, done.versions))}" if done.versions else "no version"
    num_files = len(done.files) + len(done.caches)
    print(f"{verb} {bank}: {versions}, {num_files:,} files, {format_bytes(done.size_bytes)}")


def print_purge(result: "PurgeResult", bank: str) -> None:
    """Prints what a purge removed and what it searched."""
    gone = ", ".join(map(str, result.removed_versions)) or "none"
    print(f"{bank} version {result.version} is all that is left; versions removed: {gone}")
    if result.removed_tags:
        print(f"tags removed: {', '.join(result.removed_tags)}")
    print(f"{format_bytes(result.freed_bytes)} freed, {result.num_forgotten:,} references forgotten")
    if result.num_standing:
        print(f"{result.num_standing:,} of their texts are part of other documents, where they stay")
    if result.trained_codec:
        print(
            f"the parameters of the codec {result.trained_codec} stay, learnt from memories some of which may be gone: "
            "train it anew and migrate if no number of those may stay"
        )
    size = format_bytes(result.searched_bytes)
    print(f"searched {result.num_files:,} files, {size}, and the columns of all tables: no trace is left")


def print_summary(summary: dict[str, Any], bank: str) -> None:
    """Prints what an operation has made: documents, references, drops by reason, bytes, seconds a stage."""
    version = summary["version"]
    if summary["unchanged"]:
        print(f"{bank} is up to date: version {version} has this content and this configuration already")
    else:
        print(f"{bank} version {version}")
    rows = []
    for name in ("documents", "references"):
        counts = summary["counts"][name]
        drops = ", ".join(f"{number:,} {reason}" for reason, number in counts["dropped"].items()) or "none"
        rows.append([name, f"{counts['read']:,}", f"{counts['kept']:,}", f"{sum(counts['dropped'].values()):,}", drops])
    print_rows(["", "read", "kept", "dropped", "by reason"], rows, numeric={1, 2, 3})
    changes = summary["counts"].get("changes", {})
    if not summary["unchanged"] and summary["operation"] != "build":
        print(f"changes     {_join_changes(changes)}")
    kept = summary["counts"]["references"]["kept"]
    print(f"size        {format_bytes(summary['size_bytes'])}, {summary['bytes_a_reference']:,} bytes a reference")
    skipped = summary["counts"].get("pairs_not_compared", 0)
    if skipped:
        print(f"duplicates  {skipped:,} pairs of very common texts were not compared; raise max_bucket to compare more")
    seconds = summary["seconds"]
    total = sum(seconds.values())
    stages = ", ".join(f"{name} {spent:.1f}" for name, spent in seconds.items())
    print(f"seconds     {total:.1f} in all: {stages}")
    if not summary["unchanged"] and summary["operation"] == "build" and total:
        print(f"rate        {kept / total:,.0f} references a second")
    if summary["advice"]:
        print(f"advice      {summary['advice']}")


def print_report(report: "Report", path: str) -> None:
    """Prints where a report is, and what is not in it."""
    head = report.head
    state = "sound" if report.verification.passed else "damaged"
    print(f"{path}: {head.bank} version {head.version}, {state}")
    for name, section in vars(report).items():
        if reason := getattr(section, "skipped", ""):
            print(f"without {name}: {reason}")


def print_reference(shown: "ShownReference") -> None:
    """Prints a reference with the words its memory kept marked: the more heads kept a token, the stronger."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True, markup=False)
    text = Text()
    for token in shown.tokens:
        share = token.num_heads / max(1, shown.num_heads)
        style = (
            "" if not share else "bold black on yellow" if share > 0.5 else "bold yellow" if share > 0.25 else "yellow"
        )
        text.append(token.text if console.is_terminal or not share else _bracket(token.text), style)
    console.print(f"reference {shown.ref_id}  {shown.num_tokens} tokens")
    if shown.contaminated:
        found = shown.contaminated
        console.print(f"left out: it gives away {found['matched_doc_id']} (overlap {found['overlap']:.3f})")
    if shown.kept_for:
        kept = shown.kept_for
        console.print(f"dropped as a near-duplicate of {kept['kept_ref_id']} (Jaccard {kept['jaccard']:.3f})")
    console.print()
    console.print(text)
    console.print()
    kept_tokens = sum(token.num_heads > 0 for token in shown.tokens)
    marks = "highlighted" if console.is_terminal else "in [brackets]"
    console.print(f"{kept_tokens} tokens kept by at least one of {shown.num_heads} heads, {marks}")
    for place in shown.occurrences:
        span = f"characters {place['start_char']:,}..{place['end_char']:,}"
        console.print(f"stands in {place['doc_id']} as number {place['ordinal']}, {span}")
    for duplicate in shown.duplicates:
        console.print(f"kept for {duplicate['ref_id']} (Jaccard {duplicate['jaccard']:.3f})")


def _bracket(text: str) -> str:
    core = text.strip()
    return text.replace(core, f"[{core}]", 1) if core else text


def print_hits(hits: "list[FoundReference]") -> None:
    """Prints the hits of a search, best first, each with its score, its id and its first lines."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True, markup=False)
    for hit in hits:
        console.print(Text(f"{hit.score:.3f}  {hit.ref_id}  {hit.doc_id}", style="bold"))
        console.print(Text("       " + _shorten(hit.text, 200)))
    if not hits:
        print("nothing found")


def print_traces(traces: "list[ChunkTrace]") -> None:
    """Prints which memories each chunk read and how its memory attention was divided among them."""
    rows = []
    for chunk in traces:
        shares = [f"{share:.0%}" for share in chunk.attention] or ["as text"] * len(chunk.hits)
        for hit, share in zip(chunk.hits, shares, strict=True):
            rows.append([f"{chunk.first_token}", hit.ref_id, f"{hit.score:.3f}", share])
    print_rows(["from token", "memory", "similarity", "attention"], rows, numeric={0, 2, 3})


def print_citations(texts: "list[CitingText]") -> None:
    """Prints what each generated chunk cites, and what leaving it out says."""
    for number, text in enumerate(texts, start=1):
        if len(texts) > 1:
            print(f"\ntext {number}")
        for chunk, words in zip(text.chunks, text.texts, strict=True):
            print(f"\nfrom token {chunk.first_token}: {_shorten(words, 400)}")
            rows = []
            for citation in chunk.citations:
                source = text.sources[citation.ref_id]
                more = f" and {source.num_documents - 1:,} more" if source.num_documents > 1 else ""
                figures = [f"[{source.number}]", f"{citation.attention:.0%}", f"{citation.support:+.2f}"]
                where = f"{next(iter(source.documents), '')}{more}"
                rows.append([*figures, citation.verdict, where, _shorten(source.beginning, 60)])
            print_rows(["", "attention", "nats", "", "document", "begins"], rows, numeric={1, 2})
            print(f"all memories of the chunk: {chunk.support:+.2f} nats; up to {chunk.noise:.2f} is noise")


def print_bench(report: "BenchReport") -> None:
    """Prints a benchmark: on what machine, and its figures with the ratios of speeds."""
    for key, value in report.machine.items():
        print(f"{key + ':':<11}{value}")
    print(f"\n{report.title}")
    rows = [
        [
            row.name,
            _format_figure(row.value),
            row.unit,
            "" if row.ratio is None else f"{row.ratio:.2f}",
            row.against,
            row.note,
        ]
        for row in report.rows
    ]
    print_rows(["", "figure", "", "ratio", "against", ""], rows, numeric={1, 3})


def print_harness_report(report: "HarnessReport") -> None:
    """Prints the metrics of tasks with their standard errors, what was read, and what the filter dropped."""
    where = "" if report.bank is None else f", bank {report.bank} version {report.version}"
    ways = {"memory": "with memories", "text": "with references in the prompt", "none": "the ordinary model"}
    print(f"{report.model}: {ways[report.knowledge]}{where}; lm-eval {report.harness_version}")
    rows = [
        [
            row.task,
            row.num_fewshot,
            "" if row.filter == "none" else row.filter,
            row.metric,
            "" if row.value is None else f"{row.value:.4f}",
            "" if row.stderr is None else f"{row.stderr:.4f}",
            {True: "higher", False: "lower", None: ""}[row.higher_is_better],
            row.num_samples,
        ]
        for row in report.rows
    ]
    columns = ["task", "shots", "filter", "metric", "value", "standard error", "is better", "samples"]
    print_rows(columns, rows, numeric={1, 4, 5, 7})
    counts = report.counts
    print(
        f"scored     {counts['num_scored']:,} continuations and {counts['num_documents']:,} documents, "
        f"{counts['num_tokens']:,} tokens; generated {counts['num_generated']:,} texts, "
        f"{counts['num_new_tokens']:,} tokens; in {report.seconds:.1f} seconds"
    )
    if counts["num_cut"]:
        longest = report.options["max_length"]
        print(f"cut        {counts['num_cut']:,} contexts, which did not fit into {longest} tokens")
    if "num_searches" in counts and report.options["max_overlap"] == 1:
        print("filter     off: references are read that may hold the question")
    elif "num_searches" in counts:
        print(
            f"filter     {counts['num_searches']:,} searches; {counts['num_compared']:,} references compared with "
            f"their questions,\n           {counts['num_dropped']:,} dropped, {counts['num_dropped_references']:,} "
            f"different ones, for an overlap above {report.options['max_overlap']:.3g}; "
            f"{counts['num_short']:,} searches left with too few"
        )
    if report.attention_share is not None:
        print(f"attention  {report.attention_share:.1%} of it in the memory layers went to memories")


def print_plan(rows: "list[PlanRow]") -> None:
    """Prints a plan line by line."""
    cells = [[row.name, _format_figure(row.value), row.unit, row.note] for row in rows]
    print_rows(["", "value", "unit", ""], cells, numeric={1})


def _format_figure(value: int | float | None) -> str:
    if value is None:
        return "none"
    if isinstance(value, int):
        return f"{value:,}"
    rounded = float(f"{value:.3g}")
    return f"{rounded:g}" if abs(value) < 1000 else f"{rounded:,.0f}"


def print_training(result: "TrainingResult | AlignmentResult") -> None:
    """Prints what a training run came to."""
    summary = result.summary
    state = "finished" if summary.is_finished else "stopped; the same command goes on"
    went_on = f", went on at {summary.resumed_at:,}" if summary.resumed_at else ""
    skipped = f"; {summary.num_skipped} steps skipped as spikes" if summary.num_skipped else ""
    print(f"{result.folder}: {state} after {summary.step:,} steps and {summary.num_tokens:,} tokens{went_on}{skipped}")
    print(f"loss    {summary.loss:.4f} in the last steps; {result.folder}/loss.png shows all")
    print(f"model   {result.model}")


def print_dataset(manifest: "DatasetManifest", folder: str) -> None:
    """Prints what was prepared for training."""
    counts = manifest.counts
    documents = counts["documents"]
    print(f"{folder}: {counts['sequences']:,} sequences, {counts['targets']:,} tokens to predict")
    num_dropped = sum(documents["dropped"].values())
    print(f"documents   {documents['read']:,} read, {documents['kept']:,} kept, {num_dropped:,} dropped")
    if manifest.bank is not None:
        print(f"references  from {manifest.bank.url} version {manifest.bank.version}")
        print(
            f"chunks      {counts['chunks']:,}, of which {counts['chunks_without_candidate']:,} have none to read; "
            f"left out: {counts['leaking']:,} that give the sequence away, {counts['own_place']:,} from its own place"
        )


def print_alignment(result: "AlignmentResult") -> None:
    """Prints what SFT or DPO came to."""
    print_training(result)
    num_dropped = result.num_read - result.num_kept
    print(f"rows    {result.num_read:,} read, {result.num_kept:,} kept, {num_dropped:,} dropped")
    for reason, count in result.rejects.items():
        print(f"        {count:,} x {reason}")


def print_grading(result: "GradingResult") -> None:
    """Prints how well a classifier grades documents it was not trained on."""
    num_dropped = sum(result.rejects.values())
    print(f"documents  {result.num_read:,} read, {result.num_read - num_dropped:,} kept, {num_dropped:,} dropped")
    for reason, count in result.rejects.items():
        print(f"           {count:,} x {reason}")
    if result.report is None:
        print(f"stopped after {result.summary.step:,} steps; the same command goes on")
        return
    for name, value in vars(result.report).items():
        print(
            f"{name.replace('_', ' '):<26} {value:,.4g}"
            if isinstance(value, float)
            else f"{name.replace('_', ' '):<26} {value:,}"
        )
    print(f"model      {result.model}")
