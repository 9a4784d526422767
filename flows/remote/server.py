"""The bank server: answers what :mod:`flows.remote.wire` says, from the versions that are open."""

import contextlib
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import FastAPI, Path, Query, Request, Response

from flows.remote.holdings import Holdings
from flows.remote.wire import BYTES_TYPE, MAX_HITS, BankDescription, pack_hits, unpack_ids, unpack_vectors
from flows.serving.bounded_pool import BoundedPool
from flows.serving.errors import ApiError, Responses, describe_errors, install_error_handlers
from flows.serving.limits import guard
from flows.serving.metrics import MetricsMiddleware, RequestMetrics
from flows.serving.running import Served, run_app
from flows.serving.settings import ListeningConfig

ERRORS = describe_errors(400, 401, 404, 413, 429, 503, 504)

BINARY: Responses = {200: {"content": {BYTES_TYPE: {}}}, **ERRORS}

Version = Annotated[int, Path(ge=1, le=2**31 - 1, description="Number of a version.")]


def find_hits(holdings: Holdings, version: int, body: bytes, num_hits: int) -> bytes:
    """Answers query vectors with the nearest references.

    Raises:
        InputError: the body holds no vectors of the right size.
        BankError: the version cannot be opened.
    """
    search = holdings.get(version).search
    if not search.num_references:
        return b""
    return pack_hits(search.find(unpack_vectors(body, search.dimension), num_hits), num_hits)


def read_records(holdings: Holdings, version: int, body: bytes) -> bytes:
    """Answers ids with the records of their memories.

    Raises:
        InputError: the body holds no ids, or a reference is not live in this version.
        BankError: the version cannot be opened, or has no such memory.
    """
    ref_ids = unpack_ids(body)
    records = holdings.get(version).records.read(ref_ids).records
    return b"".join(records[ref_id].tobytes() for ref_id in ref_ids)


def read_codec(holdings: Holdings, version: int) -> bytes | None:
    """Returns the parameters of a version's codec, None if it has none.

    Raises:
        BankError: the version cannot be opened, or the file is missing or damaged.
    """
    path = holdings.get(version).bank.locate_codec()
    return None if path is None else path.read_bytes()


def make_bank_app(config: ListeningConfig, holdings: Holdings, num_threads: int) -> FastAPI:
    """Makes the application.

    Args:
        config: its limits, and who may use it.
        holdings: the versions that it answers from.
        num_threads: searches and reads at a time.
    """
    pool = BoundedPool(num_threads=num_threads, max_queue=config.max_queue, timeout_seconds=config.timeout_seconds)
    metrics = RequestMetrics()

    @contextlib.asynccontextmanager
    async def run(_app: FastAPI) -> AsyncIterator[None]:
        yield
        await pool.close()

    app = FastAPI(title="memory3 bank", lifespan=run, docs_url=None, redoc_url=None)
    install_error_handlers(app)
    guard(app, config)
    app.add_middleware(MetricsMiddleware, metrics=metrics)

    @app.get("/v1/bank", responses=ERRORS)
    async def describe(
        at: Annotated[str | None, Query(description="Number or tag of a version.")] = None,
    ) -> BankDescription:
        """Describes a version, by default the one of the moment."""
        return await pool.run(lambda: holdings.find(at).describe())

    @app.get("/v1/bank/{version}/codec", response_class=Response, responses=BINARY)
    async def get_codec(version: Version) -> Response:
        """Hands out the parameters of a version's codec."""
        found = await pool.run(read_codec, holdings, version)
        if found is None:
            raise ApiError(404, f"the codec of version {version} has no parameters")
        return Response(found, media_type=BYTES_TYPE)

    @app.post("/v1/bank/{version}/search", response_class=Response, responses=BINARY)
    async def search(
        version: Version, num_hits: Annotated[int, Query(ge=1, le=MAX_HITS)], request: Request
    ) -> Response:
        """Answers query vectors with the nearest references."""
        return Response(
            await pool.run(find_hits, holdings, version, await request.body(), num_hits), media_type=BYTES_TYPE
        )

    @app.post("/v1/bank/{version}/memories", response_class=Response, responses=BINARY)
    async def read_memories(version: Version, request: Request) -> Response:
        """Answers ids with the records of their memories."""
        return Response(await pool.run(read_records, holdings, version, await request.body()), media_type=BYTES_TYPE)

    @app.get("/healthz")
    async def check_health() -> dict[str, str]:
        """Tells that the server is alive."""
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def get_metrics() -> Response:
        """Tells Prometheus what there is to know."""
        text, kind = metrics.render()
        return Response(text, media_type=kind)

    return app


def run_bank_server(bank: str, at: str | None, config: ListeningConfig, num_threads: int) -> None:
    """Serves a bank until Ctrl-C or SIGTERM.

    Raises:
        BankError: the address or the bank cannot be used.
    """

    def open_app() -> Served:
        app = make_bank_app(config, Holdings(bank, at), num_threads)
        return Served(app=app, what=f"the memories of {bank}")

    run_app(open_app, config)
