"""What a batch of pictures goes through: a stage a file, put in a row by `models/generation.py`.

A stage is a frozen setting with two methods: `steps`, the denoising steps that it is known to take for one batch, and
`run`, which moves the batch's `Drawing` on. Multi-scale and previews act within a run of the denoiser.
"""
