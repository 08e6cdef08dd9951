"""A real browser without a window, driven over its own pipe: no driver, no port, no package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")


def found() -> str | None:
    """The program of the browser, None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """Commands and answers of the DevTools protocol, one after another."""

    def __init__(self, send: int, receive: int) -> None:
        self._send, self._receive = send, receive
        self._number, self._rest, self.session = 0, b"", ""
        self.events: list[dict[str, Any]] = []

    def __call__(self, method: str, **values: Any) -> dict[str, Any]:
        """The result of a command; what else is said meanwhile is kept in ``events``."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": values}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while True:
            said = self._next()
            if said.get("id") == self._number:
                assert "error" not in said, (method, said["error"])
                return said["result"]
            self.events.append(said)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            chunk = os.read(self._receive, 1 << 16)
            assert chunk, "the browser has ended"
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\0")
        return json.loads(line)

    def open(self, page: Path, width: int = 1200, *, dark: bool = False) -> None:
        """Load a file in a new tab and wait until it is there."""
        self.session = ""
        target = self("Target.createTarget", url="about:blank")["targetId"]
        attached = self("Target.attachToTarget", targetId=target, flatten=True)
        self.session, self.events = attached["sessionId"], []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")
        self("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1,
             mobile=False)  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])
        self("Page.navigate", url=page.resolve().as_uri())
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.events.append(self._next())

    def run(self, script: str) -> Any:
        """The value of a script in the page."""
        found = self("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def asked(self) -> list[str]:
        """What the page asked for, itself left out."""
        urls = [e["params"]["request"]["url"] for e in self.events
                if e.get("method") == "Network.requestWillBeSent"]  # fmt: skip
        return urls[1:]

    def complaints(self) -> list[str]:
        """Errors and messages of the console."""
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [json.dumps(e["params"]) for e in self.events if e.get("method") in kinds]

    def point_at(self, selector: str) -> None:
        """Move the pointer to the middle of an element."""
        box = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
            "return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        self("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])


@contextmanager
def started(folder: Path) -> Iterator[Browser]:
    """A browser with a profile of its own, ended with the block."""
    program = found()
    assert program is not None
    to_it, send = os.pipe()
    receive, from_it = os.pipe()
    words = [program, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
             f"--user-data-dir={folder}", "--no-first-run", "--disable-dev-shm-usage"]  # fmt: skip
    # The browser listens on descriptor 3 and answers on 4.
    shell = ["bash", "-c", f'exec "$@" 3<&{to_it} 4>&{from_it}', "browser", *words]
    process = subprocess.Popen(
        shell, pass_fds=(to_it, from_it), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(to_it)
    os.close(from_it)
    try:
        yield Browser(send, receive)
    finally:
        os.close(send)
        process.terminate()
        process.wait(30)
        os.close(receive)
