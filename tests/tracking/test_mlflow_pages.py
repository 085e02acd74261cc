"""MLflow's own pages in headless Chromium: what a person who compares runs of this project sees.

With DFU_SCREENSHOTS=FOLDER the runs are trainings of the embedded base, long enough to show something, and the pages
are saved there as pictures (`docs/mlflow_*.png`).
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

import mlflow
import pytest
from mlflow import MlflowClient
from playwright.sync_api import Browser, Locator, Page, expect

from dfu_mlflow.config import RunConfig
from dfu_mlflow.config.load import merge, validate
from dfu_mlflow.pipeline import run_training
from tests.stores import new_store

SCREENSHOTS = os.environ.get("DFU_SCREENSHOTS")
LOAD_MS = 60_000
"""MLflow's pages are megabytes of script: seconds on an idle core, a minute on a shared one."""

pytestmark = pytest.mark.slow

RUNS = {
    "slow, guidance 3": {"train": {"learning_rate": 3e-4}},
    "fast, guidance 3": {"train": {"learning_rate": 1e-3}},
    "fast, guidance 8": {"train": {"learning_rate": 1e-3}, "sampling": {"guidance_scale": 8.0}},
}
SHOWN = {"base_model": "tiny_sdxl", "train": {"epochs": 4, "steps_per_epoch": 30}, "evaluation": {"grid_per_class": 8}}
COLOURS = ("#1f77b4", "#2ca02c", "#d62728")


@dataclass(frozen=True)
class Tracked:
    """A tracking server with three runs.

    Attributes:
        url: where it listens.
        experiment: id of the runs' experiment.
        runs: their ids, in the order of RUNS.
    """

    url: str
    experiment: str
    runs: tuple[str, ...]


def three_runs(config: RunConfig) -> tuple[str, ...]:
    ids = []
    for (name, change), colour in zip(RUNS.items(), COLOURS, strict=True):
        tree = merge(config.model_dump(mode="json"), SHOWN if SCREENSHOTS else {})
        ids.append(run_training(validate(RunConfig, merge(tree, change))).run_id)
        for key, value in {"mlflow.runName": name, "mlflow.runColor": colour}.items():
            MlflowClient().set_tag(ids[-1], key, value)
    return tuple(ids)


