"""The commands ``memory3 deploy ...``: flows on a schedule, or when a corpus changes."""

import dataclasses
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.engine import configure_engine
from flows.options import BankOption, JsonOption, RunnerOption, RunnerOptionsOption, stop_at_once
from schemas.errors import InputError

if TYPE_CHECKING:
    from flows.deploying import DeploymentConfig

app = typer.Typer(
    invoke_without_command=True,
    help="Run flows on a schedule, or when a corpus changes: Prefect deployments, executed by this process or workers."
    "\n\nWithout --pool this process executes the runs until Ctrl-C, and starts a Prefect server if none answers."
    "\n\nExample: memory3 deploy --file deployments.yaml",
)

NameOption = Annotated[str, typer.Option("--name", help="Name of the deployment; that of the bank if not given.")]
CronOption = Annotated[str, typer.Option("--cron", help="When it runs, five fields: '0 3 * * *' is daily at three.")]
EveryOption = Annotated[str, typer.Option("--every", help="Time from one run to the next, such as 15m, 6h or 1d.")]
TimezoneOption = Annotated[str, typer.Option("--timezone", help="In which --cron is meant, such as Europe/Berlin.")]
PausedOption = Annotated[bool, typer.Option("--paused", help="Make it, but let no schedule start it.")]
PoolOption = Annotated[
    str, typer.Option("--pool", help="Work pool whose workers execute the runs; this process if not given.")
]
OverlapOption = Annotated[
    str, typer.Option("--overlap", help="A run that is due during another one: queue it, or cancel it.")
]
VerifyOption = Annotated[str, typer.Option("--verify", help="Check a new version at once: none, quick or deep.")]
PrintOption = Annotated[bool, typer.Option("--print", help="Only show what would be made.")]


def _deploy(configs: "list[DeploymentConfig]", *, only_print: bool) -> None:
    """Makes deployments, and serves and watches what is to be served and watched here until Ctrl-C."""
    from flows.console import print_json
    from flows.deploying import TAG, check_owners, describe_deployment, make_deployments, register_deployments
    from flows.hosting import reach_server, serve_deployments, watch_until_interrupt
    from flows.lost_runs import end_lost_runs
    from flows.progress import choose_display, set_display
    from flows.run_records import tolerate_server
    from flows.watching import Watch

    deployments = make_deployments(configs)
    pairs = list(zip(configs, deployments, strict=True))
    if only_print:
        print_json([describe_deployment(config, deployment) for config, deployment in pairs])
        return
    served = [deployment for config, deployment in pairs if not config.pool]
    _check_banks([config for config in configs if not config.pool])
    watches = [
        Watch(
            deployment=deployment.full_name,
            paths=config.watch,
            settle_seconds=config.settle_seconds,
            poll_seconds=config.poll_seconds,
        )
        for config, deployment in pairs
        if config.watch and not config.paused
    ]
    set_display(display := choose_display())
    stop_at_once()
    # Before Prefect has handlers of its own, what was started is to be ended too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with reach_server(can_start=bool(served)) as url:
            display.close()
            if not url:
                raise InputError(
                    "workers of a pool need a Prefect server that all reach; start one with: prefect server start, "
                    "and name it by PREFECT_API_URL"
                )
            check_owners(deployments)
            with tolerate_server():
                end_lost_runs(TAG)
            register_deployments([deployment for config, deployment in pairs if config.pool])
            for config, deployment in pairs:
                when = [f"cron {config.cron} {config.timezone}"] if config.cron else []
                when += [f"every {config.every}"] if config.every else []
                when += [f"when {', '.join(config.watch)} changes"] if config.watch else []
                print(f"{deployment.full_name}: {', '.join(when) or 'when it is started by hand'}", flush=True)
            if served:
                print(f"served until Ctrl-C; to watch the runs: {url.removesuffix('/api')}", flush=True)
                serve_deployments(served, watches)
                print("stopped; schedules are paused until this command runs again", flush=True)
            elif watches:
                print("watched until Ctrl-C", flush=True)
                watch_until_interrupt(watches)
    except KeyboardInterrupt:
        return
    finally:
        display.close()


def _check_banks(configs: "list[DeploymentConfig]") -> None:
    """Makes sure that the banks there have to be are there, before anything is made.

    Raises:
        BankFormatError: one is not.
    """
    from schemas.bank import Bank

    for config in configs:
        if config.bank and config.flow != "build":
            Bank.open(config.bank)


@app.callback()
def deploy(
    context: typer.Context,
    file: Annotated[
        Path | None, typer.Option("--file", help="YAML or TOML file with deployments, see docs/nightly.md.")
    ] = None,
    only_print: PrintOption = False,
) -> None:
    """Make the deployments of a file."""
    # Before anything imports Prefect, which reads its settings then. What stays to serve has a log.
    configure_engine(level=None if context.invoked_subcommand in ("list", "remove") else "INFO")
    if context.invoked_subcommand is not None:
        if file is not None:
            raise InputError("--file names all deployments; leave out the command after it, or the file")
        return
    if file is None:
        raise InputError("give --file deployments.yaml, or a command: memory3 deploy --help lists them")
    from flows.deploying import read_deployments

    _deploy(read_deployments(file), only_print=only_print)


