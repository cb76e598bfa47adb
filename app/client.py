"""A Python client of the service: pictures now or as jobs, their events, models and telemetry.

with Client("http://127.0.0.1:7861") as client:
    drawn = client.generate("a misty forest at twilight", deepcache_enabled=True)
    Path("forest.png").write_bytes(drawn.image)
    print(drawn.report["cache"]["hit_rate"])
"""

from __future__ import annotations

import base64
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, TypedDict, Unpack

import httpx2

from app.errors import status_of

ADDRESS = "http://127.0.0.1:7861"
PATIENCE = 3700.0  # seconds for an answer; the server's own limit comes first
SILENCE = 60.0  # seconds without a sign of life on an event stream, which has one every fifteen
TRIES = 5  # to come back to an event stream, without an event in between


class ClientError(Exception):
    """No answer to work with."""


class Unreachable(ClientError):
    """Nobody answers there, or the connection broke."""


class ApiError(ClientError):
    """The service's own error. `message` says what to do; `retry_after` is in seconds, where coming back can help.

    `type` is the word to branch on: invalid, incompatible, queue_full, out_of_memory, …; `field` that of the request.
    """

    def __init__(
        self, status: int, type: str, message: str, field: str | None, request_id: str, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.type = type
        self.message = message
        self.field = field
        self.request_id = request_id
        self.retry_after = retry_after

    def __repr__(self) -> str:
        return f"ApiError({self.status}, {self.type!r}, {self.message!r}, field={self.field!r})"


@dataclass(frozen=True, slots=True)
class Generated:
    """`images`: whole files, one a seed. `report`: the rest of the answer of POST /api/generate."""

    images: tuple[bytes, ...] = field(repr=False)
    report: Mapping[str, Any]

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> Generated:
        texts = answer["images"] if "images" in answer else [answer["image"]]
        report = {name: value for name, value in answer.items() if name not in ("image", "images")}
        return cls(tuple(base64.b64decode(text) for text in texts), report)

    @property
    def image(self) -> bytes:
        """The only picture, or the first of several."""
        return self.images[0]


@dataclass(frozen=True, slots=True)
class Event:
    """`name`: queued, running, progress, preview, and done or error as the last one; `number` counts from 1."""

    number: int
    name: str
    data: Mapping[str, Any]


class Client:
    """Raises ApiError for what the service refuses or cannot do, Unreachable where there is no service.

    `key` is one of the server's API keys; `headers` go with every request. Close it, or use it in a `with`.
    """

    def __init__(
        self,
        address: str = ADDRESS,
        *,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = PATIENCE,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        headers = {**(headers or {}), **({} if key is None else {"Authorization": f"Bearer {key}"})}
        patience = httpx2.Timeout(timeout, connect=10.0)
        try:
            self._http = httpx2.Client(base_url=address, headers=headers, timeout=patience, transport=transport)
        except httpx2.InvalidURL as error:
            raise Unreachable(f"{address!r} is no address such as {ADDRESS}: {error}.") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def generate(self, prompt: str | None = None, **fields: Unpack[Fields]) -> Generated:
        """Wait for the pictures. When the connection is closed meanwhile, the server gives them up.

        `prompt` is left out where `rerender` stands in its place.
        """
        return Generated.of(self._ask("POST", "/api/generate", json=_body(prompt, fields)))

    def submit(self, prompt: str | None = None, *, idempotency_key: str | None = None, **fields: Unpack[Fields]) -> Job:
        """The same as a job: this returns as soon as it is queued. Sent again with the same key it is the same job."""
        headers = {} if idempotency_key is None else {"Idempotency-Key": idempotency_key}
        return Job(self, self._ask("POST", "/api/jobs", json=_body(prompt, fields), headers=headers))

    def job(self, identity: str) -> Job:
        """A job that was submitted before."""
        return Job(self, self._ask("GET", _job(identity)))

    def jobs(self, limit: int = 50, before: str | None = None) -> list[Job]:
        """This caller's jobs, the newest first; `before`: older ones than the job of that id."""
        asked = {"limit": limit} | ({} if before is None else {"before": before})
        return [Job(self, row) for row in self._ask("GET", "/api/jobs", params=asked)["jobs"]]

    def settings_of(self, picture: bytes) -> dict[str, Any]:
        """The fields that a PNG of this service's or of AUTOMATIC1111's says it was drawn with; empty for others."""
        fields: dict[str, Any] = self._ask(
            "POST", "/api/images/metadata", json={"image": base64.b64encode(picture).decode("ascii")}
        )["fields"]
        return fields

    def models(self) -> list[dict[str, Any]]:
        """The rows of GET /api/models."""
        rows: list[dict[str, Any]] = self.catalogue()["models"]
        return rows

    def catalogue(self) -> dict[str, Any]:
        """GET /api/models: `models`, and the names in `default` and `default_flux`."""
        return self._ask("GET", "/api/models")

    def adapters(self) -> dict[str, list[str]]:
        """The names of GET /api/adapters: `loras`, `embeddings` and `upscalers`."""
        return self._ask("GET", "/api/adapters")

    def telemetry(self) -> dict[str, Any]:
        """GET /api/telemetry."""
        return self._ask("GET", "/api/telemetry")

    def _ask(self, method: str, address: str, **options: Any) -> dict[str, Any]:
        try:
            response = self._http.request(method, address, **options)
        except httpx2.RequestError as error:
            raise Unreachable(_unreachable(self._http.base_url, error)) from error
        return _answer(response)

    def _events(self, identity: str) -> Iterator[Event]:
        """Comes back to the event after the last one seen when the connection breaks."""
        seen, tries = 0, 0
        while True:
            try:
                for event in self._stream(identity, seen):
                    seen, tries = event.number, 0
                    yield event
                    if event.name in ("done", "error"):
                        return
                tries += 1  # the server closed it without an end
                last: Exception = httpx2.RemoteProtocolError("the event stream ended early")
            except (httpx2.RequestError, ValueError) as error:  # ValueError: half an event
                tries, last = tries + 1, error
            if tries >= TRIES:
                raise Unreachable(_unreachable(self._http.base_url, last)) from last

    def _stream(self, identity: str, seen: int) -> Iterator[Event]:
        headers = {"Last-Event-ID": str(seen)} if seen else {}
        timeout = httpx2.Timeout(10.0, read=SILENCE)
        with self._http.sse(_job(identity, "/events"), headers=headers, timeout=timeout, max_event_size=None) as source:
            if source.response.status_code != 200:
                source.response.read()
                _answer(source.response)
            for event in source:
                data = event.json()
                yield Event(int(event.id), event.event, data if isinstance(data, dict) else {})


class Job:
    """A job as it stood when it was last asked for. `data`: the answer of GET /api/jobs/{id} without its result."""

    def __init__(self, client: Client, answer: dict[str, Any]) -> None:
        self._client = client
        self._take(answer)

    def __repr__(self) -> str:
        return f"<Job {self.id} {self.state}>"

    @property
    def id(self) -> str:
        return str(self.data["id"])

    @property
    def state(self) -> str:
        """queued, running, done, failed or cancelled."""
        return str(self.data["state"])

    @property
    def ended(self) -> bool:
        return self.state in ("done", "failed", "cancelled")

    def refresh(self) -> Job:
        self._take(self._client._ask("GET", _job(self.id)))
        return self

    def events(self) -> Iterator[Event]:
        """From the first one on, as they happen, to `done` or `error`. A broken connection is taken up again."""
        return self._client._events(self.id)

    def result(self) -> Generated:
        """Wait for the pictures. Raises ApiError with what a synchronous request would have been answered."""
        if self._generated is None and not self.ended:
            for _ in self.events():
                pass
        if self._generated is None:
            self.refresh()
        if self._generated is None:
            error = self.data["error"]
            raise ApiError(status_of(error["type"]), **error)
        return self._generated

    def cancel(self) -> Job:
        """Raises ApiError, of type job_finished, when there is nothing left to cancel."""
        self._take(self._client._ask("DELETE", _job(self.id)))
        return self

    def forget(self) -> None:
        """With its pictures, for good."""
        self._client._ask("DELETE", _job(self.id, "/result"))

    def _take(self, answer: dict[str, Any]) -> None:
        result = answer.pop("result", None)
        self.data: Mapping[str, Any] = answer
        self._generated = Generated.of(result) if result is not None else None


def _body(prompt: str | None, fields: Fields) -> dict[str, Any]:
    return {**({} if prompt is None else {"prompt": prompt}), **fields}


def _job(identity: str, part: str = "") -> str:
    return f"/api/jobs/{urllib.parse.quote(identity, safe='')}{part}"


def _answer(response: httpx2.Response) -> dict[str, Any]:
    if response.status_code == 204:
        return {}
    try:
        body = response.json()
    except ValueError:
        body = None
    if response.is_success and isinstance(body, dict):
        return body
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict) or not {"type", "message", "field", "request_id"} <= set(error):
        raise Unreachable(f"{response.url} answered {response.status_code}, and not as this service does.")
    after = response.headers.get("retry-after", "")
    known = {name: error[name] for name in ("type", "message", "field", "request_id")}
    raise ApiError(response.status_code, **known, retry_after=int(after) if after.isdigit() else None)


def _unreachable(address: object, error: Exception) -> str:
    return f"{address} cannot be reached: {error or type(error).__name__}. Is the server running there?"


# Below: written by docs/fields.py.


class LoraField(TypedDict, total=False):
    """An adapter under the configured folder."""

    name: str
    weight: float
    text_weight: float | None


class ControlField(TypedDict, total=False):
    """A ControlNet of the configured folder, and the picture that it reads."""

    model: str
    image: str
    weight: float
    start: float
    end: float
    edges: bool


class Fields(TypedDict, total=False):
    """All but the prompt; what each means stands in docs/api.md."""

    negative_prompt: str
    model: str | None
    flux_enabled: bool
    width: int
    height: int
    num_images: int
    batch_size: int
    steps: int | None
    guidance_scale: float | None
    guidance_rescale: float
    guidance_start: float
    guidance_end: float
    clip_skip: int | None
    freeu: bool
    freeu_b1: float | None
    freeu_b2: float | None
    freeu_s1: float | None
    freeu_s2: float | None
    seed: int | None
    sampler: str | None
    scheduler: str | None
    deepcache_enabled: bool
    deepcache_preset: Literal["balanced", "max_speed", "max_quality", "partial"] | None
    deepcache_interval: int
    deepcache_depth: int
    deepcache_schedule: Literal["auto", "uniform"] | None
    deepcache_guidance: Literal["full", "reuse"] | None
    deepcache_start_step: int
    deepcache_end_step: int
    fbcache_enabled: bool | None
    fbcache_threshold: float
    fbcache_max_consecutive: int | None
    cache_forecast: bool
    cache_speedup: float | None
    cache_floor: float | None
    attention: Literal["auto", "sdpa", "sage", "sparge"]
    compile: bool
    stable_fast: bool
    img2img_enabled: bool
    img2img_image: str | None
    img2img_denoise: float
    refiner_model: str | None
    refiner_switch: float
    mask: str | None
    mask_blur: int
    mask_fill: Literal["original", "noise"]
    inpaint_area: Literal["whole", "masked"]
    inpaint_padding: int
    outpaint_left: int
    outpaint_top: int
    outpaint_right: int
    outpaint_bottom: int
    hires_fix: bool
    hires_upscaler: str | None
    adetailer: bool
    upscale: str | None
    multiscale_enabled: bool
    multiscale_factor: float
    multiscale_fullres_start: int
    multiscale_fullres_end: int
    multiscale_intermittent: bool
    loras: list[LoraField]
    control: list[ControlField]
    enable_preview: bool
    deadline_seconds: float | None
    output_format: Literal["png", "jpeg", "webp"]
    rerender: str | None
