"""The commands that change a bank after it was built, and those that look into its history."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from flows.options import (
    BankOption,
    DryRunOption,
    JsonOption,
    RunnerOption,
    RunnerOptionsOption,
    WorkersOption,
    open_bank,
    print_result,
    show_work,
)

app = typer.Typer()

BACKWARD = {"ignore_unknown_options": True}
"""Lets an argument be -1, which would be taken for an option."""


@app.command()
def update(
    bank: BankOption,
    corpus: Annotated[
        list[str] | None,
        typer.Option(help="All of the corpus, as for build; that of the newest version if not given.", metavar="PATH"),
    ] = None,
    runner: RunnerOption = None,
    runner_options: RunnerOptionsOption = None,
    workers: WorkersOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make a bank equal to its corpus: documents added, changed and gone.

    Only documents of new content are cut, only references never seen are encoded. The settings are those of the build.

    Example: memory3 update --bank my-bank --corpus docs/
    """
    from flows.building import find_update
    from schemas.stores import open_store

    given = {"runner": runner, "num_workers": workers, "options": runner_options}
    engine = {key: value for key, value in given.items() if value is not None}
    # What needs no work needs no engine.
    summary = find_update(open_store(bank), corpus)
    if summary is not None and dry_run:
        summary = {"dry_run": True, "version": summary["version"], "changes": {}}
    if summary is None:
        with show_work(with_engine=True):
            from flows.build import update_bank

            summary = update_bank(corpus, bank, engine, dry_run=dry_run)
    print_result(summary, bank, as_json=as_json)


