"""Presets, files and flags -> one configuration; everything wrong is told at once, by flag."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from dfu_mlflow.config import RunConfig, dump_yaml, flatten, load, preset_names
from dfu_mlflow.config.load import parse_flags, without_password
from dfu_mlflow.config.prompts import MINIMAL, resolve_prompts, resolve_style
from dfu_mlflow.config.schema import PromptsConfig
from dfu_mlflow.errors import ConfigError, UserError


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def problems(config: str | None, *flags: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load(RunConfig, config, flags)
    return caught.value.problems


def test_presets_are_those_of_the_surface() -> None:
    shipped = {"tiny", "sdxl_lora", "sdxl_lora_12gb", "sdxl_full", "sdxl_full_24gb", "seed_before", "seed_after"}
    assert set(preset_names()) == shipped


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_loads_and_survives_a_round_trip(preset: str, tmp_path: Path) -> None:
    config = load(RunConfig, preset)
    assert load(RunConfig, write(tmp_path, "resolved.yaml", dump_yaml(config))) == config


def test_tiny_is_the_defaults() -> None:
    assert load(RunConfig, "tiny") == RunConfig() == load(RunConfig, None)


def test_the_founding_settings_differ_in_three_things_only() -> None:
    before, after = (flatten(load(RunConfig, name)) for name in ("seed_before", "seed_after"))
    changed = {key: (before[key], after[key]) for key in before if before[key] != after[key]}
    assert changed.pop("loss.perceptual_loss.network") == ("vgg16", "efficientnet_lite0")  # without effect when off
    assert changed == {
        "prompts.style": ("detailed", "minimal"),
        "loss.perceptual_loss.enabled": (True, False),
        "sampling.guidance_scale": (12.0, 3.0),
    }


def test_fragments_of_the_founding_analysis_load(tmp_path: Path) -> None:
    text = """
prompts:
  phase_prompts:
    I: "diabetic foot ulcer, inflammatory phase"
    P: >
      diabetic foot ulcer,
      proliferative phase
    R: "diabetic foot ulcer, remodeling phase"
loss:
  perceptual_loss:
    enabled: false  # VGG trained on ImageNet, not medical wounds
sampling:
  guidance_scale: 3.0
