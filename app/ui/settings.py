"""What the page's operator can set: `WAVESPEED_UI_*` environment variables and `.env`."""

from __future__ import annotations

import difflib
import os
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


class PageSettings(BaseSettings):
    """The server's address is the operator's alone: whoever opens the page must not point its requests elsewhere."""

    model_config = SettingsConfigDict(env_prefix="WAVESPEED_UI_", env_file=".env", extra="ignore", frozen=True)

    server: str = Field("http://127.0.0.1:7861", description="Address of the WaveSpeed server.")
    api_key: str = Field(
        "", repr=False, description="Key sent for everybody who gives none on the page; empty sends none."
    )
    host: str = Field("127.0.0.1", description="Address that the page listens on.")
    port: int = Field(8501, ge=1, le=65535, description="Port that the page listens on.")

    @model_validator(mode="after")
    def _known(self) -> PageSettings:
        known = [f"WAVESPEED_UI_{name.upper()}" for name in PageSettings.model_fields]
        for name in os.environ:
            if name.startswith("WAVESPEED_UI_") and name not in known:
                nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
                raise ValueError(f"{name} is no variable that is read here; the nearest one is {nearest}")
        return self

    @field_validator("server")
    @classmethod
    def _an_address(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
            raise ValueError(f"{value!r} is no address; give one such as http://127.0.0.1:7861")
        return value.rstrip("/")
