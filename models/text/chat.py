"""Prompts that a language model reads as a message of a chat, by the template that came with its tokenizer."""

from __future__ import annotations

from typing import Any

from .prompt import remarks


def warnings(name: str, tokenizer: Any, prompt: str, negative_prompt: str, longest: int, **template: Any) -> list[str]:
    """What of the texts the model `name` does not read. longest: tokens, with those of the template."""
    sentences = []
    for which, text in (("prompt", prompt), ("negative prompt", negative_prompt)):
        message = [{"role": "user", "content": text}]
        written = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True, **template)
        if (tokens := len(tokenizer(written).input_ids)) > longest:
            sentences.append(
                f"{name} reads {longest} tokens; the {which} has {tokens} with its template, and its end was not read."
            )
    return sentences + remarks(f"{prompt}\n{negative_prompt}", weights=False)