@app.command()
def delete(
    bank: BankOption,
    document: Annotated[list[str], typer.Option(help="Id of a document; may be given again.", metavar="ID")],
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Take documents out of a bank. Older versions, and the files, hold them until a purge.

    The corpus is not touched: an update brings back what is still in it.

    Example: memory3 delete --bank my-bank --document pep-0008
    """
    with show_work():
        from flows.deleting import delete_documents
        from schemas.stores import open_store

        summary = delete_documents(open_store(bank), document, dry_run=dry_run)
    print_result(summary, bank, as_json=as_json)


@app.command()
def purge(
    bank: BankOption,
    document: Annotated[
        list[str] | None, typer.Option(help="Id of a document to delete first; may be given again.", metavar="ID")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Forget for good: rewrite what holds deleted documents, prove it, and remove all older versions.

    The corpus is not touched: an update brings back what is still in it.

    Example: memory3 purge --bank my-bank --document leaked-mail-17
    """
    with show_work():
        from flows.purging import purge_bank
        from schemas.stores import open_store

        result = purge_bank(open_store(bank), document or [])
    from flows.console import print_json, print_purge

    if as_json:
        print_json(dataclasses.asdict(result))
    else:
        print_purge(result, bank)


@app.command()
def compact(bank: BankOption, as_json: JsonOption = False) -> None:
    """Rewrite the newest version as one segment, without rows that nothing needs any more.

    Example: memory3 compact --bank my-bank && memory3 gc --bank my-bank --keep 3
    """
    with show_work():
        from flows.compacting import compact_bank
        from schemas.stores import open_store

        summary = compact_bank(open_store(bank))
    print_result(summary, bank, as_json=as_json)


@app.command()
def migrate(
    bank: BankOption,
    model: Annotated[
        str | None,
        typer.Option(help="memory3-tiny, or the folder of a transformers model; that of the bank if not given."),
    ] = None,
    codec: Annotated[
        str | None, typer.Option(help="How vectors are to be stored: a codec, or the file of a trained one.")
    ] = None,
    first: Annotated[
        int | None,
        typer.Option(help="Commit after so many of the most used references; the rest is encoded when retrieved."),
    ] = None,
    uses: Annotated[
        Path | None,
        typer.Option(help="Parquet or CSV with ref_id and count: how often references were used.", metavar="FILE"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Encode the references of a bank for another model or codec, as a new version; the old one serves meanwhile.

    All memories are made, also where the bank was built --cold, unless --first sets a limit.

    Example: memory3 migrate --bank my-bank --model ./model-2 --first 100000
    """
    with show_work():
        from flows.migrating import Migration, migrate_bank, read_uses
        from schemas.stores import open_store

        wanted = Migration(model=model, codec=codec, limit=first, uses=read_uses(uses) if uses else None)
        summary = migrate_bank(open_store(bank), wanted)
    print_result(summary, bank, as_json=as_json)


@app.command()
def log(bank: BankOption, as_json: JsonOption = False) -> None:
    """List the versions of a bank: what made each, and what it changed.

    Example: memory3 log --bank my-bank
    """
    from flows.console import print_json, print_log
    from flows.history import describe_versions
    from schemas.stores import open_store

    versions = describe_versions(open_store(bank))
    if as_json:
        print_json([dataclasses.asdict(version) for version in versions])
    else:
        print_log(versions)


@app.command(context_settings=BACKWARD)
def diff(
    bank: BankOption,
    before: Annotated[str, typer.Argument(help="A version: number, tag, or -1.", metavar="VERSION")] = "-1",
    after: Annotated[str | None, typer.Argument(help="Another; the newest if not given.", metavar="VERSION")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show how two versions differ: documents, live references, files, settings, model.

    Example: memory3 diff --bank my-bank 1 2
    """
    from flows.console import print_difference, print_json
    from flows.history import compare_versions

    difference = compare_versions(open_bank(bank, before), open_bank(bank, after))
    if as_json:
        print_json(difference.to_json())
    else:
        print_difference(difference)


@app.command(context_settings=BACKWARD)
def rollback(
    bank: BankOption,
    version: Annotated[
        str, typer.Argument(help="The version to go back to: number, tag, or -1 for the one before.", metavar="VERSION")
    ],
    as_json: JsonOption = False,
) -> None:
    """Make an old version the newest again. Nothing is lost: it is a new version with the files of the old one.

    Example: memory3 rollback --bank my-bank 3
    """
    from flows.console import print_json
    from flows.history import roll_back
    from schemas.stores import open_store
    from schemas.tags import find_version

    store = open_store(bank)
    number = find_version(store, version)
    assert number is not None
    manifest = roll_back(store, number)
    if as_json:
        print_json({"version": manifest.version, "content_of": number})
    else:
        print(f"{bank} version {manifest.version} has the content of version {number}")


@app.command()
def tag(
    bank: BankOption,
    name: Annotated[str | None, typer.Argument(help="The tag; all are listed if not given.", metavar="NAME")] = None,
    at: Annotated[str | None, typer.Option("--at", help="Version to name; the newest if not given.")] = None,
    move: Annotated[bool, typer.Option("--move", help="Let a tag that exists name this version.")] = False,
    remove: Annotated[bool, typer.Option("--remove", help="Remove the tag.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Name a version, so that gc keeps it and --at finds it.

    Example: memory3 tag --bank my-bank before-import
    """
    from flows.console import print_json
    from schemas.errors import InputError
    from schemas.stores import open_store
    from schemas.tags import list_tags, remove_tag, set_tag

    if name is None and (remove or move or at is not None):
        raise InputError("give the name of the tag: memory3 tag --bank BANK NAME, and then the options")
    store = open_store(bank)
    if name is not None and remove:
        remove_tag(store, name)
    elif name is not None:
        set_tag(store, name, open_bank(bank, at).manifest.version, move=move)
    tags = list_tags(store)
    if as_json:
        print_json(tags)
        return
    for tagged, version in tags.items():
        print(f"{tagged}  version {version}")


@app.command()
def gc(
    bank: BankOption,
    keep: Annotated[int | None, typer.Option(help="Newest versions that stay; all if not given.")] = None,
    older_than: Annotated[
        float | None, typer.Option(help="Only versions older than this many days go.", metavar="DAYS")
    ] = None,
    min_age_hours: Annotated[
        float, typer.Option(help="In an object store: age from which a file no version names goes.")
    ] = 24.0,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Remove files that no version needs, and versions beyond the newest ones. Tagged versions stay.

    Example: memory3 gc --bank my-bank --keep 5
    """
    from flows.collecting import collect, plan_collection
    from flows.console import print_collection, print_json
    from schemas.stores import open_store

    store = open_store(bank)
    plan = plan_collection(store, keep=keep, older_than_days=older_than, min_age_hours=min_age_hours)
    done = plan if dry_run else collect(store, plan)
    if as_json:
        print_json({"dry_run": dry_run, **dataclasses.asdict(done)})
    else:
        print_collection(done, bank, dry_run=dry_run)
