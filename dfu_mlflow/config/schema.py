"""The frozen configuration, one section a stage. Defaults live here and nowhere else.

The defaults are those of the embedded base (`tiny_sdxl`) on the embedded data (`phantom`); a preset states what is
different.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dfu_mlflow.config.gates import GatesConfig
from dfu_mlflow.config.measures import EvaluationConfig, MemorisationConfig, MetricsConfig, UtilityConfig
from dfu_mlflow.config.runtime import RuntimeConfig
from dfu_mlflow.config.section import Fraction, NotNegative, Positive, Section
from dfu_mlflow.config.tuning import TuneConfig


class PhantomConfig(Section):
    """The procedural stand-in for a clinic's photographs."""

    patients: Annotated[int, Field(ge=8)] = 160
    seed: int = 0


class DataConfig(Section):
    """Which photographs, who is on them, and how they are cut."""

    root: str | None = "phantom"
    """`phantom`, or a folder holding one sub-folder a class (`CLASS/*` or `MODALITY/CLASS/*`); None with a manifest."""
    manifest: Path | None = None
    """CSV: columns path, label, patient, optionally xmin, ymin, xmax, ymax; paths relative to `root` or the CSV."""
    bounding_boxes: Path | None = None
    """CSV with columns Filename, Xmin, Ymin, Xmax, Ymax; several rows an image are several pictures."""
    group_by: str | None = None
    """Who is the patient: a pattern with one group over the file name, `column:NAME` of the manifest, or `none`."""
    classes: tuple[str, ...] | None = None
    """Labels to use; None takes every class found."""
    resolution_px: Annotated[int, Field(ge=16, le=4096)] = 64
    box_margin_min: NotNegative = 0.1
    """Smallest margin around a bounding box, as a share of its longer side."""
    box_margin_max: NotNegative = 0.4
    crop: Literal["center", "random"] = "center"
    """Which square of a picture that is not square."""
    views_per_image: Positive = 1
    """Crops, flips and colour draws cached for each training picture."""
    horizontal_flip: bool = False
    vertical_flip: bool = False
    color_jitter: Annotated[float, Field(ge=0.0, le=0.5)] = 0.0
    """Largest relative change of brightness, contrast and saturation."""
    validation_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.25
    """Share of the patients held out."""
    class_balanced: bool = True
    """Every class is drawn equally often, however many images it has."""
    min_side_px: Positive = 32
    """Images with a shorter side are reported and left out."""
    max_bad_fraction: Fraction = 0.05
    """Above this share of unusable files the run refuses to start."""
    cache_dir: Path | None = None
    """Latents, embeddings and features; None is `$XDG_CACHE_HOME/dfu-mlflow`. Readable only by the user."""
    phantom: PhantomConfig = PhantomConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.box_margin_min > self.box_margin_max:
            raise ValueError(
                f"data.box_margin_min {self.box_margin_min} is above data.box_margin_max {self.box_margin_max}"
            )
        if self.group_by is not None and self.group_by.startswith("column:") and self.manifest is None:
            raise ValueError(f"data.group_by {self.group_by} needs data.manifest, which is not set")
        return self


class PromptsConfig(Section):
    """What the model is told about each class."""

    style: Literal["minimal", "detailed", "custom"] | None = None
    """None is `custom` where `phase_prompts` is given, else `minimal`."""
    phase_prompts: dict[str, str] | None = None
    """Class label -> prompt."""
    negative_prompt: str = ""
    """Used when sampling only; dropped captions always train the base's own unconditional."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Share of captions dropped in training."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.phase_prompts and self.style in ("minimal", "detailed"):
            raise ValueError(
                f"prompts.style {self.style} and prompts.phase_prompts exclude each other: set --prompts.style custom"
            )
        if self.style == "custom" and not self.phase_prompts:
            raise ValueError("prompts.style custom needs prompts.phase_prompts, a prompt for each class")
        return self


class AdapterConfig(Section):
    """Which weights learn."""

    method: Literal["lora", "full"] = "full"
    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0.0)] | None = None
    """LoRA scale numerator; None takes the rank, a scale of 1."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
    """Module name endings that get an adapter."""
    use_dora: bool = False
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which `lora` keeps the base's matrices; bf16 halves them and, computing in bf16, changes nothing."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.frozen_dtype == "bfloat16" and (self.method != "lora" or self.use_dora):
            raise ValueError(
                "adapter.frozen_dtype bfloat16 is for weights that no step reads in float32: it needs "
                "--adapter.method lora and --adapter.use_dora false"
            )
        return self


