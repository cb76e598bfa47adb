"""The bodies of answers and requests, as OpenAPI describes them."""

from __future__ import annotations

import json
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from app.http.foreign import LIGHTDIFFUSION, CfgFree, ControlNet
from app.http.schemas import GenerateRequest
from app.images import OutputFormat
from app.jobs.record import Drawn


class Timing(BaseModel):
    """Seconds."""

    queue_seconds: float = Field(description="Waiting for a worker.")
    text_seconds: float = Field(description="Encoding the prompt.")
    denoise_seconds: float = Field(description="All denoising steps.")
    decode_seconds: float = Field(description="From latents to pixels.")
    compile_seconds: float = Field(description="Compiling, with compile or stable_fast: 0 where it was done before.")
    total_seconds: float = Field(description="From the job's arrival to its end.")


class Chosen(BaseModel):
    """The settings that cache_speedup came to, beside those that the cache reports itself, and what they promise."""

    asked_speedup: float = Field(description="cache_speedup.")
    asked_steps: int = Field(description="Of the uncached pictures that it is measured by.")
    floor_db: float | None = Field(description="cache_floor.")
    steps: int = Field(description="Denoising steps that were taken.")
    speedup: float = Field(description="Of the denoising, over asked_steps uncached ones.")
    by: Literal["seconds", "operations"] = Field(description="What that was measured in: seconds of this device.")
    psnr_db: float | None = Field(description="To the uncached pictures, in the mean; null: the same, or not known.")
    psnr_interval: tuple[float, float] | None = Field(description="95 % interval of that mean.")
    measured: str | None = Field(description="On what; null where the model has no profile of its own.")


class CacheAnswer(BaseModel):
    """What the cache did; the strategy's own settings stand beside these fields."""

    model_config = ConfigDict(extra="allow")

    strategy: str = Field(description="none, deepcache, first_block, or fitted, which cache_speedup alone takes.")
    computed: int = Field(description="Denoiser calls computed in full, over all batches.")
    reused: int = Field(description="Denoiser calls served from the cache.")
    hit_rate: float = Field(description="reused / (computed + reused).")
    decisions: str = Field(description="C or R for each call, a space between runs: of batches and passes.")
    reuse_cost: float | None = Field(description="A reuse call's share of a full call's operations.")
    predicted_speedup: float | None = Field(description="Denoising speed-up that the operations promise.")
    cache_bytes: int = Field(description="Most bytes kept between two calls.")
    control: dict[str, float | None] | None = Field(
        None, description="With ControlNets: calls, how often one was run; share, theirs of the run's operations."
    )
    chosen: Chosen | None = Field(None, description="With cache_speedup: what it came to.")
    passes: list[dict[str, Any]] | None = Field(
        None, description="The same for each pass by name, where there is more than the plain run; see docs/passes.md."
    )


class Report(BaseModel):
    """What is said about pictures, whichever API they are asked by."""

    request_id: str = Field(description="Also in X-Request-Id and in every line of the log about it.")
    model: str = Field(description="The model that drew.")
    seeds: list[int] = Field(description="One an image.")
    width: int = Field(description="Pixels.")
    height: int = Field(description="Pixels.")
    steps: int = Field(description="Denoising steps.")
    warnings: list[str] = Field(description="Sentences on what was not quite as asked.")
    attention: str = Field(description="The kernel that computed attention: sdpa, sage or sparge.")
    reused_run: bool = Field(
        description="Whether it went on from a run that an earlier request of the caller had made, and that `cache` "
        "tells of; see docs/passes.md."
    )
    timings: Timing = Field(description="Where the time went.")
    cache: CacheAnswer = Field(description="What the cache did.")


class GenerateAnswer(Report):
    """Pictures and the report on them."""

    image: str | None = Field(None, description="Base64; when one image was asked for.")
    images: list[str] | None = Field(None, description="Base64 each; when several were asked for.")


class ImageData(BaseModel):
    b64_json: str | None = Field(None, description="The file, base64.")
    url: str | None = Field(None, description="Instead, with response_format url: the file as a data: URL.")


class ImagesAnswer(Report):
    """As the OpenAI images API answers, and the report of POST /api/generate beside it."""

    created: int = Field(description="Unix seconds.")
    data: list[ImageData] = Field(description="One a picture.")
    size: str = Field(description="WIDTHxHEIGHT, pixels.")
    output_format: str = Field(description="png, jpeg or webp.")
    background: str = Field(description="opaque.")


class ModelCard(BaseModel):
    """A model, as the OpenAI API shows it."""

    id: str = Field(description="Its name.")
    object: Literal["model"] = Field("model", description="What this is.")
    created: int = Field(description="When the server started, Unix seconds.")
    owned_by: str = Field("wavespeed", description="Always wavespeed.")


class ModelCards(BaseModel):
    """The models, as the OpenAI API lists them."""

    object: Literal["list"] = Field("list", description="What this is.")
    data: list[ModelCard] = Field(description="One a model.")


