"""The online services as processes of their own, started, waited for and ended."""

import http.client
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hashtab.pipelines.cluster import ROOT
from hashtab.pipelines.command_line import SettingsError
from hashtab.pipelines.places import shown

_LOOK_S = 0.1
_END_S = 30.0  # to finish what is in flight
_ANSWER_S = 5.0


class Service:
    """A running service.

    Args:
        name: for people.
        process: of it.
        url: that it answers at.
        log: file of what it says.
    """

    def __init__(self, name: str, process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
        self.name = name
        self.process = process
        self.url = url
        self.log = log

    def wait_until_ready(self) -> None:
        """Wait until the service says that it is ready.

        Raises:
            SettingsError: if it ends before.
        """
        while self._get("/health/ready") is None:
            self.check()
            time.sleep(_LOOK_S)

    def wait_for_tables(self, fingerprint: str) -> None:
        """Wait until the BSE service has every user's table of a model.

        Raises:
            SettingsError: if it ends before.
        """
        while not self._is_live(fingerprint):
            self.check()
            time.sleep(_LOOK_S)

    def _is_live(self, fingerprint: str) -> bool:
        models = (self._get("/v1/models") or {"models": []})["models"]
        return any(m["fingerprint"] == fingerprint and m["state"] == "live" for m in models)

    def _get(self, path: str) -> Any:
        """Return the JSON at a path, None where there is none yet."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=_ANSWER_S) as answer:
                return json.load(answer)
        except (OSError, ValueError, http.client.HTTPException):
            return None

    def check(self) -> None:
        """Check that the service runs.

        Raises:
            SettingsError: if it has ended, saying where its log lies.
        """
        status = self.process.poll()
        if status is not None:
            said = self.log.read_text(errors="replace").strip().splitlines()
            last = f": {said[-1]}" if said else ""
            raise SettingsError(f"{self.name} ended with {status}, see {shown(self.log)}{last}")


def wait_for_end(*services: Service) -> None:
    """Wait until one of the services ends.

    Raises:
        SettingsError: when it has.
    """
    while True:
        for service in services:
            service.check()
        time.sleep(_LOOK_S)


def _check_free(name: str, port: int) -> None:
    """Check that nobody listens at a port: whoever does would answer in the service's place."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise SettingsError(
                f"port {port} of {name} is taken: end what listens there, or choose another"
            )


@contextmanager
def running(
    name: str, module: str, options: Sequence[str], port: int, log: Path
) -> Iterator[Service]:
    """Run a service of one process until the block ends, and let it finish what is in flight.

    Args:
        name: for people.
        module: that `python -m` runs.
        options: of its command line, but for the port.
        port: to listen at, on this machine alone.
        log: file of what it says.

    Raises:
        SettingsError: if it ends before it is ready.
    """
    _check_free(name, port)
    with log.open("ab") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *options, f"--port={port}"],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            cwd=ROOT,
            start_new_session=True,  # a Ctrl-C is for the parent, which then ends all in order
        )
    service = Service(name, process, f"http://127.0.0.1:{port}", log)
    try:
        service.wait_until_ready()
        yield service
    finally:
        process.terminate()
        try:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_END_S)
        finally:  # also when another Ctrl-C comes
            process.kill()
            process.wait()
