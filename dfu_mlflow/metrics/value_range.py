"""Are these pictures in the value range that photographs are in? The classic way to a wrong FID is that they are not.

uint8 alone proves nothing: floats multiplied by 255 twice wrap round, -1 to 1 cast to bytes wraps its dark half, 0 to 1
cast to bytes is black, and 255 - x is a negative. Each has a sign of its own, judged against the photographs:

    not scaled        no value above `DARK` of 255 in nearly all pictures
    wrapped           neighbouring pixels jump by more than `JUMP` of 255 far more often than in photographs
    inverted          the colours overlap little with the photographs', those of the negative overlap well
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dfu_mlflow.errors import UserError
from dfu_mlflow.metrics.extractors.pixels import JUMP

DARK = 3.0
MOST = 0.9
"""Share of pictures that must show the first sign."""
JUMP_FACTOR, JUMP_FLOOR = 3.0, 0.3
"""Wrapped: jumps a line are above both a multiple of the photographs' 95th percentile and this number.

Measured at 64 px: 1.5 to 3.2 a line in wrapped pictures, at most 0.03 in photographs.
"""
OVERLAP_FACTOR, OVERLAP_FLOOR = 2.0, 0.25
"""Inverted: the negative's colours overlap at least this much, and this many times as much as the colours do.

Measured: inverted photographs 2.3 to 7.5 times; the worst of 3,000 sets of 12 to 100 sound ones 0.54 times: no false
alarm.
"""


@dataclass(frozen=True)
class RangeSigns:
    """What a set of pictures shows.

    Attributes:
        dark_share: pictures whose highest value is at most `DARK`.
        jumps: how often neighbours in a line of pixels differ by more than `JUMP` of 255, on average.
        usual_jumps: 95th percentile of the same among photographs.
        overlap: of the colour histograms of pictures and photographs, 0 to 1.
        inverted_overlap: the same for the pictures' negatives.
    """

    dark_share: float
    jumps: float
    usual_jumps: float
    overlap: float
    inverted_overlap: float

    @property
    def problem(self) -> str | None:
        """What is wrong with the pictures, or None."""
        if self.dark_share > MOST:
            return f"{self.dark_share:.0%} of them hold no value above {DARK:.0f} of 255: 0 to 1 was not scaled"
        if self.jumps > max(JUMP_FACTOR * self.usual_jumps, JUMP_FLOOR):
            return (
                f"a line of pixels jumps {self.jumps:.1f} times by more than {JUMP:.0f} of 255, in photographs"
                f" {self.usual_jumps:.2f} times: values look wrapped round (scaled to 255 twice, or -1 to 1 cast to"
                " bytes)"
            )
        if self.inverted_overlap > max(OVERLAP_FACTOR * self.overlap, OVERLAP_FLOOR):
            return (
                f"their colours overlap with the photographs' by {self.overlap:.0%}, their negatives' by"
                f" {self.inverted_overlap:.0%}: values look inverted"
            )
        return None


def range_signs(pictures: torch.Tensor, photographs: torch.Tensor) -> RangeSigns:
    """Measure the signs on features [M, 514] and [N, 514] of the extractor `value_signs`, M and N at least 1."""
    colours, wanted = pictures[:, 2:].mean(0), photographs[:, 2:].mean(0)
    return RangeSigns(
        dark_share=float((pictures[:, 1] * 255 <= DARK).double().mean()),
        jumps=float(pictures[:, 0].mean()),
        usual_jumps=float(photographs[:, 0].quantile(0.95)),
        overlap=float(torch.minimum(colours, wanted).sum()),
        inverted_overlap=float(torch.minimum(colours.flip(0), wanted).sum()),
    )


def require_photographic(
    pictures: torch.Tensor, photographs: torch.Tensor, name: str = "the generated pictures"
) -> None:
    """Refuse pictures whose values are wrapped, inverted or not scaled.

    Args:
        pictures, photographs: features of the extractor `value_signs`.
        name: what the message calls the pictures.

    Raises:
        UserError: naming the sign and what photographs show.
    """
    problem = range_signs(pictures, photographs).problem
    if problem is not None:
        raise UserError(
            f"{name} are not in the value range 0 to 255 of photographs: {problem}; mend the export, or evaluate with"
            " --metrics.check_value_range false"
        )
