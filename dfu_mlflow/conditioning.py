"""Prompts -> what the UNet is told, in training exactly as in sampling.

Embeddings come from `StableDiffusionXLPipeline.encode_prompt` itself (penultimate layer of both encoders, pooled from
the second), each prompt encoded on its own, so parity with sampling holds by construction.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from dfu_mlflow.base.load import BaseModel
from dfu_mlflow.data.cache import RowCache, Work
from dfu_mlflow.phases import phase
from dfu_mlflow.runtime import move
from dfu_mlflow.types import Conditioning, Pipeline

TOKENS = 77
ENCODING = Work("encoding prompts", "prompts")
UNCONDITIONAL = None
"""In place of a text: what guidance compares with where no negative prompt is given."""
FED = "text_embeddings.safetensors"
"""What training told the network, in a run's folder."""


@dataclass(frozen=True)
class Conditioner:
    """The encoded prompts of all classes.

    Attributes:
        classes: K class labels; class ids index the rows below.
        prompts: K prompts.
        embeddings: [K, L, D].
        pooled: [K, P].
        empty_embeddings, empty_pooled: [1, L, D] and [1, P]: what sampling uses as unconditional when no negative
            prompt is given (zeros where the base forces zeros), and what a dropped caption trains.
        negative_embeddings, negative_pooled: what guidance pushes away from.
    """

    classes: tuple[str, ...]
    prompts: tuple[str, ...]
    embeddings: torch.Tensor
    pooled: torch.Tensor
    empty_embeddings: torch.Tensor
    empty_pooled: torch.Tensor
    negative_embeddings: torch.Tensor
    negative_pooled: torch.Tensor

    def training(self, class_ids: torch.Tensor, dropped: torch.Tensor, time_ids: torch.Tensor) -> Conditioning:
        """Conditioning of a micro-batch.

        Args:
            class_ids: int64 [B].
            dropped: bool [B], captions to replace by the unconditional.
            time_ids: float32 [B, 6].
        """
        device = self.embeddings.device
        class_ids, dropped = move(class_ids, device), move(dropped, device)
        embeddings = torch.where(dropped[:, None, None], self.empty_embeddings, self.embeddings[class_ids])
        pooled = torch.where(dropped[:, None], self.empty_pooled, self.pooled[class_ids])
        return Conditioning(embeddings, pooled, move(time_ids, device))

    def fed(self) -> dict[str, torch.Tensor]:
        """What training tells the network of each class and of a dropped caption, asked for as training asks.

        Returns:
            `embeddings` [K, L, D] and `pooled` [K, P], one row a class; `empty_embeddings` and `empty_pooled`, one row.
        """
        count = len(self.classes)
        ids, time_ids = torch.arange(count), torch.zeros(count, 6)
        kept, dropped = (self.training(ids, torch.full((count,), gone), time_ids) for gone in (False, True))
        rows = {"embeddings": kept.embeddings, "pooled": kept.pooled}
        rows |= {"empty_embeddings": dropped.embeddings[:1], "empty_pooled": dropped.pooled[:1]}
        return {name: value.float().cpu().contiguous() for name, value in rows.items()}

    def sampling(self, class_ids: torch.Tensor) -> dict[str, Any]:
        """Arguments for the pipeline's call. class_ids: int64 [B]."""
        count = len(class_ids)
        class_ids = class_ids.to(self.embeddings.device)
        return {
            "prompt_embeds": self.embeddings[class_ids],
            "pooled_prompt_embeds": self.pooled[class_ids],
            "negative_prompt_embeds": self.negative_embeddings.expand(count, -1, -1),
            "negative_pooled_prompt_embeds": self.negative_pooled.expand(count, -1),
        }

    def to(self, device: torch.device) -> Conditioner:
        """The same embeddings on another device."""
        tensors = (
            self.embeddings,
            self.pooled,
            self.empty_embeddings,
            self.empty_pooled,
            self.negative_embeddings,
            self.negative_pooled,
        )
        return Conditioner(self.classes, self.prompts, *(tensor.to(device) for tensor in tensors))


