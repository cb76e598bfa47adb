"""The models in the repository: our own training, drawn at their native scale, loaded like any other."""

from __future__ import annotations

from pathlib import Path

from models.base import ModelSpec
from models.embedded.recipe.grammar import WORDS

FOLDER = Path(__file__).parent

# (width, height), pixels: what the recipe renders, and so what the models draw well.
RENDER_SIZES = ((192, 128), (128, 128), (128, 192))
# Of the latents of both: they have one autoencoder.
FINE_DECODER = FOLDER / "fine-decoder"

SPECS = (
    ModelSpec(
        name="tiny-sd",
        family="sd",
        source=FOLDER / "tiny-sd",
        steps=20,
        guidance_scale=3.0,
        render_sizes=RENDER_SIZES,
        fine_decoder=FINE_DECODER,
        vocabulary=WORDS,
    ),
    ModelSpec(
        name="tiny-flux",
        family="flux",
        source=FOLDER / "tiny-flux",
        steps=28,
        guidance_scale=3.0,
        render_sizes=RENDER_SIZES,
        fine_decoder=FINE_DECODER,
        vocabulary=WORDS,
    ),
)
CONTROLNETS = {"tiny-sd-edges": FOLDER / "tiny-sd-edges"}
"""The ControlNets here by name."""
DEFAULT = "tiny-sd"
DEFAULT_FLUX = "tiny-flux"
