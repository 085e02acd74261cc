"""Floors, progress, identity, equal sizes, and what happens with too little data."""

import pytest
import torch

from dfu_mlflow.errors import UserError
from dfu_mlflow.evaluator import flatten_reports
from dfu_mlflow.metrics.catalogue import figure_names, metrics_of
from dfu_mlflow.metrics.comparison import progress
from dfu_mlflow.metrics.frechet import frechet_distance
from dfu_mlflow.metrics.matching import FeatureRows, matched_rows, patient_order, proportional_counts
from dfu_mlflow.metrics.reference import RealFeatures, Reference, ReferenceSettings
from dfu_mlflow.types import Estimate, EvalReport

WIDTH = 16
CLASSES = ("I", "P", "R")


def rows(patients: int, seed: int, classes: int = 3, views: int = 3) -> FeatureRows:
    """`views` pictures of each patient, one class a patient; classes lie apart along their own axis."""
    generator = torch.Generator().manual_seed(seed)
    ids = (torch.arange(patients) % classes).repeat_interleave(views)
    people = torch.randn(patients, WIDTH, generator=generator, dtype=torch.float64).repeat_interleave(views, 0)
    features = 0.5 * people + torch.randn(len(ids), WIDTH, generator=generator, dtype=torch.float64)
    features[torch.arange(len(ids)), ids] += 4.0
    return FeatureRows(features, ids, tuple(f"{seed}-{row // views}" for row in range(len(ids))))


def real_features(**changes: object) -> RealFeatures:
    held_out, training = rows(20, 0), rows(60, 1)
    parts = {
        "classes": CLASSES,
        "held_out": held_out,
        "training": training,
        "reconstructed_held_out": held_out.features * 0.9,
        "reconstructed_training": training.features * 0.9,
    }
    return RealFeatures(**{**parts, **changes})  # type: ignore[arg-type]


def settings(**changes: object) -> ReferenceSettings:
    return ReferenceSettings(**{"extractor": "test 8px", "samples": 60, **changes})  # type: ignore[arg-type]


def test_report_of_a_good_and_a_poor_model() -> None:
    reference = Reference(real_features(), settings())
    poor, good = rows(60, 2), rows(60, 3)
    base = reference.report(poor.features + 2.0, poor.class_ids.roll(3))
    now = reference.report(good.features + 0.2, good.class_ids, base, "ema")
    names = {"fd", "fd_floor", "fd_autoencoder_floor", "fd_progress", "kid", "kid_floor", "kid_autoencoder_floor"}
    names |= {"kid_progress", "I/kid", "P/kid", "R/kid", "class_accuracy", "class_accuracy_reconstructed"}
    assert now.values.keys() == names
    assert now.weights == "ema"
    assert now.notes == {}
    assert now.values["fd_progress"].value > 0.8
    assert now.values["kid_progress"].value > 0.8
    assert now.values["class_accuracy"].value > 0.9
    assert base.values["class_accuracy"].value < 0.2
    assert "fd_progress" not in base.values
    assert "base" in base.notes["fd_progress"]


def test_floor_is_the_distance_of_other_patients() -> None:
    """Real photographs of new patients fall into the floor's range; shifted ones do not."""
    reference = Reference(real_features(), settings())
    new = rows(20, 7)
    value, floor = reference.report(new.features, new.class_ids).values["kid"].value, reference.floors["kid_floor"]
    assert floor.low is not None
    assert floor.high is not None
    assert floor.low < value < floor.high
    assert reference.report(new.features + 1.0, new.class_ids).values["kid"].value > floor.high


def test_equal_sizes_whatever_is_generated() -> None:
    reference = Reference(real_features(), settings())
    many = rows(80, 4)
    report = reference.report(many.features, many.class_ids)
    order = list(range(60))
    assert reference.size == 60
    assert reference.generation_plan() == {"I": 21, "P": 21, "R": 18}
    assert reference.generation_plan(30) == {"I": 11, "P": 10, "R": 9}
    assert report.identity == reference.identity
    plan = matched_rows(many.class_ids[order], reference.counts, order)
    exact = reference.report(many.features[plan], many.class_ids[plan])
    assert exact.values["fd"].value == pytest.approx(
        frechet_distance(real_features().held_out.features, many.features[plan]), rel=1e-9
    )


def test_fewer_generated_pictures_are_another_measurement() -> None:
    reference, few = Reference(real_features(), settings()), rows(10, 5)
    report = reference.report(few.features, few.class_ids)
    assert report.identity != reference.identity
    assert "30 generated, 30 of 60 real" in report.identity
    whole = reference.report(rows(20, 5).features, rows(20, 5).class_ids)
    with pytest.raises(UserError, match="cannot be compared"):
        reference.report(few.features, few.class_ids, whole)


