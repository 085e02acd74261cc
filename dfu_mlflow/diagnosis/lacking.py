"""How a part that is not at hand is told."""

from __future__ import annotations


class Lacking(Exception):
    """A check needs something that is not at hand; the message says what and how to give it."""
