"""Textual inversion (Gal et al. 2022): vectors that stand for a word of the prompt, put in place for one request."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.base import Embedding
from models.errors import AdapterFailed
from models.finite import is_finite
from models.libraries import first_line

if TYPE_CHECKING:
    from torch import Tensor

    from .lora import LoraFile

# Keys of the files in the wild. One encoder: AUTOMATIC1111's, or a single key (diffusers: the token; ComfyUI: clip_l).
# Two: kohya's and OneTrainer's, or Replicate's.
_ONE = "emb_params"
_TWO = (("clip_l", "text_encoders_0"), ("clip_g", "text_encoders_1"))


class EmbeddingFailed(AdapterFailed):
    field = "prompt"


def mentioned(files: dict[str, Path], texts: Iterable[str]) -> tuple[Embedding, ...]:
    """The embeddings whose file name stands in one of `texts` as a word of its own, in any case.

    The name of a file in a subfolder may stand there with its folders or, where no other file has it, without.
    """
    lowered = [text.lower() for text in texts]
    short = [name.rpartition("/")[2] for name in files]
    counts = Counter(short)
    words = {word: path for word, path in zip(short, files.values(), strict=True) if counts[word] == 1} | files
    likely = [word for word in words if any(word.lower() in text for text in lowered)]
    return tuple(
        Embedding(name=word, path=words[word]) for word in likely if any(_word(word).search(text) for text in lowered)
    )


def without(text: str, embeddings: Iterable[Embedding]) -> str:
    """`text` without the embeddings' names: what is left are words."""
    return _substitute(text, {embedding.name: " " for embedding in embeddings})


def bundled(pipeline: Any, files: Iterable[LoraFile]) -> tuple[dict[str, Mapping[str, Tensor]], list[str]]:
    """The vectors that LoRAs bring, by the word that they stand for; and sentences on those that are left out."""
    found: dict[str, Mapping[str, Tensor]] = {}
    said = []
    for file in files:
        if hasattr(pipeline, "unet"):
            found |= file.embeddings
        elif file.embeddings:
            words = ", ".join(file.embeddings)
            said.append(f"This model takes no embeddings; those that {file.lora.name!r} brings were left out: {words}.")
    return found, said


@contextmanager
def inserted(
    pipeline: Any, embeddings: Sequence[Embedding], bundles: Mapping[str, Mapping[str, Tensor]]
) -> Iterator[Callable[[str], str]]:
    """The pipeline's tokenizers and text encoders with vectors added, of `embeddings` and of `bundles` by their words.

    As they were afterwards. Yields a function that writes a prompt for the tokenizers: each name as tokens of its own,
    one a vector. Raises AdapterFailed.
    """
    encoders = _encoders(pipeline)
    widths = [model.get_input_embeddings().weight.shape[1] for _, model in encoders] if embeddings or bundles else []
    tokens: dict[str, list[str]] = {}
    added: list[dict[str, Tensor]] = [{} for _ in encoders]  # by encoder: token → vector (D,)
    sources = {**bundles, **{embedding.name: _read(embedding) for embedding in embeddings}}
    for index, (name, tensors) in enumerate(sources.items()):
        matrices = _matrices(name, tensors, widths)
        names = [f"<|embedding-{index}-{row}|>" for row in range(len(matrices[0]))]
        tokens[name] = names
        for vectors, matrix in zip(added, matrices, strict=True):
            vectors.update(zip(names, matrix, strict=True))
    with ExitStack() as stack:
        for (tokenizer, model), vectors in zip(encoders, added, strict=True):
            if vectors:
                stack.enter_context(_extended(pipeline, tokenizer, model, vectors))
        words = {name: " ".join(names) for name, names in tokens.items()}
        yield lambda text: _substitute(text, words)


