"""Deployments: which flow runs on which bank, when, and with which parameters; made, listed and removed.

    command line or file -> :class:`DeploymentConfig` -> a deployment of Prefect -> :mod:`flows.hosting`, or a worker

A deployment names its flow by module, so a run finds it in any working folder; its paths are absolute for the same
reason. Everybody who reaches the server can read its parameters: credentials stay in the environment of the process
that executes the run, and what looks like one among the parameters is refused.
"""

import dataclasses
import importlib
import inspect
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

from prefect import Flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.client.schemas.responses import DeploymentResponse
from prefect.deployments.runner import DeploymentApplyError, RunnerDeployment
from prefect.exceptions import ObjectNotFound, ParameterTypeError
from prefect.schedules import Cron, Interval, Schedule
from prefect.types.entrypoint import EntrypointType
from pydantic import ValidationError

from flows.config import apply_changes, read_settings
from flows.flow_runs import check_choice
from flows.lost_runs import HEARTBEAT_SECONDS, HEARTBEAT_VARIABLE
from flows.run_records import get_place_name
from pipelines.running import EngineConfig
from schemas.errors import InputError

FLOWS = {
    "build": "flows.build.build_bank",
    "update": "flows.build.update_bank",
    "verify": "flows.upkeep.verify_bank",
    "compact": "flows.upkeep.compact_bank",
    "migrate": "flows.upkeep.migrate_bank",
    "train": "flows.learning.train_model",
    "evaluate": "flows.learning.evaluate_model",
}
"""What can be deployed, by the word users have for it."""

TAG = "memory3"
"""Every deployment made here has it, and no other is listed or removed."""

OVERLAPS = {"queue": ConcurrencyLimitStrategy.ENQUEUE, "cancel": ConcurrencyLimitStrategy.CANCEL_NEW}

QUEUED_MINUTES = 60.0
"""How long a queued run waits for a writer that is not of its own deployment, unless told otherwise."""

UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
INTERVAL = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd])")

PATHS = ("bank", "corpus", "data", "out", "uses")
NAMES_OR_PATHS = ("model", "codec", "tokenizer")
"""Parameters that are a path if there is one of that name, and else a name."""

ANCHOR = datetime(2020, 1, 1, tzinfo=UTC)
"""What intervals are counted from: not from the start of a process, which may be started more often than they end."""

