"""What can be said about a prompt before anything is measured: its length, and words that name a look of its own."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

LIMIT = 77
"""CLIP's context, the two special tokens included: what stands behind it is cut off without a word."""
LONG = 40
"""Tokens from which a caption describes more than it names; the founding run's short captions had about 12, its long
ones 68."""
STYLE_WORDS = """
    stock photo photograph photography photorealistic professional medical documentation illustration
    high resolution sharp focus detailed close-up macro studio lighting clinical cinematic 4k 8k hd
    masterpiece quality textbook
"""
"""Words under which a base that learned from the web knows a look: they pull towards it and away from the clinic's."""


@dataclass(frozen=True)
class Lint:
    """One prompt.

    Attributes:
        tokens: by the base's first tokenizer, special ones included, before truncation.
        cut_off: tokens lost to the encoder's limit.
        style_words: words that name a look, in order, each once.
    """

    tokens: int
    cut_off: int
    style_words: tuple[str, ...]


def lint(prompt: str, tokenizer: Any) -> Lint:
    """Count tokens and find style words."""
    tokens = len(tokenizer(prompt, truncation=False, verbose=False).input_ids)
    words = dict.fromkeys(re.findall(r"[a-z0-9-]+", prompt.lower()))
    return Lint(tokens, max(0, tokens - LIMIT), tuple(word for word in words if word in STYLE_WORDS.split()))
