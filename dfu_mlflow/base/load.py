"""Any Stable Diffusion XL base: the embedded one, a folder in diffusers layout, or a hub id; one network at a time."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from safetensors import SafetensorError
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from dfu_mlflow.base.half_on_cpu import speed_up_half
from dfu_mlflow.base.weight_files import FileDigests, read_tensors_in_turn, weight_files
from dfu_mlflow.errors import UserError
from dfu_mlflow.phases import phase
from dfu_mlflow.runtime import release_memory, state_digest
from dfu_mlflow.types import Pipeline

EMBEDDED = {"tiny_sdxl": Path(__file__).resolve().parent / "weights" / "tiny_sdxl"}
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


def resolve_base(base_model: str) -> str:
    """The folder of an embedded base; folders and hub ids as they are.

    Raises:
        UserError: for a folder that is not a Stable Diffusion XL pipeline.
    """
    folder = EMBEDDED.get(base_model, Path(base_model))
    if not folder.is_dir():
        if base_model.count("/") != 1 or base_model.startswith(("/", ".", "~")):
            raise UserError(
                f"--base_model {base_model}: no such folder; give {', '.join(EMBEDDED)}, a folder in diffusers layout "
                "(model_index.json, unet/, vae/, ...) or a hub id such as stabilityai/stable-diffusion-xl-base-1.0"
            )
        return base_model
    _check_layout(folder)
    return str(folder)


class BaseModel:
    """A base on disk, whose networks are loaded when they are asked for, each in the precision it is used in.

    Args:
        base_model: `tiny_sdxl`, a folder, or a hub id, which is fetched unless the hub's cache holds it.
        digests: of weight files; None remembers them in this object alone.

    Raises:
        UserError: for a base that is missing, unreachable or not Stable Diffusion XL.
    """

    def __init__(self, base_model: str, digests: FileDigests | None = None) -> None:
        self.name = base_model
        self.digests = digests or FileDigests(None)
        source = resolve_base(base_model)
        with self._explained():
            self.folder = Path(source) if Path(source).is_dir() else _fetch(source)
        _check_layout(self.folder)

    def config(self, part: str) -> dict[str, Any]:
        """`config.json` of a network."""
        return dict(json.loads((self.folder / part / "config.json").read_text(encoding="utf-8")))

    def digest(self, part: str) -> str:
        """SHA-256 of a network's weight files: what caches and bundles know it by."""
        with self._explained():
            return self.digests.of(weight_files(self.folder / part))

    def tensor_digest(self, part: str) -> str:
        """SHA-256 over names and float32 values of a network's weights: what earlier versions knew a base by."""
        if part in TEXT_ENCODERS:
            with self.text_encoders() as pipe:
                return state_digest(dict(getattr(pipe, part).state_dict()))
        return state_digest(dict((self.vae() if part == "vae" else self.unet()).state_dict()))

    @cached_property
    def image_factor(self) -> int:
        """Pixels an edge of one latent cell: resolutions must be multiples of it times the UNet's own downscaling."""
        return int(2 ** (len(self.config("vae")["block_out_channels"]) - 1))

    @cached_property
    def pooled_width(self) -> int:
        """Length of a prompt's pooled embedding."""
        return int(self.config("text_encoder_2")["projection_dim"])

    def pipeline(self) -> Pipeline:
        """The pipeline without networks: tokenizers, scheduler and settings."""
        with self._explained(), _without_progress_bars():
            pipe = StableDiffusionXLPipeline.from_pretrained(self.folder, add_watermarker=False, **dict.fromkeys(PARTS))
        pipe.set_progress_bar_config(disable=True)
        # what its constructor reads of the networks
        pipe.vae_scale_factor = self.image_factor
        pipe.image_processor = VaeImageProcessor(vae_scale_factor=self.image_factor)
        pipe.default_sample_size = self.config("unet").get("sample_size", pipe.default_sample_size)
        return pipe

    @contextmanager
    def text_encoders(self) -> Iterator[Pipeline]:
        """A pipeline that encodes prompts, in float32 on the CPU; its encoders are given up after the block."""
        pipe = self.pipeline()
        with phase("loading the text encoders"), self._explained(), _without_progress_bars():
            kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
            encoders = {
                part: kind.from_pretrained(self.folder / part, dtype=torch.float32, use_safetensors=True)
                for part, kind in kinds.items()
            }
        pipe.register_modules(**{part: encoder.requires_grad_(False).eval() for part, encoder in encoders.items()})
        del encoders
        try:
            yield pipe
        finally:
            pipe.register_modules(**dict.fromkeys(TEXT_ENCODERS))
            release_memory()

    def vae(self) -> Any:
        """The autoencoder in float32: Stable Diffusion XL's own overflows in half precision."""
        with phase("loading the autoencoder"), self._explained(), _without_progress_bars():
            vae = AutoencoderKL.from_pretrained(self.folder / "vae", torch_dtype=torch.float32, use_safetensors=True)
        return vae.requires_grad_(False).eval()

    def unet(
        self,
        matrices: torch.dtype = torch.float32,
        device: torch.device | None = None,
        weights: Sequence[Path] = (),
    ) -> Any:
        """The UNet, nothing trainable.

        Args:
            matrices: precision of the weights of its linear layers; the rest is float32, see `store_frozen`.
            device: where it is put, tensor by tensor; None is the CPU.
            weights: safetensors files by parameter names to read in place of the base's own.

        Raises:
            UserError: for files that do not fit the architecture.
        """
        place, folder = device or torch.device("cpu"), self.folder / "unet"
        with _refused(f"{weights[0]} does not hold this model's weights") if weights else self._explained():
            files = weights or weight_files(folder)
            with init_empty_weights(include_buffers=False):
                unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder))
            _fill(unet, files, matrices, place)
        unet.register_to_config(_name_or_path=str(folder))
        speed_up_half(unet, place)
        return unet.to(place).requires_grad_(False).eval()

    def _explained(self) -> AbstractContextManager[None]:
        closed = "; on a closed network give a folder in diffusers layout with safetensors weights"
        return _refused(f"--base_model {self.name} cannot be loaded", closed)