@pytest.fixture(scope="module")
def tracked(
    browser: Browser,  # first: without one nothing needs to be trained
    small_config_at: Callable[[Path], RunConfig],
    wait_for: Callable[[str, subprocess.Popen[bytes]], None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Tracked]:
    folder = tmp_path_factory.mktemp("pages")
    store = new_store(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for variable in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
            patch.delenv(variable, raising=False)
        mlflow.set_tracking_uri(store)
        runs = three_runs(small_config_at(folder))
        experiment = MlflowClient().get_run(runs[0]).info.experiment_id
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--workers", "1"]
        environment = dict(os.environ, MLFLOW_DISABLE_TELEMETRY="true", MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # it starts processes of its own, which outlive it
        )
        try:
            wait_for(f"http://127.0.0.1:{port}/health", server)
            yield Tracked(f"http://127.0.0.1:{port}", experiment, runs)
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait(timeout=60)
            mlflow.set_tracking_uri(None)


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page that fails the test on a request to elsewhere, and on usage that is reported to the server."""
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.set_default_timeout(LOAD_MS)
    expect.set_options(timeout=LOAD_MS)
    wrong: list[str] = []
    page.on("request", lambda asked: wrong.append(asked.url) if is_wrong(asked.method, asked.url) else None)
    yield page
    page.close()
    assert wrong == []


def is_wrong(method: str, url: str) -> bool:
    local = url.startswith(("http://127.0.0.1:", "data:", "blob:http://127.0.0.1:"))
    return not local or (method == "POST" and "telemetry" in url)


def open_page(page: Page, url: str) -> None:
    """Open a page and put the chat panel away, which covers a quarter of it."""
    page.goto(url)
    page.get_by_role("button", name="Close", exact=True).click()


def saved(page: Page, name: str) -> None:
    if SCREENSHOTS:
        page.mouse.move(0, 0)
        page.wait_for_timeout(1500)
        page.screenshot(path=Path(SCREENSHOTS) / f"{name}.png")


def parameter(page: Page, name: str) -> Locator:
    """The row of the table of parameters that has this name."""
    return page.locator("tr", has=page.get_by_role("rowheader", name=name, exact=True))


def test_comparing_three_runs_shows_what_differs(page: Page, tracked: Tracked) -> None:
    wanted = {"runs": json.dumps(tracked.runs), "experiments": json.dumps([tracked.experiment])}
    open_page(page, f"{tracked.url}/#/compare-runs?{urlencode(wanted)}")
    expect(page.get_by_text("Comparing 3 Runs from 1 Experiment")).to_be_visible()
    for name, values in {
        "cfg/train.learning_rate": ["0.0003", "0.001", "0.001"],
        "guidance_scale": ["3.0", "3.0", "8.0"],
    }.items():
        assert parameter(page, name).locator("td").all_inner_texts() == values
        expect(parameter(page, name)).to_have_class("diff-row")
    expect(parameter(page, "cfg/seed")).to_have_class("")
    page.get_by_role("button", name="Parameters - Show diff only").or_(
        page.get_by_role("switch", name="Parameters - Show diff only")
    ).click()
    expect(parameter(page, "cfg/seed")).to_have_count(0)
    expect(parameter(page, "learning_rate")).to_be_visible()
    page.get_by_text("Run details").scroll_into_view_if_needed()
    saved(page, "mlflow_compare")


def test_curves_of_three_runs_lie_over_epochs(page: Page, tracked: Tracked) -> None:
    open_page(page, f"{tracked.url}/#/experiments/{tracked.experiment}/runs?compareRunsMode=CHART")
    page.get_by_placeholder("Search metric charts").fill("^eval/(fd|kid)$")
    charts = page.locator(".js-plotly-plot")
    expect(charts).to_have_count(2)
    shown = page.evaluate(
        "[...document.querySelectorAll('.js-plotly-plot')].flatMap(e => e.data.map(({name, x, y}) => [name, x, y]))"
    )
    for name, run in zip(RUNS, tracked.runs, strict=True):
        points = MlflowClient().get_metric_history(run, "eval/fd")
        curve = [[point.step for point in points], [point.value for point in points]]
        assert curve[0] == list(range(len(points)))
        assert len(points) >= 3
        assert curve in [[x, y] for own, x, y in shown if own == name]
    saved(page, "mlflow_curves")


def without_parameters(page: Page, key: str) -> None:
    """Switch the list of a run's parameters off in an image chart: it stands above the picture, 150 lines long."""
    page.locator(".react-resizable", has_text=re.compile(rf"^{key}\b")).get_by_role("button").last.click()
    page.get_by_role("menuitem", name="Configure").click()
    page.get_by_text("Show run parameters").click()
    page.get_by_role("dialog").get_by_role("button", name="Save").click()


def test_the_slider_of_a_run_goes_through_its_epochs(page: Page, tracked: Tracked) -> None:
    open_page(page, f"{tracked.url}/#/experiments/{tracked.experiment}/runs/{tracked.runs[1]}/model-metrics")
    page.get_by_placeholder("Search metric charts").fill("^samples/")
    for label in "IPR":
        without_parameters(page, f"samples/{label}")
    epochs = len(MlflowClient().get_metric_history(tracked.runs[1], "eval/fd"))
    seen = set()
    for label in "IPR":
        card = page.locator(".react-resizable", has_text=re.compile(rf"^samples/{label}\b"))
        slider = card.get_by_role("slider")
        expect(slider).to_have_attribute("aria-valuemax", str(epochs - 1))
        for epoch in range(epochs):
            picture = card.locator(f"img[src*='samples~{label}%2Bstep%2B{epoch}%2B']")
            expect(picture).to_be_visible()
            page.wait_for_function("image => image.complete && image.naturalWidth > 0", arg=picture.element_handle())
            seen.add(picture.get_attribute("src"))
            if epoch < epochs - 1:
                slider.press("ArrowRight")
    assert len(seen) == 3 * epochs
    saved(page, "mlflow_images")
