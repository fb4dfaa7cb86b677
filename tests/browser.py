"""A real browser for the tests of the page: headless Chromium, spoken to through its DevTools pipe."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def needs_browser() -> str:
    """Its path; skips where there is none."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    return CHROMIUM


class Browser:
    """One page in a window of that size. Enter to start, leave to end.

    console: what the page reported as errors.
    """

    def __init__(self, profile: Path, *, width: int = 1280, height: int = 900, phone: bool = False) -> None:
        self._profile, self._size, self._phone = profile, (width, height), phone
        self._number = 0
        self._rest = b""
        self._session: str | None = None
        self.console: list[str] = []

    def __enter__(self) -> Browser:
        to_browser, commands = os.pipe()
        events, from_browser = os.pipe()
        pair = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (to_browser, from_browser)]
        os.close(to_browser)
        os.close(from_browser)
        command = [
            needs_browser(),
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--remote-debugging-pipe",
            f"--user-data-dir={self._profile}",
            "about:blank",
        ]
        # Chromium reads commands from descriptor 3 and writes to 4.
        moves = f"os.dup2({pair[0]}, 3); os.dup2({pair[1]}, 4)"
        start = f"import os, sys; {moves}; os.execv(sys.argv[1], sys.argv[1:])"
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-c", start, *command],
            pass_fds=pair,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for end in pair:
            os.close(end)
        self._commands, self._events = commands, events
        try:
            self._attach()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _attach(self) -> None:
        target = self.do("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.do("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.do(f"{domain}.enable")
        width, height = self._size
        self.do(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if self._phone else 1,
            mobile=self._phone,
        )

    def __exit__(self, *exc: object) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._commands)
        os.close(self._events)

    def do(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the DevTools protocol, and its answer."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                found: dict[str, Any] = answer["result"]
                return found

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._events], [], [], 20)[0], "the browser does not answer"
            data = os.read(self._events, 1 << 16)
            assert data, "the browser has ended"
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if message.get("method") == "Runtime.exceptionThrown":
            self.console.append(str(message["params"]["exceptionDetails"]))
        if message.get("method") == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
            self.console.append(str(message["params"]["entry"]))
        return message

    def run(self, script: str) -> Any:
        """The value of an expression in the page; a promise is waited for."""
        answer = self.do("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, script: str, seconds: float = 10.0) -> Any:
        """The expression's value once it is true."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, (script, self.console)
            time.sleep(0.05)
        return value

    def open(self, url: str) -> None:
        self.do("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def place(self, selector: str, x: float = 0.5, y: float = 0.5) -> tuple[float, float]:
        """Where in the window that share of an element lies."""
        box = self.run(
            f"(() => {{const e = document.querySelector({json.dumps(selector)}); "
            "e.scrollIntoView({block: 'nearest'}); const b = e.getBoundingClientRect(); "
            "return [b.left, b.top, b.width, b.height]})()"
        )
        return box[0] + x * box[2], box[1] + y * box[3]

    def mouse(self, kind: str, x: float, y: float) -> None:
        button = "none" if kind == "mouseMoved" else "left"
        buttons = {"mousePressed": 1, "mouseReleased": 0}.get(kind, 1)
        self.do("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, buttons=buttons, clickCount=1)

    def click(self, selector: str, x: float = 0.5, y: float = 0.5) -> None:
        place = self.place(selector, x, y)
        self.mouse("mousePressed", *place)
        self.mouse("mouseReleased", *place)

    def drag(self, selector: str, start: tuple[float, float], end: tuple[float, float]) -> None:
        first, last = self.place(selector, *start), self.place(selector, *end)
        self.mouse("mousePressed", *first)
        for share in (0.3, 0.7, 1.0):
            self.mouse("mouseMoved", *(a + share * (b - a) for a, b in zip(first, last, strict=True)))
        self.mouse("mouseReleased", *last)

    def key(self, key: str, *, shift: bool = False) -> None:
        text = "\r" if key == "Enter" else ""
        codes = {"Enter": 13, "Tab": 9, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39}
        code = {"ArrowDown": 40, **codes}[key]
        for kind in ("keyDown" if text else "rawKeyDown", "keyUp"):
            self.do(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                text=text if kind == "keyDown" else "",
                windowsVirtualKeyCode=code,
                modifiers=8 if shift else 0,
            )

    def type(self, text: str) -> None:
        self.do("Input.insertText", text=text)

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        answer = self.do("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))
