"""The page itself: HTML made once at the start, and the scripts and styles beside it.

A view is a document of its own with an address of its own, so that links, the back button and titles are the browser's;
its script asks the API for what to show. The documents hold nothing of the bank, so they need no key.

What a page may do is said by a content security policy: it runs its own scripts, asks its own server, and nothing else.
Texts of a bank are put in place by ``textContent`` alone.
"""

from pathlib import Path

import jinja2
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flows.reporting.page import STYLE_SHEET
from flows.reporting.page import TEMPLATES as REPORT_TEMPLATES
from flows.serving.settings import PAGES_PATH

TEMPLATES = Path(__file__).parent / "templates"

STATIC = Path(__file__).parent / "static"

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)

HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    # Asked for anew each time, answered with 304: a newer release must not meet an older one's scripts.
    "Cache-Control": "no-cache",
}

VIEWS = {
    "/": "search",
    "/references/{ref_id}": "reference",
    "/versions": "versions",
    "/versions/{before:int}/{after:int}": "difference",
    "/playground": "playground",
}
"""The template of each address."""


class _AddHeaders:
    """Adds :data:`HEADERS` to every response."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_more(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        await self._app(scope, receive, send_more)


def render_views() -> dict[str, str]:
    """Returns the HTML document of each template."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = [*VIEWS.values(), "missing"]
    return {name: environment.get_template(f"{name}.html").render(root=PAGES_PATH, view=name) for name in names}


def make_pages() -> Starlette:
    """Makes the application that has the pages, to be mounted at :data:`flows.serving.settings.PAGES_PATH`."""
    documents = render_views()

    def make_route(path: str, name: str) -> Route:
        async def show(_request: Request) -> Response:
            return HTMLResponse(documents[name])

        return Route(path, show, name=name)

    async def get_report_styles(_request: Request) -> Response:
        return FileResponse(REPORT_TEMPLATES / STYLE_SHEET)

    async def tell_missing(_request: Request, _error: Exception) -> Response:
        return HTMLResponse(documents["missing"], 404)

    return Starlette(
        routes=[
            *(make_route(path, name) for path, name in VIEWS.items()),
            Route(f"/static/{STYLE_SHEET}", get_report_styles),
            Mount("/static", StaticFiles(directory=STATIC)),
        ],
        middleware=[Middleware(_AddHeaders)],
        exception_handlers={404: tell_missing},
    )
