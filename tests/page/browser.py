"""Headless Chromium over its DevTools protocol: one page, opened, measured and printed."""

import asyncio
import base64
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--remote-debugging-port=0",
)
COLOURS = """['backgroundColor', 'color'].map(name =>
  getComputedStyle(document.body)[name].match(/[0-9]+/g).slice(0, 3).map(Number))"""
WIDE_PARTS = """[...document.querySelectorAll('body *')].filter(e => e.scrollWidth > e.clientWidth + 1
  && e.clientWidth && getComputedStyle(e).overflowX != 'visible').map(e => e.className)"""


@dataclass
class Seen:
    """What a browser made of a page."""

    faults: list[str]  # of the console, of the network, of scripts
    width: int  # of the content
    scrolled: list[str]  # classes of the parts that scroll sideways by themselves
    outside: int  # letters of tables and texts beyond the right edge, that nothing scrolls to
    pdf_pages: int
    colours: list[list[int]]  # red, green, blue of the page and of its letters
    screenshot: bytes = field(repr=False)


@contextmanager
def chromium(folder: Path) -> Iterator[str]:
    """Run Chromium; yield the address of its DevTools."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    port, end = folder / "DevToolsActivePort", time.monotonic() + 60
    try:
        while not (port.exists() and port.read_text().count("\n")):
            assert process.poll() is None, "Chromium has not started"
            assert time.monotonic() < end, "Chromium does not answer"
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port.read_text().split()[0]}"
    finally:
        process.terminate()
        process.wait(30)


class Tab:
    """One tab: commands are answered in turn, what happens between them is kept."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._number = socket, 0
        self.events: list[dict[str, Any]] = []

    async def call(self, method: str, **params: object) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": params})
        while True:
            message = json.loads((await self._socket.receive(timeout=60)).data)
            if message.get("id") == self._number:
                assert "error" not in message, message
                return dict(message["result"])
            self.events.append(message)

    async def wait_for(self, event: str) -> None:
        while not any(message["method"] == event for message in self.events):
            self.events.append(json.loads((await self._socket.receive(timeout=60)).data))

    async def value(self, expression: str) -> Any:
        return (await self.call("Runtime.evaluate", expression=expression, returnByValue=True))["result"][
            "value"
        ]


def look_at(address: str, page: Path, width: int, *, is_dark: bool = False) -> Seen:
    """Open the page in a window of that width."""
    return asyncio.run(_look_at(address, page, width, is_dark=is_dark))


async def _look_at(address: str, page: Path, width: int, *, is_dark: bool) -> Seen:
    async with aiohttp.ClientSession() as session:
        async with session.put(f"{address}/json/new?about:blank") as answer:
            target = json.loads(await answer.text())
        async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            tab = Tab(socket)
            for domain in ("Page", "Runtime", "Log", "Network"):
                await tab.call(f"{domain}.enable")
            await tab.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1,
                           mobile=width < 600)  # fmt: skip
            scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
            await tab.call("Emulation.setEmulatedMedia", features=[scheme])
            await tab.call("Page.navigate", url=page.resolve().as_uri())
            await tab.wait_for("Page.loadEventFired")
            return await _measure(tab)


async def _measure(tab: Tab) -> Seen:
    width = int(await tab.value("document.documentElement.scrollWidth"))
    scrolled = [str(name) for name in await tab.value(WIDE_PARTS)]
    colours = await tab.value(COLOURS)
    shot = await tab.call("Page.captureScreenshot", captureBeyondViewport=True)
    printed = await tab.call("Page.printToPDF", preferCSSPageSize=True, printBackground=True)
    pdf = base64.b64decode(printed["data"])
    await tab.call("Emulation.setEmulatedMedia", media="print")
    await tab.call("Emulation.setDeviceMetricsOverride", width=703, height=1000, deviceScaleFactor=1,
                   mobile=False)  # fmt: skip
    outside = int(await tab.value(
        "[...document.querySelectorAll('td, th, p, li, pre, code, dd, svg')]"
        ".filter(e => e.getBoundingClientRect().right > 704).length"
    ))  # fmt: skip
    faults = [json.dumps(message) for message in tab.events if is_fault(message)]
    pages, image = pdf.count(b"/Type /Page\n"), base64.b64decode(shot["data"])
    return Seen(faults, width, scrolled, outside, pages, colours, image)


def is_fault(message: dict[str, Any]) -> bool:
    """Return whether an event says that something went wrong, or that a file was asked for from elsewhere."""
    if message["method"] == "Network.requestWillBeSent":
        return not message["params"]["request"]["url"].startswith(("file:", "data:"))
    return message["method"] in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded",
                                 "Network.loadingFailed")  # fmt: skip
