"""Build the vocabulary of `tiny_sdxl`: a real `CLIPTokenizer` with byte-level BPE merges learnt from its own captions.

    python -m dfu_mlflow.base.pretraining.tokenizer --out runs/tokenizer

The special tokens stand at the end, as in OpenAI's vocabulary, so that `CLIPTextModel` pools at the highest id.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer

from dfu_mlflow.base.pretraining.world import draw_scene
from dfu_mlflow.config.prompts import DETAILED, MINIMAL

START, END = "<|startoftext|>", "<|endoftext|>"
# The pattern of CLIP's own pre-tokenizer.
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def learn_merges(captions: list[str], merges: int) -> list[tuple[str, str]]:
    """Byte-pair merges of a corpus, most frequent first."""
    tokenizer = Tokenizer(BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=10 * len(alphabet) + merges,
        min_frequency=2,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    learnt = json.loads(tokenizer.to_str())["model"]["merges"]
    return [(left, right) for left, right in learnt][:merges]


def build_tokenizer(captions: list[str], merges: int, folder: Path) -> CLIPTokenizer:
    """Write a tokenizer and load it again.

    Args:
        captions: the corpus.
        merges: at most this many; fewer when the corpus runs out of pairs.
        folder: made when missing.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learnt = learn_merges(captions, merges)
    symbols = [*alphabet, *(symbol + "</w>" for symbol in alphabet), *("".join(pair) for pair in learnt), START, END]
    vocabulary = {symbol: index for index, symbol in enumerate(dict.fromkeys(symbols))}
    folder.mkdir(parents=True, exist_ok=True)
    pairs: Any = learnt  # transformers takes pairs, though its annotation says strings
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=77)
    tokenizer.save_pretrained(folder)
    loaded: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder)
    return loaded


def draw_corpus(count: int, seed: int) -> list[str]:
    """World captions and the project's own class prompts, which the world's phrases are made of."""
    rng = np.random.default_rng([seed, 21])
    captions = [draw_scene(rng, 16)[1] for _ in range(count)]
    return captions + 3 * [*MINIMAL.values(), *DETAILED.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--merges", type=int, default=370)
    parser.add_argument("--captions", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    tokenizer = build_tokenizer(draw_corpus(given.captions, given.seed), given.merges, given.out)
    for prompt in [*MINIMAL.values(), *DETAILED.values()]:
        print(len(tokenizer(prompt).input_ids), " ".join(tokenizer.tokenize(prompt)))
    print(f"{len(tokenizer)} symbols")


if __name__ == "__main__":
    main()