def _make_config(**options: Any) -> "DeploymentConfig":
    """Returns the deployment that options ask for, with paths as they are meant in this folder."""
    from flows.deploying import DeploymentConfig, resolve_paths

    parameters = {name: value for name, value in options.pop("parameters").items() if value is not None}
    return resolve_paths(DeploymentConfig(**options, parameters=parameters), Path.cwd())


@app.command()
def update(
    bank: BankOption,
    corpus: Annotated[
        list[str] | None,
        typer.Option(help="All of the corpus, as for build; that of the newest version if not given.", metavar="PATH"),
    ] = None,
    watch: Annotated[
        list[str] | None,
        typer.Option(help="File, folder or s3:// prefix; it runs when something in it changes.", metavar="PATH"),
    ] = None,
    settle: Annotated[float, typer.Option(help="Seconds nothing may change before a change counts.")] = 30.0,
    poll: Annotated[float, typer.Option(help="Seconds from one look at what is watched to the next.")] = 10.0,
    cron: CronOption = "",
    every: EveryOption = "",
    timezone: TimezoneOption = "UTC",
    paused: PausedOption = False,
    pool: PoolOption = "",
    overlap: OverlapOption = "queue",
    verify: VerifyOption = "quick",
    runner: RunnerOption = None,
    runner_options: RunnerOptionsOption = None,
    name: NameOption = "",
    only_print: PrintOption = False,
) -> None:
    """Update a bank on a schedule, or when a corpus changes.

    Example: memory3 deploy update --bank my-bank --cron "0 3 * * *" --timezone Europe/Berlin --watch docs/
    """
    engine = {"runner": runner, "options": runner_options}
    config = _make_config(
        flow="update",
        bank=bank,
        name=name,
        cron=cron,
        every=every,
        timezone=timezone,
        paused=paused,
        pool=pool,
        overlap=overlap,
        watch=tuple(watch or ()),
        settle_seconds=settle,
        poll_seconds=poll,
        parameters={
            "corpus": corpus or None,
            "verify": verify,
            "engine": {key: value for key, value in engine.items() if value} or None,
        },
    )
    _deploy([config], only_print=only_print)


@app.command()
def verify(
    bank: BankOption,
    deep: Annotated[
        bool, typer.Option("--deep", help="Read every byte, compare all tables, encode a sample again.")
    ] = False,
    cron: CronOption = "",
    every: EveryOption = "",
    timezone: TimezoneOption = "UTC",
    paused: PausedOption = False,
    pool: PoolOption = "",
    overlap: OverlapOption = "cancel",
    name: NameOption = "",
    only_print: PrintOption = False,
) -> None:
    """Verify the newest version of a bank on a schedule; a run fails if it is damaged.

    Example: memory3 deploy verify --bank my-bank --deep --cron "0 5 * * 0"
    """
    config = _make_config(
        flow="verify",
        bank=bank,
        name=name,
        cron=cron,
        every=every,
        timezone=timezone,
        paused=paused,
        pool=pool,
        overlap=overlap,
        parameters={"deep": deep},
    )
    _deploy([config], only_print=only_print)


@app.command()
def compact(
    bank: BankOption,
    cron: CronOption = "",
    every: EveryOption = "",
    timezone: TimezoneOption = "UTC",
    paused: PausedOption = False,
    pool: PoolOption = "",
    overlap: OverlapOption = "queue",
    verify: VerifyOption = "quick",
    name: NameOption = "",
    only_print: PrintOption = False,
) -> None:
    """Compact a bank on a schedule.

    Example: memory3 deploy compact --bank my-bank --cron "0 4 1 * *" --pool nightly
    """
    config = _make_config(
        flow="compact",
        bank=bank,
        name=name,
        cron=cron,
        every=every,
        timezone=timezone,
        paused=paused,
        pool=pool,
        overlap=overlap,
        parameters={"verify": verify},
    )
    _deploy([config], only_print=only_print)


@app.command("list")
def list_made(as_json: JsonOption = False) -> None:
    """List the deployments that were made.

    Example: memory3 deploy list
    """
    from flows.console import print_json, print_rows
    from flows.hosting import reach_server

    with reach_server(can_start=False):
        from flows.deploying import list_deployments

        found = list_deployments()
    if as_json:
        print_json([dataclasses.asdict(deployed) for deployed in found])
        return
    columns = ["deployment", "bank", "schedule", "paused", "executed by"]
    rows = [
        [one.name, one.bank, one.schedule, "yes" if one.paused else "", f"pool {one.pool}" if one.pool else "a process"]
        for one in found
    ]
    print_rows(columns, rows)


@app.command()
def remove(
    name: Annotated[str, typer.Argument(help="As listed: flow and name, with a slash.", metavar="DEPLOYMENT")],
) -> None:
    """Remove a deployment. Its schedules end; runs that were made stay in Prefect's history.

    Example: memory3 deploy remove update_bank/my-bank
    """
    from flows.hosting import reach_server

    with reach_server(can_start=False):
        from flows.deploying import remove_deployment

        remove_deployment(name)
    print(f"{name} is removed")
