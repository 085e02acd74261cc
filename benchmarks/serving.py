"""What does the server cost, and what does batching gain? `python -m benchmarks.serving` prints ratios of one run.

Packages the embedded base as a sampler, registers it in a store of its own, serves it over HTTP and asks from threads:
one client against calling the pipeline directly, in turns; 1 and 8 clients, in turns; 1,000 requests from 32 clients.
`--requests`, `--pairs`, `--pictures` and `--steps` shrink it.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlflow
import psutil
from safetensors.torch import save_file

from benchmarks.machine import machine
from dfu_mlflow.base.load import load_base
from dfu_mlflow.bundle import BundleSource, write_bundle
from dfu_mlflow.bundle_format import Settings
from dfu_mlflow.config import RunConfig
from dfu_mlflow.config.serving import ServeConfig
from dfu_mlflow.sampling import Sampler
from registry.package import register_sampler
from registry.serving.run import build_server, listen

OVERHEAD = 0.10
GAIN = 1.5
GROWTH_MIB = 64.0
PROMPTS = {
    "I": "diabetic foot ulcer, inflammatory phase",
    "P": "diabetic foot ulcer, proliferative phase",
    "R": "diabetic foot ulcer, remodeling phase",
}
EMBEDDED = RunConfig.model_validate({"adapter": {"method": "full"}})


@dataclass(frozen=True)
class Server:
    """A running server and the sampler it draws with."""

    port: int
    sampler: Sampler

    def ask(self, seed: int) -> int:
        """HTTP status of a request for one picture."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        try:
            body = json.dumps({"rows": [{"phase": "IPR"[seed % 3], "seed": seed}]})
            connection.request("POST", "/v1/images", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            return answer.status
        finally:
            connection.close()


def register(folder: Path, steps: int) -> None:
    """The embedded base as `dfu-sampler/1`; weights do not matter for time."""
    weights = {name: weight.detach() for name, weight in load_base("tiny_sdxl").unet.named_parameters()}
    save_file(weights, folder / "weights.safetensors")
    settings = Settings(3.0, steps, 64, (64, 64), scheduler=EMBEDDED.sampling.scheduler)
    source = BundleSource(folder / "weights.safetensors", PROMPTS, settings, "live")
    with mlflow.start_run() as run:
        register_sampler(write_bundle(folder / "bundle", EMBEDDED, source), EMBEDDED, run.info.run_id, {}, {})


@contextmanager
def serving() -> Iterator[Server]:
    """The registered version, served by a thread of this process."""
    config = ServeConfig.model_validate({"model": "models:/dfu-sampler/1", "serve": {"port": 0}})
    with listen(config.serve) as listener:
        server = build_server(config, None)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            app = server.config.app
            yield Server(listener.getsockname()[1], app.state.service.versions.current.sampler)  # type: ignore[union-attr]
        finally:
            server.should_exit = True
            thread.join()


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    start_s = time.perf_counter()
    work()
    return time.perf_counter() - start_s


def overhead(server: Server, repeats: int) -> bool:
    """One client against the pipeline, in turns, so that a busy machine slows both."""
    served, direct = [], []
    for seed in range(repeats):
        label = "IPR"[seed % 3]
        direct.append(seconds(lambda label=label, seed=seed: server.sampler.draw([label], [seed])))  # type: ignore[misc]
        served.append(seconds(lambda seed=seed: server.ask(seed)))  # type: ignore[misc]
    more = statistics.median(a / b for a, b in zip(served, direct, strict=True)) - 1
    good = more < OVERHEAD
    pipeline_ms, http_ms = statistics.median(direct) * 1000, statistics.median(served) * 1000
    print(
        f"one picture: pipeline {pipeline_ms:.0f} ms, over HTTP {http_ms:.0f} ms, {more:+.1%} ({repeats} pairs;"
        f" under {OVERHEAD:.0%} wanted) {'ok' if good else 'MISSED'}",
        flush=True,
    )
    return good


def throughput(server: Server, clients: int, requests: int) -> float:
    """Pictures a second."""
    with ThreadPoolExecutor(clients) as pool:
        return requests / seconds(lambda: list(pool.map(server.ask, range(requests))))


def gain(server: Server, requests: int) -> bool:
    """8 clients against one, in turns."""
    ratios = []
    for _ in range(3):
        one, eight = throughput(server, 1, requests // 4), throughput(server, 8, requests)
        ratios.append(eight / one)
        print(f"1 client {one:.2f} pictures/s, 8 clients {eight:.2f}", flush=True)
    ratio = statistics.median(ratios)
    good = ratio >= GAIN
    print(
        f"8 clients: {ratio:.2f} times one client's (at least {GAIN} wanted) {'ok' if good else 'MISSED'}", flush=True
    )
    return good


def endurance(server: Server, requests: int) -> bool:
    """Errors and memory under 32 clients; the first tenth warms up allocators and is not counted as growth."""
    process, statuses = psutil.Process(os.getpid()), Counter[int]()
    resident = []
    with ThreadPoolExecutor(32) as pool:
        for number, status in enumerate(pool.map(server.ask, range(requests))):
            statuses[status] += 1
            if (number + 1) % (requests // 10) == 0:
                resident.append(process.memory_info().rss / 2**20)
    growth = resident[-1] - resident[0]
    good = set(statuses) <= {200, 429} and growth < GROWTH_MIB
    shown = ", ".join(f"{count} x {status}" for status, count in sorted(statuses.items()))
    print(
        f"{requests} requests from 32 clients: {shown}; resident {' '.join(f'{value:.0f}' for value in resident)} MiB, "
        f"{growth:+.0f} after the first tenth (no errors but 429, under {GROWTH_MIB:g} MiB wanted) "
        f"{'ok' if good else 'MISSED'}",
        flush=True,
    )
    return good


def main(arguments: Sequence[str]) -> int:
    """Run everything; 0 where all targets are met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=EMBEDDED.sampling.num_inference_steps)
    parser.add_argument("--requests", type=int, default=1000, help="of the last part")
    parser.add_argument("--pairs", type=int, default=20, help="of the first part")
    parser.add_argument("--pictures", type=int, default=64, help="asked for by 8 clients, three times")
    chosen = parser.parse_args(arguments)
    print(f"{machine('torch', 'diffusers', 'fastapi')}; {chosen.steps} steps")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
        os.chdir(folder)
        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        register(Path(folder), chosen.steps)
        with serving() as server:
            server.ask(0)
            good = [overhead(server, chosen.pairs), gain(server, chosen.pictures), endurance(server, chosen.requests)]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
