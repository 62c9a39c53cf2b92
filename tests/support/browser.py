"""A headless Chromium behind chromedriver's HTTP interface, for pages that are only right where they are drawn."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from base64 import b64decode
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BINARY, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
MISSING = "" if BINARY and DRIVER else "no chromium with chromedriver on the PATH"


@dataclass
class Browser:
    """One window."""

    url: str

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(f"{self.url}/{path}", json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def _devtools(self, command: str, **parameters: Any) -> Any:
        return self._post("goog/cdp/execute", {"cmd": command, "params": parameters})

    def open(self, page: Path, width: int, *, dark: bool = False) -> None:
        """Show a file in a window so many pixels wide."""
        theme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500
        )
        self._devtools("Emulation.setEmulatedMedia", features=theme)
        self._post("url", {"url": page.resolve().as_uri()})

    def run(self, script: str) -> Any:
        """What the script returns."""
        return self._post("execute/sync", {"script": script, "args": []})

    def complaints(self) -> list[str]:
        """What stood in the console since the last call: errors, and requests that were refused."""
        return [entry["message"] for entry in self._post("se/log", {"type": "browser"}) if entry["level"] == "SEVERE"]

    def shot(self) -> bytes:
        """The whole page as PNG."""
        return b64decode(self._devtools("Page.captureScreenshot", captureBeyondViewport=True)["data"])


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """profile: an empty folder for what Chromium keeps."""
    assert BINARY
    assert DRIVER
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "HOME": str(profile), "no_proxy": "127.0.0.1"}
    driver = subprocess.Popen(
        [DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    base = Browser(f"http://127.0.0.1:{port}")
    arguments = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--user-data-dir={profile}",
    ]
    wanted = {
        "goog:chromeOptions": {"binary": BINARY, "args": arguments},
        "goog:loggingPrefs": {"browser": "ALL"},
    }
    try:
        session = _patiently(base, {"capabilities": {"alwaysMatch": wanted}})
        window = Browser(f"{base.url}/session/{session['sessionId']}")
        try:
            yield window
        finally:  # or Chromium outlives its driver
            urllib.request.urlopen(urllib.request.Request(window.url, method="DELETE"), timeout=30).close()
    finally:
        driver.terminate()
        driver.wait(20)


def _patiently(base: Browser, body: dict[str, Any]) -> Any:
    """The driver takes a moment until it listens."""
    for _ in range(100):
        with contextlib.suppress(ConnectionError, urllib.error.URLError):
            return base._post("session", body)
        time.sleep(0.1)
    raise TimeoutError("chromedriver does not answer")
