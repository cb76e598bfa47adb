"""Everything that needs a GPU, in one call: see docs/gpu-check.md."""
