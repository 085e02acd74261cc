"""Utility: scores against scikit-learn, arms of equal effort, intervals by simulation, planted gains and none."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from scipy import stats
from sklearn.metrics import accuracy_score, cohen_kappa_score, f1_score, recall_score

from dfu_mlflow.config.measures import UtilityConfig
from dfu_mlflow.data.phantom import PHASES, render
from dfu_mlflow.errors import UserError
from dfu_mlflow.metrics.utility.arms import Pictures, training_arms
from dfu_mlflow.metrics.utility.experiment import measure_utility
from dfu_mlflow.metrics.utility.networks import build_classifier
from dfu_mlflow.metrics.utility.report import Named, gain_sentence, pool, utility_report
from dfu_mlflow.metrics.utility.scores import confusion_counts, score_names, scores
from dfu_mlflow.metrics.utility.training import name_classes, train_classifier
from dfu_mlflow.types import Estimate

SIDE = 16


def config(**changes: object) -> UtilityConfig:
    defaults = {"seeds": 1, "steps": 2, "batch_size": 8, "device": "cpu"}
    return UtilityConfig.model_validate(defaults | changes)


@cache
def phantoms(first: int, patients: int) -> Pictures:
    """One picture of every phase of each patient, 32 px."""
    draws = [(patient, phase) for patient in range(first, first + patients) for phase in PHASES]
    images = np.stack([render(patient, 0, 0, phase, size_px=64)[::2, ::2] for patient, phase in draws])
    labels = torch.tensor([PHASES.index(phase) for _, phase in draws])
    return Pictures(torch.from_numpy(images.copy()), labels, tuple(f"P{patient}" for patient, _ in draws))


def synthetic(pictures: Pictures) -> Pictures:
    return Pictures(pictures.images, pictures.labels)


def noise(count: int, seed: int) -> Pictures:
    """Pictures of nothing, with labels."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, SIDE, SIDE, 3), generator=generator, dtype=torch.uint8)
    return Pictures(images, torch.arange(count) % 2, tuple(f"{seed}-{row // 2}" for row in range(count)))


def named(seed: int, gain: float, patients: int = 40, seeds: int = 3) -> Named:
    """What classifiers of known skill named; patients and trainings differ, and `with_x` is right by `gain` more often.

    Each picture is named right with probability `skill + patient + training (+ gain)`, so the expected accuracy gain is
    `gain` exactly.
    """
    generator = np.random.default_rng(seed)
    groups = np.repeat(np.arange(patients), 4)
    truth = generator.integers(0, 3, len(groups))
    ease = generator.uniform(-0.15, 0.15, patients)[groups]
    found = {}
    for arm, more in (("real", 0.0), ("oversampled", 0.0), ("with_x", gain)):
        own = generator.uniform(-0.08, 0.08, patients)[groups]
        training = generator.uniform(-0.04, 0.04, (seeds, 1))
        right = generator.random((seeds, len(groups))) < 0.5 + ease + own + training + more
        wrong = (truth + generator.integers(1, 3, (seeds, len(groups)))) % 3
        found[arm] = torch.from_numpy(np.where(right, truth, wrong))
    return Named(("a", "b", "c"), torch.from_numpy(truth), tuple(f"p{g:02d}" for g in groups), found, 1, "test")


def test_scores_are_scikit_learns() -> None:
    generator = torch.Generator().manual_seed(0)
    truth, found = (torch.randint(0, 4, shape, generator=generator) for shape in ((90,), (3, 90)))
    groups = torch.arange(90) // 5
    counts = confusion_counts(truth, found, groups, 4)
    assert counts.shape == (3, 18, 4, 4)
    for row, figures in enumerate(scores(counts.sum(1))):
        pair = (truth.numpy(), found[row].numpy())
        expected = [accuracy_score(*pair), cohen_kappa_score(*pair), f1_score(*pair, average="macro")]
        expected += recall_score(*pair, average=None).tolist()
        np.testing.assert_allclose(figures, expected, rtol=1e-12)
    assert score_names(("a", "b")) == ("accuracy", "kappa", "macro_f1", "recall/a", "recall/b")


