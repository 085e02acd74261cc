"""Training is told exactly what sampling is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dfu_mlflow.base.autoencoder import VaeEncoder
from dfu_mlflow.base.load import BaseModel, load_base
from dfu_mlflow.conditioning import Conditioner, EmbeddingCache, encode_prompts, prompt_length
from dfu_mlflow.config.prompts import DETAILED, MINIMAL, resolve_prompts
from dfu_mlflow.config.schema import DataConfig, PromptsConfig
from dfu_mlflow.data import RowCache
from dfu_mlflow.data.dataset import encode_evaluation_latents
from dfu_mlflow.data.load import load_split
from dfu_mlflow.errors import UserError
from dfu_mlflow.types import Conditioning


@pytest.fixture(scope="module")
def pipe(random_base: Path) -> Any:
    return load_base(str(random_base))


@pytest.mark.parametrize("prompts", [dict(MINIMAL), dict(DETAILED)])
def test_embeddings_equal_the_pipelines_bit_for_bit(
    pipe: Any, random_base: Path, prompts: dict[str, str], tmp_path: Path
) -> None:
    cache = EmbeddingCache(RowCache(tmp_path), ("one", "two"))
    for conditioner in (
        encode_prompts(pipe, prompts, ""),
        encode_prompts(BaseModel(str(random_base)), prompts, ""),
        encode_prompts(pipe, prompts, "", cache),
        encode_prompts(pipe, prompts, "", cache),  # from the cache
    ):
        for row, prompt in enumerate(prompts.values()):
            embeds, empty, pooled, empty_pooled = pipe.encode_prompt(prompt, negative_prompt=None)
            assert torch.equal(conditioner.embeddings[row], embeds[0])
            assert torch.equal(conditioner.pooled[row], pooled[0])
            assert torch.equal(conditioner.empty_embeddings, empty)
            assert torch.equal(conditioner.empty_pooled, empty_pooled)


def test_a_warm_cache_asks_no_text_encoder(random_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = load_base(str(random_base))
    cache = EmbeddingCache(RowCache(tmp_path), ("one", "two"))
    cold = {}
    for zeros in (True, False):
        pipe.register_to_config(force_zeros_for_empty_prompt=zeros)
        cold[zeros] = encode_prompts(pipe, dict(MINIMAL), "", cache)
    assert not cold[True].empty_embeddings.any()
    assert cold[False].empty_embeddings.any()
    monkeypatch.setattr(type(pipe), "encode_prompt", None)
    for zeros, known in cold.items():
        pipe.register_to_config(force_zeros_for_empty_prompt=zeros)
        warm = encode_prompts(pipe, dict(MINIMAL), "", cache)
        assert torch.equal(warm.empty_embeddings, known.empty_embeddings)
        assert torch.equal(warm.negative_pooled, known.negative_pooled)
        assert torch.equal(warm.embeddings, known.embeddings)


def test_embeddings_are_the_penultimate_layers_of_both_encoders(pipe: Any) -> None:
    prompt = MINIMAL["P"]
    conditioner = encode_prompts(pipe, {"P": prompt}, "")
    layers = []
    for tokenizer, encoder in ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)):
        ids = tokenizer(prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        with torch.no_grad():
            output = encoder(ids, output_hidden_states=True)
        layers.append(output.hidden_states[-2][0])
    assert torch.equal(conditioner.embeddings[0], torch.cat(layers, dim=-1))
    assert torch.equal(conditioner.pooled[0], output.text_embeds[0])


def test_dropped_captions_train_what_sampling_calls_unconditional(pipe: Any) -> None:
    conditioner = encode_prompts(pipe, dict(MINIMAL), "")
    told = conditioner.training(torch.tensor([0, 1, 2]), torch.tensor([False, True, False]), torch.zeros(3, 6))
    sampled = conditioner.sampling(torch.tensor([1]))
    assert torch.equal(told.embeddings[1], sampled["negative_prompt_embeds"][0])
    assert torch.equal(told.pooled[1], sampled["negative_pooled_prompt_embeds"][0])
    assert torch.count_nonzero(told.embeddings[1]) == 0, "this base forces zeros for an empty prompt"
    assert torch.equal(told.embeddings[1:2], sampled["negative_prompt_embeds"])
    assert torch.equal(told.embeddings[2], conditioner.sampling(torch.tensor([2]))["prompt_embeds"][0])


def test_what_training_is_told_is_recorded(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    conditioner = encode_prompts(pipe, dict(MINIMAL), "")
    fed = conditioner.fed()
    assert torch.equal(fed["embeddings"], conditioner.embeddings)
    assert torch.equal(fed["empty_pooled"], conditioner.empty_pooled)
    sound = Conditioner.training

    def doubled(self: Conditioner, *told: torch.Tensor) -> Conditioning:
        right = sound(self, *told)
        return replace(right, embeddings=2 * right.embeddings)

    monkeypatch.setattr(Conditioner, "training", doubled)
    assert torch.equal(conditioner.fed()["embeddings"], 2 * conditioner.embeddings)


def test_a_base_that_does_not_force_zeros_drops_to_the_encoded_empty_prompt(pipe: Any) -> None:
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    try:
        conditioner = encode_prompts(pipe, dict(MINIMAL), "")
        _, empty, _, empty_pooled = pipe.encode_prompt("anything", negative_prompt=None)
    finally:
        pipe.register_to_config(force_zeros_for_empty_prompt=True)
    assert torch.equal(conditioner.empty_embeddings, empty)
    assert torch.equal(conditioner.empty_pooled, empty_pooled)
    assert torch.count_nonzero(empty) > 0


def test_a_negative_prompt_is_for_sampling_only(pipe: Any) -> None:
    conditioner = encode_prompts(pipe, dict(MINIMAL), "cartoon")
    _, negative, _, negative_pooled = pipe.encode_prompt(MINIMAL["I"], negative_prompt="cartoon")
    assert torch.equal(conditioner.negative_embeddings, negative)
    assert torch.equal(conditioner.negative_pooled, negative_pooled)
    assert torch.count_nonzero(conditioner.empty_embeddings) == 0


def test_time_ids_equal_the_pipelines(pipe: Any, photographs: Path, tmp_path: Path) -> None:
    config = DataConfig(root=str(photographs), group_by=r"^P(\d+)", cache_dir=tmp_path)
    split, _ = load_split(config, seed=0)
    latents = encode_evaluation_latents(split.held_out, config, RowCache(tmp_path), VaeEncoder(pipe.vae, "digest"))
    height, width, top, left, *target = (int(value) for value in latents.time_ids[0].tolist())
    expected = pipe._get_add_time_ids((height, width), (top, left), tuple(target), torch.float32, 24)
    assert torch.equal(latents.time_ids[:1], expected)
    assert (height, width, top, left, *target) == (64, 64, 0, 0, 64, 64)


def test_prompt_length_counts_special_tokens_and_no_truncation(pipe: Any) -> None:
    assert prompt_length(pipe, [""]) == 2
    assert prompt_length(pipe, list(MINIMAL.values())) < prompt_length(pipe, list(DETAILED.values()))
    assert prompt_length(pipe, ["wound " * 200]) == 202


def test_every_class_needs_a_prompt_unless_the_style_is_minimal() -> None:
    assert resolve_prompts(PromptsConfig(), ["I", "U"]) == {"I": MINIMAL["I"], "U": "diabetic foot ulcer, U"}
    with pytest.raises(UserError, match=r"no prompt for class U .*--prompts\.phase_prompts\.U"):
        resolve_prompts(PromptsConfig(style="detailed"), ["I", "U"])
    with pytest.raises(UserError, match="no prompt for class R"):
        resolve_prompts(PromptsConfig(phase_prompts={"I": "a", "P": "b"}), ["I", "P", "R"])
