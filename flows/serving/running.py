"""The server as a process: its socket, its log, its start and its orderly end."""

import logging
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from flows.serving.app import make_app
from flows.serving.editions import Shelf
from flows.serving.settings import ListeningConfig, ServingConfig
from schemas.errors import InputError


class _AnnouncingServer(uvicorn.Server):
    """Says that it can be reached once it can."""

    def __init__(self, config: uvicorn.Config, announcement: str) -> None:
        super().__init__(config)
        self._announcement = announcement

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        sys.stdout.write(self._announcement + "\n")
        sys.stdout.flush()


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


def run_app(open_app: Callable[[], tuple[FastAPI, str]], config: ListeningConfig) -> None:
    """Serves until Ctrl-C or SIGTERM, and then ends what is under way.

    Args:
        open_app: makes the application, once the address is known to be free, and says what it serves.
        config: where to listen.

    Raises:
        BankError: the address cannot be used, or the application not be made.
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    logging.getLogger("flows.serving").setLevel(logging.INFO)
    with bind_socket(config.host, config.port) as bound:
        app, what = open_app()
        host, port = bound.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        settings = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="on",
            ws="none",
            timeout_graceful_shutdown=int(config.grace_seconds),
        )
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _end_at_leisure)
        _AnnouncingServer(settings, f"memory3 serves {what} at {address}; Ctrl-C ends it").run(sockets=[bound])


def run_server(config: ServingConfig) -> None:
    """Serves a model with a bank, see :func:`run_app`.

    Raises:
        BankError: the address, the model or the bank cannot be used.
    """

    def open_app() -> tuple[FastAPI, str]:
        shelf = Shelf(config)
        what = f"{config.model_name} with {config.bank} version {shelf.edition.version}"
        return make_app(config, shelf), what

    run_app(open_app, config)