@dataclass(frozen=True)
class EmbeddingCache:
    """Where embeddings are kept.

    Attributes:
        rows: the cache.
        encoders: digests of both text encoders (`BaseModel.digest`).
    """

    rows: RowCache
    encoders: tuple[str, str]


def encode_prompts(
    model: BaseModel | Pipeline, prompts: Mapping[str, str], negative_prompt: str, cache: EmbeddingCache | None = None
) -> Conditioner:
    """Encode one prompt a class, the unconditional and the negative prompt.

    Args:
        model: a base, whose text encoders are loaded where the cache lacks a text and given up again, or a pipeline
            that holds them.
        prompts: class label -> prompt.
        negative_prompt: empty for none.
        cache: embeddings by text and encoder weights; None encodes anew.
    """
    texts = list(prompts.values())
    rows = _rows(model, [UNCONDITIONAL, *texts, *([negative_prompt] if negative_prompt else [])], cache)
    width = rows.shape[1] - _pooled_width(model)
    embeddings = rows[:, :width].reshape(len(rows), TOKENS, -1).clone()
    pooled = rows[:, width:].clone()
    negative = slice(-1, None) if negative_prompt else slice(1)
    prompted = slice(1, 1 + len(texts))
    return Conditioner(
        classes=tuple(prompts),
        prompts=tuple(texts),
        embeddings=embeddings[prompted],
        pooled=pooled[prompted],
        empty_embeddings=embeddings[:1],
        empty_pooled=pooled[:1],
        negative_embeddings=embeddings[negative],
        negative_pooled=pooled[negative],
    )


def prompt_length(pipe: Pipeline, prompts: Sequence[str]) -> int:
    """Tokens of the longest prompt by the base's first tokenizer, the two special ones included, before truncation."""
    return max(len(pipe.tokenizer(prompt).input_ids) for prompt in prompts)


def _rows(model: BaseModel | Pipeline, texts: Sequence[str | None], cache: EmbeddingCache | None) -> torch.Tensor:
    """[K, L * D + P]: embeddings and pooled side by side, one row a text or `UNCONDITIONAL`."""

    def compute(positions: list[int]) -> torch.Tensor:
        with _encoding(model) as pipe:
            return torch.stack([_encode(pipe, texts[position]) for position in positions])

    if cache is None:
        with phase(ENCODING.name, len(texts), ENCODING.unit):
            return compute(list(range(len(texts))))
    tokenizing = model.pipeline() if isinstance(model, BaseModel) else model
    keys = [_key(tokenizing, text) for text in texts]
    namespace = f"embeddings-{''.join(digest[:16] for digest in cache.encoders)}"
    return cache.rows.rows(namespace, keys, compute, len(keys), ENCODING)


def _encoding(model: BaseModel | Pipeline) -> AbstractContextManager[Pipeline]:
    """A pipeline with text encoders in it, inside a block."""
    return model.text_encoders() if isinstance(model, BaseModel) else nullcontext(model)


def _pooled_width(model: BaseModel | Pipeline) -> int:
    if isinstance(model, BaseModel):
        return model.pooled_width
    return int(model.text_encoder_2.config.projection_dim)


def _key(pipe: Pipeline, text: str | None) -> str:
    """The token ids say what the encoders see, whatever vocabulary made them; some bases put zeros for no prompt."""
    ids: list[Any] = [tokenizer(text or "").input_ids for tokenizer in (pipe.tokenizer, pipe.tokenizer_2)]
    if text is UNCONDITIONAL:
        ids.append(("unconditional", bool(pipe.config.force_zeros_for_empty_prompt)))
    return hashlib.sha256(repr(ids).encode()).hexdigest()


@torch.no_grad()
def _encode(pipe: Pipeline, text: str | None) -> torch.Tensor:
    if text is UNCONDITIONAL:
        _, embeddings, _, pooled = pipe.encode_prompt("", negative_prompt=None, do_classifier_free_guidance=True)
    else:
        embeddings, _, pooled, _ = pipe.encode_prompt(text, do_classifier_free_guidance=False)
    return torch.cat([embeddings[0].flatten(), pooled[0]]).float().cpu()
