"""Memorisation: closed forms, parity, coverage by simulation, planted copies, honest and low-diversity generators."""

from __future__ import annotations

import csv
import math
import os
import stat
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

from dfu_mlflow.base.autoencoder import VaeEncoder, restore
from dfu_mlflow.base.load import load_base
from dfu_mlflow.config.measures import MemorisationConfig
from dfu_mlflow.config.schema import DataConfig
from dfu_mlflow.data import evaluation_pixels, load_split
from dfu_mlflow.data.phantom import render, visit_phases
from dfu_mlflow.errors import UserError
from dfu_mlflow.metrics.closest_pairs import write_closest_pairs
from dfu_mlflow.metrics.coarse_pixels import coarse_pixels
from dfu_mlflow.metrics.copies import CopyReference, TrainingAppearances, clustered_share, share_excess, similar_share
from dfu_mlflow.metrics.extractors.efficientnet import efficientnet_lite0
from dfu_mlflow.metrics.intervals import proportion_estimate
from dfu_mlflow.metrics.matched_share import matched_training_excess
from dfu_mlflow.metrics.matching import FeatureRows
from dfu_mlflow.metrics.membership import MemberLosses, membership_auc
from dfu_mlflow.metrics.memorisation import MemorisationReference, MemorisationReport, Suspect
from dfu_mlflow.metrics.nearest import nearest
from dfu_mlflow.types import Estimate, Latents
from dfu_mlflow.validation import ValidationGrid, grid_rows

WIDTH = 12
CONFIG = MemorisationConfig(neighbours=20)


def rows(features: torch.Tensor, views: int, name: str = "p") -> FeatureRows:
    patients = tuple(f"{name}{row // views:03d}" for row in range(len(features)))
    return FeatureRows(features, torch.zeros(len(features), dtype=torch.int64), patients)