@pytest.mark.parametrize("change", [{"extractor": "other"}, {"seed": 1}, {"data_digest": "ab"}, {"floor_draws": 21}])
def test_identity_tells_measurements_apart(change: dict[str, object]) -> None:
    first, second = Reference(real_features(), settings()), Reference(real_features(), settings(**change))
    assert first.identity != second.identity
    assert first.identity == Reference(real_features(), settings()).identity


def test_wrong_class_proportions_are_said() -> None:
    generated = rows(20, 6)
    report = Reference(real_features(), settings()).report(generated.features, torch.zeros_like(generated.class_ids))
    assert "{0: 60}" in report.notes["class_proportions"]
    assert "0 pictures" in report.notes["P/kid"]
    unknown = Reference(real_features(), settings()).report(generated.features, -torch.ones_like(generated.class_ids))
    assert "not known" in unknown.notes["class_accuracy"]
    assert "fd" in unknown.values


def test_reports_are_deterministic() -> None:
    generated = rows(25, 8)
    reports = [Reference(real_features(), settings()).report(generated.features, generated.class_ids) for _ in range(2)]
    assert reports[0] == reports[1]


def test_one_class_and_no_autoencoder() -> None:
    real = RealFeatures(("U",), rows(20, 0, classes=1), rows(40, 1, classes=1))
    report = Reference(real, settings()).report(rows(20, 2, classes=1).features, torch.zeros(60, dtype=torch.int64))
    assert report.values.keys() == {"fd", "fd_floor", "kid", "kid_floor"}
    assert {"class_accuracy", "kid_autoencoder_floor"} <= report.notes.keys()


@pytest.mark.parametrize(("held_out", "generated"), [(3, 20), (20, 3), (3, 3)])
def test_tiny_sets_are_left_out_with_a_note(held_out: int, generated: int) -> None:
    real = real_features(
        held_out=rows(held_out, 0), reconstructed_held_out=None, training=None, reconstructed_training=None
    )
    made = rows(generated, 2)
    report = Reference(real, settings()).report(made.features, made.class_ids)
    assert "fd" not in report.values
    assert "9 pictures to compare, at least 10 are needed" in report.notes["fd"]
    assert "kid" in report.notes


def test_two_patients_give_values_without_intervals() -> None:
    held_out = rows(2, 0, classes=2, views=15)
    real = RealFeatures(("I", "P"), held_out, rows(20, 1, classes=2))
    made = rows(10, 2, classes=2)
    report = Reference(real, settings()).report(made.features, made.class_ids)
    assert report.values["kid"].low is None
    assert "fewer than 3" in report.notes["intervals"]


def test_inception_reports_hold_the_frechet_distance_alone() -> None:
    reference = Reference(real_features(), settings(metrics=("frechet",), names={"fd": "fid"}, judge=False))
    made = rows(20, 2)
    base = reference.report(made.features + 3.0, made.class_ids)
    report = reference.report(made.features, made.class_ids, base)
    assert report.values.keys() == {"fid", "fid_floor", "fid_autoencoder_floor", "fid_progress"}


def test_twelve_pictures_have_intervals_and_no_verdict() -> None:
    reference = Reference(real_features(), settings())
    made = rows(4, 2)
    report = reference.report(made.features, made.class_ids)
    assert report.values["kid"].low is not None
    assert report.values["fd"].low is not None
    assert report.notes["verdict"] == "12 pictures on each side are fewer than 30: intervals, but no verdict"
    few = Reference(real_features(), settings(samples=12))
    found = few.compare(made.features + 3.0, made.features, made.class_ids)
    assert found["kid"].outcome == "no verdict"
    assert found["kid"].difference.low is not None


def test_every_metric_of_an_extractor_reports_under_its_own_names() -> None:
    metrics = metrics_of("dinov2", thorough=True)
    made = settings(metrics=metrics, names=figure_names("dinov2", metrics), judge=False)
    generated = rows(20, 2)
    reference = Reference(real_features(), made)
    base = reference.report(generated.features + 3.0, generated.class_ids)
    report = reference.report(generated.features, generated.class_ids, base)
    assert all("_dinov2" in name for name in report.values)
    assert {"fd_dinov2", "kid_dinov2_floor", "I/coverage_dinov2", "R/vendi_dinov2"} <= report.values.keys()
    assert {"kid_dinov2_autoencoder_floor", "coverage_dinov2_progress"} <= report.values.keys()
    assert all(report.values[name].low is not None for name in ("coverage_dinov2", "vendi_dinov2", "I/kid_dinov2"))


