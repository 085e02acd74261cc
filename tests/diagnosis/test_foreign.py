"""A fine-tune by plain diffusers code, with its trainer's own words for its settings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.training_utils import EMAModel
from safetensors.torch import save_file

from dfu_mlflow.diagnosis.case import Case
from dfu_mlflow.diagnosis.checks.class_ignored import ClassIgnored
from dfu_mlflow.diagnosis.checks.ema_lag import EmaLag
from dfu_mlflow.diagnosis.checks.patient_leakage import PatientLeakage
from dfu_mlflow.diagnosis.checks.prompt_prior import PromptPrior
from dfu_mlflow.diagnosis.checks.stale_cache import StaleCache
from dfu_mlflow.diagnosis.checks.text_mismatch import TextMismatch
from dfu_mlflow.diagnosis.diagnose import Diagnosis
from dfu_mlflow.diagnosis.finding import CannotRun, Finding, Healthy
from dfu_mlflow.diagnosis.foreign import read_foreign
from dfu_mlflow.diagnosis.lacking import Lacking
from dfu_mlflow.diagnosis.weights import find_weights
from dfu_mlflow.errors import UserError
from entrypoints.diagnose import main
from registry.diagnose import build_case, run_diagnosis
from registry.told import DiagnoseOptions, Told, tell_of_checkpoint

STEPS = 30
WORDS = {
    "pretrained_model_name_or_path": "base",
    "learning_rate": 3e-3,
    "lr_scheduler": "constant",
    "max_train_steps": STEPS,
    "resolution": 64,
    "train": {"train_batch_size": 4, "use_ema": True, "ema_decay": 0.999},
    "guidance_scale": 3.0,
    "my_own_setting": 1,
}


def fine_tune(base: Path, folder: Path) -> None:
    """What a plain script does; its fault: an average of decay 0.999 over 30 updates, which is what it samples from."""
    torch.manual_seed(0)
    pipe = StableDiffusionXLPipeline.from_pretrained(base)
    unet, scheduler = pipe.unet, pipe.scheduler
    embeddings, _, pooled, _ = pipe.encode_prompt("diabetic foot ulcer", do_classifier_free_guidance=False)
    average = EMAModel(unet.parameters(), decay=0.999, use_ema_warmup=False, min_decay=0.999)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=3e-3)
    time_ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).repeat(4, 1)
    latents = torch.randn(4, 4, 16, 16)
    for _ in range(STEPS):
        noise, steps = torch.randn_like(latents), torch.randint(0, 1000, (4,))
        prediction = unet(
            scheduler.add_noise(latents, noise, steps),
            steps,
            encoder_hidden_states=embeddings.detach().repeat(4, 1, 1),
            added_cond_kwargs={"text_embeds": pooled.detach().repeat(4, 1), "time_ids": time_ids},
        ).sample
        torch.nn.functional.mse_loss(prediction, noise).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.step(unet.parameters())
    unet.save_pretrained(folder / "unet")
    average.copy_to(unet.parameters())
    unet.save_pretrained(folder / "unet_ema")


@pytest.fixture(scope="module")
def foreign(random_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("foreign")
    fine_tune(random_base, folder)
    words = {**WORDS, "pretrained_model_name_or_path": str(random_base)}
    (folder / "args.json").write_text(json.dumps(words), encoding="utf-8")
    return folder


def examine(foreign: Path, flags: list[str], patch: pytest.MonkeyPatch, here: Path, config: bool = True) -> Diagnosis:
    patch.chdir(here)
    options = DiagnoseOptions(checkpoint=foreign)
    return run_diagnosis(options, str(foreign / "args.json") if config else None, flags)[0]


def test_the_lagging_average_is_found_without_photographs(
    foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No data: the checks that need photographs say so, the rest run."""
    diagnosis = examine(foreign, ["--data.root", str(tmp_path / "nowhere")], monkeypatch, tmp_path)
    assert diagnosis.findings[0].id == "ema_lag"
    assert diagnosis.findings[0].severity == "blocker"
    assert float(diagnosis.findings[0].evidence["coverage"].value) < 0.25
    assert [finding.id for finding in diagnosis.findings if finding.severity != "note"] == ["ema_lag"]
    for check in ("memorisation", "metric_input_broken", "text_mismatch"):
        assert "nowhere" in diagnosis.unable[check]
    assert "own split" in diagnosis.unable["patient_leakage"]
    assert "own cache" in diagnosis.unable["stale_cache"]
    assert "curves" in diagnosis.unable["noisy_validation"]
    assert "exit.reason" in diagnosis.unable["eval_oom"]