class TrainConfig(Section):
    """The optimisation."""

    epochs: Annotated[int, Field(ge=0)] = 2
    steps_per_epoch: Positive | None = 330
    """Optimizer steps an epoch; None is one pass over the training views."""
    batch_size: Positive = 16
    """Samples a forward pass, over all ranks together: 16 on 4 ranks is 4 on each, and learns the same as on one."""
    gradient_accumulation_steps: Positive = 1
    learning_rate: Annotated[float, Field(gt=0.0)] = 1e-3
    lr_schedule: Literal["constant", "cosine", "linear"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    """Optimizer steps."""
    optimizer: Literal["adamw", "adamw_8bit", "adafactor"] = "adamw"
    weight_decay: NotNegative = 0.01
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    max_grad_norm: Annotated[float, Field(gt=0.0)] | None = 1.0
    fused_backward: bool = False
    """Step each weight inside the backward pass and free its gradient at once: no memory for gradients."""
    gradient_checkpointing: bool = False
    compile: bool = False
    """`torch.compile` the training step's network: minutes at the start, faster steps; needs a C++ compiler."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    max_nonfinite_steps: Positive = 5
    """Steps in a row with a non-finite loss or gradient after which the run stops; each is skipped and counted."""
    early_stopping_patience: Positive | None = None
    """Evaluations without a better `evaluation.best_metric` after which training ends."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.fused_backward:
            return self
        if self.compile:
            raise ValueError(
                "train.compile hands over all gradients at once, after the backward pass, and train.fused_backward "
                "exists to hold none of them: use one of the two"
            )
        if self.gradient_accumulation_steps > 1:
            raise ValueError(
                "train.fused_backward steps at every backward pass and keeps no gradient to add to: it needs "
                f"--train.gradient_accumulation_steps 1, not {self.gradient_accumulation_steps}"
            )
        if self.max_grad_norm is not None:
            raise ValueError(
                "train.fused_backward steps the first weight before the last gradient is known, so the gradient cannot "
                f"be clipped by its norm: it needs --train.max_grad_norm null, not {self.max_grad_norm:g}"
            )
        if self.mixed_precision == "fp16":
            raise ValueError(
                "train.fused_backward cannot wait for fp16's loss scaler to look at all gradients: it needs "
                "--train.mixed_precision bf16 or no"
            )
        return self


class PerceptualLossConfig(Section):
    """Distance between deep features of the decoded prediction and of the photograph."""

    enabled: bool = False
    weight: Annotated[float, Field(gt=0.0)] = 0.01
    network: Literal["efficientnet_lite0", "vgg16"] = "efficientnet_lite0"
    weights: Path | None = None
    """VGG16's weights; None looks into torch's hub cache."""
    layer: Annotated[int, Field(ge=1, le=5)] = 3
    """Depth: features after this many resolutions are compared (1 is the shallowest)."""
    max_timestep: Annotated[int, Field(ge=1, le=1000)] = 250
    """Only predictions from timesteps below this are decoded: above it the predicted image is a blur."""


class LossConfig(Section):
    """The training objective."""

    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """None takes the base's own."""
    min_snr_gamma: Annotated[float, Field(gt=0.0)] | None = None
    """Hang et al. 2023; None leaves every timestep's weight at 1."""
    noise_offset: NotNegative = 0.0
    perceptual_loss: PerceptualLossConfig = PerceptualLossConfig()


class EmaConfig(Section):
    """Exponential moving average of the trained weights, in float32."""

    enabled: bool = True
    decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.99
    warmup: bool = True
    """Decay grows as (1 + n) / (10 + n): without it N updates cover only 1 - decay^N of the way."""
    on_host: bool = False
    """Keep the average in the computer's memory: 4 bytes a trained weight less on the GPU, a copy of them each step."""


class SamplingConfig(Section):
    """How pictures are drawn: in evaluation, by `sample` and by the server."""

    guidance_scale: NotNegative = 3.0
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] = 10
    scheduler: Literal["base", "ddim", "euler", "dpmpp_2m", "unipc"] = "dpmpp_2m"
    """`base` is the base's own."""
    guidance_rescale: Fraction = 0.0
    """Lin et al. 2024, section 3.4."""
    batch_size: Positive = 16
    """Pictures drawn at a time. The embedded base on a CPU is fastest with 16: 4 to 9 % below 8 and 32 a picture."""
    original_size_px: tuple[Positive, Positive] | None = None
    """(height, width) told to the model; None is the training set's median."""