"""
    config = load(RunConfig, write(tmp_path, "fragment.yaml", text))
    assert resolve_style(config.prompts) == "custom"
    assert resolve_prompts(config.prompts, ("I", "P", "R")) == MINIMAL
    assert not config.loss.perceptual_loss.enabled


def test_defaults_then_presets_then_file_then_flags(tmp_path: Path) -> None:
    path = write(tmp_path, "mine.yaml", "extends: [sdxl_full, seed_after]\ntrain: {epochs: 7, batch_size: 2}\n")
    config = load(RunConfig, path, ["--train.batch_size", "3", "--seed=5"])
    assert config.train.epochs == 7
    assert config.train.batch_size == 3
    assert config.seed == 5
    assert config.adapter.method == "full"
    assert config.sampling.guidance_scale == 3.0
    assert config.train.gradient_accumulation_steps == 4
    assert config.train.beta1 == RunConfig().train.beta1


def test_extends_starts_at_the_file_it_stands_in(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    write(tmp_path / "shared", "base.yaml", "seed: 4")
    write(tmp_path / "shared", "middle.yaml", "extends: base.yaml")
    assert load(RunConfig, write(tmp_path, "mine.yaml", "extends: shared/middle.yaml")).seed == 4


def test_extending_oneself_is_told(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "extends: b.yaml")
    write(tmp_path, "b.yaml", "extends: a.yaml")
    with pytest.raises(UserError, match=r"extends itself: .*a.yaml -> .*b.yaml -> .*a.yaml"):
        load(RunConfig, str(tmp_path / "a.yaml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [("- 1\n- 2\n", "must hold sections"), ("a: [", "cannot be read"), ("a: b: c", "cannot be read")],
)
def test_files_that_are_no_configuration(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, "broken.yaml", text)
    with pytest.raises(UserError, match=message) as caught:
        load(RunConfig, path)
    assert "\n" not in str(caught.value)


def test_unknown_name_lists_the_presets() -> None:
    with pytest.raises(UserError, match=r"'tinny' is neither a preset .*tiny.* nor a file"):
        load(RunConfig, "tinny")


@pytest.mark.parametrize(
    ("flags", "tree"),
    [
        (["--a.b", "1"], {"a": {"b": "1"}}),
        (["--a.b=1=2"], {"a": {"b": "1=2"}}),
        (["--a", "--b", "x"], {"a": "true", "b": "x"}),
        (["--a", "-1.5"], {"a": "-1.5"}),
        (["--a", ""], {"a": ""}),
        (["--a", "null", "--b", "~"], {"a": None, "b": None}),
        (["--a", "[1, x]", "--b", "{I: x}"], {"a": [1, "x"], "b": {"I": "x"}}),
        (["--a", r"[A-Z]+_(\d+)"], {"a": r"[A-Z]+_(\d+)"}),
        (["--a.b", "1", "--a.c", "2"], {"a": {"b": "1", "c": "2"}}),
    ],
)
def test_flags(flags: list[str], tree: dict[str, object]) -> None:
    assert parse_flags(flags) == tree


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["train.epochs=1"], "is not a flag"),
        (["-P", "a=1"], "is not a flag"),
        (["--a", "1", "--a.b", "2"], "--a.b"),
        (["--a", "[1"], "not a YAML list"),
    ],
)
def test_what_is_no_flag(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_flags(flags)


def test_all_problems_are_told_at_once_by_flag() -> None:
    found = problems(
        None,
        *["--train.learningrate", "1", "--train.epochs", "many", "--sampling.guidance_scale", "-1"],
        *["--data.box_margin_min", "0.9", "--prompts.style", "custom"],
    )
    text = "\n".join(found)
    assert len(found) == 5, text
    assert "--train.learningrate: unknown (did you mean --train.learning_rate?)" in found
    assert "--train.epochs: " in text
    assert "got 'many'" in text
    assert "--sampling.guidance_scale: " in text
    assert "data.box_margin_min 0.9 is above data.box_margin_max 0.4" in text
    assert "prompts.style custom needs prompts.phase_prompts" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--loss.perceptual_loss.wieght", "1"], r"did you mean --loss\.perceptual_loss\.weight\?"),
        (["--learning_rate", "1"], r"did you mean --train\.learning_rate\?"),
        (["--zzz", "1"], r"^--zzz: unknown$"),
        (["--train", "5"], r"^--train: "),
        (["--train.learning_rate", "nan"], r"^--train\.learning_rate: .*finite"),
        (["--ema.decay", "1"], r"^--ema\.decay: .*less than 1"),
        (["--data.group_by", "column:who"], r"needs data\.manifest"),
        (["--evaluation.success", "{metric: kid}"], "exactly one of below and above"),
        (["--train.mixed_precision", "fp16", "--device", "cpu"], "needs a GPU"),
        (["--prompts.style", "minimal", "--prompts.phase_prompts.I", "x"], "exclude each other"),
    ],
)
def test_problem(flags: list[str], message: str) -> None:
    (problem,) = problems(None, *flags)
    assert re.search(message, problem), problem


def test_lists_are_given_with_commas_or_as_yaml() -> None:
    for text in ("U, V", "[U, V]"):
        assert load(RunConfig, None, ["--data.classes", text]).data.classes == ("U", "V")
    assert load(RunConfig, None, ["--data.classes", "U"]).data.classes == ("U",)
    assert load(RunConfig, None, ["--sampling.original_size_px", "48,64"]).sampling.original_size_px == (48, 64)


def test_class_labels_that_yaml_reads_as_numbers(tmp_path: Path) -> None:
    text = "data: {classes: [0, 1]}\nprompts: {phase_prompts: {0: none, 1: some}}"
    config = load(RunConfig, write(tmp_path, "numbers.yaml", text))
    assert config.data.classes == ("0", "1")
    assert resolve_prompts(config.prompts, config.data.classes) == {"0": "none", "1": "some"}


def test_prompts_are_replaced_whole(tmp_path: Path) -> None:
    path = write(tmp_path, "mine.yaml", "prompts: {phase_prompts: {I: one, P: two}}")
    config = load(RunConfig, path, ["--prompts.phase_prompts", "{U: ulcer}"])
    assert config.prompts.phase_prompts == {"U": "ulcer"}


def test_a_prompt_missing_for_a_class_names_it_and_its_flag() -> None:
    with pytest.raises(UserError, match=r"no prompt for class R .*--prompts\.phase_prompts\.R"):
        resolve_prompts(PromptsConfig(phase_prompts={"I": "a", "P": "b"}), ("I", "P", "R"))


def test_a_configuration_does_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().train.epochs = 9  # type: ignore[misc]


def test_dumped_yaml_is_plain() -> None:
    assert yaml.safe_load(dump_yaml(RunConfig()))["data"]["root"] == "phantom"


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("postgresql+psycopg://me:p@ss@host/db", "postgresql+psycopg://me:***@host/db"),
        ("postgresql://host/db?password=p%40ss&user=me", "postgresql://host/db?password=***&user=me"),
        ("sqlite:///optuna.db", "sqlite:///optuna.db"),
    ],
)
def test_passwords_are_neither_dumped_nor_flattened(address: str, shown: str) -> None:
    config = load(RunConfig, None, ["--tune.storage", address])
    assert config.tune.storage == address
    assert without_password(address) == shown == flatten(config)["tune.storage"]
    assert yaml.safe_load(dump_yaml(config))["tune"]["storage"] == shown