def test_photographs_and_base_that_nobody_named_are_not_replaced_by_defaults(
    foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A default would judge somebody's wounds by procedural pictures."""
    diagnosis = examine(foreign, [], monkeypatch, tmp_path)
    assert [finding.id for finding in diagnosis.findings if finding.severity != "note"] == ["ema_lag"]
    for check in ("memorisation", "patient_leakage", "metric_input_broken"):
        assert "no photographs were named (--data.root" in diagnosis.unable[check]
    nothing = examine(foreign, [], monkeypatch, tmp_path, config=False)
    assert nothing.findings == ()
    assert "the base was not named (--base_model)" in nothing.unable["text_mismatch"]


def test_a_resolution_that_nobody_stated_is_the_bases_own_or_lacking(
    foreign: Path, random_base: Path, tmp_path: Path
) -> None:
    options = DiagnoseOptions(checkpoint=foreign)
    silent = Told(None, {}, {}, {}, None, "no weights", {}, foreign=True)
    native = build_case(options, silent, {"base_model": str(random_base)})
    assert native.bench is not None
    assert native.bench.config.data.resolution_px == 4 * native.bench.base.config("unet")["sample_size"]
    assert "data.resolution_px" not in native.settings
    untold = shutil.copytree(random_base, tmp_path / "base")
    (untold / "vae" / "config.json").write_text("{}", encoding="utf-8")
    stated: dict[str, Any] = {"base_model": str(untold), "data": {"root": str(tmp_path)}}
    lacking = build_case(options, silent, stated).bench
    assert lacking is not None
    with pytest.raises(Lacking, match=r"give --data\.resolution_px"):
        assert lacking.material


def test_a_split_and_a_cache_made_for_the_diagnosis_are_not_found_sound(
    foreign: Path, random_base: Path, photographs: Path, tmp_path: Path
) -> None:
    """They are this project's, not what the run trained on."""
    silent = Told(None, {}, {}, {}, None, "no weights", {}, foreign=True)
    data: dict[str, Any] = {"root": str(photographs), "group_by": r"^P(\d+)", "cache_dir": str(tmp_path)}
    stated: dict[str, Any] = {"base_model": str(random_base), "data": data}
    case = build_case(DiagnoseOptions(checkpoint=foreign), silent, stated)
    for check, reason in ((StaleCache(), "cache of latents"), (PatientLeakage(), "own split is not known")):
        outcome = check.run(case)
        assert isinstance(outcome, CannotRun)
        assert reason in outcome.reason
    for check in (TextMismatch(), PromptPrior(), ClassIgnored()):
        outcome = check.run(case)
        assert isinstance(outcome, CannotRun)
        assert "captions are not known" in outcome.reason or "does not say the prompts" in outcome.reason
    stated["prompts"] = {"style": "minimal"}
    case = build_case(DiagnoseOptions(checkpoint=foreign), silent, stated)
    embeddings = TextMismatch().run(case)
    assert isinstance(embeddings, CannotRun)
    assert "--embeddings" in embeddings.reason
    pictures = ClassIgnored().run(case)
    assert isinstance(pictures, CannotRun)
    assert "how it is sampled is not known" in pictures.reason
    remade = {**stated, "seed": 3, "data": {**data, "validation_fraction": 0.3}}
    case = build_case(DiagnoseOptions(checkpoint=foreign), silent, remade)
    assert isinstance(PatientLeakage().run(case), Healthy)
    assert isinstance(StaleCache().run(case), CannotRun)


@pytest.mark.parametrize("warmup", [None, False])
def test_an_average_nobody_measured_is_accused_only_where_its_decay_does_not_warm_up(
    warmup: bool | None, foreign: Path
) -> None:
    """diffusers' average warms up with `use_ema_warmup` off as well: at decay 0.9999 it follows 2,000 updates."""
    settings = {"ema.decay": 0.9999, "train.total_steps": 2000}
    settings |= {} if warmup is None else {"ema.warmup": warmup}
    outcome = EmaLag().run(Case("elsewhere", settings))
    if warmup is None:
        assert isinstance(outcome, CannotRun)
        assert "--ema.warmup false" in outcome.reason
    else:
        assert isinstance(outcome, Finding)
        assert "by their decay 18.1 %" in outcome.explanation


def test_half_precision_files_and_the_schedulers_words_are_read(
    random_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = StableDiffusionXLPipeline.from_pretrained(random_base)
    pipe.save_pretrained(tmp_path / "tuned", variant="fp16")
    words = json.loads((tmp_path / "tuned" / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    assert find_weights(tmp_path / "tuned").live.name == "diffusion_pytorch_model.fp16.safetensors"
    for place in (tmp_path / "tuned", tmp_path / "tuned" / "unet"):
        words["prediction_type"] = "v_prediction"
        (tmp_path / "tuned" / "scheduler" / "scheduler_config.json").write_text(json.dumps(words), encoding="utf-8")
        told = tell_of_checkpoint(DiagnoseOptions(checkpoint=place), None)
        assert told.settings["loss.prediction_type"] == "v_prediction"
        case = build_case(DiagnoseOptions(checkpoint=place), told, {"base_model": str(random_base)})
        assert case.bench is not None
        assert case.bench.config.loss.prediction_type == "v_prediction"


def test_curves_tell_where_no_base_is_at_hand(foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    curves = {"ema/coverage": {1: 0.02, 2: 0.03}, "train/nonfinite_steps": {2: 0.0}, "model/displacement": {2: 0.05}}
    (tmp_path / "curves.json").write_text(json.dumps(curves), encoding="utf-8")
    options = DiagnoseOptions(checkpoint=foreign, curves=tmp_path / "curves.json")
    diagnosis = run_diagnosis(options, None, [])[0]
    assert diagnosis.findings[0].id == "ema_lag"
    assert not {"nonfinite", "weights_not_moving"} & set(diagnosis.unable)


def test_findings_and_report_are_written(
    foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--checkpoint", str(foreign), "--config", str(foreign / "args.json"), "--data.root", "nowhere"]
    assert main(flags) == 0
    said = capsys.readouterr().out
    assert "my_own_setting" in said
    assert "ema_lag" in said
    (folder,) = (tmp_path / "outputs" / "diagnose").glob(f"{foreign.name}-*")
    findings = json.loads((folder / "findings.json").read_text(encoding="utf-8"))
    assert findings[0]["id"] == "ema_lag"
    assert set(findings[0]) == {"id", "severity", "confidence", "evidence", "explanation", "fix"}
    assert "<h2>Diagnosis</h2>" in (folder / "report.html").read_text(encoding="utf-8")


def test_without_base_or_configuration_reasons_are_given(
    foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--base_model", "nobody/nothing", "--data.root", str(tmp_path / "nowhere")]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    diagnosis = examine(foreign, flags, monkeypatch, tmp_path, config=False)
    assert diagnosis.findings == ()
    assert "cannot be loaded" in diagnosis.unable["ema_lag"]


def test_weights_that_are_not_finite(
    foreign: Path, random_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = StableDiffusionXLPipeline.from_pretrained(random_base).unet
    weights = {name: weight.detach().clone() for name, weight in unet.named_parameters()}
    weights["conv_in.weight"][0] = torch.nan
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "args.json").write_text((foreign / "args.json").read_text(encoding="utf-8"), encoding="utf-8")
    diagnosis = examine(tmp_path, ["--data.root", "nowhere"], monkeypatch, tmp_path)
    assert diagnosis.findings[0].id == "nonfinite"
    assert diagnosis.findings[0].severity == "blocker"


def test_words_of_other_trainers_are_understood(tmp_path: Path) -> None:
    path = tmp_path / "kohya.yaml"
    path.write_text(
        "network_dim: 16\nnetwork_alpha: 8\nunet_lr: 1e-4\ncfg_scale: 7\nclip_skip: 2\nresolution: '1024'\n"
    )
    told = read_foreign(path)
    assert told.settings["adapter.method"] == "lora"
    assert told.settings["adapter.alpha"] == 8
    assert told.settings["data.resolution_px"] == 1024
    assert told.settings["train.learning_rate"] == 1e-4
    assert told.unknown == ("clip_skip",)


def test_kohyas_own_files_are_read_and_restarts_are_no_cosine(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('[training]\nnetwork_dim = 16\nunet_lr = 1e-4\nlr_scheduler = "cosine_with_restarts"\n')
    told = read_foreign(path)
    assert told.settings["adapter.rank"] == 16
    assert "train.lr_schedule" not in told.settings


@pytest.mark.parametrize(
    ("words", "samples", "noted"),
    [
        ("train_batch_size: '2'\nnum_processes: 4\n", 8, False),
        ("train_batch_size: 2\n", 2, True),
        ("train:\n  batch_size: 2\nnum_processes: 4\n", 2, False),
    ],
)
def test_a_batch_of_one_process_is_counted_for_all(words: str, samples: int, noted: bool, tmp_path: Path) -> None:
    path = tmp_path / "args.yaml"
    path.write_text(words, encoding="utf-8")
    told = read_foreign(path)
    assert told.settings["train.batch_size"] == samples
    assert bool(told.notes) is noted


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give one of --run ID"),
        (["--run", "no such thing"], "no such thing"),
        (["--checkpoint", "no such folder"], "no such folder"),
        (["--checkpoint", ".", "--budget", "free"], "budget"),
    ],
)
def test_bad_input_is_told(flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(flags)


def test_weights_of_another_kind_leave_what_the_configuration_says(foreign: Path, tmp_path: Path) -> None:
    """A pickle is not opened; the checks that need no weights run."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "pytorch_lora_weights.bin").touch()
    told = tell_of_checkpoint(DiagnoseOptions(checkpoint=other), str(foreign / "args.json"))
    assert told.settings["train.learning_rate"] == 3e-3
    with pytest.raises(UserError, match="holds no weights"):
        tell_of_checkpoint(DiagnoseOptions(checkpoint=other), None)
    deep = other / "checkpoint-500" / "unet"
    deep.mkdir(parents=True)
    (deep / "diffusion_pytorch_model.safetensors").touch()
    tell_of_checkpoint(DiagnoseOptions(checkpoint=other), None)
