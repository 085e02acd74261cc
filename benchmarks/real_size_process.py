"""Runs commands for `benchmarks.real_size`, watching their time, memory and silence."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

POLL_S = 0.1
READY_S = 900.0
GB = 1e9


@dataclass(frozen=True)
class Run:
    """How a command went.

    Attributes:
        name: of the command.
        code: its exit code; of a server, 0 where it answered.
        seconds: from its start to its end, of a server to its answer.
        peak_gb: resident memory of the largest process, by the kernel's account.
        tree_gb: of it and its children together, looked at ten times a second.
        silence_s: longest time without a line of output.
        silent_after: the line before it.
    """

    name: str
    code: int
    seconds: float
    peak_gb: float
    tree_gb: float
    silence_s: float
    silent_after: str

    def good(self, allowed: int) -> bool:
        """It ended as it should."""
        return self.code in (0, allowed)


@dataclass(frozen=True)
class Address:
    """Of a server on this machine: its port, what answers when it is ready, and what draws."""

    port: int
    ready: str
    draws: str

    def at(self, path: str) -> str:
        """A URL."""
        return f"http://127.0.0.1:{self.port}{path}"


class Watch(threading.Thread):
    """Looks at a process, its children and its log until it is told to stop."""

    def __init__(self, pid: int, log: Path) -> None:
        super().__init__(daemon=True)
        self.process, self.log = psutil.Process(pid), log
        self.tree = self.largest = self.silence_s = 0.0
        self.silent_after = ""
        self.done = threading.Event()

    def run(self) -> None:
        """Until `done`."""
        size, since = 0, time.monotonic()
        while not self.done.wait(POLL_S):
            found = []
            with suppress(psutil.Error):
                for process in (self.process, *self.process.children(recursive=True)):
                    with suppress(psutil.Error):
                        found.append(float(process.memory_info().rss))
            self.tree = max(self.tree, sum(found))
            self.largest = max(self.largest, *found, 0.0)
            now = self.log.stat().st_size
            if now != size:
                size, since = now, time.monotonic()
            silence_s = time.monotonic() - since
            if silence_s > self.silence_s:
                self.silence_s, self.silent_after = silence_s, self.last_line()

    def last_line(self) -> str:
        """Of the log, shortened."""
        lines = self.log.read_text(errors="replace").splitlines()
        return lines[-1][:60] if lines else "its start"


def run_to_its_end(name: str, command: Sequence[str], environment: Mapping[str, str], log: Path) -> Run:
    """Run a command, its output in a file."""
    start_s = time.monotonic()
    with log.open("w") as output:
        child = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        watch = Watch(child.pid, log)
        watch.start()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        watch.done.set()
        watch.join()
    seconds = time.monotonic() - start_s
    peak = max(usage.ru_maxrss * 1024.0, watch.largest)
    return Run(name, child.returncode, seconds, peak / GB, watch.tree / GB, watch.silence_s, watch.silent_after)


def serve_one(
    name: str,
    command: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    address: Address,
    request: Mapping[str, Any],
) -> Run:
    """Start a server, wait until it is ready, ask it for one picture, and end it."""
    start_s = time.monotonic()
    with log.open("w") as output:
        child = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        watch = Watch(child.pid, log)
        watch.start()
        try:
            _wait(address.at(address.ready), child)
            body = json.dumps(request).encode()
            asked = urllib.request.Request(address.at(address.draws), body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(asked, timeout=600) as answer:
                code = 0 if answer.status == 200 and len(answer.read()) > 1000 else 1
        except (OSError, TimeoutError):
            code = 1
        finally:
            watch.done.set()
            watch.join()
            _end(child)
    seconds = time.monotonic() - start_s
    return Run(name, code, seconds, watch.largest / GB, watch.tree / GB, watch.silence_s, watch.silent_after)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait(address: str, child: subprocess.Popen[bytes]) -> None:
    end_s = time.monotonic() + READY_S
    while time.monotonic() < end_s and child.poll() is None:
        with suppress(urllib.error.URLError, OSError), urllib.request.urlopen(address, timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.5)
    raise TimeoutError(f"{address} was not ready")


def _end(child: subprocess.Popen[bytes]) -> None:
    """The server and what it started."""
    with suppress(psutil.Error):
        family = psutil.Process(child.pid).children(recursive=True)
        child.terminate()
        _, alive = psutil.wait_procs([*family, psutil.Process(child.pid)], timeout=20)
        for process in alive:
            process.kill()
    child.wait()
