"""CLIP text beyond what diffusers' pipelines read: weighted words, prompts of several windows, skipped layers.

Through compel (https://github.com/damian0815/compel), from the words on: a weight above 1 moves a token's state away
from that of the empty prompt, one below 1 blends towards the prompt without those words. A long prompt is read in
windows of the encoder's length, cut at commas and full stops where there are some, and their states are strung
together. The word BREAK begins a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .base import ModelError
from .prompt import Fragment, plain, weighted, windows

if TYPE_CHECKING:
    import torch
    from torch import Tensor


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

        return torch.cat([self._unbroken(part) for part in windows(fragments)], dim=1)

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
