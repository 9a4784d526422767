"""Settings of all tests, and the one Prefect engine they share."""

import os
import tempfile

import pytest
from hypothesis import settings

from flows.engine import configure_engine

# A property holds however busy the machine is.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# Before anything imports Prefect: its files belong to this run, not to the user's home. Making the database of a new
# home takes Prefect 17 s of computing, minutes on a machine busy with other work.
os.environ["PREFECT_HOME"] = tempfile.mkdtemp(prefix="memory3-tests-")
os.environ["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"] = "900"
os.environ.pop("PREFECT_API_URL", None)
configure_engine()


@pytest.fixture(scope="session")
def engine() -> None:
    """Starts Prefect's own server once for all flows of the session; it takes seconds."""
    from flows.engine import start_engine

    start_engine()
