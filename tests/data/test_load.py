"""Finding, naming and dividing photographs from folders and tables, and the ways in which they are refused."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from dfu_mlflow.config.schema import DataConfig
from dfu_mlflow.data import Audit, dataset_digest, load_split
from dfu_mlflow.errors import UserError
from dfu_mlflow.types import Record, Split

WritePicture = Callable[..., Path]
MakeConfig = Callable[..., DataConfig]

PATTERN = r"P(\d{3})"


@pytest.fixture
def clinic(tmp_path: Path, write_picture: WritePicture) -> Path:
    """Six patients, two phases, named as the founding team named theirs: number, patient, visit, ulcer, side."""
    root = tmp_path / "photographs"
    for patient in range(6):
        for visit, phase in enumerate("IP"):
            number = 200 + 2 * patient + visit
            write_picture(root / phase / f"{number}_P{patient:03d}{visit:02d}1BDLW.png", number)
    return root


def records(result: tuple[Split, Audit]) -> list[Record]:
    return sorted(result[0].train + result[0].held_out, key=lambda item: (item.path, item.box or ()))


def kinds(audit: Audit) -> Counter[str]:
    return Counter(problem.kind for problem in audit.problems)


def test_seed_teams_names_and_folders(clinic: Path, make_config: MakeConfig) -> None:
    split, audit = load_split(make_config(group_by=PATTERN), 0)
    assert {item.patient for item in split.train + split.held_out} == {f"{patient:03d}" for patient in range(6)}
    assert not {item.patient for item in split.train} & {item.patient for item in split.held_out}
    assert all(item.path.parent.name == item.label for item in split.train)
    assert audit.problems == ()
    assert (audit.files, audit.patients, audit.unusable_files) == (12, 6, 0)
    assert [(row.label, row.train_images + row.held_out_images) for row in audit.classes] == [("I", 6), ("P", 6)]
    assert "12 image files of 6 patients" in audit.table()


def test_modality_level_is_seen_through(clinic: Path, tmp_path: Path, make_config: MakeConfig) -> None:
    (tmp_path / "deep").mkdir()
    clinic.rename(tmp_path / "deep" / "rgb")
    (tmp_path / "deep" / "notes.txt").write_text("not a picture")
    (tmp_path / "deep" / "rgb" / ".DS_Store").write_text("hidden")
    split, audit = load_split(make_config(root=str(tmp_path / "deep"), group_by=PATTERN), 0)
    assert split.classes == ("I", "P")
    assert audit.ignored_files == 1


def test_suffix_case_and_misplaced_or_foreign_files(
    clinic: Path, write_picture: WritePicture, make_config: MakeConfig
) -> None:
    lower = next((clinic / "I").iterdir())
    lower.rename(lower.with_suffix(".PNG"))
    write_picture(clinic / "stray_P001.png", 900)
    (clinic / "P" / "photo_P002.HEIC").write_bytes(b"apple")
    result = load_split(make_config(group_by=PATTERN, max_bad_fraction=0.2), 0)
    assert len(records(result)) == 12
    assert kinds(result[1]) == {"misplaced": 1, "unsupported format": 1}
    assert (result[1].files, result[1].unusable_files) == (14, 2)


def test_patients_must_be_told_apart(clinic: Path, make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match=r"patients cannot be told from 200_P000001BDLW\.png.*group_by.*none"):
        load_split(make_config(), 0)
    result = load_split(make_config(group_by="none"), 0)
    assert len({item.patient for item in records(result)}) == 12


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("P(", "is no valid pattern"),
        (r"P\d", "has 0 groups"),
        (r"(P)(\d)", "has 2 groups"),
        (r"Q(\d)", r"fits 0 of 12 file names, but not 200_P000001BDLW\.png"),
        (r"P00([0-4])", r"fits 10 of 12 file names, but not 210_P005001BDLW\.png"),
    ],
)
def test_patterns_that_do_not_serve(clinic: Path, make_config: MakeConfig, pattern: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_split(make_config(group_by=pattern), 0)


def test_roots_that_do_not_serve(tmp_path: Path, write_picture: WritePicture, make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        load_split(make_config(root=str(tmp_path / "nowhere")), 0)
    (tmp_path / "photographs" / "I").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no images"):
        load_split(make_config(), 0)
    write_picture(tmp_path / "photographs" / "loose.png", 0)
    with pytest.raises(UserError, match="1 images lie elsewhere"):
        load_split(make_config(), 0)
    with pytest.raises(UserError, match=r"set --data\.root"):
        load_split(make_config(root=None), 0)
    with pytest.raises(UserError, match=r"--data\.bounding_boxes needs photographs"):
        load_split(make_config(root="phantom", bounding_boxes=tmp_path / "boxes.csv"), 0)


def test_folders_of_patients_are_no_classes(
    tmp_path: Path, write_picture: WritePicture, make_config: MakeConfig
) -> None:
    for label, patient in (("chronic", "Miller"), ("chronic", "Smith"), ("acute", "Jones")):
        for number in range(2):
            write_picture(tmp_path / "data" / label / patient / f"{number}.png", len(patient) * 10 + number)
    with pytest.raises(UserError, match="are the 2 folders in it classes, each with folders of patients"):
        load_split(make_config(root=str(tmp_path / "data"), group_by="none"), 0)


def test_a_folder_of_files_that_must_be_converted_says_so(tmp_path: Path, make_config: MakeConfig) -> None:
    (tmp_path / "data" / "I").mkdir(parents=True)
    (tmp_path / "data" / "I" / "a.heic").write_bytes(b"apple")
    with pytest.raises(UserError, match=r"1 files \(\.heic\) must be converted to JPEG or PNG"):
        load_split(make_config(root=str(tmp_path / "data"), group_by="none"), 0)


def test_names_that_are_no_utf_8_are_only_names(
    tmp_path: Path, write_picture: WritePicture, make_config: MakeConfig
) -> None:
    folder = tmp_path / "data" / "I"
    for number in range(4):
        write_picture(folder / f"{number}.png", number)
        os.rename(folder / f"{number}.png", os.fsencode(folder) + b"/M\xfcller%d.png" % number)
    split, _ = load_split(make_config(root=str(tmp_path / "data"), group_by="none", validation_fraction=0.5), 0)
    assert len(dataset_digest(split)) == 32


def test_classes_can_be_chosen_but_not_invented(clinic: Path, make_config: MakeConfig) -> None:
    split, audit = load_split(make_config(group_by=PATTERN, classes=("P",)), 0)
    assert split.classes == ("P",)
    assert audit.files == 6
    with pytest.raises(UserError, match="names R, but the data hold I, P"):
        load_split(make_config(group_by=PATTERN, classes=("P", "R")), 0)


def test_class_with_one_patient(clinic: Path, write_picture: WritePicture, make_config: MakeConfig) -> None:
    write_picture(clinic / "R" / "1_P003.png", 500)
    write_picture(clinic / "R" / "2_P003.png", 501)
    with pytest.raises(UserError, match=r"class R has one patient \(003\)"):
        load_split(make_config(group_by=PATTERN), 0)


def test_every_kind_of_bad_file_is_reported(
    clinic: Path, write_picture: WritePicture, make_config: MakeConfig, tmp_path: Path
) -> None:
    (clinic / "I" / "empty_P001.png").touch()
    (clinic / "I" / "broken_P001.jpg").write_bytes(b"\xff\xd8\xff nonsense")
    write_picture(clinic / "I" / "tiny_P001.png", 1, (31, 90))
    Image.new("RGB", (64, 64), (7, 7, 7)).save(clinic / "I" / "blank_P001.png")
    first = clinic / "I" / "200_P000001BDLW.png"
    Image.open(first).save(clinic / "I" / "same_P005.bmp")  # equal pixels, other bytes
    shutil.copy(clinic / "P" / "203_P001011BDLW.png", clinic / "I" / "wrong_P001.png")
    with pytest.raises(UserError, match=r"^7 of 18 image files \(38\.9%\).*2 mislabelled.*complete list: ") as refused:
        load_split(make_config(group_by=PATTERN), 0)
    assert "\n" not in str(refused.value)
    listing = next((tmp_path / "cache" / "audits").iterdir())
    assert str(listing) in str(refused.value)
    assert listing.stat().st_mode & 0o777 == 0o600
    assert len(listing.read_text().splitlines()) == 8

    result = load_split(make_config(group_by=PATTERN, max_bad_fraction=0.5), 0)
    assert kinds(result[1]) == {
        "empty file": 1, "unreadable": 1, "too small": 1, "blank": 1, "duplicate": 1, "mislabelled": 2
    }  # fmt: skip
    reasons = {problem.path.name: problem.reason for problem in result[1].problems}
    assert reasons["same_P005.bmp"] == "same pixels as 200_P000001BDLW.png of patient 000"
    assert reasons["wrong_P001.png"] == "the same picture is in the classes I, P"
    assert "31x90" in reasons["tiny_P001.png"]
    assert len(records(result)) == 11
    held_out = {item.patient for item in result[0].held_out}
    assert ("000" in held_out) == ("005" in held_out)  # they share a picture


@pytest.mark.parametrize(("kind", "grey"), [("png", 255), ("jpg", 255), ("png", 90)])
def test_segmentations_among_the_photographs_are_found(
    clinic: Path, make_config: MakeConfig, kind: str, grey: int
) -> None:
    mask = Image.new("L", (200, 160))
    ImageDraw.Draw(mask).ellipse((40, 30, 150, 120), fill=grey)
    mask.save(clinic / "I" / f"mask_P001.{kind}")
    _, audit = load_split(make_config(group_by=PATTERN, max_bad_fraction=0.5), 0)
    assert kinds(audit) == {"mask": 1}


def test_near_duplicates_stay_but_tie_their_patients(
    clinic: Path, write_picture: WritePicture, make_config: MakeConfig
) -> None:
    image = Image.open(clinic / "I" / "202_P001001BDLW.png")
    image.resize((60, 60)).save(clinic / "I" / "copy_P004.jpg", quality=70)
    for seed in range(6):
        result = load_split(make_config(group_by=PATTERN, validation_fraction=0.4), seed)
        assert kinds(result[1]) == {"near-duplicate": 1}
        assert len(records(result)) == 13
        held_out = {item.patient for item in result[0].held_out}
        assert ("001" in held_out) == ("004" in held_out)


def test_manifest_with_boxes_patients_and_foreign_habits(clinic: Path, tmp_path: Path, make_config: MakeConfig) -> None:
    lines = ["\ufeffPath;Label;Patient;Xmin;Ymin;Xmax;Ymax;comment"]
    for path in sorted(clinic.rglob("*.png")):
        name = path.relative_to(tmp_path).as_posix().replace("/", "\\")
        lines.append(f"{name};{path.parent.name};{path.name[5:8]};4;4,5;30;28;x")
    lines.append(lines[1].replace("4;4,5;30;28", "20;20;99;40"))  # a second wound, reaching outside
    lines.append(lines[2].replace("4;4,5;30;28", "60;60;70;70"))  # outside
    lines.append(lines[3].replace("4;4,5", "?;4,5"))
    lines.append(lines[4])  # twice
    (tmp_path / "manifest.csv").write_text("\n".join(lines), encoding="utf-8")
    result = load_split(make_config(root="phantom", manifest=tmp_path / "manifest.csv"), 0)
    found = records(result)
    assert len(found) == 13
    assert [item.box for item in found[:2]] == [(4, 4, 30, 28), (20, 20, 48, 40)]
    assert found[0].patient == "000"
    assert kinds(result[1]) == {"clipped box": 1, "bad bounding box": 2, "duplicate": 1}
    assert result[1].unusable_files == 0


def test_manifest_reports_missing_files_and_labels(clinic: Path, tmp_path: Path, make_config: MakeConfig) -> None:
    names = sorted(path.relative_to(clinic).as_posix() for path in clinic.rglob("*.png"))
    rows = [f"{name},{name[0]},{name[7:10]}" for name in names]
    rows += ["I/none.png,I,000", "I/unlabelled.png,,000"]
    manifest = tmp_path / "m.csv"
    manifest.write_text("\n".join(["path,label,who", *rows]))
    config = make_config(manifest=manifest, group_by="column:Who", max_bad_fraction=0.2)
    result = load_split(config, 0)
    assert kinds(result[1]) == {"missing file": 1, "no label": 1}
    assert result[1].unusable_files == 2
    with pytest.raises(UserError, match=r"column:ward: .* has the columns path, label, who"):
        load_split(config.model_copy(update={"group_by": "column:ward"}), 0)
    with pytest.raises(UserError, match="patients cannot be told"):
        load_split(config.model_copy(update={"group_by": None}), 0)
    manifest.write_text("path,label,who\nI/a.png,I,\n")
    with pytest.raises(UserError, match=r"column who names nobody for I/a\.png"):
        load_split(config, 0)
    manifest.write_text("path,who\nI/a.png,1\n")
    with pytest.raises(UserError, match="lacks the column label: it has path, who"):
        load_split(config, 0)
    manifest.write_text("path,label\n")
    with pytest.raises(UserError, match="has no rows"):
        load_split(config, 0)
    manifest.write_text("path,label\n" + "x" * 200_000)
    with pytest.raises(UserError, match="is no CSV: field larger"):
        load_split(config, 0)
    manifest.unlink()
    with pytest.raises(UserError, match=r"--data\.manifest .* cannot be read"):
        load_split(config, 0)


def test_bounding_boxes_by_name(clinic: Path, tmp_path: Path, make_config: MakeConfig) -> None:
    names = sorted(path.name for path in clinic.rglob("*.png"))
    lines = ["Filename,Bounding Box Number,Xmin,Ymin,Xmax,Ymax"]
    lines += [f"{name},1,5,6,40,41" for name in names[1:]]
    lines += [f"{names[1].upper()},2,1,1,20,20", f"I/{names[2]},1,2,2,22,22"]
    boxes = tmp_path / "boxes.csv"
    boxes.write_text("\n".join(lines))
    result = load_split(make_config(group_by=PATTERN, bounding_boxes=boxes, max_bad_fraction=0.1), 0)
    found = [(item.path.name, item.box) for item in records(result)]
    assert len(found) == 12
    assert names[0] not in dict(found)
    assert sorted(box for name, box in found if name == names[1]) == [(1, 1, 20, 20), (5, 6, 40, 41)]
    assert dict(found)[names[2]] == (2, 2, 22, 22)  # the longer name decides
    assert kinds(result[1])["bad bounding box"] == 1  # names[0], because a row fits no picture
    assert kinds(result[1])["box without image"] == 1


def test_images_without_a_box_are_a_remark_where_all_names_fit(
    clinic: Path, tmp_path: Path, make_config: MakeConfig
) -> None:
    names = sorted(path.name for path in clinic.rglob("*.png"))
    boxes = tmp_path / "boxes.csv"
    boxes.write_text("\n".join(["filename,xmin,ymin,xmax,ymax"] + [f"{name},5,6,40,41" for name in names[:9]]))
    result = load_split(make_config(group_by=PATTERN, bounding_boxes=boxes), 0)
    assert kinds(result[1]) == {"no bounding box": 3}
    assert result[1].unusable_files == 0
    boxes.write_text("filename,xmin,ymin,xmax,ymax\nelse.png,1,2,30,40\n")
    with pytest.raises(UserError, match=r"no Filename matches a picture: it names else\.png"):
        load_split(make_config(group_by=PATTERN, bounding_boxes=boxes), 0)


def test_phantom_is_rendered_once_and_divided_by_patient(tmp_path: Path, make_config: MakeConfig) -> None:
    config = make_config(root="phantom", phantom={"patients": 12})
    split, audit = load_split(config, 0)
    assert split.classes == ("I", "P", "R")
    assert audit.unusable_files == 0
    assert not {item.patient for item in split.train} & {item.patient for item in split.held_out}
    folders = list((tmp_path / "cache" / "phantom").iterdir())
    assert len(folders) == 1
    before = split.train[0].path.stat().st_mtime_ns
    again, _ = load_split(config, 0)
    assert again.train[0].path.stat().st_mtime_ns == before
    assert dataset_digest(again) == dataset_digest(split)


def manifest_of(clinic: Path, header: str, row: Callable[[Path, int], str]) -> Path:
    pictures = sorted(clinic.rglob("*.png"))
    file = clinic.parent / "manifest.csv"
    lines = [header, *(row(path.relative_to(clinic), number) for number, path in enumerate(pictures))]
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("header", "row", "words"),
    [
        ("path,label,patient,xmin,ymin,xmax", "{path},{label},{patient},4,4,30", "lacks the column ymax"),
        ("path,label,patient,x,y,width,height", "{path},{label},{patient},4,4,30,30", "boxes are xmin, ymin"),
        ("path,label,patient,xmin,ymin,xmax,ymax", "{path},{label},{patient},0.1,0.2,0.8,0.9", "give pixels"),
        ("path,label,label,patient", "{path},{label},{label},{patient}", "label more than once"),
        ("path,label,patient", "{path},{label},NaN", "names nobody"),
        (
            "path,label,patient,bbox_left,bbox_top,bbox_right,bbox_bottom",
            "{path},{label},{patient},4,4,9,9",
            "boxes are",
        ),
        ("path,label,patient", "{path},{either},{patient}", "classes I and i: are they one"),
        ("path,label,patient", "{path},{label},{patients}", "patients p000 and P000: are they one"),
    ],
)
def test_tables_that_would_be_misunderstood_are_refused(
    clinic: Path, make_config: MakeConfig, header: str, row: str, words: str
) -> None:
    def line(path: Path, number: int) -> str:
        label, patient = path.parent.name, path.name[5:8]
        either = {"either": label.lower() if number % 2 else label, "patients": f"{'P' if number else 'p'}{patient}"}
        return row.format(path=path.as_posix(), label=label, patient=patient, **either)

    manifest = manifest_of(clinic, header, line)
    with pytest.raises(UserError, match=words):
        load_split(make_config(manifest=manifest), 0)


def test_columns_that_nobody_reads_may_hold_anything(clinic: Path, make_config: MakeConfig) -> None:
    boxes = clinic.parent / "boxes.csv"
    rows = [f"{path.name},4,4,30,28" for path in clinic.rglob("*.png")]
    boxes.write_text("\n".join(["Filename,Xmin,Ymin,Xmax,Ymax", *rows]), encoding="utf-8")
    manifest = manifest_of(
        clinic,
        "path,label,patient,note,note,x1,y1,x2,y2",
        lambda path, _: f"{path.as_posix()},{path.parent.name},unknown {path.name[5:8]},a,b,1,1,9,9",
    )
    split, _ = load_split(make_config(manifest=manifest, bounding_boxes=boxes), 0)
    assert {record.box for record in split.train} == {(4, 4, 30, 28)}


@pytest.mark.parametrize("box", ["x_min,Y Min,x-max,YMAX", "bbox_xmin,bbox_ymin,bbox_xmax,bbox_ymax"])
def test_columns_of_boxes_may_be_written_in_words(box: str, clinic: Path, make_config: MakeConfig) -> None:
    header = f"path,label,patient,{box}"
    manifest = manifest_of(
        clinic, header, lambda path, _: f"{path.as_posix()},{path.parent.name},{path.name[5:8]},4,4,30,28"
    )
    manifest.write_bytes(manifest.read_text(encoding="utf-8").encode("utf-16"))
    split, audit = load_split(make_config(manifest=manifest), 0)
    assert {record.box for record in split.train} == {(4, 4, 30, 28)}
    assert "12 of 12 images are cut out by a bounding box" in str(audit.in_short())


def test_what_is_left_out_is_counted_once(clinic: Path, tmp_path: Path, make_config: MakeConfig) -> None:
    named = [path.name for path in sorted(clinic.rglob("*.png"))][:-2]
    boxes = tmp_path / "boxes.csv"
    lines = [f"{name},{low},4,30,28" for name in named for low in (3, 4)]
    boxes.write_text("\n".join(["Filename,Xmin,Ymin,Xmax,Ymax", *lines]), encoding="utf-8")
    _, audit = load_split(make_config(group_by=PATTERN, bounding_boxes=boxes), 0)
    assert (audit.files, audit.left_out_files, audit.unusable_files) == (12, 2, 0)
    assert (audit.images, audit.boxed_images) == (20, 20)
    assert str(audit.in_short()).startswith("2 of 12 image files are left out")
    assert "2 left out, of these 0 unusable" in audit.table()


@pytest.mark.parametrize("phases", ["IPR", "ipr", ("Inflammatory", "proliferative")])
def test_visits_below_phases_are_no_classes(
    phases: Sequence[str], write_picture: WritePicture, make_config: MakeConfig, tmp_path: Path
) -> None:
    for number, label in enumerate(phases):
        for visit in ("baseline", "week4"):
            write_picture(tmp_path / "photographs" / label / visit / f"P{number}.png", number)
    with pytest.raises(UserError, match=r"folders of patients or visits lie in .*: put pictures straight into"):
        load_split(make_config(group_by=r"P(\d)"), 0)


def test_one_folder_of_a_modality_may_be_called_as_a_phase_is(
    write_picture: WritePicture, make_config: MakeConfig, tmp_path: Path
) -> None:
    for number in range(12):
        label = ("healthy", "ulcer")[number % 2]
        write_picture(tmp_path / "photographs" / "P" / label / f"F{number:03}.png", number)
    split, _ = load_split(make_config(group_by=r"F(\d+)"), 0)
    assert split.classes == ("healthy", "ulcer")
