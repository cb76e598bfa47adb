"""Prompts that a language model reads as a message of a chat, by the template that came with its tokenizer."""

from __future__ import annotations

from typing import Any


def tokens(tokenizer: Any, prompt: str, *, thinking: bool) -> int:
    """How many the model reads, those of the template too. thinking: whether the answer may begin with thoughts."""
    message = [{"role": "user", "content": prompt}]
    written = tokenizer.apply_chat_template(
        message, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )
    return len(tokenizer(written).input_ids)
