"""A headless Chromium that opens a page and tells what it fetched, printed and showed."""

import contextlib
import itertools
import json
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any, Self

from websockets.sync.client import connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
"""The browser, None if there is none on the PATH."""


class Browser:
    """A tab of a browser of its own, driven by the DevTools protocol; to be used as a context.

    Attributes:
        requests: URLs that the page asked for, in order.
        complaints: what it wrote to the console, uncaught errors and violations of its policy.
    """

    def __init__(self, profile: Path) -> None:
        """Starts the browser with an empty profile folder."""
        assert CHROMIUM
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._numbers = itertools.count(1)
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        options += [
            "--disable-background-networking",
            "--remote-debugging-port=0",
            f"--user-data-dir={profile}",
            "about:blank",
        ]
        self._process = subprocess.Popen([CHROMIUM, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port = self._wait_for_port(profile / "DevToolsActivePort")
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
                pages = [target for target in json.load(answer) if target["type"] == "page"]
            self._socket = connect(pages[0]["webSocketDebuggerUrl"], max_size=None)
        except BaseException:
            self._process.kill()
            raise
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def _wait_for_port(self, file: Path) -> str:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if file.exists() and file.read_text().count("\n"):
                return file.read_text().splitlines()[0]
            time.sleep(0.1)
        raise TimeoutError("the browser does not answer")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Runs a command of the protocol and returns its result; events on the way are noted."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=120))
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        method, parameters = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(str(parameters["args"]))
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(str(parameters["exceptionDetails"]))
        elif method == "Log.entryAdded":
            self.complaints.append(parameters["entry"]["text"])

    def open(self, url: str) -> None:
        """Opens a page and waits until it is there; requests and complaints are those of this page."""
        self.requests.clear()
        self.complaints.clear()
        self.call("Page.navigate", url=url)
        while self.evaluate("document.readyState") != "complete" or self.evaluate("location.href") == "about:blank":
            time.sleep(0.05)

    def evaluate(self, expression: str) -> Any:
        """Returns the value of a JavaScript expression in the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def prefer(self, scheme: str) -> None:
        """Makes the page believe that its reader likes it ``light`` or ``dark``."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def press(self, key: str) -> None:
        """Presses a key, such as ``Tab``."""
        codes = {"Tab": 9, "Enter": 13, "ArrowUp": 38, "ArrowDown": 40, "/": 191}
        for kind in ("rawKeyDown", "char" if key == "Enter" else "", "keyUp"):
            if kind:
                text = {"text": "\r"} if kind == "char" else {}
                self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=codes[key], **text)

    def type(self, text: str) -> None:
        """Writes into what has the focus."""
        self.call("Input.insertText", text=text)

    def wait_for(self, expression: str, seconds: float = 300.0) -> None:
        """Waits until a JavaScript expression is true, in this page or in the one that comes after it.

        Raises:
            AssertionError: it has not become true.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(AssertionError):  # between two pages nothing can be evaluated
                if self.evaluate(expression):
                    return
            time.sleep(0.05)
        raise AssertionError(f"{expression} has not become true; complaints: {self.complaints}")

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the browser."""
        self._socket.close()
        self._process.terminate()
        self._process.wait(30)
