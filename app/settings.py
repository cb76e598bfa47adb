"""What an operator can set: `WAVESPEED_*` environment variables, `.env`, and the three `LD_*` names."""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from app.errors import CannotStart

OTHERS = ("KEY",)  # the client's own WAVESPEED_*
# What Kubernetes sets in every container for a service called wavespeed-…: WAVESPEED_API_PORT_80_TCP=tcp://10.3.2.1:80.
_OF_A_CLUSTER = re.compile(r"_SERVICE_(HOST|PORT)|_PORT(_\d+_(TCP|UDP))?(?=.*=\w+://)|_PORT_\d+_(TCP|UDP)_")
_FORMS = {
    "devices": (r"auto|cpu|[a-z]+(:\d+)?", "device; there are auto, cpu, cuda, and cuda:0, cuda:1, …"),
    "allowed_hosts": (r"[\w.-]+", "name of a host, as images.example: no scheme, no port, no path, no *"),
    "cors_origins": (r"https?://[^/*\s]+", "origin: scheme and host, as https://a.example, no path, no *"),
}
"""What each part of a setting looks like, and what it is not where it does not."""
LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
LogFormat = Literal["console", "json"]


class Settings(BaseSettings):
    """Read once by whoever starts the service, never at import. Raises CannotStart for a variable that there is not."""

    model_config = SettingsConfigDict(
        env_prefix="WAVESPEED_", env_file=".env", extra="ignore", populate_by_name=True, frozen=True
    )

    host: str = Field(
        "127.0.0.1", min_length=1, description="Address to listen on. Anything but loopback opens it to the network."
    )
    port: int = Field(7861, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    devices: Annotated[tuple[str, ...], NoDecode] = Field(
        ("auto",),
        min_length=1,
        validation_alias=AliasChoices("WAVESPEED_DEVICES", "WAVESPEED_DEVICE"),
        description="One worker process each, separated by commas: cpu, cuda:0, cuda:1. auto: a GPU, else the CPU.",
    )
    threads: int = Field(0, ge=0, description="Threads that a worker computes with; 0 leaves one core to others.")
    model: str | None = Field(None, description="Model of a request that names none; unset takes the embedded one.")
    models_file: Path | None = Field(
        None, description="TOML file of further models, see docs/models.md; unset serves the embedded ones."
    )
    model_memory: float | None = Field(
        None,
        gt=0,
        description="GiB that the weights of all loaded models may take on a device; the ones used longest ago make "
        "room. Unset: nine tenths of the device's memory, of the machine's on the CPU.",
    )
    device_memory: float | None = Field(
        None,
        gt=0,
        description="GiB of a GPU that a model and a request may take: a smaller card to try. Unset: what is free when "
        "the worker starts. By it is found what of a model waits in main memory, see docs/memory.md.",
    )
    resume_bytes: int = Field(
        64 * 2**20,
        ge=0,
        description="Main memory for the finished runs of each loaded model, which later requests of the same caller "
        "go on from; 0 keeps none.",
    )
    queue_size: int = Field(64, ge=1, description="Jobs that may wait; one more is answered 429.")
    max_body_bytes: int = Field(32 * 2**20, ge=1024, description="Longest request body; a longer one is answered 413.")
    body_seconds: float = Field(30.0, gt=0, description="Time for a client to finish sending its body.")
    silence_seconds: float = Field(
        60.0, ge=1, description="A worker whose process gives no sign of life for so long is replaced."
    )
    stall_seconds: float = Field(
        600.0, ge=1, description="A worker that finishes no step of its job for so long is replaced."
    )
    load_seconds: float = Field(
        1800.0, ge=1, description="A worker that loads one part of a model for longer than this is replaced."
    )
    quarantine_seconds: float = Field(
        600.0, gt=0, description="How long a model that took its worker down twice while loading is not tried again."
    )
    deadline_seconds: float = Field(
        3600.0, gt=0, description="Longest time from a request's arrival to its answer; past it, 504."
    )
    drain_seconds: float = Field(
        30.0, ge=0, description="Time at shutdown for accepted jobs to be done; past it they are answered 503."
    )
    stop_seconds: float = Field(10.0, gt=0, description="Time for a worker to end by itself at shutdown.")
    jobs_folder: Path | None = Field(
        None,
        description="Where jobs and their pictures are kept over a restart. Unset: in jobs/, on Ray in memory; empty: "
        "in memory.",
    )
    jobs_restart: Literal["lost", "requeue"] = Field(
        "lost", description="What a restart does with jobs that were not done: answer lost_at_restart, or run them."
    )
    result_seconds: float = Field(
        30 * 86400.0, gt=0, description="How long a job and its result are kept after its end."
    )
    result_bytes: int = Field(
        512 * 2**20, ge=2**20, description="Room for all kept results together; the oldest go first."
    )
    api_keys: Annotated[tuple[str, ...], NoDecode] = Field(
        (), repr=False, description="Bearer keys, separated by commas. None: whoever reaches the port may use it."
    )
    page: bool = Field(True, description="Show the page at /, where Streamlit is installed.")
    metrics_open: bool = Field(True, description="With API keys: /metrics asks for none.")
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Names, separated by commas, that the server goes by without keys, beside its IP and localhost."
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Origins, separated by commas, whose pages may ask from a browser, such as https://a.example."
    )
    proxies: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Addresses or networks, separated by commas, of reverse proxies whose X-Forwarded-For and "
        "X-Forwarded-Proto are believed, such as 10.0.0.0/8. None: a caller is whoever connects.",
    )
    checkpoint_folder: Path = Field(
        Path("checkpoints"),
        description="Checkpoints, in subfolders too: each .safetensors file and diffusers folder is a model by its "
        "name, see docs/models.md.",
    )
    lora_folder: Path = Field(Path("loras"), description="LoRAs (.safetensors) that requests may name in `loras`.")
    embedding_folder: Path = Field(
        Path("embeddings"), description="Textual inversions (.safetensors); a prompt uses one by its file's name."
    )
    upscaler_folder: Path = Field(
        Path("upscalers"), description="Upscalers (.safetensors) that `hires_upscaler` and `upscale` may name."
    )
    control_folder: Path = Field(
        Path("controlnets"),
        description="ControlNets (.safetensors, or a folder in diffusers format) that `control` may name.",
    )
    face_detector: Path | None = Field(
        None, description="ONNX file of a YOLO that finds ADetailer's faces; unset: the cascade that OpenCV brings."
    )
    log_folder: Path = Field(Path("logs"), description="Where server.log is written.")
    log_level: LogLevel = Field("INFO", validation_alias=AliasChoices("LD_SERVER_LOGLEVEL", "WAVESPEED_LOG_LEVEL"))
    log_format: LogFormat = Field("console", description="A line for people, or a JSON object a line.")
    max_batch_size: int = Field(
        4,
        ge=1,
        le=16,
        validation_alias=AliasChoices("LD_MAX_BATCH_SIZE", "WAVESPEED_MAX_BATCH_SIZE"),
        description="Images denoised together at most, of one request or of several that differ in prompts and seeds "
        "alone; 1 batches nothing.",
    )
    batch_timeout: float = Field(
        0.5,
        ge=0,
        validation_alias=AliasChoices("LD_BATCH_TIMEOUT", "WAVESPEED_BATCH_TIMEOUT"),
        description="Seconds that a free worker waits at most for requests to batch with; only while some keep coming.",
    )

    @model_validator(mode="after")
    def _requeues_from_somewhere(self) -> Settings:
        if self.jobs_restart == "requeue" and self.jobs_folder is None:
            raise ValueError("WAVESPEED_JOBS_RESTART=requeue needs WAVESPEED_JOBS_FOLDER: memory outlives no restart")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        known = {name for field in cls.model_fields for name in variables(field)} | {f"WAVESPEED_{x}" for x in OTHERS}
        for source in (env_settings, dotenv_settings):
            if isinstance(source, EnvSettingsSource | DotEnvSettingsSource):
                refuse_unknown(source.env_vars, "WAVESPEED_", known)
        return init_settings, env_settings, dotenv_settings

    @field_validator("jobs_folder", mode="before")
    @classmethod
    def _in_memory(cls, value: object) -> object:
        return None if value == "" else value

    @field_validator("face_detector", "models_file")
    @classmethod
    def _a_file(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if value is not None and info.field_name == "face_detector" and value.suffix != ".onnx":
            raise ValueError(f"{value.name!r} is no .onnx file; a YOLO's .pt becomes one by `yolo export format=onnx`")
        if value is not None and not value.is_file():
            raise ValueError(f"there is no file {str(value)!r}")
        return _readable(value)

    @field_validator("checkpoint_folder", "lora_folder", "embedding_folder", "upscaler_folder", "control_folder")
    @classmethod
    def _a_folder(cls, value: Path) -> Path | None:
        if value.exists() and not value.is_dir():
            raise ValueError(f"{str(value)!r} is no folder")
        return _readable(value)

    @field_validator(*_FORMS)
    @classmethod
    def _formed(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        form, words = _FORMS[str(info.field_name)]
        for part in value:
            if not re.fullmatch(form, part):
                raise ValueError(f"{part!r} is no {words}")
        return value

    @field_validator("devices", "api_keys", "allowed_hosts", "cors_origins", "proxies", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("api_keys", mode="before")
    @classmethod
    def _no_keys_by_mistake(cls, value: object) -> object:
        if isinstance(value, str) and value and not value.strip(" ,"):
            raise ValueError("holds no key; leave it unset to let everybody in")
        return value

    @field_validator("api_keys")
    @classmethod
    def _sendable(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any(not (key.isascii() and key.isprintable()) or " " in key for key in value):
            raise ValueError("a key is sent in a header: printable ASCII without spaces")
        return value

    @field_validator("proxies")
    @classmethod
    def _networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for one in value:
            try:
                ipaddress.ip_network(one)
            except ValueError:
                raise ValueError(f"{one!r} is no IP address and no network, such as 10.0.0.1 or 10.0.0.0/8") from None
        return value

    @field_validator("log_level", mode="before")
    @classmethod
    def _upper(cls, value: object) -> object:
        return value.upper() if isinstance(value, str) else value


def available_cores() -> int:
    """Cores that this process may run on, which in a container are fewer than the machine has."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS or Windows
        return os.cpu_count() or 1


def default_threads() -> int:
    """Threads that a worker computes with unless told.

    One core is left to the rest of the machine: threads that wait for one whose core another program has taken make a
    picture several times slower (docs/decisions/spinning-threads.md).
    """
    return max(1, available_cores() - 1)


def variables(field: str) -> tuple[str, ...]:
    """The environment variables that set `field`; the first one is what messages call it."""
    alias = Settings.model_fields[field].validation_alias
    return tuple(map(str, alias.choices)) if isinstance(alias, AliasChoices) else (f"WAVESPEED_{field.upper()}",)


def variable(field: str) -> str:
    return variables(field)[0]


def read_settings(**given: Any) -> Settings:
    """`given` goes before the environment. Raises CannotStart, a sentence for each variable that is wrong."""
    try:
        return Settings(**given)
    except ValidationError as error:
        raise CannotStart("\n".join(faults(error))) from None
    except (OSError, UnicodeDecodeError) as error:
        raise CannotStart(f".env cannot be read: {error}.") from None


def refuse_unknown(given: Mapping[str, str | None], prefix: str, known: Collection[str]) -> None:
    """Raises CannotStart for names that begin with `prefix` and are not `known`: a key that is not set by a slip."""
    lines = []
    for name, value in given.items():
        name = name.upper()
        if name.startswith(prefix) and name not in known and not _OF_A_CLUSTER.search(f"{name}={value}"):
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
            lines.append(f"{name} is no variable that is read here; the nearest one is {nearest}.")
    if lines:
        raise CannotStart("\n".join(lines))


def _readable(path: Path | None) -> Path | None:
    if path is not None and path.exists() and not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
        raise ValueError(f"{str(path)!r} cannot be read by this user")
    return path


def faults(error: ValidationError) -> list[str]:
    """What is wrong with which variable, a line each; never its value, which may be a key."""
    lines = []
    for fault in error.errors(include_url=False, include_input=False):
        name = str(fault["loc"][0]) if fault["loc"] else ""
        where = variable(name) if name in Settings.model_fields else name
        what = fault["msg"].removeprefix("Value error, ").removesuffix(".") + "."
        lines.append(f"{where}: {what}" if where else what)
    return lines
