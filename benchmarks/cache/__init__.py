"""The caches beside their peers, on the embedded models, in one run.

    python -m benchmarks.cache          the presets: time, counted operations and quality, in a few minutes
    python -m benchmarks.cache --full   the whole grid with every peer; writes docs/benchmarks.md and its plots

Quality and time are measured apart: quality over many prompts and seeds, with every operation counted; time without
that counting, each run beside an uncached one.
"""