class CheckpointConfig(Section):
    """What is kept on disk."""

    every_steps: Positive | None = None
    """Optimizer steps between checkpoints inside an epoch; each epoch's end writes one anyway."""
    keep_last: Positive = 2


class TrackingConfig(Section):
    """What MLflow is shown."""

    experiment: Annotated[str, Field(min_length=1)] = "dfu-mlflow"
    log_every_steps: Positive = 5
    log_real_images: bool = False
    """Real photographs are patients: never logged unless asked for here."""
    system_metrics: bool = True


class RegistryConfig(Section):
    """What becomes of the best checkpoint."""

    register_model: bool = True
    name: str = "dfu-sampler"
    alias: str = "challenger"
    promote: bool = False
    """Put the registered version through the gate (section `gates`) at once, as `promote` does."""

    @model_validator(mode="after")
    def _as_mlflow_allows(self) -> Self:
        if not self.name.strip() or self.name in (".", "..") or set(self.name) & set("/:"):
            raise ValueError(f"--registry.name {self.name!r}: a model's name is not empty and has no / and no :")
        reserved = re.fullmatch(r"latest|v\d+", self.alias, re.IGNORECASE)
        if reserved or not re.fullmatch(r"[\w\-]{1,255}", self.alias):
            raise ValueError(
                f"--registry.alias {self.alias!r}: letters, digits, _ and - make an alias, but not latest, v1, v2 ..."
            )
        return self


class RunConfig(Section):
    """Everything a run depends on."""

    base_model: str = "tiny_sdxl"
    """`tiny_sdxl`, a folder in diffusers layout, or a hub id."""
    seed: int = 0
    output_dir: Path = Path("outputs/train")
    resume: str = "none"
    """`none`, `latest`, `best`, or a checkpoint's folder."""
    device: str = "auto"
    data: DataConfig = DataConfig()
    prompts: PromptsConfig = PromptsConfig()
    adapter: AdapterConfig = AdapterConfig()
    train: TrainConfig = TrainConfig()
    loss: LossConfig = LossConfig()
    ema: EmaConfig = EmaConfig()
    sampling: SamplingConfig = SamplingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    metrics: MetricsConfig = MetricsConfig()
    memorisation: MemorisationConfig = MemorisationConfig()
    utility: UtilityConfig = UtilityConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    registry: RegistryConfig = RegistryConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    tune: TuneConfig = TuneConfig()
    gates: GatesConfig = GatesConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.train.mixed_precision == "fp16" and self.device == "cpu":
            raise ValueError("train.mixed_precision fp16 needs a GPU: use bf16 or no on device cpu")
        if self.adapter.frozen_dtype == "bfloat16" and self.train.mixed_precision != "bf16":
            raise ValueError(
                "adapter.frozen_dtype bfloat16 would round what is computed in another precision: it needs "
                f"--train.mixed_precision bf16, not {self.train.mixed_precision}"
            )
        return self