def test_scores_of_a_class_that_is_not_there() -> None:
    truth, found = torch.tensor([0, 0, 1, 1]), torch.tensor([[0, 1, 1, 1]])
    accuracy, kappa, macro_f1, *recall = scores(confusion_counts(truth, found, torch.zeros(4).long(), 3)[0, 0]).tolist()
    assert (accuracy, kappa) == (0.75, 0.5)
    assert macro_f1 == pytest.approx(f1_score(truth, found[0], average="macro"), rel=1e-12)
    assert recall[:2] == [0.5, 1.0]
    assert np.isnan(recall[2])


def test_leaving_a_patient_out_is_scoring_without_them() -> None:
    """Closed form of the interval: a jackknife by hand over patients, and the variance between seeds."""
    case = named(3, 0.1, patients=6, seeds=2)
    estimate = utility_report(case).values["x_gain/kappa"]

    def gain(kept: np.ndarray, row: int) -> float:
        truth = case.truth.numpy()[kept]
        pair = [cohen_kappa_score(truth, case.found[arm][row].numpy()[kept]) for arm in ("with_x", "oversampled")]
        return float(pair[0] - pair[1])

    patients = np.array(case.patients)
    everyone = np.ones(len(patients), dtype=bool)
    left_out = np.array([np.mean([gain(patients != p, row) for row in (0, 1)]) for p in np.unique(patients)])
    by_seed = np.array([gain(everyone, row) for row in (0, 1)])
    parts = [((left_out - left_out.mean()) ** 2).sum() * 5 / 6, by_seed.var(ddof=1) / 2]
    assert estimate.value == pytest.approx(by_seed.mean(), rel=1e-12)
    assert estimate.low is not None
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / 5 + parts[1] ** 2 / 1)
    assert estimate.value - estimate.low == pytest.approx(stats.t.ppf(0.975, freedom) * sum(parts) ** 0.5, rel=1e-10)


def test_intervals_cover_the_gain() -> None:
    """150 experiments with a known gain: 95 % intervals hold it in 90 to 99.4 %."""
    held = []
    for seed in range(150):
        estimate = utility_report(named(seed, 0.1)).values["x_gain/accuracy"]
        assert estimate.low is not None
        assert estimate.high is not None
        held.append(estimate.low <= 0.1 <= estimate.high)
    assert 0.90 <= np.mean(held) <= 0.994


def test_no_gain_is_seldom_called_one() -> None:
    called = []
    for seed in range(120):
        estimate = utility_report(named(1000 + seed, 0.0)).values["x_gain/kappa"]
        assert estimate.low is not None
        assert estimate.high is not None
        called.append(estimate.low > 0 or estimate.high < 0)
    assert np.mean(called) <= 0.07


def test_what_a_report_says_when_there_is_little() -> None:
    few = utility_report(named(0, 0.1, patients=2, seeds=1))
    assert few.values["x_gain/kappa"].low is None
    assert {"intervals", "seeds", "folds"} <= few.notes.keys()
    assert "no verdict" in gain_sentence(few, "x")
    assert "cannot be told apart" in gain_sentence(utility_report(named(0, 0.0)), "x")
    assert ": better" in gain_sentence(utility_report(named(0, 0.35)), "x")
    assert ": worse" in gain_sentence(utility_report(named(0, -0.35)), "x")