@contextmanager
def _extended(pipeline: Any, name: str, model: Any, vectors: Mapping[str, Tensor]) -> Iterator[None]:
    """The tokenizer is a copy with the new tokens, the matrix is wrapped: the originals are never written to."""
    import torch
    from torch import nn

    class Extended(nn.Module):
        """The matrix for the ids that it knows, the new vectors for those behind."""

        new: Tensor

        def __init__(self, known: nn.Module, first: int, new: Tensor) -> None:
            super().__init__()
            self.known = known
            self.first = first
            self.register_buffer("new", new, persistent=False)

        @property
        def weight(self) -> Tensor:
            weight: Tensor = self.known.weight  # type: ignore[assignment]
            return weight

        def forward(self, ids: Tensor) -> Tensor:
            out: Tensor = self.known(ids.masked_fill(ids >= self.first, 0))
            ids = ids.to(out.device)  # an offloaded matrix is computed elsewhere than it lies
            new = self.new.to(out)[(ids - self.first).clamp(min=0)]
            return torch.where((ids >= self.first).unsqueeze(-1), new, out)

    tokenizer, matrix = getattr(pipeline, name), model.get_input_embeddings()
    extended = copy.deepcopy(tokenizer)
    extended.add_tokens(list(vectors))
    new = torch.stack(list(vectors.values())).to(matrix.weight.dtype)
    # Old configurations name a wrong end token, and transformers then takes the highest id of a text for its end.
    wrong = [part for part in model.modules() if part.__dict__.get("eos_token_id") == 2]
    setattr(pipeline, name, extended)
    model.set_input_embeddings(Extended(matrix, extended.convert_tokens_to_ids(next(iter(vectors))), new))
    for part in wrong:
        part.eos_token_id = tokenizer.eos_token_id
    try:
        yield
    finally:
        for part in wrong:
            part.eos_token_id = 2
        model.set_input_embeddings(matrix)
        setattr(pipeline, name, tokenizer)


def _encoders(pipeline: Any) -> list[tuple[str, Any]]:
    """Each CLIP encoder with the name of its tokenizer, in the order of the files' keys."""
    pairs = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))
    return [(name, getattr(pipeline, model)) for name, model in pairs if getattr(pipeline, model, None) is not None]


def _read(embedding: Embedding) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(embedding.path)
    except (SafetensorError, OSError, ValueError) as error:
        raise _failed(embedding.name, f"its file cannot be read: {first_line(error)}") from error


def _matrices(name: str, tensors: Mapping[str, Tensor], widths: Sequence[int]) -> list[Tensor]:
    """One matrix (vectors, D) for each of the text encoders, whose widths D are `widths`."""
    if len(widths) == len(_TWO):
        found = [next((tensors[key] for key in keys if key in tensors), None) for keys in _TWO]
    elif sum(any(key in tensors for key in keys) for keys in _TWO) > 1:
        raise _failed(name, "it holds vectors for two text encoders, and this model has one.")
    else:
        found = [tensors.get(_ONE, next(iter(tensors.values())) if len(tensors) == 1 else None)]
    matrices = [tensor.reshape(1, -1) if tensor.dim() == 1 else tensor for tensor in found if tensor is not None]
    if len(matrices) != len(widths):
        raise _failed(name, f"it does not hold vectors for this model's {len(widths)} text encoder(s).")
    for matrix, width in zip(matrices, widths, strict=True):
        if matrix.dim() != 2 or len(matrix) == 0 or not matrix.is_floating_point():
            raise _failed(name, f"its tensor has the shape {tuple(matrix.shape)}, not (vectors, width).")
        if not is_finite([matrix]):
            raise _failed(name, "its vectors hold numbers that are not finite.")
        if matrix.shape[1] != width:
            raise _failed(name, f"its vectors have {matrix.shape[1]} numbers, this model's words {width}.")
    if len({len(matrix) for matrix in matrices}) != 1:
        raise _failed(name, "its two encoders have different numbers of vectors.")
    return matrices


def _failed(name: str, reason: str) -> EmbeddingFailed:
    return EmbeddingFailed(
        f"The embedding {name!r} cannot be used with this model: {reason} "
        "Take one that was trained for it, or leave its name out of the prompts."
    )


def _word(name: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![\w-]){re.escape(name.lower())}(?![\w-])")


def _substitute(text: str, words: Mapping[str, str]) -> str:
    """`text` with each key, as a word of its own in any case, replaced; longer keys first."""
    if not words:
        return text
    lowered = {name.lower(): word for name, word in words.items()}
    names = "|".join(re.escape(name) for name in sorted(lowered, key=len, reverse=True))
    return re.sub(
        rf"(?<![\w-])(?:{names})(?![\w-])", lambda match: lowered[match[0].lower()], text, flags=re.IGNORECASE
    )
