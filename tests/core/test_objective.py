"""Noise, target and weighting against closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dfu_mlflow.config.schema import LossConfig
from dfu_mlflow.errors import UserError
from dfu_mlflow.objective import Objective, draw
from dfu_mlflow.types import Conditioning

SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}
TOLD = Conditioning(torch.zeros(4, 77, 8), torch.zeros(4, 8), torch.zeros(4, 6))


class Constant(nn.Module):
    """A network that answers one tensor whatever it is asked."""

    def __init__(self, answer: torch.Tensor) -> None:
        super().__init__()
        self.answer = nn.Parameter(answer)

    def forward(self, *_: Any, **__: Any) -> tuple[torch.Tensor]:
        return (self.answer,)


@pytest.fixture
def case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 4, 4, 8, 8, generator=source)
    return latents, noise, torch.tensor([0, 200, 600, 999])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_right_answer_costs_nothing_and_gives_back_the_clean_latents(
    kind: str, case: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> None:
    latents, noise, timesteps = case
    objective = Objective(SCHEDULE, LossConfig(prediction_type=kind))  # type: ignore[arg-type]
    alphas = objective.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    right = noise if kind == "epsilon" else alphas.sqrt() * noise - (1 - alphas).sqrt() * latents
    assert objective(Constant(right), latents, noise, timesteps, TOLD).total.max() < 1e-10
    noisy = alphas.sqrt() * latents + (1 - alphas).sqrt() * noise
    assert torch.allclose(objective.clean_latents(right, noisy, timesteps), latents, atol=2e-4)


def test_losses_are_per_sample_means(case: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    latents, noise, timesteps = case
    objective = Objective(SCHEDULE, LossConfig())
    loss = objective(Constant(torch.zeros_like(noise)), latents, noise, timesteps, TOLD).total
    assert torch.allclose(loss, noise.pow(2).mean(dim=(1, 2, 3)))


@pytest.mark.parametrize(("kind", "extra"), [("epsilon", 0.0), ("v_prediction", 1.0)])
def test_min_snr_weights_are_the_papers(kind: str, extra: float) -> None:
    objective = Objective(SCHEDULE, LossConfig(prediction_type=kind, min_snr_gamma=5.0))  # type: ignore[arg-type]
    timesteps = torch.arange(0, 1000, 37)
    alphas = objective.scheduler.alphas_cumprod[timesteps].double()
    snr = alphas / (1 - alphas)
    expected = torch.minimum(snr, torch.full_like(snr, 5.0)) / (snr + extra)
    assert torch.allclose(objective.weights(timesteps).double(), expected, rtol=1e-4)


def test_min_snr_is_finite_at_zero_terminal_snr() -> None:
    for kind in ("epsilon", "v_prediction"):
        config = LossConfig(prediction_type=kind, min_snr_gamma=5.0)  # type: ignore[arg-type]
        objective = Objective(SCHEDULE | {"rescale_betas_zero_snr": True}, config)
        assert torch.isfinite(objective.weights(torch.tensor([998, 999]))).all()


def test_validation_is_unweighted(case: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    latents, noise, timesteps = case
    objective = Objective(SCHEDULE, LossConfig(min_snr_gamma=1.0))
    network = Constant(torch.zeros_like(noise))
    assert torch.allclose(
        objective.unweighted(network, latents, noise, timesteps, TOLD), noise.pow(2).mean(dim=(1, 2, 3))
    )
    assert not torch.allclose(
        objective(network, latents, noise, timesteps, TOLD).total, noise.pow(2).mean(dim=(1, 2, 3))
    )


def test_draws_depend_on_the_sample_alone() -> None:
    config = LossConfig(noise_offset=0.1)
    together = draw(7, (3, 4, 5), (4, 8, 8), config, dropout=0.5)
    alone = draw(7, (4,), (4, 8, 8), config, dropout=0.5)
    for name in ("dropped", "timesteps", "posterior", "noise"):
        assert torch.equal(getattr(together, name)[1:2], getattr(alone, name))
    other = draw(8, (4,), (4, 8, 8), config, dropout=0.5)
    assert not torch.equal(alone.noise, other.noise)
    assert not torch.equal(together.noise[0], together.noise[1])


def test_draws_have_the_promised_distributions() -> None:
    draws = draw(0, tuple(range(4000)), (1, 2, 2), LossConfig(noise_offset=0.5), dropout=0.1)
    assert abs(float(draws.dropped.float().mean()) - 0.1) < 0.02
    assert abs(float(draws.timesteps.float().mean()) - 499.5) < 20
    assert draws.timesteps.min() >= 0
    assert draws.timesteps.max() <= 999
    # variance 1 + 0.5^2, and the offset is shared by a channel's pixels: covariance 0.25
    flat = draws.noise.flatten(1)
    covariance = torch.cov(flat.T)
    assert abs(float(covariance.diagonal().mean()) - 1.25) < 0.08
    assert abs(float(covariance[0, 1]) - 0.25) < 0.06


def test_a_base_of_unknown_prediction_type_is_refused() -> None:
    with pytest.raises(UserError, match="prediction_type"):
        Objective(SCHEDULE | {"prediction_type": "sample"}, LossConfig())
