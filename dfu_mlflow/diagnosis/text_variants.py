"""The usual wrong ways to encode a prompt for Stable Diffusion XL."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from dfu_mlflow.conditioning import TOKENS, Conditioner
from dfu_mlflow.types import Pipeline


@dataclass(frozen=True, eq=False)
class TextVariant:
    """One wrong encoding.

    Attributes:
        name: short.
        words: what was done, for a person.
        told: the prompts encoded so.
        unconditional: it concerns dropped captions only.
    """

    name: str
    words: str
    told: Conditioner
    unconditional: bool = False


@torch.no_grad()
def text_variants(pipe: Pipeline, right: Conditioner) -> tuple[TextVariant, ...]:
    """The three mistakes seen in trainers, made on purpose."""
    ids_1, ids_2 = (_ids(tokenizer, right.prompts, pipe) for tokenizer in (pipe.tokenizer, pipe.tokenizer_2))
    penultimate = _layers(pipe.text_encoder, ids_1)[-2]
    last = _layers(pipe.text_encoder, ids_1)[-1]
    second = _layers(pipe.text_encoder_2, ids_2)[-2]
    crossed = pipe.text_encoder_2(ids_1, output_hidden_states=True)
    empty, _, empty_pooled, _ = pipe.encode_prompt("", do_classifier_free_guidance=False)
    swapped = torch.cat([penultimate, crossed.hidden_states[-2]], dim=-1).float().cpu()
    variants = [
        TextVariant(
            "final_layer",
            "encoder 1's final layer stands where its penultimate one belongs",
            replace(right, embeddings=torch.cat([last, second], dim=-1).float().cpu()),
        ),
        TextVariant(
            "first_ids_into_second",
            "encoder 2 was fed encoder 1's token ids",
            replace(right, embeddings=swapped, pooled=crossed[0].float().cpu()),
        ),
        TextVariant(
            "encoded_empty",
            "dropped captions were encoded as an empty text where the pipeline uses zeros",
            replace(right, empty_embeddings=empty.float().cpu(), empty_pooled=empty_pooled.float().cpu()),
            unconditional=True,
        ),
    ]
    return tuple(variant for variant in variants if not _same(variant.told, right))


def _ids(tokenizer: Any, prompts: tuple[str, ...], pipe: Pipeline) -> torch.Tensor:
    told = tokenizer(list(prompts), padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    ids: torch.Tensor = told.input_ids.to(pipe.text_encoder.device)
    return ids


def _layers(encoder: Any, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    layers: tuple[torch.Tensor, ...] = encoder(ids, output_hidden_states=True).hidden_states
    return layers


def _same(one: Conditioner, other: Conditioner) -> bool:
    """Where both tokenizers agree, or a base encodes the empty text itself, a mistake changes nothing."""
    names = ("embeddings", "pooled", "empty_embeddings", "empty_pooled")
    return all(torch.allclose(getattr(one, name), getattr(other, name), atol=1e-4) for name in names)
