"""Tokenizers and text encoders of the embedded models: true CLIP and T5 classes, small, over the grammar's words.

The encoders are trained first, alone, to name the triple that a caption says, and then frozen: the denoisers meet a
text signal that is clean from their first step.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from models.embedded.recipe.grammar import PLACES, TIMES, TRIPLES, WEATHERS, WORDS, caption, labels
from models.embedded.recipe.training import DEVICE, averaged, train

WIDTH = 96
CLIP_LENGTH = 77
T5_LENGTH = 24


def clip_tokenizer() -> CLIPTokenizer:
    """Byte-level BPE whose merges make every word of the grammar one token; any other text falls into bytes."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=100_000, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator([word for word in sorted(WORDS) for _ in range(2)], trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *dict.fromkeys("".join(pair) for pair in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=CLIP_LENGTH
    )


def t5_tokenizer() -> T5Tokenizer:
    """Unigram with one piece a word (as written and capitalised) and one a character."""
    letters = [chr(c) for c in range(33, 127)]
    words = [f"▁{form}" for word in sorted(WORDS) for form in (word, word.capitalize()) if len(word) > 1]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -9.0)]
    vocab += [(word, -4.0) for word in words] + [(letter, -9.0) for letter in letters]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=T5_LENGTH)


def clip_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config).to(DEVICE)


def t5_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer), d_model=WIDTH, d_kv=24, num_heads=4, d_ff=3 * WIDTH, num_layers=2,
        feed_forward_proj="gated-gelu", dropout_rate=0.0, pad_token_id=0, eos_token_id=1, is_encoder_decoder=False,
        use_cache=False, tie_word_embeddings=True,
    )  # fmt: skip
    return T5EncoderModel(config).to(DEVICE)


def tokens(tokenizer: CLIPTokenizer | T5Tokenizer, captions: list[str]) -> Tensor:
    """(n, length) padded ids, as the diffusers pipelines ask for them."""
    return tokenizer(
        captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids.to(DEVICE)


class Reader(nn.Module):
    """A text encoder and the heads that it is trained through: the pooled state of CLIP, the mean of T5's tokens."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleList(nn.Linear(WIDTH, len(table)) for table in (WEATHERS, PLACES, TIMES))

    def forward(self, ids: Tensor) -> list[Tensor]:
        """(n, length) ids → three (n, classes) logits."""
        out = self.encoder(ids)
        state = out.pooler_output if "pooler_output" in out else out.last_hidden_state.mean(1)
        return [head(state) for head in self.heads]


def reader(name: str) -> tuple[Reader, CLIPTokenizer | T5Tokenizer]:
    """A new, untrained reader of the encoder `name`, "clip" or "t5", and its tokenizer."""
    if name == "clip":
        clip = clip_tokenizer()
        return Reader(clip_encoder(clip)).to(DEVICE), clip
    t5 = t5_tokenizer()
    return Reader(t5_encoder(t5)).to(DEVICE), t5


def load(folder: Path, name: str) -> nn.Module:
    """The trained encoder, frozen."""
    trained = averaged(f"text-{name}", folder, reader(name)[0])
    assert isinstance(trained, Reader)
    return trained.encoder.requires_grad_(False)


def run(folder: Path, name: str, steps: int, batch: int = 64) -> None:
    """Train the encoder `name`; the log ends in its accuracy over unseen wordings."""
    torch.manual_seed(0)
    module, tokenizer = reader(name)

    def read(rng: Random, count: int) -> tuple[list[Tensor], Tensor]:
        triples = rng.choices(TRIPLES, k=count)
        said = [caption(triple, rng) for triple in triples]
        said = [text.capitalize() if rng.random() < 0.2 else text for text in said]
        return module(tokens(tokenizer, said)), torch.tensor([labels(t) for t in triples], device=DEVICE)

    def loss_of(step: int) -> Tensor:
        logits, truth = read(Random(step), batch)
        return torch.stack([F.cross_entropy(one, truth[:, i]) for i, one in enumerate(logits)]).sum()

    train(f"text-{name}", folder, module, loss_of, steps=steps, learning_rate=2e-3, ema_decay=0.98)
    with torch.no_grad():
        logits, truth = read(Random(-1), 500)
    right = [(one.argmax(-1) == truth[:, i]).float().mean().item() for i, one in enumerate(logits)]
    print(f"text-{name}: weather {right[0]:.3f}, place {right[1]:.3f}, time {right[2]:.3f}", flush=True)
