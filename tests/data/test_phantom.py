"""Phantoms: deterministic, laid out as a clinic's folders, healing forward, and with phases that can be told apart."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dfu_mlflow.data.phantom import PHASES, render, visit_phases, write_phantom


def draw_clinic(patients: range, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Pictures uint8 [N, 64, 64, 3] and class numbers [N], two a visit."""
    pictures, labels = [], []
    for patient in patients:
        for visit, phase in enumerate(visit_phases(patient, seed)):
            for image in range(2):
                pictures.append(render(patient, visit, image, phase, seed))
                labels.append(PHASES.index(phase))
    return np.stack(pictures), np.array(labels)


def thumbnails(pictures: np.ndarray) -> np.ndarray:
    """16 x 16 means, [N, 768]: what a coarse look sees."""
    return pictures.reshape(len(pictures), 16, 4, 16, 4, 3).mean((2, 4)).reshape(len(pictures), -1) / 255


def test_the_same_arguments_give_the_same_bytes() -> None:
    assert np.array_equal(render(3, 1, 0, "P", seed=5), render(3, 1, 0, "P", seed=5))


@pytest.mark.parametrize("change", [{"patient": 4}, {"visit": 2}, {"image": 1}, {"phase": "R"}, {"seed": 6}])
def test_every_argument_matters(change: dict[str, object]) -> None:
    given: dict[str, object] = {"patient": 3, "visit": 1, "image": 0, "phase": "P", "seed": 5}
    first = render(**given)  # type: ignore[arg-type]
    second = render(**(given | change))  # type: ignore[arg-type]
    assert np.abs(first.astype(int) - second.astype(int)).mean() > 1


def test_an_unknown_phase_is_refused_with_what_is_allowed() -> None:
    with pytest.raises(ValueError, match="I, P, R"):
        render(0, 0, 0, "X")


@pytest.mark.parametrize("size_px", [64, 96, 128])
def test_any_size_shows_the_same_scene(size_px: int) -> None:
    picture = render(1, 0, 0, "I", size_px=size_px)
    assert (picture.shape, picture.dtype) == ((size_px, size_px, 3), np.uint8)
    small = np.asarray(Image.fromarray(picture).resize((16, 16), Image.Resampling.BOX), float)
    usual = np.asarray(Image.fromarray(render(1, 0, 0, "I")).resize((16, 16), Image.Resampling.BOX), float)
    assert np.abs(small - usual).mean() < 8


def test_healing_goes_forward_only_and_classes_are_balanced() -> None:
    courses = [visit_phases(patient, seed=0) for patient in range(600)]
    assert all(list(course) == sorted(course) for course in courses)
    counts = np.array([sum(course.count(phase) for course in courses) for phase in PHASES])
    assert np.all(np.abs(counts / counts.sum() - 1 / 3) < 0.03)


def test_folders_by_class_and_names_by_patient_visit_and_image(tmp_path: Path) -> None:
    write_phantom(tmp_path / "clinic", patients=4, seed=2, size_px=32)
    paths = sorted((tmp_path / "clinic").glob("*/*.png"))
    assert len(paths) == 4 * 3 * 2
    assert {path.parent.name for path in paths} <= set(PHASES)
    visits = [visit_phases(patient, 2) for patient in range(4)]
    for path in paths:
        patient, visit = int(path.stem[1:4]), int(path.stem[5:7])
        assert path.stem == f"P{patient:03d}V{visit:02d}N{path.stem[-1]}"
        assert path.parent.name == visits[patient][visit]
    with Image.open(paths[0]) as picture:
        assert picture.size == (32, 32)


def test_a_small_classifier_tells_phases_apart_on_patients_it_has_not_seen() -> None:
    pictures, labels = draw_clinic(range(120))
    unseen, truth = draw_clinic(range(120, 160))
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300)).fit(thumbnails(pictures), labels)
    assert model.score(thumbnails(unseen), truth) > 0.95  # 0.975 when this was written


def test_pictures_of_one_patient_are_alike_but_not_the_same() -> None:
    pictures = np.stack([render(patient, 0, image, "P") for patient in range(12) for image in range(2)]).astype(float)
    border = np.concatenate([pictures[:, :8].mean((1, 2)), pictures[:, -8:].mean((1, 2))], 1)
    own = np.abs(border[0::2] - border[1::2]).mean()
    others = np.abs(border[0::2] - np.roll(border[1::2], 1, 0)).mean()
    assert 0 < own < 0.7 * others