SECRET = "secret|passw|access_?key|api_?key|credential"
SECRET_NAME = re.compile(SECRET, re.IGNORECASE)
SECRET_VALUE = re.compile(rf"(?:^|--)\w*({SECRET})\w*[= ]|://[^/@\s]+:[^/@\s]+@", re.IGNORECASE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeploymentConfig:
    """One deployment, as a user asks for it.

    Attributes:
        flow: a key of :data:`FLOWS`.
        bank: the bank, where the flow has one.
        name: tells deployments of one flow apart; by default the last part of the bank's place.
        cron: five fields, as ``0 3 * * *``; empty for none.
        every: a number and ``s``, ``m``, ``h`` or ``d``, as ``15m``; empty for none.
        timezone: in which ``cron`` is meant, as ``Europe/Berlin``.
        paused: made, but not started by schedules or changes.
        pool: work pool whose workers execute the runs; empty for the process that makes the deployment.
        overlap: what becomes of a run that is due while another of this deployment is at work: ``queue`` or ``cancel``.
        watch: files, folders and patterns; the flow runs when something in them changes.
        settle_seconds: how long nothing may change before a change counts.
        poll_seconds: from one look at what is watched to the next.
        parameters: further parameters of the flow.
    """

    flow: str = "update"
    bank: str = ""
    name: str = ""
    cron: str = ""
    every: str = ""
    timezone: str = "UTC"
    paused: bool = False
    pool: str = ""
    overlap: str = "queue"
    watch: tuple[str, ...] = ()
    settle_seconds: float = 30.0
    poll_seconds: float = 10.0
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks what can be checked without Prefect.

        Raises:
            InputError: an unknown flow or way to overlap, an interval that is none, times out of bounds.
        """
        if self.flow not in FLOWS:
            raise InputError(f"deployment: flow is {self.flow!r}, must be one of {', '.join(FLOWS)}")
        if self.overlap not in OVERLAPS:
            raise InputError(f"deployment: overlap is {self.overlap!r}, must be one of {', '.join(OVERLAPS)}")
        if self.watch and self.overlap != "queue":
            raise InputError(
                f"deployment: overlap is {self.overlap!r}, and a change that comes during a run would be lost; what is "
                "watched needs overlap queue"
            )
        if self.every:
            parse_interval(self.every)
        if self.settle_seconds < 0 or self.poll_seconds <= 0:
            raise InputError(
                f"deployment: settle_seconds is {self.settle_seconds} and poll_seconds {self.poll_seconds}, "
                "must be at least 0 and above 0"
            )


def parse_interval(text: str) -> timedelta:
    """Returns the time that ``15m`` and the like stand for.

    Raises:
        InputError: it stands for none, or for less than a second.
    """
    match = INTERVAL.fullmatch(text.strip())
    seconds = float(match[1]) * UNIT_SECONDS[match[2]] if match else 0.0
    if seconds < 1:
        raise InputError(f"deployment: every is {text!r}, must be a number and s, m, h or d, such as 15m")
    return timedelta(seconds=seconds)


def read_deployments(file: Path) -> list[DeploymentConfig]:
    """Reads deployments of a YAML or TOML file: a list ``deployments``; what stands beside it holds for all of them.

    Relative paths are taken from the folder of the file.

    Raises:
        InputError: the file cannot be read, has unknown keys or values that cannot be, or names no deployment.
    """
    settings = read_settings(file)
    entries = settings.pop("deployments", None)
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"{file} names no deployment; write for instance 'deployments: [{{bank: b, every: 1d}}]'")
    shared = apply_changes(DeploymentConfig(), settings, str(file))
    configs = [apply_changes(shared, entry, f"{file}: deployments[{n}]") for n, entry in enumerate(entries)]
    return [resolve_paths(config, file.absolute().parent) for config in configs]


def _resolve(place: str, base: Path) -> str:
    return place if "://" in place or not place else os.path.normpath(base / Path(place).expanduser())


def resolve_paths(config: DeploymentConfig, base: Path) -> DeploymentConfig:
    """Returns a deployment whose paths mean the same in every working folder."""
    parameters = dict(config.parameters)
    for name in PATHS:
        value = parameters.get(name)
        if isinstance(value, str):
            parameters[name] = _resolve(value, base)
        elif isinstance(value, list | tuple):
            parameters[name] = [_resolve(place, base) for place in value]
    for name in NAMES_OR_PATHS:
        value = parameters.get(name)
        if isinstance(value, str) and (base / value).exists():
            parameters[name] = _resolve(value, base)
    watch = tuple(_resolve(place, base) for place in config.watch)
    return dataclasses.replace(config, bank=_resolve(config.bank, base), watch=watch, parameters=parameters)


def _list_secrets(value: Any, name: str) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if SECRET_NAME.search(str(key)):
                yield f"{name}.{key}"
            yield from _list_secrets(inner, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            yield from _list_secrets(inner, f"{name}[{place}]")
    elif isinstance(value, str) and SECRET_VALUE.search(value):
        yield name


def load_flow(name: str) -> Flow[..., Any]:
    """Returns a flow by its word in :data:`FLOWS`."""
    module, _, function = FLOWS[name].rpartition(".")
    return cast(Flow[..., Any], getattr(importlib.import_module(module), function))


def _check_values(parameters: dict[str, Any]) -> None:
    """Makes sure that what flows look at only when they run can be used: nobody watches at night.

    Raises:
        InputError: a value is out of its bounds.
    """
    if isinstance(verify := parameters.get("verify"), str):
        check_choice(verify)
    if isinstance(engine := parameters.get("engine"), dict):
        apply_changes(EngineConfig(), engine, "parameters.engine")


def _make_parameters(config: DeploymentConfig, flow: Flow[..., Any]) -> dict[str, Any]:
    """Returns all parameters of the runs, checked against the flow's signature.

    Raises:
        InputError: one is unknown, missing, of another type, or a secret.
    """
    known = inspect.signature(flow.fn).parameters
    where = f"deployment {config.flow} {config.name or config.bank}".strip()
    defaults: dict[str, Any] = {
        "bank": config.bank or None,
        "verify": "quick",
        "wait_minutes": QUEUED_MINUTES if config.overlap == "queue" else None,
    }
    parameters = {name: value for name, value in defaults.items() if name in known and value is not None}
    if config.flow == "update":
        parameters["corpus"] = None
    parameters |= config.parameters
    if unknown := sorted(parameters.keys() - known.keys()):
        raise InputError(f"{where}: there is no parameter {unknown[0]!r}; there is {', '.join(known)}")
    required = [name for name, parameter in known.items() if parameter.default is inspect.Parameter.empty]
    if missing := [name for name in required if name not in parameters]:
        raise InputError(f"{where}: {', '.join(missing)} must be given")
    if secret := next(_list_secrets(parameters, "parameters"), None):
        raise InputError(
            f"{where}: {secret} looks like a secret, and parameters can be read by all who reach the server; "
            "set it in the environment of the process that executes the runs"
        )
    _check_values(parameters)
    try:
        flow.validate_parameters(parameters)
    except (ParameterTypeError, ValidationError) as error:
        raise InputError(f"{where}: {' '.join(str(error).split())}") from error
    return parameters


def _make_schedules(config: DeploymentConfig) -> list[Schedule]:
    schedules = []
    if config.cron:
        schedules.append(Cron(config.cron, timezone=config.timezone))
    if config.every:
        schedules.append(Interval(parse_interval(config.every), anchor_date=ANCHOR, timezone=config.timezone))
    return schedules


def make_deployment(config: DeploymentConfig) -> RunnerDeployment:
    """Returns a deployment as Prefect has it; nothing is told to a server yet.

    Raises:
        InputError: a parameter or a schedule that cannot be.
    """
    flow = load_flow(config.flow)
    parameters = _make_parameters(config, flow)
    place = parameters.get("bank") or parameters.get("out") or config.flow
    try:
        return RunnerDeployment.from_flow(
            flow,
            name=config.name or get_place_name(place),
            schedules=_make_schedules(config),
            paused=config.paused,
            parameters=parameters,
            tags=[TAG],
            concurrency_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=OVERLAPS[config.overlap]),
            work_pool_name=config.pool or None,
            job_variables={"env": {HEARTBEAT_VARIABLE: str(HEARTBEAT_SECONDS)}} if config.pool else None,
            entrypoint_type=EntrypointType.MODULE_PATH,
        )
    except ValueError as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise InputError(
            f"deployment {config.flow} {place}: cron is {config.cron!r}, timezone {config.timezone!r}, name "
            f"{config.name!r}: {reason.removeprefix('Value error, ')}"
        ) from error


def make_deployments(configs: list[DeploymentConfig]) -> list[RunnerDeployment]:
    """Returns deployments, of which no two have the same name.

    Raises:
        InputError: two have, or one cannot be made.
    """
    deployments = [make_deployment(config) for config in configs]
    names = [deployment.full_name for deployment in deployments]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"two deployments are called {twice[0]}; give one of them a name")
    return deployments


def describe_deployment(config: DeploymentConfig, deployment: RunnerDeployment) -> dict[str, Any]:
    """Returns what would be made as a JSON object."""
    return {
        "name": deployment.full_name,
        "entrypoint": deployment.entrypoint,
        "cron": config.cron,
        "every": config.every,
        "timezone": config.timezone,
        "paused": config.paused,
        "pool": config.pool,
        "overlap": config.overlap,
        "watch": list(config.watch),
        "parameters": deployment.parameters,
    }


def check_owners(deployments: list[RunnerDeployment]) -> None:
    """Makes sure that no deployment takes the place of one for another bank.

    Raises:
        InputError: one would.
    """
    with get_client(sync_client=True) as client:
        for deployment in deployments:
            with suppress(ObjectNotFound):
                known = client.read_deployment_by_name(deployment.full_name).parameters or {}
                for name in ("bank", "out"):
                    before, now = known.get(name), (deployment.parameters or {}).get(name)
                    if before != now:
                        raise InputError(
                            f"there is a deployment {deployment.full_name} for {before}, not for {now}; give this one "
                            "another --name, or remove that one first"
                        )


def register_deployments(deployments: list[RunnerDeployment]) -> None:
    """Makes deployments for the workers of their pools, or changes those that are there.

    Raises:
        InputError: there is no such pool.
    """
    for deployment in deployments:
        try:
            deployment.apply()
        except (DeploymentApplyError, ObjectNotFound) as error:
            raise InputError(
                f"deployment {deployment.full_name} cannot be made in pool {deployment.work_pool_name}; make the pool "
                f"first: prefect work-pool create --type process {deployment.work_pool_name}"
            ) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeployedFlow:
    """A deployment as the server has it.

    Attributes:
        name: flow and name, with a slash.
        bank: the bank, "" if it has none.
        schedule: when it runs, in words.
        paused: whether it is.
        pool: its work pool, "" if a process serves it.
        status: ``READY`` while somebody executes its runs, else ``NOT_READY``.
    """

    name: str
    bank: str
    schedule: str
    paused: bool
    pool: str
    status: str


def _describe_schedule(deployment: DeploymentResponse) -> str:
    found = []
    for scheduled in deployment.schedules:
        rule = scheduled.schedule
        if cron := getattr(rule, "cron", None):
            found.append(f"cron {cron} {getattr(rule, 'timezone', None) or 'UTC'}")
        elif interval := getattr(rule, "interval", None):
            found.append(f"every {interval}")
    return ", ".join(found)


def list_deployments() -> list[DeployedFlow]:
    """Returns the deployments made here, sorted by name."""
    wanted = DeploymentFilter(tags=DeploymentFilterTags(all_=[TAG]))
    with get_client(sync_client=True) as client:
        found: list[DeploymentResponse] = []
        # A server hands out so many at a time.
        while page := client.read_deployments(deployment_filter=wanted, offset=len(found), limit=100):
            found += page
        flows = {flow_id: client.read_flow(flow_id).name for flow_id in {deployment.flow_id for deployment in found}}
    rows = [
        DeployedFlow(
            name=f"{flows[deployment.flow_id]}/{deployment.name}",
            bank=str((deployment.parameters or {}).get("bank") or ""),
            schedule=_describe_schedule(deployment),
            paused=bool(deployment.paused),
            pool=deployment.work_pool_name or "",
            status=deployment.status.value if deployment.status else "",
        )
        for deployment in found
    ]
    return sorted(rows, key=lambda row: row.name)


def remove_deployment(name: str) -> None:
    """Removes a deployment with its schedules; runs it has made stay in the server's history.

    Raises:
        InputError: there is none of that name.
    """
    known = [deployment.name for deployment in list_deployments()]
    if name not in known:
        raise InputError(f"there is no deployment {name}; there is {', '.join(known) or 'none'}")
    with get_client(sync_client=True) as client:
        client.delete_deployment(client.read_deployment_by_name(name).id)
