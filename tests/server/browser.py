"""Chromium without a window, driven by its debugging protocol over a pair of pipes."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOUND = next(
    (p for n in ("chromium", "google-chrome", "chromium-browser") if (p := shutil.which(n))), None
)


class Browser:
    """One page. `said` collects what it logs and every error of its scripts."""

    def __init__(self, wants: int, tells: int) -> None:
        self._wants, self._tells = os.fdopen(wants, "wb", 0), os.fdopen(tells, "rb")
        self._id, self._session = 0, None
        self.said: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for part in ("Runtime", "Page", "Log", "Network"):
            self.call(f"{part}.enable")

    def call(self, method: str, **given: Any) -> Any:
        """Return the result of a command."""
        self._id += 1
        message: dict[str, Any] = {"id": self._id, "method": method, "params": given}
        if self._session:
            message["sessionId"] = self._session
        self._wants.write(json.dumps(message).encode() + b"\0")
        while True:
            told = self._read()
            if told.get("id") == self._id:
                if "error" in told:
                    raise RuntimeError(f"{method}: {told['error']}")
                return told["result"]
            self._note(told)

    def _read(self) -> Any:
        piece = bytearray()
        while (byte := self._tells.read(1)) != b"\0":
            if not byte:
                raise EOFError("the browser has ended")
            piece += byte
        return json.loads(piece)

    def _note(self, told: Any) -> None:
        given = told.get("params", {})
        if told["method"] == "Runtime.exceptionThrown":
            self.said.append(str(given["exceptionDetails"]))
        elif told["method"] == "Log.entryAdded":
            self.said.append(given["entry"]["text"])
        elif told["method"] == "Network.requestWillBeSent":
            self.said.append("asks " + given["request"]["url"])

    def run(self, script: str) -> Any:
        """Return the value of an expression of the page; promises are waited for."""
        done = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in done:
            raise RuntimeError(f"{script}: {done['exceptionDetails']}")
        return done["result"].get("value")

    def until(self, script: str, seconds: float = 30) -> Any:
        """Wait until an expression is true and return it."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            if time.monotonic() > end:
                raise TimeoutError(
                    f"{script}; the page reads {self.run('document.body.innerText')}"
                )
            time.sleep(0.05)
        return value

    def press(self, *keys: str) -> None:
        """Type keys: names such as Tab and Enter, or text."""
        codes = {"Tab": 9, "Enter": 13, "Escape": 27}
        for key in keys:
            if key not in codes:
                self.call("Input.insertText", text=key)
                continue
            named = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key]}
            text = {"text": "\r"} if key == "Enter" else {}
            self.call("Input.dispatchKeyEvent", type="keyDown", **named, **text)
            self.call("Input.dispatchKeyEvent", type="keyUp", **named)

    def picture(self, path: Path) -> None:
        """Write what is seen as PNG."""
        made = self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(made["data"]))


@contextlib.contextmanager
def browsing(home: Path) -> Iterator[Browser]:
    """Start a browser with a profile in `home`."""
    assert FOUND is not None
    read_wants, wants = os.pipe()
    tells, write_tells = os.pipe()
    # The browser reads commands from 3 and writes to 4.
    command = f'exec "$0" "$@" 3<&{read_wants} 4>&{write_tells}'
    options = ["--headless", "--remote-debugging-pipe", f"--user-data-dir={home}", "--no-sandbox"]
    options += ["--disable-gpu", "--no-first-run", "--disable-background-networking"]
    options += ["--disable-dev-shm-usage", "--disable-extensions", "--hide-scrollbars"]
    process = subprocess.Popen(
        ["bash", "-c", command, FOUND, *options],
        pass_fds=(read_wants, write_tells),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(read_wants)
    os.close(write_tells)
    try:
        browser = Browser(wants, tells)
        yield browser
        with contextlib.suppress(EOFError, BrokenPipeError):
            browser.call("Browser.close")
    finally:
        process.terminate()
        process.wait(30)
