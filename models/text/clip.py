"""CLIP text beyond what diffusers' pipelines read: weighted words, prompts of several windows, skipped layers.

Through compel (https://github.com/damian0815/compel), from the words on: a weight above 1 moves a token's state away
from that of the empty prompt, one below 1 blends towards the prompt without those words. A long prompt is read in
windows of the encoder's length, cut at commas and full stops where there are some, and their states are strung
together. The word BREAK begins a window. So many windows are read at most: the work of each step grows with them.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from models.errors import ModelError

from .prompt import Fragment, plain, weighted, windows

if TYPE_CHECKING:
    import torch
    from torch import Tensor


MOST_WINDOWS = 32
"""Read of one prompt. 10,000 characters of English take about thirty; 10,000 emoji would take four hundred."""


class TooFewLayers(ModelError):
    """clip_skip asks for a layer that a text encoder has not got."""

    field = "clip_skip"


@dataclass(frozen=True, slots=True)
class ClipEncoder:
    """A tokenizer and its text model; `layer` counts from the end, 0 the last one with the final norm, as trained."""

    tokenizer: Any
    model: Any
    device: Any
    layer: int = 0
    normed: bool = True

    def tokens(self, fragments: Sequence[Fragment]) -> int:
        """How many tokens the text makes, the two at its ends included."""
        return len(self.tokenizer(plain(tuple(fragments))).input_ids)

    @property
    def window(self) -> int:
        return int(self.tokenizer.model_max_length)

    def states(self, fragments: tuple[Fragment, ...]) -> Tensor:
        """(1, windows × tokens, D)"""
        import torch

        return torch.cat([self._unbroken(part) for part in self.read(fragments)], dim=1)

    def read(self, fragments: tuple[Fragment, ...]) -> list[tuple[Fragment, ...]]:
        """The parts between the words BREAK, as far as MOST_WINDOWS reach."""
        parts, room, length = [], MOST_WINDOWS, self.window - 2
        for part in windows(fragments):
            if room == 0:
                break
            taken = -(-(self.tokens(part) - 2) // length)
            parts.append(part if taken <= room else self._cut(part, room * length))
            room -= min(max(taken, 1), room)
        return parts

    def _cut(self, fragments: tuple[Fragment, ...], tokens: int) -> tuple[Fragment, ...]:
        """The beginning of it that makes at most so many tokens."""
        kept: list[Fragment] = []
        for fragment in fragments:
            left = tokens + 2 - self.tokens(kept)
            if self.tokens([fragment]) - 2 > left:
                end = bisect(range(len(fragment.text)), left, key=lambda to: self._length(fragment.text[:to])) - 1
                return (*kept, Fragment(fragment.text[:end], fragment.weight))
            kept.append(fragment)
        return tuple(kept)

    def _length(self, text: str) -> int:
        return len(self.tokenizer(text).input_ids) - 2

    def _unbroken(self, fragments: Sequence[Fragment]) -> Tensor:
        fragments = fragments or (Fragment(""),)
        states: Tensor = self._provider().get_embeddings_for_weighted_prompt_fragments(
            text_batch=[[fragment.text for fragment in fragments]],
            fragment_weights_batch=[[fragment.weight for fragment in fragments]],
            device=self.device,
        )
        return states

    def empty(self) -> Tensor:
        """One window of the empty prompt (1, tokens, D): what a shorter prompt is filled up with."""
        return self.states(())

    def _provider(self) -> Any:
        from compel.embeddings_provider import EmbeddingsProvider, SplitLongTextMode

        encoder = self

        class Provider(EmbeddingsProvider):
            def _encode_token_ids_to_embeddings(
                self, token_ids: Tensor, attention_mask: Tensor | None = None
            ) -> Tensor:
                return encoder._layer(token_ids, attention_mask)

        return Provider(self.tokenizer, self.model, truncate=False, split_long_text_mode=SplitLongTextMode.PHRASES)

    def _layer(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """States (1, tokens, D) of `layer`. A mask that hides nothing is left out: it would only change rounding."""
        if mask is not None and bool(mask.all()):
            mask = None
        output = self.model(ids, attention_mask=mask, output_hidden_states=self.layer > 0)
        if self.layer == 0:
            last: Tensor = output.last_hidden_state
            return last
        state: Tensor = output.hidden_states[-1 - self.layer]
        return getattr(self.model, "text_model", self.model).final_layer_norm(state) if self.normed else state


def encoders(
    pipeline: Any, device: torch.device, clip_skip: int | None, *, trained: int = 0, normed: bool = True
) -> list[ClipEncoder]:
    """The pipeline's CLIP encoders, each at its layer `trained` or, with a `clip_skip` of n, at n - 1 below it.

    Raises TooFewLayers.
    """
    layer = trained + (clip_skip or 1) - 1
    pairs = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))
    found = [(getattr(pipeline, name, None), getattr(pipeline, model, None)) for name, model in pairs]
    clips = [ClipEncoder(tokenizer, model, device, layer, normed) for tokenizer, model in found if model is not None]
    most = min(clip.model.config.num_hidden_layers for clip in clips) - trained
    if clip_skip is not None and clip_skip > most:
        raise TooFewLayers(f"This model's text encoder has {most} layers to choose from: clip_skip can be 1 to {most}.")
    return clips


def plain_enough(clips: Sequence[ClipEncoder], prompts: Sequence[tuple[Fragment, ...]], clip_skip: int | None) -> bool:
    """Whether diffusers' own encoding reads all of it: nothing weighted, one window, the layer as trained."""
    if (clip_skip or 1) > 1 or any(weighted(fragments) or windows(fragments) != [fragments] for fragments in prompts):
        return False
    return all(clip.tokens(fragments) <= clip.window for clip in clips for fragments in prompts)


def left_out(clips: Sequence[ClipEncoder], fragments: tuple[Fragment, ...]) -> int:
    """Characters of the prompt's end that no encoder reads."""
    read = min(sum(len(plain(part)) for part in clip.read(fragments)) for clip in clips)
    return sum(len(plain(part)) for part in windows(fragments)) - read


def states(clips: Sequence[ClipEncoder], prompts: Sequence[tuple[Fragment, ...]]) -> list[Tensor]:
    """For each prompt the states of all encoders side by side (1, tokens, sum of D), all of one length."""
    import torch

    read = [[clip.states(fragments) for clip in clips] for fragments in prompts]
    longest = max(state.shape[1] for row in read for state in row)
    for row in read:
        for index, clip in enumerate(clips):
            while row[index].shape[1] < longest:
                row[index] = torch.cat([row[index], clip.empty()], dim=1)
    return [torch.cat(row, dim=-1) for row in read]
