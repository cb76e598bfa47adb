"""The OpenAI images API under /v1, for its SDK and what speaks as it does."""