def load_base(base_model: str) -> Pipeline:
    """The whole pipeline in float32 on the CPU, nothing trainable: for small bases and for comparisons.

    Raises:
        UserError: for a base that is missing, unreachable or not Stable Diffusion XL.
    """
    base = BaseModel(base_model)
    pipe = base.pipeline()
    with base.text_encoders() as encoding:
        encoders = {part: getattr(encoding, part) for part in TEXT_ENCODERS}
    pipe.register_modules(vae=base.vae(), unet=base.unet(), **encoders)
    return pipe


def with_networks(pipe: Pipeline, **networks: Any) -> Pipeline:
    """Another pipeline of the same tokenizers and scheduler, with these networks in place of its own."""
    other = copy.copy(pipe)
    other.register_modules(**networks)
    return other


def check_resolution(base: BaseModel, resolution_px: int) -> None:
    """Refuse a resolution that the autoencoder and the UNet cannot halve down evenly.

    Raises:
        UserError: naming the nearest resolutions that work.
    """
    factor = base.image_factor
    step = factor * 2 ** (len(base.config("unet")["block_out_channels"]) - 1)
    if resolution_px % step:
        low = resolution_px // step * step
        choices = f"{low} or {low + step}" if low else str(step)
        raise UserError(
            f"--data.resolution_px {resolution_px} is not divisible by {step} (autoencoder {factor}x, UNet "
            f"{step // factor}x): use {choices}"
        )


def _fetch(hub_id: str) -> Path:
    with phase(f"fetching {hub_id}"), _without_progress_bars():
        return Path(StableDiffusionXLPipeline.download(hub_id, use_safetensors=True))


def _fill(unet: nn.Module, files: Sequence[Path], matrices: torch.dtype, place: torch.device) -> None:
    """Put the tensors of weight files into a network of shapes alone, each at once in its own precision and place."""
    owners = {
        f"{path}.{name}": (module, name) for path, module in unet.named_modules() for name in dict(module._parameters)
    }
    total = sum(weight.numel() for weight in unet.parameters())
    missing = {name for name, _ in unet.named_parameters()}
    with phase("loading the UNet", total // 10**6, "million weights") as progress:
        for name, tensor in (each for file in files for each in read_tensors_in_turn(file)):
            if name not in missing:
                continue  # a file may hold more than the network takes
            module, own = owners[name]
            if tensor.shape != module._parameters[own].shape:
                raise ValueError(f"{name} is {tuple(tensor.shape)} in the file and another shape in config.json")
            dtype = matrices if own == "weight" and isinstance(module, nn.Linear) else torch.float32
            setattr(module, own, nn.Parameter(tensor.to(place, dtype, copy=True), requires_grad=False))
            missing.discard(name)
            progress.advance(round(tensor.numel() / 1e6))
    if missing:
        raise ValueError(f"{len(missing)} of its UNet's tensors are missing, such as {min(missing)}")


@contextmanager
def _refused(what: str, advice: str = "") -> Iterator[None]:
    """What the libraries say of files inside the block, in words for the user."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{what} ({reason}){advice}") from None


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """The libraries' own bars bury the messages that matter."""
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    shown = [library.is_progress_bar_enabled() for library in libraries]
    for library in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, was_shown in zip(libraries, shown, strict=True):
            if was_shown:
                library.enable_progress_bar()


def _check_layout(folder: Path) -> None:
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(f"--base_model {folder} is no diffusers pipeline: it has no model_index.json")
    try:
        parts = json.loads(index.read_text(encoding="utf-8"))
        unet = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--base_model {folder} cannot be read: {error}") from None
    missing = [part for part in PARTS if not parts.get(part, [None])[0]]
    if missing or unet.get("addition_embed_type") != "text_time":
        lack = f"it has no {', '.join(missing)}" if missing else "its UNet takes no text_time conditioning"
        raise UserError(f"--base_model {folder} is a {parts.get('_class_name')}, not Stable Diffusion XL: {lack}")
