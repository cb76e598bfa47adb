"""The caches beside their peers, on the embedded models, in one run.

Quality and time are measured apart: quality over many prompts and seeds, with every operation counted; time without
that counting, each run beside an uncached one.
"""
