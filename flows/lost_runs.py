"""Runs whose process is gone: an automation by which Prefect's server ends them.

A process that is killed tells nobody. Its run would be RUNNING for ever, and hold the one place of its deployment until
the lease of that runs out, five minutes after it was renewed last. A run of a deployment therefore sends heartbeats,
which Prefect has for this, and the server takes a run for crashed when they stay away: the place is free, the list of
runs says what happened, and the next run goes on from what is finished.

A run that is only cut off from the server, and so is taken for crashed, harms nothing: it gives up when it cannot renew
its lease, and until then the lock of the bank and its commit decide, as between any two writers.
"""

from datetime import timedelta

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

HEARTBEAT = "prefect.flow-run.heartbeat"
HEARTBEAT_VARIABLE = "PREFECT_FLOWS_HEARTBEAT_FREQUENCY"
HEARTBEAT_SECONDS = 30
"""From one to the next; Prefect takes no less."""

SILENT_SECONDS = 100
"""Three heartbeats stay away, and the third is late."""

ENDS = ("Completed", "Failed", "Cancelled", "Crashed")

NAME = "memory3: runs whose process is gone"


def make_automation(tag: str) -> AutomationCore:
    """Returns what the server is asked to do.

    Args:
        tag: of the runs that are meant.
    """
    return AutomationCore(
        name=NAME,
        description="Made by memory3 deploy. A run that sends no heartbeats any more is taken for crashed.",
        trigger=EventTrigger(
            after={HEARTBEAT},
            expect={HEARTBEAT, *(f"prefect.flow-run.{end}" for end in ENDS)},
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related={"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{tag}"},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=SILENT_SECONDS),
        ),
        actions=[
            ChangeFlowRunState(
                name="Crashed",
                state=StateType.CRASHED,
                force=False,
                message=f"the process of this run is gone: nothing was heard of it for {SILENT_SECONDS} seconds; "
                "the next run goes on from what it has finished",
            )
        ],
    )


def end_lost_runs(tag: str) -> None:
    """Makes the automation on the server, or makes it what it is here."""
    automation = make_automation(tag)
    with get_client(sync_client=True) as client:
        if known := client.read_automations_by_name(NAME):
            client.update_automation(known[0].id, automation)
        else:
            client.create_automation(automation)
