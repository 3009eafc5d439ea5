"""A headless Chromium over its debugging pipe (chromium --remote-debugging-pipe: JSON messages, each ended by a zero byte)."""

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SECONDS = 60.0


class Browser:
    """One page. ``said``: what it logged or threw; ``asked``: every request but that of the page itself."""

    def __init__(self, write: int, read: int) -> None:
        self.write, self.read, self.buffer, self.number, self.session = write, read, b"", 0, ""
        self.said: list[str] = []
        self.asked: list[str] = []
        self.seen: set[str] = set()

    def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command of the DevTools protocol and return its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters} | (
            {"sessionId": self.session} if self.session else {}
        )
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == self.number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _message(self) -> dict[str, Any]:
        deadline = time.monotonic() + SECONDS
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.read], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "chromium does not answer"
            self.buffer += os.read(self.read, 1 << 20)
        text, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(text)
        self._event(message.get("method", ""), message.get("params", {}))
        return message

    def _event(self, method: str, found: dict[str, Any]) -> None:
        self.seen.add(method)
        if method == "Runtime.consoleAPICalled":
            self.said.append(" ".join(str(a.get("value", a.get("description"))) for a in found["args"]))
        elif method == "Runtime.exceptionThrown":
            self.said.append(json.dumps(found["exceptionDetails"]))
        elif method == "Log.entryAdded":
            self.said.append(found["entry"]["text"])
        elif method == "Page.javascriptDialogOpening":
            self.said.append(f"dialog: {found['message']}")
        elif (
            method == "Network.requestWillBeSent"
            and found["type"] != "Document"
            and not found["request"]["url"].startswith("data:")
        ):
            self.asked.append(found["request"]["url"])

    def open(self, page: Path, width: int = 1280, height: int = 900, dark: bool = False, media: str = "screen") -> None:
        """Load a file and wait until it is shown."""
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self.seen.clear()
        self.command("Page.navigate", url=page.absolute().as_uri())
        deadline = time.monotonic() + SECONDS
        while "Page.loadEventFired" not in self.seen:
            assert time.monotonic() < deadline
            self._message()

    def value(self, expression: str) -> Any:
        """The JSON value of a JavaScript expression."""
        answer = self.command("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self, place: Path, whole: bool = True) -> None:
        """A PNG of the page."""
        found = self.command("Page.captureScreenshot", captureBeyondViewport=whole)
        place.write_bytes(base64.b64decode(found["data"]))

    def move(self, x: float, y: float) -> None:
        """Move the pointer there, in pixels of the window."""
        self.command("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)


@contextlib.contextmanager
def started() -> Iterator[Browser]:
    """A browser with one page, its own profile, and no way to the network but what is asked of it."""
    assert PROGRAM
    to_browser, our_write = os.pipe()
    our_read, from_browser = os.pipe()

    def pipes() -> None:  # the browser reads 3 and writes 4
        a, b = os.dup(to_browser), os.dup(from_browser)
        os.dup2(a, 3)
        os.dup2(b, 4)

    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--proxy-server=127.0.0.1:9"]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="chromium-") as profile, (Path(profile) / "log").open("w") as log:
        process = subprocess.Popen(
            [PROGRAM, *options, f"--user-data-dir={profile}/data", "about:blank"], preexec_fn=pipes, close_fds=False, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
        os.close(to_browser)
        os.close(from_browser)
        browser = Browser(our_write, our_read)
        try:
            target = browser.command("Target.createTarget", url="about:blank")["targetId"]
            browser.session = browser.command("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                browser.command(f"{domain}.enable")
            yield browser
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            os.close(our_write)
            os.close(our_read)
