"""The server as a process: its socket, its log, its start and its orderly end."""

import dataclasses
import logging
import signal
import socket
import sys
import threading
import webbrowser
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from flows.serving.app import make_app
from flows.serving.editions import Shelf
from flows.serving.settings import PAGES_PATH, ListeningConfig, ServingConfig
from schemas.errors import InputError


class _AnnouncingServer(uvicorn.Server):
    """Says that it can be reached once it can, and opens a page of it in the browser if that is wanted."""

    def __init__(self, config: uvicorn.Config, announcement: str, page: str | None) -> None:
        super().__init__(config)
        self._announcement, self._page = announcement, page

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        sys.stdout.write(self._announcement + "\n")
        sys.stdout.flush()
        if self._page is not None:
            # A browser of the terminal keeps its caller waiting until it is left.
            threading.Thread(target=webbrowser.open, args=(self._page,), daemon=True).start()


def bind_socket(host: str, port: int) -> socket.socket:
    """Takes an address; nobody can connect before the server listens.

    Raises:
        InputError: it is taken, or is none of this machine.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise InputError(
            f"{host} port {port} cannot be listened at ({error.strerror or error}); "
            "choose others with --host and --port"
        ) from error
    return bound


def _end_at_leisure(_number: int, _frame: FrameType | None) -> None:
    """Does nothing: uvicorn raises a signal again once it has ended because of it, and that is no failure."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Served:
    """What a server serves.

    Attributes:
        app: the application.
        what: the same in words.
        page: path of a page for people, None if it has none.
    """

    app: FastAPI
    what: str
    page: str | None = None


def run_app(open_app: Callable[[], Served], config: ListeningConfig, *, opens_browser: bool = False) -> None:
    """Serves until Ctrl-C or SIGTERM, and then ends what is under way.

    Args:
        open_app: makes the application, once the address is known to be free.
        config: where to listen.
        opens_browser: whether the page is shown in the browser of this machine as soon as it can be.

    Raises:
        BankError: the address cannot be used, or the application not be made.
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    logging.getLogger("flows.serving").setLevel(logging.INFO)
    # It warns of each piece that is sent to a client which has just gone away.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    with bind_socket(config.host, config.port) as bound:
        served = open_app()
        host, port = bound.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        page = None if served.page is None else f"{address}{served.page}"
        announcement = (
            f"memory3 serves {served.what} at {address}{f', with a page at {page}' if page else ''}; Ctrl-C ends it"
        )
        settings = uvicorn.Config(
            served.app,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="on",
            ws="none",
            timeout_graceful_shutdown=int(config.grace_seconds),
        )
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _end_at_leisure)
        _AnnouncingServer(settings, announcement, page if opens_browser else None).run(sockets=[bound])


def run_server(config: ServingConfig, *, opens_browser: bool = False) -> None:
    """Serves a model with a bank, see :func:`run_app`.

    Raises:
        BankError: the address, the model or the bank cannot be used.
    """

    def open_app() -> Served:
        shelf = Shelf(config)
        return Served(
            app=make_app(config, shelf),
            what=f"{config.model_name} with {config.bank} version {shelf.edition.version}",
            page=f"{PAGES_PATH}/" if config.explore else None,
        )

    run_app(open_app, config, opens_browser=opens_browser)
