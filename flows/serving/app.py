"""The application: routes, and what runs beside them for as long as the server does."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import FastAPI, Path, Request, Response

from flows.serving.answering import EventStream
from flows.serving.chatting import answer_chat
from flows.serving.completing import complete
from flows.serving.editions import Shelf
from flows.serving.errors import Responses, describe_errors, install_error_handlers
from flows.serving.limits import guard
from flows.serving.looking_up import LookingUp, describe_memory, find_references
from flows.serving.metrics import MetricsMiddleware, ServingMetrics
from flows.serving.prompting import Prompter
from flows.serving.queueing import GenerationQueue
from flows.serving.request_models import ChatRequest, CompletionRequest, SearchRequest
from flows.serving.response_models import (
    ChatCompletion,
    Completion,
    DescribedMemory,
    Health,
    Model,
    ModelList,
    SearchAnswer,
)
from flows.serving.settings import ServingConfig
from model.training.chat import ChatTemplate, load_chat_template
from schemas.errors import InputError

HIDDEN_PROBLEM = "a newer version cannot be opened; the log of the server says why"

EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}

_LOGGER = logging.getLogger(__name__)

STREAMED: Responses = {200: {"content": {"text/event-stream": {"schema": EVENT}}}}
"""What a route says of its streams: events whose data are pieces of the answer as JSON, and in the end ``[DONE]``."""

ERRORS = describe_errors(400, 401, 404, 413, 429, 503, 504)

RefId = Annotated[str, Path(pattern="^[0-9a-f]{32}$", description="Id of a reference.")]


def find_chat_template(config: ServingConfig, shelf: Shelf) -> ChatTemplate | None:
    """Returns the chat template of the model; None if it has none."""
    try:
        return load_chat_template(config.model, shelf.edition.checkpoint)
    except InputError:
        return None


def _log_defect(task: asyncio.Task[None]) -> None:
    """Says why something ended that runs as long as the server; health checks fail from then on."""
    error = None if task.cancelled() else task.exception()
    if error is not None:
        _LOGGER.error("the server has to be started again", exc_info=error)


class Server:
    """What answers requests, and how it is.

    Attributes:
        shelf: the version that is served.
        queue: generates.
        looking_up: looks things up.
        exploring: looks things up for the page of :mod:`flows.exploring`, where it is served.
        metrics: what Prometheus is told.
        prompter: puts prompts into the queue.
    """

    def __init__(self, config: ServingConfig, shelf: Shelf) -> None:
        """Joins the parts; nothing runs before :meth:`run`."""
        self._config = config
        # Health and metrics are for all who reach the server; paths and names of buckets are not.
        self._tells_places = config.api_key is None
        self.shelf = shelf
        self.metrics = ServingMetrics()
        self.queue = GenerationQueue(config, shelf, self.metrics)
        self.looking_up = LookingUp(config, shelf)
        self.exploring = LookingUp(config, shelf)
        self.prompter = Prompter(config.model_name, self.queue)
        self._tasks: list[asyncio.Task[None]] = []
        metrics = self.metrics
        metrics.add_gauge("memory3_queue_length", "Prompts that wait.", lambda: self.queue.num_waiting)
        metrics.add_gauge("memory3_running", "Prompts that are generated.", lambda: self.queue.num_running)
        metrics.add_gauge("memory3_bank_version", "Version that is served.", lambda: shelf.edition.version)
        metrics.add_gauge("memory3_bank_exchanges", "Versions exchanged so far.", lambda: shelf.num_exchanges)
        metrics.add_gauge("memory3_bank_failures", "Versions that cannot be opened.", lambda: shelf.num_failures)
        bank = config.bank if self._tells_places else ""
        metrics.add_information("memory3_info", "What is served.", model=config.model_name, bank=bank)

    @property
    def is_alive(self) -> bool:
        """Whether everything runs that has to."""
        return bool(self._tasks) and not any(task.done() for task in self._tasks)

    def describe_health(self, status: str) -> Health:
        """Returns how the server is."""
        problem = self.shelf.problem
        return Health(
            status=status,
            model=self._config.model_name,
            bank=self._config.bank if self._tells_places else None,
            version=self.shelf.edition.version,
            problem=problem if problem is None or self._tells_places else HIDDEN_PROBLEM,
            num_waiting=self.queue.num_waiting,
            num_running=self.queue.num_running,
        )

    @contextlib.asynccontextmanager
    async def run(self, _app: FastAPI) -> AsyncIterator[None]:
        """Runs what runs beside the routes: the queue, and the look for newer versions."""
        await self.queue.warm_up()
        self._tasks = [asyncio.create_task(work) for work in (self.queue.run(), self.shelf.watch())]
        for task in self._tasks:
            task.add_done_callback(_log_defect)
        try:
            yield
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks)
            await self.queue.close()
            await self.looking_up.close()
            await self.exploring.close()


def make_app(config: ServingConfig, shelf: Shelf) -> FastAPI:
    """Makes the application.

    Args:
        config: the settings.
        shelf: the opened bank.
    """
    server = Server(config, shelf)
    chat = find_chat_template(config, shelf)
    created = int(time.time())
    # The pages that show the schema load scripts from elsewhere; the schema itself is at /openapi.json.
    app = FastAPI(
        title="memory3", lifespan=server.run, docs_url=None, redoc_url=None, separate_input_output_schemas=False
    )
    app.state.server = server
    install_error_handlers(app)
    guard(app, config)
    app.add_middleware(MetricsMiddleware, metrics=server.metrics)

    @app.post("/v1/completions", response_model=Completion, responses={**STREAMED, **ERRORS})
    async def continue_prompts(asked: CompletionRequest, request: Request) -> Completion | EventStream:
        """Continues prompts."""
        return await complete(server.prompter, asked, request)

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses={**STREAMED, **ERRORS})
    async def answer_messages(asked: ChatRequest, request: Request) -> ChatCompletion | EventStream:
        """Answers a conversation."""
        return await answer_chat(server.prompter, chat, asked, request)

    @app.get("/v1/models", responses=describe_errors(401))
    async def list_models() -> ModelList:
        """Lists the model that is served."""
        return ModelList(data=[Model(id=config.model_name, created=created)])

    @app.get("/v1/models/{name}", responses=describe_errors(401, 404))
    async def get_model(name: str) -> Model:
        """Describes the model that is served."""
        server.prompter.check_model(name)
        return Model(id=config.model_name, created=created)

    @app.post("/v1/search", responses=ERRORS)
    async def search(asked: SearchRequest) -> SearchAnswer:
        """Finds references by meaning."""
        return await server.looking_up.run(find_references, asked.query, asked.num_hits)

    @app.get("/v1/memories/{ref_id}", responses=describe_errors(400, 401, 404, 429, 503, 504))
    async def get_memory(ref_id: RefId) -> DescribedMemory:
        """Describes a reference and its memory."""
        return await server.looking_up.run(describe_memory, ref_id)

    @app.get("/healthz", responses={503: {"model": Health, "description": "the server has to be started again"}})
    async def check_health(response: Response) -> Health:
        """Tells whether the server is alive, and which version it serves."""
        response.status_code = 200 if server.is_alive else 503
        return server.describe_health("ok" if server.is_alive else "dead")

    @app.get("/readyz", responses={503: {"model": Health, "description": "the server takes no further prompts now"}})
    async def check_readiness(response: Response) -> Health:
        """Tells whether the server takes further prompts."""
        is_ready = server.is_alive and not server.queue.is_full
        response.status_code = 200 if is_ready else 503
        return server.describe_health("ok" if is_ready else "full" if server.is_alive else "dead")

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def get_metrics() -> Response:
        """Tells Prometheus what there is to know."""
        text, kind = server.metrics.render()
        return Response(text, media_type=kind)

    if config.explore:
        from flows.exploring.routes import add_explorer

        add_explorer(app, config, server.exploring)
    return app