def test_pooled_folds_are_one_experiment() -> None:
    folds = [named(seed, 0.1, patients=10) for seed in range(3)]
    folds = [
        Named(f.classes, f.truth, tuple(f"{i}{p}" for p in f.patients), f.found, 1, f.identity)
        for i, f in enumerate(folds)
    ]
    pooled = pool([utility_report(fold) for fold in folds])
    assert pooled.named.folds == 3
    assert "folds" not in pooled.notes
    truth = torch.cat([fold.truth for fold in folds]).numpy()
    rows = [torch.cat([fold.found["with_x"][row] for fold in folds]).numpy() for row in range(3)]
    expected = np.mean([cohen_kappa_score(truth, row) for row in rows])
    assert pooled.values["with_x/kappa"].value == pytest.approx(expected, rel=1e-12)
    alone, together = (report.values["x_gain/kappa"] for report in (utility_report(folds[0]), pooled))
    assert width(together) < width(alone)


def width(estimate: Estimate) -> float:
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.high - estimate.low


def test_reports_made_differently_are_not_pooled() -> None:
    one = utility_report(named(0, 0.1))
    other = utility_report(Named(**{**vars(one.named), "identity": "other steps"}))
    with pytest.raises(UserError, match="other steps"):
        pool([one, other])
    with pytest.raises(UserError, match="cannot be pooled"):
        pool([one, utility_report(named(0, 0.1, seeds=2))])


def test_arms_hold_equal_counts_of_every_class() -> None:
    real = Pictures(noise(20, 0).images, torch.tensor([0] * 16 + [1] * 4), tuple(map(str, range(20))))
    sets = {"tuned": noise(40, 1), "base": noise(30, 2)}
    arms = {name: arm.collect() for name, arm in training_arms(real, sets, 1.0, seed=0).items()}
    assert list(arms) == ["real", "oversampled", "with_tuned", "only_tuned", "with_base", "only_base"]
    counts = {arm: torch.bincount(pictures.labels).tolist() for arm, pictures in arms.items()}
    assert counts["real"] == [16, 4]
    assert counts["oversampled"] == counts["with_tuned"] == counts["with_base"] == [26, 14]
    assert counts["only_tuned"] == counts["only_base"] == [10, 10]
    again = arms["oversampled"].images[20:][arms["oversampled"].labels[20:] == 1]
    distinct, times = torch.unique(again.flatten(1), dim=0, return_counts=True)
    assert len(distinct) == 4
    assert int(times.max() - times.min()) <= 1


def test_the_smallest_set_decides_how_many() -> None:
    arms = training_arms(noise(40, 0), {"tuned": noise(40, 1), "base": noise(6, 2)}, 1.0, seed=0)
    assert len(arms["only_tuned"].collect().labels) == len(arms["only_base"].collect().labels) == 6


def test_every_arm_gets_the_same_number_of_steps() -> None:
    calls: list[int] = []
    settings = config(seeds=2, steps=3)
    report = measure_utility(
        ("a", "b"), noise(16, 0), noise(8, 1), {"tuned": noise(16, 2)}, settings, lambda: calls.append(0)
    )
    assert len(calls) == 4 * 2 * 3
    assert {arm: tuple(found.shape) for arm, found in report.named.found.items()} == dict.fromkeys(
        ("real", "oversampled", "with_tuned", "only_tuned"), (2, 8)
    )
    assert "tuned_gain_over_base/kappa" not in report.values


