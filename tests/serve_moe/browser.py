"""A browser without a screen, by chromedriver's WebDriver interface."""

import contextlib
import http.client
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

CHROMEDRIVER = shutil.which("chromedriver")
_SECONDS = 60
_FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")


class Browser:
    """A session of chromedriver's."""

    def __init__(self, port: int):
        self._port = port
        options = {"goog:chromeOptions": {"args": _FLAGS}}
        session = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": options}})
        self._path = f"/session/{session['sessionId']}"
        self._ask("POST", f"{self._path}/timeouts", {"script": 1000 * _SECONDS})

    def open(self, url: str) -> None:
        self._ask("POST", f"{self._path}/url", {"url": url})

    def type_into(self, selector: str, text: str) -> None:
        """Replaces what an input field has."""
        element = self._find(selector)
        self._ask("POST", f"{element}/clear", {})
        self._ask("POST", f"{element}/value", {"text": text})

    def click(self, selector: str) -> None:
        self._ask("POST", f"{self._find(selector)}/click", {})

    def run(self, script: str) -> Any:
        """Runs a script that calls done(value) at its end; returns the value."""
        body = {"script": f"const done = arguments[0]; {script}", "args": []}
        return self._ask("POST", f"{self._path}/execute/async", body)

    def _find(self, selector: str) -> str:
        found = {"using": "css selector", "value": selector}
        (element,) = self._ask("POST", f"{self._path}/element", found).values()
        return f"{self._path}/element/{element}"

    def _ask(self, method: str, path: str, body: dict) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=2 * _SECONDS)
        with contextlib.closing(connection):
            connection.request(method, path, json.dumps(body))
            response = connection.getresponse()
            value = json.loads(response.read())["value"]
        assert response.status == 200, value
        return value

    def close(self) -> None:
        self._ask("DELETE", self._path, {})


@contextlib.contextmanager
def browsing() -> Iterator[Browser]:
    """Runs a browser, which must be there: see CHROMEDRIVER."""
    command = [CHROMEDRIVER, "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        try:
            for line in driver.stdout:
                if found := re.search(r"started successfully on port (\d+)", line):
                    break
            else:
                raise AssertionError("chromedriver has not started")
            with contextlib.closing(Browser(int(found[1]))) as browser:
                yield browser
        finally:
            driver.kill()
