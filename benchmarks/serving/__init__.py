"""Load over HTTP against a server that runs: what it finishes, how long requests wait, what it holds, what it refuses.

    python -m benchmarks.serving             every scenario against servers of its own; writes docs/serving.md
    python -m benchmarks.serving load        one load, against any server of this API or of OpenAI's images API
    python -m benchmarks.serving plan        fleet and price from what the scenarios measured; docs/planning.md

The requests come from an arrival process that does not wait for answers (open loop), or from clients that ask again
once they are answered (closed loop).
"""
