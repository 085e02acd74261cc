"""`report.html`: what it says follows from the figures, and it needs nothing but itself."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from dfu_mlflow.report.album import Album
from dfu_mlflow.report.document import Report, Section, Table
from dfu_mlflow.report.figures import epoch_axes, headline_table, number, with_interval
from dfu_mlflow.report.plots import Interval, curve_row, interval_rows
from dfu_mlflow.report.render import render, render_section, with_section
from dfu_mlflow.report.training import TrainingStory, training_report


def epoch_figures(kid: float) -> dict[str, float]:
    return {
        "val/loss": 0.3,
        "eval/kid": kid,
        "eval/kid_low": kid - 0.5,
        "eval/kid_high": kid + 0.5,
        "eval/kid_floor": 0.1,
        "eval/kid_autoencoder_floor": 0.4,
        "eval/class_accuracy": 0.9,
        "eval/class_accuracy_reconstructed": 0.99,
        "eval/I/kid": 2.5,
    }


@pytest.fixture
def story() -> TrainingStory:
    pixels = np.zeros((8, 32, 3), np.uint8)
    progress = {
        "eval/kid_progress": 0.714,
        "eval/kid_progress_low": 0.6,
        "eval/kid_progress_high": 0.8,
    }
    return TrainingStory(
        run_id="0123456789abcdef",
        epochs={0: epoch_figures(6.0), 1: epoch_figures(2.0) | progress},
        best_epoch=1,
        best_weights="live",
        verdict="met: kid below 3",
        grids={"<I>": {0: pixels, 1: pixels}},
        settings={"method": "lora", "prompt": "<script>alert(1)</script>"},
        identities=["efficientnet 96px"],
        notes={"fid": "no Inception weights"},
    )


def test_headlines_stand_beside_ceiling_and_floors(story: TrainingStory) -> None:
    table = headline_table(story.epochs[0], story.epochs[1], "eval")
    assert table.rows == (("KID", "2 [1.5, 2.5]", "6 [5.5, 6.5]", "0.1", "0.4", "71 % [60, 80]"),)


@pytest.mark.parametrize(
    ("kid", "said"), [(2.0, "It learned: KID fell"), (5.9, "cannot be told apart"), (9.0, "It got worse")]
)
def test_learning_is_claimed_only_where_intervals_part(story: TrainingStory, kid: float, said: str) -> None:
    report = training_report(replace(story, epochs={0: epoch_figures(6.0), 1: epoch_figures(kid)}))
    assert any(said in sentence for sentence in report.summary)


def test_document_opens_without_a_network_and_runs_nothing(story: TrainingStory) -> None:
    html = render(training_report(story))
    assert "<script" not in html
    assert {address.partition(":")[0] for address in re.findall(r'(?:src|href)="([^"]*)"', html)} == {"data"}
    assert "fid: not computed, because no Inception weights." in html
    assert "class &lt;I&gt;; rows are epochs 0, 1" in html
    assert "Metric identity: efficientnet 96px" in html


def test_equal_figures_give_equal_documents(story: TrainingStory) -> None:
    assert render(training_report(story)) == render(training_report(story))


def test_a_section_takes_the_place_of_its_namesake_and_of_nothing_else() -> None:
    first, second = Section("Found", ("</section>",)), Section("Samples", ("two",))
    document = render(Report("Run", (), (first, second), ("end",)))
    longer = render(Report("Run", (), (Section("Found", ("one \\1",)), second), ("end",)))
    assert with_section(document, render_section(Section("Found", ("one \\1",)))) == longer
    without = render(Report("Run", (), (second,), ("end",)))
    assert with_section(without, render_section(first)) == render(Report("Run", (), (second, first), ("end",)))


def test_plots_are_whole_drawings(story: TrainingStory) -> None:
    drawn = curve_row(epoch_axes(story.epochs), "epoch")
    assert ElementTree.fromstring(drawn).tag.endswith("svg")
    effects = interval_rows(
        "effects", [Interval("guidance", -1.0, -2.0, 0.0), Interval("prompts", 1.0, 0.5, 1.5)], "KID"
    )
    assert effects.count("<path") > 10


def test_curves_are_of_quick_figures_and_headlines_of_full_ones(story: TrainingStory) -> None:
    quick = {
        epoch: {f"eval_quick/{name.removeprefix('eval/')}": value for name, value in epoch_figures(kid).items()}
        for epoch, kid in ((0, 6.5), (1, 4.5), (2, 2.5))
    }
    full = {0: epoch_figures(6.0), 1: {}, 2: epoch_figures(2.0)}
    epochs = {epoch: full[epoch] | quick[epoch] for epoch in quick}
    told = replace(story, epochs=epochs, best_epoch=2)
    axis = epoch_axes(epochs)[0]
    assert axis.title == "KID, quick"
    assert {epoch: point[0] for epoch, point in axis.curves[0].points.items()} == {0.0: 6.5, 1.0: 4.5, 2.0: 2.5}
    html = render(training_report(told))
    assert "Quick figures (eval_quick/...)" in html
    assert headline_table(epochs[0], epochs[2], "eval").rows[0][1:3] == ("2 [1.5, 2.5]", "6 [5.5, 6.5]")
    assert "Quick figures" not in render(training_report(story))


def test_album_gives_back_what_it_kept(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    grids = {label: rng.integers(0, 255, (8, 16, 3), dtype=np.uint8) for label in ("a/b", "c")}
    album = Album(tmp_path / "grids", ["a/b", "c"])
    album.keep("live", 0, grids)
    album.keep("live", 1, grids)
    album.keep("ema", 1, grids)
    found = album.grids("ema")
    assert {label: sorted(epochs) for label, epochs in found.items()} == {"a/b": [0, 1], "c": [0, 1]}
    assert np.array_equal(found["c"][1], grids["c"])


@pytest.mark.parametrize(("value", "text"), [(2094.4, "2094"), (0.05913, "0.0591"), (-0.5, "-0.5"), (12.34, "12.3")])
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


def test_missing_figures_are_a_dash() -> None:
    assert with_interval({}, "eval/kid") == "–"
    assert "–" in render(Report("t", (), (Section("s", tables=(Table("", ("a",), (("–",),)),)),), ()))
