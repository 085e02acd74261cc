"""Vendi score: closed forms."""

import pytest
import torch

from dfu_mlflow.errors import UserError
from dfu_mlflow.metrics.vendi import vendi_score


def test_copies_count_once_and_unlike_pictures_each() -> None:
    assert vendi_score(torch.ones(20, 3)) == pytest.approx(1.0)
    assert vendi_score(torch.eye(12) * 5) == pytest.approx(12.0)
    assert vendi_score(torch.eye(3).repeat(10, 1)) == pytest.approx(3.0)


def test_unequal_groups_count_by_their_entropy() -> None:
    """30 of one kind and 10 of another: exp of the entropy of (3/4, 1/4)."""
    rows = torch.eye(2)[[0] * 30 + [1] * 10]
    shares = torch.tensor([0.75, 0.25], dtype=torch.float64)
    assert vendi_score(rows) == pytest.approx(float((-shares * shares.log()).sum().exp()))


def test_two_pictures_in_closed_form() -> None:
    """Eigenvalues of [[1, c], [c, 1]] / 2 are (1 ± c) / 2."""
    cosine = 0.6
    rows = torch.tensor([[1.0, 0.0], [cosine, 0.8]], dtype=torch.float64)
    shares = torch.tensor([(1 + cosine) / 2, (1 - cosine) / 2], dtype=torch.float64)
    assert vendi_score(rows) == pytest.approx(float((-shares * shares.log()).sum().exp()))


def test_more_pictures_score_higher() -> None:
    """Why only sets of one size are compared."""
    drawn = torch.randn(400, 64, generator=torch.Generator().manual_seed(0))
    assert vendi_score(drawn[:50]) < vendi_score(drawn) - 5


@pytest.mark.parametrize(
    ("rows", "message"), [(torch.full((3, 2), torch.nan), "not finite"), (torch.zeros(3, 2), "all zero")]
)
def test_refuses_broken_features(rows: torch.Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        vendi_score(rows)