class JobAnswer(BaseModel):
    """A job as it stands. Times are Unix seconds."""

    id: str = Field(description="Its name in the addresses below /api/jobs, and in every line of the log about it.")
    state: str = Field(description="queued, running, done, failed or cancelled.")
    model: str | None = Field(description="The model that draws.")
    position: int | None = Field(description="Place in the queue, 1 for the next; null when it does not wait.")
    step: int = Field(description="Denoising steps done, over all batches.")
    total: int | None = Field(description="Denoising steps in all; null before the first.")
    attempts: int = Field(description="How often it was started: twice when its worker was lost.")
    created: float = Field(description="When it was accepted.")
    started: float | None = Field(description="When a worker took it first.")
    finished: float | None = Field(description="When it ended.")
    error: ErrorDetail | None = Field(description="Why it was not done.")
    request: dict[str, Any] | None = Field(
        description="What was asked, with the model and the seed that were taken. `left_out` names the fields that "
        "were too long to be kept. null for a job that was not done when the server was restarted."
    )
    result: GenerateAnswer | None = Field(None, description="What POST /api/generate answers; of a job that is done.")


class JobsAnswer(BaseModel):
    """Some of the caller's jobs, the newest first."""

    jobs: list[JobAnswer] = Field(description="Without their results.")
    more: bool = Field(description="Whether there are older ones.")


class ErrorDetail(BaseModel):
    type: str = Field(description="A word to branch on: invalid, incompatible, unsupported, queue_full, …")
    message: str = Field(description="What is wrong and what to do about it.")
    field: str | None = Field(description="The request's field at fault, if it is one's.")
    request_id: str = Field(description="To find the request in the log.")


class ErrorAnswer(BaseModel):
    """Every answer that is not a success."""

    error: ErrorDetail = Field(description="What went wrong.")


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI `responses` for these statuses."""
    words = {
        401: "API keys are configured and none of them was sent.",
        404: "There is no such model or job.",
        409: "The job has ended.",
        413: "The body is too large.",
        422: "The request is invalid, or asks for things that do not go together.",
        429: "The queue is full; try again after Retry-After seconds.",
        500: "The model failed; the log has the cause.",
        504: "The deadline passed before the pictures were done.",
        503: "No worker, or it was lost, or out of memory; try again after Retry-After seconds.",
    }
    return {status: {"model": ErrorAnswer, "description": words[status]} for status in statuses}


def request_schema(*, rerender: bool = False) -> dict[str, Any]:
    """JSON Schema of the body, other APIs' names included. rerender: whether it can stand in the prompt's place."""
    schema = GenerateRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    ours = schema["properties"]
    if rerender:
        schema["anyOf"] = [{"required": schema.pop("required")}, {"required": ["rerender"]}]
    else:
        del ours["rerender"]
    foreign = {name: field.schema(ours) for name, field in LIGHTDIFFUSION.items()}
    groups = (CfgFree, ControlNet)
    theirs = {name: field for one in groups for name, field in one.model_json_schema()["properties"].items()}
    schema["properties"] = {**ours, **foreign, **theirs}
    return schema


def json_body(schema: str, summary: str | None = None, example: object = None) -> dict[str, Any]:
    """OpenAPI `requestBody`: one of `components/schemas`, with an example and what it shows, if there is one."""
    content: dict[str, Any] = {"schema": {"$ref": f"#/components/schemas/{schema}"}}
    if summary is not None:
        content["examples"] = {"document": {"summary": summary, "value": example}}
    return {"requestBody": {"required": True, "content": {"application/json": content}}}


def form_body(schema: str) -> dict[str, Any]:
    """OpenAPI `requestBody` of a form with files."""
    content = {"multipart/form-data": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    return {"requestBody": {"required": True, "content": content}}


IMAGE_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "properties": {"image": {"type": "string", "description": "A picture, base64 or a data URL."}},
                    "required": ["image"],
                    "additionalProperties": False,
                }
            }
        },
    }
}
"""OpenAPI of a body that is a picture."""
MEDIA_TYPES: dict[str, OutputFormat] = {f"image/{name}": name for name in get_args(OutputFormat)}


def accepted_image(header: str, output_format: OutputFormat) -> OutputFormat | None:
    """The picture format that an Accept header prefers to JSON, None for JSON.

    `image/*` stands for `output_format`, `*/*` for JSON. JSON wins a tie, and a header that names neither.
    """
    best: OutputFormat | None = None
    best_quality = json_quality = 0.0
    for part in header.lower().split(","):
        kind, *parameters = (piece.strip() for piece in part.split(";"))
        quality = _quality(parameters)
        if kind in ("application/json", "application/*", "*/*"):
            json_quality = max(json_quality, quality)
        wanted = output_format if kind == "image/*" else MEDIA_TYPES.get(kind)
        if wanted is not None and quality > best_quality:
            best, best_quality = wanted, quality
    return best if best_quality > json_quality else None


def _quality(parameters: list[str]) -> float:
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                return min(max(float(value), 0.0), 1.0)
            except ValueError:
                return 0.0
    return 1.0


def bytes_answer(one: Drawn) -> Response:
    """The first picture itself; the report stands in `X-WaveSpeed-*` headers."""
    headers: dict[str, str] = {}
    for key, value in one.report.items():
        if isinstance(value, dict) and key in ("cache", "timings"):
            headers.update({_header(key if key == "cache" else "", name): _plain(item) for name, item in value.items()})
        else:
            headers[_header("", key)] = _plain(value)
    return Response(one.images[0], media_type=f"image/{one.job.output_format}", headers=headers)


def _header(group: str, name: str) -> str:
    return "-".join(["X-WaveSpeed", *(word.capitalize() for word in f"{group}_{name}".split("_") if word)])


def _plain(value: object) -> str:
    """Headers are ASCII: text as it is where it can be, everything else as JSON."""
    if isinstance(value, str) and value.isascii() and value.isprintable():
        return value
    return json.dumps(value)
