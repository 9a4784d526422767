"""The routes under ``/v1/explore``: what the page needs to know and the API does not tell.

They look things up in a thread of their own, so that a comparison of two large versions holds up no search. The key of
the server is asked for here as for everything under ``/v1``.
"""

from typing import Annotated

from fastapi import APIRouter, FastAPI, Path, Query
from fastapi.responses import RedirectResponse

from flows.exploring.answers import (
    ExploredBank,
    ExploredDifference,
    ExploredReference,
    PairPage,
    PlacePage,
    Snippets,
    VersionPage,
)
from flows.exploring.comparing_versions import describe_difference, list_version_page
from flows.exploring.describing import (
    describe_bank,
    describe_reference,
    describe_snippets,
    list_pairs,
    list_places,
)
from flows.exploring.opened_versions import OpenedVersions
from flows.exploring.pages import make_pages
from flows.serving.errors import describe_errors
from flows.serving.looking_up import LookingUp
from flows.serving.settings import PAGES_PATH, ServingConfig
from schemas.identifiers import ID_LENGTH

MAX_SNIPPETS = 100
"""References that are told in short at a time."""

ID_PATTERN = f"^[0-9a-f]{{{ID_LENGTH}}}$"

LARGEST = 2**31 - 1

RefId = Annotated[str, Path(pattern=ID_PATTERN, description="Id of a reference.")]

RefIds = Annotated[
    list[Annotated[str, Query(pattern=ID_PATTERN)]], Query(min_length=1, max_length=MAX_SNIPPETS, alias="ref_id")
]

Version = Annotated[int | None, Query(ge=1, le=LARGEST, description="Version to look into; else the served one.")]

VersionNumber = Annotated[int, Path(ge=1, le=LARGEST, description="Number of a version.")]

Start = Annotated[int, Query(ge=0, le=LARGEST, description="How many to leave out.")]

Limit = Annotated[int, Query(ge=1, le=100, description="How many to list at most.")]


def make_routes(config: ServingConfig, looking_up: LookingUp) -> APIRouter:
    """Makes the routes.

    Args:
        config: the settings of the server.
        looking_up: looks things up.
    """
    opened = OpenedVersions()
    router = APIRouter(prefix="/v1/explore", responses=describe_errors(400, 401, 404, 429, 503, 504))

    @router.get("/bank")
    async def get_bank() -> ExploredBank:
        """Describes the version that is served."""
        return await looking_up.run(describe_bank, config.model_name)

    @router.get("/references")
    async def get_snippets(ref_ids: RefIds, version: Version = None) -> Snippets:
        """Describes several references in short."""
        return await looking_up.run(describe_snippets, opened, ref_ids, version)

    @router.get("/references/{ref_id}")
    async def get_reference(ref_id: RefId, version: Version = None) -> ExploredReference:
        """Describes a reference of any version, and its memory."""
        return await looking_up.run(describe_reference, opened, ref_id, version)

    @router.get("/references/{ref_id}/places")
    async def get_places(ref_id: RefId, version: Version = None, start: Start = 0, limit: Limit = 20) -> PlacePage:
        """Lists where a reference stands."""
        return await looking_up.run(list_places, opened, ref_id, version, start, limit)

    @router.get("/references/{ref_id}/duplicates")
    async def get_pairs(ref_id: RefId, version: Version = None, start: Start = 0, limit: Limit = 10) -> PairPage:
        """Lists the near-duplicates of a reference."""
        return await looking_up.run(list_pairs, opened, ref_id, version, start, limit)

    @router.get("/versions")
    async def get_versions(start: Start = 0, limit: Limit = 20) -> VersionPage:
        """Lists the versions of the bank."""
        return await looking_up.run(list_version_page, start, limit)

    @router.get("/differences/{before}/{after}")
    async def get_difference(before: VersionNumber, after: VersionNumber) -> ExploredDifference:
        """Compares two versions."""
        return await looking_up.run(describe_difference, opened, before, after)

    return router


def add_explorer(app: FastAPI, config: ServingConfig, looking_up: LookingUp) -> None:
    """Adds the page and its routes to a server.

    Args:
        app: the application.
        config: the settings of the server.
        looking_up: looks things up, for the page alone.
    """
    app.include_router(make_routes(config, looking_up))
    app.mount(PAGES_PATH, make_pages())

    @app.get("/", include_in_schema=False)
    async def find_page() -> RedirectResponse:
        """Leads to the page."""
        return RedirectResponse(f"{PAGES_PATH}/")