def test_coverage_progresses_upwards() -> None:
    reference = Reference(real_features(), settings(metrics=("neighbours",), judge=False))
    generated = rows(20, 2)
    base = reference.report(generated.features + 1.5, generated.class_ids)
    report = reference.report(generated.features + 0.5, generated.class_ids, base)
    floor, shares = report.values["coverage_floor"].value, [r.values["coverage"].value for r in (base, report)]
    assert shares[0] < shares[1]
    expected = (shares[1] - shares[0]) / (floor - shares[0])
    assert report.values["coverage_progress"].value == pytest.approx(expected)


def test_a_figure_that_is_not_defined_is_left_out_with_a_note() -> None:
    """One patient alone: photographs of others do not exist."""
    alone = rows(1, 0, views=30)
    made = settings(metrics=("lpips",), judge=False)
    generated = rows(10, 1)
    report = Reference(RealFeatures(("I",), alone), made).report(generated.features, torch.zeros(30, dtype=torch.int64))
    assert report.values.keys() == {"lpips_diversity", "lpips_nearest_real"}
    assert "not defined" in report.notes["lpips_between_patients"]


def test_comparison_of_two_checkpoints_in_words() -> None:
    reference = Reference(real_features(), settings(metrics=("frechet", "kernel", "colour"), judge=False))
    made = rows(20, 2)
    further = reference.compare(made.features + 1.0, made.features, made.class_ids)
    assert further["kid"].outcome == further["fd"].outcome == "worse"
    nearer = reference.compare(made.features, made.features + 1.0, made.class_ids)
    assert nearer["kid"].sentence.startswith("kid: better (difference -")
    assert "saturation" not in nearer
    assert "saturation_w1" in nearer
    nothing = reference.compare(made.features, made.features.roll(3, 0), made.class_ids)
    assert nothing["kid"].outcome == "cannot be told apart"


def test_fixed_names_stand_beside_those_that_say_what_they_are() -> None:
    report = EvalReport({"ssim_nearest_real": Estimate(0.4, 0.3, 0.5)}, "", "live")
    assert flatten_reports([report]) == {
        "ssim_nearest_real": 0.4,
        "ssim": 0.4,
        "ssim_nearest_real_low": 0.3,
        "ssim_nearest_real_high": 0.5,
    }


def test_difference_on_the_same_seeds() -> None:
    reference = Reference(real_features(), settings())
    made = rows(20, 2)
    compared = reference.compare(made.features + 0.6, made.features + 0.5, made.class_ids)
    found = {name: each.difference for name, each in compared.items()}
    assert found["kid"].low is not None
    assert found["kid"].low > 0
    with pytest.raises(UserError, match="two equal sets of 60"):
        reference.compare(made.features[:30], made.features[:30], made.class_ids[:30])


def test_progress_in_closed_form() -> None:
    way = progress(Estimate(10.0, 9.0, 11.0), Estimate(4.0, 3.5, 4.5), 2.0)
    half = (0.5**2 + (2 / 8 * 1.0) ** 2) ** 0.5 / 8
    assert (way.value, way.low, way.high) == pytest.approx((0.75, 0.75 - half, 0.75 + half))
    assert progress(Estimate(10.0), Estimate(12.0), 2.0) == Estimate(-0.25)
    with pytest.raises(ValueError, match="not above the floor"):
        progress(Estimate(2.0), Estimate(1.0), 2.0)


def test_base_at_its_floor_gets_a_note_not_a_number() -> None:
    reference = Reference(real_features(), settings())
    made = rows(20, 2)
    base = EvalReport({"fd": Estimate(0.0), "kid": Estimate(-1.0)}, reference.identity, "live")
    report = reference.report(made.features, made.class_ids, base)
    assert "not above the floor" in report.notes["kid_progress"]
    assert "kid_progress" not in report.values


def test_proportions_and_patient_order() -> None:
    assert proportional_counts(torch.tensor([0, 0, 0, 2, 2, 1]), 4) == {0: 2, 1: 1, 2: 1}
    assert proportional_counts(torch.tensor([1, 1, 0]), 3) == {0: 1, 1: 2}
    chosen = matched_rows(torch.tensor([0, 0, 1, 1, 1]), {0: 1, 1: 2}, [4, 3, 2, 1, 0])
    assert chosen.tolist() == [1, 3, 4]
    short = matched_rows(torch.tensor([0, 1, 1, 1]), {0: 2, 1: 1}, [0, 1, 2, 3])
    assert short.tolist() == [0, 1, 2]
    order = patient_order(["b", "a", "b", "a", "c"], torch.Generator().manual_seed(0))
    assert sorted(order) == [0, 1, 2, 3, 4]
    assert order.index(2) == order.index(0) + 1
