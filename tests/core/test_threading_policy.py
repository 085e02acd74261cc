"""OpenMP's threads spin on an idle machine and sleep beside other work; the user's own choice wins."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dfu_mlflow.threading_policy import (
    CHOSEN_BY_USER,
    MAX_PATIENCE_S,
    PATIENCE_S,
    Waiting,
    run_delays_ns,
    user_has_chosen,
)

ROOT = Path(__file__).resolve().parents[2]
LIBGOMP = Path(importlib.util.find_spec("torch").origin or "").parent / "lib" / "libgomp.so.1"  # type: ignore[union-attr]
needs_libgomp = pytest.mark.skipif(not LIBGOMP.exists(), reason="this torch has no libgomp of its own")
needs_delays = pytest.mark.skipif(
    not (Path("/proc/self/task").exists() and run_delays_ns()), reason="the kernel does not tell run delays"
)

THREADS = f"""
import ctypes, os, threading, time
library = ctypes.CDLL({str(LIBGOMP)!r})
library.GOMP_parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
sizes = set()
@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def note(_): sizes.add(library.omp_get_num_threads())
def meet(): library.GOMP_parallel(ctypes.cast(note, ctypes.c_void_p), None, 2, 0)
def states():
    found = []
    for task in os.listdir("/proc/self/task"):
        try: found.append(open(f"/proc/self/task/{{task}}/stat").read().rsplit(")", 1)[1].split()[0])
        except (FileNotFoundError, ProcessLookupError): pass  # it has just ended
    return sorted(found)
def until(wanted):
    end = time.monotonic() + 20
    while not wanted() and time.monotonic() < end: time.sleep(0.01)
    assert wanted(), states()
"""


def run_program(program: str, **environment: str) -> str:
    """What it prints, in an environment that says nothing about threads but this."""
    place = {name: value for name, value in os.environ.items() if name not in (*CHOSEN_BY_USER, "OMP_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**place, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_threads_sleep_from_the_first_contention_until_there_has_been_none_for_a_while() -> None:
    waiting = Waiting()
    assert not waiting.decide(False, 0.0)
    assert waiting.decide(True, 1.0)
    assert waiting.decide(False, 1.5)
    assert waiting.decide(True, 2.0)
    assert waiting.decide(False, 2.0 + 0.9 * PATIENCE_S)
    assert not waiting.decide(False, 2.0 + PATIENCE_S)


def test_spinning_is_tried_less_often_the_more_often_it_brings_contention_back() -> None:
    waiting, now_s, sleeps_s = Waiting(), 0.0, []
    for _ in range(8):
        start_s = now_s
        assert waiting.decide(True, now_s)
        while waiting.decide(False, now_s):
            now_s += 0.25
        sleeps_s.append(now_s - start_s)
        now_s += 0.25
    assert sleeps_s[:4] == [PATIENCE_S, 2 * PATIENCE_S, 4 * PATIENCE_S, 8 * PATIENCE_S]
    assert sleeps_s[-2:] == [MAX_PATIENCE_S, MAX_PATIENCE_S]
    assert waiting.decide(True, now_s + 2 * MAX_PATIENCE_S)  # another neighbour, long after
    assert not waiting.decide(False, now_s + 2 * MAX_PATIENCE_S + PATIENCE_S)


@pytest.mark.parametrize(
    ("environment", "chosen"),
    [
        ({}, False),
        ({"OMP_NUM_THREADS": "2"}, False),
        ({"OMP_NUM_THREADS": "1"}, True),
        ({"OMP_WAIT_POLICY": "active"}, True),
        ({"GOMP_SPINCOUNT": "1000"}, True),
    ],
)
def test_the_user_decides(environment: dict[str, str], chosen: bool) -> None:
    assert user_has_chosen(environment) is chosen


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have another OpenMP")
@pytest.mark.parametrize(("environment", "watched"), [({}, 1), ({"OMP_WAIT_POLICY": "passive"}, 0)])
def test_every_entry_point_adapts_before_torch_loads(environment: dict[str, str], watched: int) -> None:
    program = (
        "import sys, threading; from dfu_mlflow import entry\n"
        "def main(_):\n"
        "    assert 'torch' not in sys.modules\n"
        "    print([thread.name for thread in threading.enumerate()].count('openmp-waiting'))\n"
        "    return 0\n"
        "entry.run(main, []); sys.exit(entry.run(main, []))"
    )
    assert run_program(program, **environment) == f"{watched}\n" * 2


@needs_libgomp
def test_a_spare_team_sends_waiting_threads_to_sleep_and_changes_no_team() -> None:
    program = THREADS + (
        "from dfu_mlflow.threading_policy import SpareTeam\n"
        "meet(); until(lambda: states() == ['R', 'R'])\n"
        "team = SpareTeam(); until(lambda: len(states()) > os.cpu_count() + 2)\n"
        "meet(); until(lambda: states().count('R') == 1)\n"
        "team.release(); until(lambda: len(states()) == 2); meet(); until(lambda: states() == ['R', 'R'])\n"
        "assert sizes == {2}"
    )
    run_program(program, GOMP_SPINCOUNT="INFINITY")


@needs_libgomp
@needs_delays
def test_threads_that_lack_a_processor_are_noticed_and_forgotten() -> None:
    program = THREADS + (
        "import hashlib, sys\n"
        "from dfu_mlflow import threading_policy\n"
        "threading_policy.PERIOD_S, threading_policy.PATIENCE_S = 0.05, 0.2\n"
        "sys.modules['torch'] = threading_policy\n"
        "os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])\n"
        "threading_policy.adapt_waiting()\n"
        "busy = True\n"
        "def work():\n"
        "    while busy: hashlib.pbkdf2_hmac('sha256', b'', b'', 10_000)\n"
        "workers = [threading.Thread(target=work) for _ in range(2)]\n"
        "for worker in workers: worker.start()\n"
        "def team(): return any(t.name == 'openmp-waiting-team' for t in threading.enumerate())\n"
        "until(team); busy = False; until(lambda: not team())"
    )
    run_program(program)
