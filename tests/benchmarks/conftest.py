"""The random pipelines of tests/models, loaded anew: peers patch what they run on."""

from __future__ import annotations

from tests.models.conftest import flux, flux_folder, flux_spec, sd, sd_folder, sd_spec

__all__ = ["flux", "flux_folder", "flux_spec", "sd", "sd_folder", "sd_spec"]