def test_training_is_reproducible_and_learns() -> None:
    """The darker half is above or below, which mirroring does not change; torch's own generator is left alone."""
    before = torch.random.get_rng_state()
    images = noise(64, 0).images.clone()
    labels = torch.arange(64) % 2
    images[labels == 0, : SIDE // 2] //= 3
    images[labels == 1, SIDE // 2 :] //= 3
    settings = config(steps=40, batch_size=16)
    first, second = (train_classifier(images[:32], labels[:32], 2, settings, 0) for _ in range(2))
    for one, other in zip(first.network.parameters(), second.network.parameters(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (name_classes(first, images[32:], 16) == labels[32:]).float().mean() > 0.8


def test_more_patients_are_a_gain_and_relabelled_noise_is_none() -> None:
    """Synthetic pictures as good as photographs of other patients help; noise under random names does not."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (90, 32, 32, 3), generator=generator, dtype=torch.uint8)
    nothing = Pictures(images, torch.randint(0, 3, (90,), generator=generator))
    sets = {"tuned": synthetic(phantoms(200, 30)), "noise": nothing}
    settings = config(seeds=2, steps=100, batch_size=24, ratio=6.0)
    report = measure_utility(PHASES, phantoms(0, 5), phantoms(100, 50), sets, settings)
    for name in ("tuned_gain/kappa", "tuned_gain_over_real/kappa", "tuned_gain/macro_f1"):
        low = report.values[name].low
        assert low is not None
        assert low > 0.0, name
    assert ": better" in gain_sentence(report, "tuned")
    assert ": better" not in gain_sentence(report, "noise")
    assert report.values["only_tuned/accuracy"].value > 0.9
    assert report.values["only_noise/kappa"].value < 0.2


def test_the_base_is_a_control() -> None:
    case = named(0, 0.2)
    found = {**case.found, "with_base": case.found["real"], "only_base": case.found["real"]}
    report = utility_report(Named(**{**vars(case), "found": found}))
    assert "base_gain/kappa" not in report.values
    assert report.values["x_gain_over_base/kappa"] == report.values["x_gain_over_real/kappa"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"held_out": noise(8, 0)}, "patients are in training and held out"),
        ({"synthetic": {"tuned": Pictures(noise(8, 2).images, torch.full((8,), 2))}}, "outside of a, b"),
        ({"synthetic": {"tuned": Pictures(noise(8, 2).images[:, ::2], torch.arange(8) % 2)}}, "data.resolution_px"),
        ({"synthetic": {"tuned": Pictures(noise(8, 2).images.float() / 255, torch.arange(8) % 2)}}, "uint8"),
        ({"training": Pictures(noise(8, 0).images, torch.zeros(8).long(), noise(8, 0).patients)}, "one class only"),
        ({"held_out": synthetic(noise(8, 1))}, "0 patients for 8 images"),
        (
            {
                "synthetic": {
                    "tuned": Pictures(noise(8, 2).images, torch.zeros(8).long()),
                    "base": Pictures(noise(8, 3).images, torch.ones(8).long()),
                }
            },
            "share no class",
        ),
    ],
)
def test_bad_input_is_told(changes: dict[str, object], words: str) -> None:
    given = {"training": noise(16, 0), "held_out": noise(8, 1), "synthetic": {"tuned": noise(8, 2)}} | changes
    with pytest.raises(UserError, match=words):
        measure_utility(("a", "b"), config=config(), **given)  # type: ignore[arg-type]


def test_any_timm_model_with_weights_from_a_file(tmp_path: Path) -> None:
    source = timm.create_model("test_resnet", pretrained=False, num_classes=1000)
    path = tmp_path / "weights.safetensors"
    save_file(source.state_dict(), path)
    settings = config(network="test_resnet", weights=path, size_px=64)
    classifier = build_classifier(settings, 3)
    loaded, own = classifier.network.state_dict(), source.state_dict()
    head = source.pretrained_cfg["classifier"]
    for name, value in loaded.items():
        assert torch.equal(value, own[name]) != name.startswith(f"{head}."), name
    assert name_classes(classifier, noise(4, 0).images, 2).shape == (4,)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    again = build_classifier(config(network="test_resnet", weights=tmp_path / "weights.pth"), 3)
    assert torch.equal(again.network.state_dict()["conv1.0.weight"], own["conv1.0.weight"])


def test_weights_that_are_missing_or_of_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"--utility.pretrained false"):
        build_classifier(config(network="test_resnet"), 3)
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="of another network"):
        build_classifier(config(network="test_resnet", weights=tmp_path / "other.safetensors"), 3)
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(UserError, match="cannot be read"):
        build_classifier(config(network="test_resnet", weights=tmp_path / "text.pth"), 3)
    with pytest.raises(UserError, match="neither small_cnn nor a model of timm"):
        build_classifier(config(network="resnet_none"), 3)