class Clinic:
    """Features of patients with three photographs each, correlated within a patient, and generators of every kind."""

    def __init__(self, seed: int, training: int = 60, held_out: int = 25) -> None:
        self.source = torch.Generator().manual_seed(seed)
        self.training = self.people(training, "t")
        self.real = TrainingAppearances(self.training, self.people(held_out, "h"), (self.training.features,))

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.source, dtype=torch.float64)

    def people(self, patients: int, name: str) -> FeatureRows:
        centres = self.normal(patients, 1, WIDTH) * 0.7
        return rows((centres + self.normal(patients, 3, WIDTH)).flatten(0, 1), 3, name)

    def honest(self, count: int) -> torch.Tensor:
        return self.normal(count, WIDTH) * (1 + 0.7**2) ** 0.5

    def low_diversity(self, count: int, modes: int) -> torch.Tensor:
        """Few new patients, many views."""
        return self.honest(modes).repeat(-(-count // modes), 1)[:count] + 0.3 * self.normal(count, WIDTH)

    def with_copies(self, count: int, share: float) -> torch.Tensor:
        copies = round(share * count)
        chosen = torch.randperm(len(self.training), generator=self.source)[:copies]
        near = self.training.features[chosen] + 0.1 * self.normal(copies, WIDTH)
        return torch.cat([self.honest(count - copies), near])


def excess(reference: CopyReference, generated: torch.Tensor) -> Estimate:
    return reference.figures(reference.neighbours(generated))["copy_excess"]


def above_zero(estimate: Estimate) -> bool:
    assert estimate.low is not None
    return estimate.low > 0.0


def holds(estimate: Estimate, truth: float) -> bool:
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.low <= truth <= estimate.high


def test_neighbours_are_scikit_learns() -> None:
    source = torch.Generator().manual_seed(0)
    training, queries = (torch.randn(n, 8, generator=source, dtype=torch.float64) for n in (60, 300))
    found = nearest(queries, [training], 10)
    unit = [x / x.norm(dim=1, keepdim=True) for x in (training, queries)]
    distance, index = NearestNeighbors(n_neighbors=10).fit(unit[0].numpy()).kneighbors(unit[1].numpy())
    np.testing.assert_allclose(found.distance, distance[:, 0], rtol=1e-9)
    np.testing.assert_allclose(found.ratio, distance[:, 0] / distance.mean(1), rtol=1e-9)
    np.testing.assert_array_equal(found.index, index[:, 0])
    np.testing.assert_allclose(found.similarity, (unit[0][index[:, 0]] * unit[1]).sum(1), rtol=1e-9)


def test_a_photograph_is_as_near_as_its_nearest_appearance() -> None:
    as_is, mirrored = torch.eye(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64).roll(1, 0)
    found = nearest(as_is[:1], [as_is, mirrored], 3)
    # photograph 0 as it is and photograph 1 mirrored are the query itself, photograph 2 stands at a right angle
    assert found.distance.tolist() == [0.0]
    alone = nearest(as_is[:1] + as_is[1:2], [as_is], 3)
    corner = math.sqrt(2 - math.sqrt(2))
    assert float(alone.ratio) == pytest.approx(corner / ((2 * corner + math.sqrt(2)) / 3), rel=1e-12)


def test_photographs_of_the_querys_own_patient_are_left_out() -> None:
    clinic = Clinic(0)
    known = clinic.training
    found = nearest(known.features, [known.features], 5, known.patients, known.patients)
    assert all(known.patients[row] != known.patients[int(other)] for row, other in enumerate(found.index))
    assert float(nearest(known.features, [known.features], 5).distance.max()) < 1e-6


def test_equal_photographs_are_no_gap_and_bad_features_are_told() -> None:
    same = torch.ones(6, 4, dtype=torch.float64)
    assert nearest(same[:1], [same], 5).ratio.tolist() == [1.0]
    assert len(nearest(same[:0], [same], 5).ratio) == 0
    with pytest.raises(UserError, match=r"memorisation\.neighbours 7"):
        nearest(same, [same], 7)
    with pytest.raises(UserError, match="unlike shape"):
        nearest(same[:, :2], [same], 5)
    with pytest.raises(UserError, match="not finite"):
        nearest(same * torch.nan, [same], 5)


def test_coarse_pixels_ignore_light_and_see_the_picture() -> None:
    source = torch.Generator().manual_seed(0)
    images = torch.randint(40, 120, (3, 32, 32, 3), generator=source, dtype=torch.uint8)
    features = coarse_pixels(images)
    assert features.shape == (3, 192)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(coarse_pixels(images * 2), features)
    torch.testing.assert_close(coarse_pixels(images + 30), features)
    assert float((features[0] * features[1]).sum()) < 0.5
    assert coarse_pixels(torch.full((1, 32, 32, 3), 9, dtype=torch.uint8)).abs().max() == 0.0
    assert coarse_pixels(images[:0]).shape == (0, 192)
    with pytest.raises(UserError, match="uint8"):
        coarse_pixels(images.float())


def test_rows_of_one_patient_count_once() -> None:
    """Every row repeated six times tells no more than the row; independent rows tell what Wilson's interval says."""
    source = torch.Generator().manual_seed(0)
    scores = torch.rand(200, generator=source, dtype=torch.float64)
    alone = clustered_share(scores < 0.1, scores, [str(row) for row in range(200)])
    repeated = scores.repeat_interleave(6)
    patients = [str(row // 6) for row in range(1200)]
    clustered = clustered_share(repeated < 0.1, repeated, patients)
    wilson = proportion_estimate(int((scores < 0.1).sum()), 200)
    for estimate in (alone, clustered):
        assert estimate.value == wilson.value
        assert estimate.low == pytest.approx(wilson.low, rel=0.02)
        assert estimate.high == pytest.approx(wilson.high, rel=0.02)
    none = clustered_share(repeated < -1, repeated, patients)
    assert none.value == none.low == 0.0
    assert none.high == pytest.approx(proportion_estimate(0, 200).high, rel=0.1)


def test_intervals_of_an_excess_cover_it() -> None:
    """Flags of 50 patients with 6 photographs, correlated within a patient, against 240 independent pictures."""
    held = []
    source = np.random.default_rng(0)
    for _ in range(200):
        people = np.repeat(source.normal(0, 0.5**0.5, 50), 6) + source.normal(0, 0.5**0.5, 300)
        pictures = source.normal(size=240) < -1.2816
        scores = torch.from_numpy(people)
        real = clustered_share(scores < -1.6449, scores, [str(row // 6) for row in range(300)])
        held.append(holds(share_excess(torch.from_numpy(pictures), real), 0.05))
    assert 0.90 <= np.mean(held) <= 0.99


def test_honest_and_low_diversity_generators_are_seldom_called_copiers() -> None:
    """120 clinics, two generators each: at most 5 % false alarms; 5 % copies are found in nearly all."""
    called: dict[str, list[bool]] = {"honest": [], "low diversity": [], "copies": []}
    for seed in range(120):
        clinic = Clinic(seed)
        reference = CopyReference(clinic.real, CONFIG)
        called["honest"].append(above_zero(excess(reference, clinic.honest(120))))
        called["low diversity"].append(above_zero(excess(reference, clinic.low_diversity(120, 2 + seed % 7))))
        called["copies"].append(above_zero(excess(reference, clinic.with_copies(120, 0.05))))
    rates = {name: float(np.mean(each)) for name, each in called.items()}
    assert rates["honest"] <= 0.05
    assert rates["low diversity"] <= 0.05
    assert rates["copies"] >= 0.95


def test_one_person_under_two_names_lowers_the_threshold() -> None:
    """Repeat visits under another patient's name look like copies: that is told, and held against nobody."""
    clinic = Clinic(0)
    training, held_out = clinic.real.training, clinic.real.held_out
    twins = training.features[:15] + 0.15 * clinic.normal(15, WIDTH)
    mixed = FeatureRows(torch.cat([held_out.features[15:], twins]), held_out.class_ids, held_out.patients)
    reference = MemorisationReference(
        {"x": TrainingAppearances(training, mixed, (training.features,))}, {"x": "test"}, CONFIG
    )
    assert reference.references["x"].threshold < 0.4
    assert "data.group_by" in reference.notes["x/patients"]
    more = training.features[20:24] + 0.15 * clinic.normal(4, WIDTH)
    assert reference.report({"x": torch.cat([clinic.honest(96), more])}).found is False
    assert reference.report({"x": torch.cat([clinic.honest(90), training.features[:10]])}).found is True


def test_matched_share_is_zero_for_more_patients_and_high_for_copies() -> None:
    honest, copied = [], []
    for seed in range(20):
        clinic = Clinic(seed)
        independent = clinic.people(25, "g").features
        honest.append(matched_training_excess(independent, clinic.real, seed))
        copied.append(matched_training_excess(clinic.with_copies(75, 0.6), clinic.real, seed))
    assert abs(np.mean([each.value for each in honest])) < 0.03
    assert np.mean([holds(each, 0.0) for each in honest]) >= 0.9
    assert np.mean([above_zero(each) for each in copied]) >= 0.9


def test_matched_share_by_hand() -> None:
    """20 photographs at right angles; one has a held-out look-alike, the 5 % expected, three have a generated one."""
    training = torch.eye(20, 24, dtype=torch.float64)
    others = torch.eye(24, dtype=torch.float64)[20:]
    held_out = torch.cat([training[:1] + 0.9 * others[:1], others[:3]])
    generated = torch.cat([training[:1], training[5:7], others[:1]])
    real = TrainingAppearances(rows(training, 1), rows(held_out, 1, "h"), (training,))
    assert matched_training_excess(generated, real, 0).value == pytest.approx(3 / 20 - 0.05)


def gains(values: torch.Tensor, patients: tuple[str, ...]) -> MemberLosses:
    """Losses that fell by `values`, the same at two timesteps on average."""
    base = torch.ones(len(values), 2, dtype=torch.float64)
    change = torch.stack([values + 0.25, values - 0.25], dim=1)
    return MemberLosses(base - change, base, patients)


def test_auc_is_scikit_learns_and_its_interval_delongs() -> None:
    source = torch.Generator().manual_seed(0)
    members, others = torch.randn(40, generator=source).double() + 0.7, torch.randn(30, generator=source).double()
    others[0] = members[0]  # a tie counts half
    estimate = membership_auc(
        gains(members, tuple(map(str, range(40)))), gains(others, tuple(f"h{n}" for n in range(30)))
    )
    truth = torch.cat([torch.ones(40), torch.zeros(30)])
    assert estimate.value == pytest.approx(roc_auc_score(truth, torch.cat([members, others])), rel=1e-12)
    wins = (members[:, None] > others).double() + 0.5 * (members[:, None] == others)
    variance = float(wins.mean(1).var() / 40 + wins.mean(0).var() / 30)  # DeLong et al. 1988
    assert estimate.low is not None
    assert estimate.high is not None
    logit = [math.log(end / (1 - end)) for end in (estimate.low, estimate.high)]
    deviation = variance**0.5 / (estimate.value * (1 - estimate.value))
    assert (logit[1] - logit[0]) / 2 / deviation == pytest.approx(2.0, abs=0.03)  # Student's 97.5 % at 60 or so


def test_auc_intervals_cover_it_when_patients_differ() -> None:
    held, naive = [], []
    source = torch.Generator().manual_seed(1)

    def side(patients: int, shift: float) -> torch.Tensor:
        people = torch.randn(patients, 1, generator=source) * 0.7**0.5
        return (people + torch.randn(patients, 5, generator=source) * 0.3**0.5 + shift).flatten().double()

    truth = 0.5 * (1 + math.erf(0.4 / 2**0.5 / 2**0.5))
    for _ in range(200):
        members, others = side(40, 0.4), side(15, 0.0)
        names = [tuple(f"{s}{row // 5}" for row in range(len(v))) for s, v in (("m", members), ("h", others))]
        held.append(holds(membership_auc(gains(members, names[0]), gains(others, names[1])), truth))
        own = [tuple(f"{s}{row}" for row in range(len(v))) for s, v in (("m", members), ("h", others))]
        naive.append(holds(membership_auc(gains(members, own[0]), gains(others, own[1])), truth))
    assert 0.90 <= np.mean(held) <= 0.99
    assert np.mean(naive) < 0.85


def test_auc_at_its_ends_and_bad_losses() -> None:
    values, names = torch.arange(6.0).double(), tuple("abcdef")
    apart = membership_auc(gains(values + 10, names), gains(values, names))
    assert apart == Estimate(1.0)
    few = membership_auc(gains(values, tuple("aabbbb")), gains(values - 1, names))
    assert few.low is None
    with pytest.raises(UserError, match="one row a photograph"):
        membership_auc(gains(values, ("a",)), gains(values, names))
    with pytest.raises(UserError, match="not finite"):
        membership_auc(gains(values * torch.nan, names), gains(values, names))


def test_a_grid_says_whose_losses_it_holds() -> None:
    """Training photographs take the place of held-out ones in a grid; their patients are found by `grid_rows`."""
    moments = torch.arange(10.0).reshape(10, 1, 1, 1).expand(10, 2, 4, 4)
    latents = Latents(moments, torch.zeros(10).long(), torch.zeros(10, 6), tuple(map(str, range(10))), ("a",))
    grid = ValidationGrid.build(latents, 1.0, 4, 8, 0)
    assert grid_rows(10, 4).tolist() == grid.latents[:, 0, 0, 0].long().tolist() == [0, 3, 6, 9]
    assert grid_rows(3, 64).tolist() == [0, 1, 2]


@cache
def phantoms(first: int, patients: int, copies: int = 1) -> torch.Tensor:
    """A picture of each of the three visits of each patient: uint8 [3 * patients * copies, 64, 64, 3]."""
    draws = [(p, v) for p in range(first, first + patients) for v in range(3) for _ in range(copies)]
    return torch.from_numpy(np.stack([render(p, v, 0, visit_phases(p)[v]) for p, v in draws]))


class PhantomClinic:
    """60 training patients and 20 held-out ones through the embedded base's autoencoder, in both kinds of features."""

    def __init__(self) -> None:
        self.vae = load_base("tiny_sdxl").vae
        self.extractor = efficientnet_lite0(96)
        self.training = phantoms(0, 60)
        self.restored = self.through_autoencoder(self.training)
        self.others = self.through_autoencoder(phantoms(500, 40)[torch.randperm(120, generator=seeded(0))])
        appearances = (self.training, self.restored, self.restored.flip(2))
        held_out = self.through_autoencoder(phantoms(300, 20))
        self.reference = MemorisationReference(
            {
                name: TrainingAppearances(
                    rows(features(self.restored), 3, "t"),
                    rows(features(held_out), 3, "h"),
                    tuple(features(each) for each in appearances),
                )
                for name, features in self.kinds().items()
            },
            {"pixels": "pixels", "efficientnet_lite0": self.extractor.identity},
            MemorisationConfig(),
        )
        self.honest = self.features(self.others)

    def kinds(self) -> dict[str, object]:
        return {"pixels": coarse_pixels, "efficientnet_lite0": self.extractor}

    def through_autoencoder(self, images: torch.Tensor) -> torch.Tensor:
        encoder = VaeEncoder(self.vae, "")
        return torch.cat([restore(self.vae, encoder(part).chunk(2, dim=1)[0]) for part in images.split(32)])

    def features(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"pixels": coarse_pixels(images), "efficientnet_lite0": self.extractor(images)}

    def judge(self, copies: torch.Tensor, honest: int = 114) -> MemorisationReport:
        planted = self.features(copies)
        return self.reference.report(
            {name: torch.cat([each[:honest], planted[name]]) for name, each in self.honest.items()}
        )


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def clinic() -> PhantomClinic:
    return PhantomClinic()


def test_copied_phantoms_are_found(clinic: PhantomClinic) -> None:
    """5 % copies (6 of 120): as they are, through the autoencoder, mirrored, both, in other light."""
    originals = clinic.training[10:16]
    lighter = (originals.float() * 1.15 + 6).clamp(0, 255).byte()
    kinds = {
        "exact": originals,
        "restored": clinic.restored[10:16],
        "mirrored": originals.flip(2),
        "mirrored, restored": clinic.through_autoencoder(originals.flip(2)),
        "lighter, restored": clinic.through_autoencoder(lighter),
    }
    for name, copies in kinds.items():
        report = clinic.judge(copies)
        assert report.found is True, name
        assert "copies found" in report.because
        assert {suspect.generated for suspect in report.suspects[:6]} == set(range(114, 120)), name
        assert {suspect.photograph for suspect in report.suspects[:6]} == set(range(10, 16)), name
        assert all(suspect.below for suspect in report.suspects[:6])


def test_phantoms_of_other_patients_are_no_copies(clinic: PhantomClinic) -> None:
    """100 draws of 60 from 120 pictures of 40 other patients."""
    reports = []
    for seed in range(100):
        chosen = torch.randperm(120, generator=seeded(seed))[:60]
        figures = [
            reference.figures(reference.neighbours(clinic.honest[name][chosen]))["copy_excess"]
            for name, reference in clinic.reference.references.items()
        ]
        reports.append(any(above_zero(each) for each in figures))
    assert np.mean(reports) <= 0.05
    report = clinic.reference.report(clinic.honest, Estimate(0.55, 0.5, 0.6))
    assert report.found is False
    assert report.notes.keys() <= {"suspects"}
    keys = ("gap_share", "gap_share_real", "copy_excess", "matched_training_excess")
    assert report.values.keys() == {"membership_auc"} | {f"{name}/{key}" for name in clinic.kinds() for key in keys}


def test_few_poses_of_new_patients_are_no_copies(clinic: PhantomClinic) -> None:
    views = [render(p, p % 3, image, visit_phases(p)[p % 3]) for p in range(700, 704) for image in range(30)]
    assert clinic.judge(torch.from_numpy(np.stack(views)), honest=0).found is False


def test_report_of_too_few_and_of_unknown_features(clinic: PhantomClinic) -> None:
    few = clinic.reference.report({name: each[:12] for name, each in clinic.honest.items()})
    assert few.found is None
    assert "12 generated pictures" in few.because
    assert few.values["pixels/copy_excess"].high is not None
    with pytest.raises(UserError, match="was set up for pixels, efficientnet_lite0"):
        clinic.reference.report({"pixels": clinic.honest["pixels"]})
    with pytest.raises(UserError, match="at least one kind"):
        MemorisationReference({}, {}, CONFIG)
    assert clinic.extractor.identity in clinic.reference.identity


def test_sscd_has_its_level_beside_real_photographs() -> None:
    clinic = Clinic(0)
    reference = MemorisationReference({"sscd": clinic.real}, {"sscd": "test"}, CONFIG)
    report = reference.report({"sscd": clinic.with_copies(100, 0.1)})
    similar = report.values["sscd/similar_share"]
    found = reference.references["sscd"].neighbours(clinic.training.features)
    assert similar_share(found, reference.references["sscd"], 0.5)["similar_share"].value == 1.0
    assert similar.value >= 0.1
    assert {"sscd/similar_share_real", "sscd/similar_excess"} <= report.values.keys()


def test_closest_pairs_are_the_users_own(tmp_path: Path) -> None:
    source = np.random.default_rng(0)
    generated = source.integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    photographs = source.integers(0, 256, (4, 96, 80, 3), dtype=np.uint8)
    suspects = [Suspect(3, 1, "pixels", 0.0123, 0.999, True), Suspect(0, 2, "sscd", 0.41, 0.7, False)]
    names = [(f"{row}.png", f"P{row}") for row in range(4)]
    folder = tmp_path / "pairs"
    folder.mkdir(mode=0o755)
    for stale in ("pair_009.png", "notes.txt"):
        (folder / stale).write_text("old")
    before = os.umask(0)
    try:
        listing = write_closest_pairs(folder, suspects, generated, photographs.__getitem__, names)
    finally:
        os.umask(before)
    assert sorted(path.name for path in folder.iterdir()) == ["notes.txt", "pair_001.png", "pair_002.png", "pairs.csv"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE((folder / name).stat().st_mode) for name in ("pair_001.png", "pairs.csv")} == {0o600}
    with listing.open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["generated"], line["photograph"], line["patient"]) for line in lines] == [
        ("3", "1.png", "P1"),
        ("0", "2.png", "P2"),
    ]
    assert (lines[0]["ratio"], lines[0]["below_threshold"], lines[0]["features"]) == ("0.0123", "True", "pixels")
    pair = np.asarray(Image.open(folder / "pair_001.png"))
    np.testing.assert_array_equal(pair[::3, -240::3], photographs[1])
    assert pair.shape == (288, 288 + 4 + 240, 3)


@pytest.mark.skipif("DFU_FUSEG" not in os.environ, reason="DFU_FUSEG does not point to the photographs")
def test_real_photographs_of_unknown_patients_are_no_copies(tmp_path: Path) -> None:
    """Repeat visits under several names: half of the held-out photographs are not called copies, planted ones are."""
    config = DataConfig(
        root=str(Path(os.environ["DFU_FUSEG"]) / "images"), group_by="none", validation_fraction=0.5, cache_dir=tmp_path
    )
    split, _ = load_split(config, 0)
    training, held_out = (coarse_pixels(evaluation_pixels(side, config)) for side in (split.train, split.held_out))
    called = []
    for seed in range(20):
        order = torch.randperm(len(held_out), generator=seeded(seed))
        real = TrainingAppearances(rows(training, 1, "t"), rows(held_out[order[:150]], 1, "h"), (training,))
        reference = CopyReference(real, CONFIG)
        called.append(above_zero(excess(reference, held_out[order[150:]])))
    assert np.mean(called) <= 0.1
    copies = torch.cat([held_out[order[162:]], training[:12]])
    assert above_zero(excess(reference, copies))
