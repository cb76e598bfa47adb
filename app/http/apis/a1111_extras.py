"""/sdapi/v1/extra-single-image and extra-batch-images: pictures enlarged as they are. /controlnet: what its units name.

Their fields: modules/api/models.py and scripts/postprocessing_upscale.py of AUTOMATIC1111's version 1.10. The lists:
scripts/api.py of sd-webui-controlnet 1.1.455.
"""

from __future__ import annotations

import asyncio
import base64
import math
from abc import abstractmethod
from functools import partial
from html import escape
from typing import Annotated, Any, ClassVar, Literal, get_args

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse

from app.engine.types import UpscaleJob
from app.errors import Invalid
from app.http.apis.a1111 import API
from app.http.foreign import PREPROCESSORS, Foreign, translated
from app.http.pictures import MOST_PIXELS, SMALLEST_PICTURE
from app.http.render import errors, json_body
from app.http.request import asked, owner_of, request_id_of, service_of, waited
from app.http.resolve import Adapters
from app.http.schemas import MOST_CONTROLS, Name, validated
from app.images import read_picture
from app.jobs.record import Drawn
from app.settings import Settings
from models import upscaling
from models.base import Enlargement, ResamplingName, Upscaler

router = APIRouter(tags=["AUTOMATIC1111"])
NONE = "None"
RESAMPLED: tuple[ResamplingName, ...] = get_args(ResamplingName)
LONGEST_SIDE = 2**13  # pixels of a result
_FACES = "Faces are not restored here. Set adetailer, a field of /api/generate, where they are drawn."
FOREIGN = {
    "gfpgan_visibility": Foreign((0,), _FACES),
    "codeformer_visibility": Foreign((0,), _FACES),
    "show_extras_results": Foreign((True,), "Pictures are in the answer and kept nowhere."),
    "codeformer_weight": Foreign(None, _FACES),
    "upscale_first": Foreign(None, _FACES),
}
_Side = Annotated[int, Field(ge=1, le=LONGEST_SIDE)]
_Picture = Annotated[str, Field(min_length=1)]


class Extras(BaseModel):
    """What the two addresses share."""

    model_config = ConfigDict(strict=True, extra="forbid")

    resize_mode: Literal[0, 1] = Field(0, description="0: by upscaling_resize; 1: to cover upscaling_resize_w × _h.")
    upscaling_resize: float = Field(
        2.0, gt=0, le=8, allow_inf_nan=False, description="How many times as wide and high, in mode 0."
    )
    upscaling_resize_w: _Side = Field(512, description="Pixels, in mode 1.")
    upscaling_resize_h: _Side = Field(512, description="Pixels, in mode 1.")
    upscaling_crop: bool = Field(True, description="In mode 1: cut off what overhangs.")
    upscaler_1: Name = Field(NONE, description="As GET /sdapi/v1/upscalers lists them; None: leave the picture alone.")
    upscaler_2: Name = Field(NONE, description="One whose result is blended in.")
    extras_upscaler_2_visibility: float = Field(
        0.0, ge=0, le=1, allow_inf_nan=False, description="The share of upscaler_2, 0 to 1."
    )

    @property
    @abstractmethod
    def uploads(self) -> dict[str, str]:
        """Each picture by the name of its field."""


class SingleExtras(Extras):
    title: ClassVar = "ExtrasSingleImageRequest"
    image: _Picture = Field(description="Base64 or a data URL. Never a path or a URL.")

    @property
    def uploads(self) -> dict[str, str]:
        return {"image": self.image}


class FileData(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    data: _Picture = Field(description="Base64 or a data URL.")
    name: Annotated[str, Field(max_length=1000)] = Field("", description="Taken and not read.")


class BatchExtras(Extras):
    title: ClassVar = "ExtrasBatchImagesRequest"
    imageList: Annotated[list[FileData], Field(min_length=1, max_length=10)] = Field(  # its name there
        description=f"1 to 10 pictures, of {MOST_PIXELS} pixels together at most."
    )

    @property
    def uploads(self) -> dict[str, str]:
        return {f"imageList.{index}.data": file.data for index, file in enumerate(self.imageList)}


class SingleAnswer(BaseModel):
    html_info: str = Field(description="What was done, in HTML.")
    image: str = Field(description="Base64, PNG.")


class BatchAnswer(BaseModel):
    html_info: str = Field(description="What was done, in HTML.")
    images: list[str] = Field(description="Base64, PNG, in their order.")


def schemas() -> dict[str, dict[str, Any]]:
    """The bodies' JSON Schemas by name, for OpenAPI."""
    found = {}
    for kind in (SingleExtras, BatchExtras):
        schema = kind.model_json_schema()
        schema["properties"] |= {name: one.schema({}) for name, one in FOREIGN.items()}
        found[kind.title] = schema
    return found


def _enlarging(summary: str, kind: type[SingleExtras | BatchExtras], answer: type[BaseModel]) -> dict[str, Any]:
    """What OpenAPI says of an address that enlarges."""
    return {
        "summary": summary,
        "response_model": answer,
        "responses": errors(401, 409, 413, 422, 429, 500, 503, 504),
        "openapi_extra": json_body(kind.title),
    }


@router.post("/sdapi/v1/extra-single-image", **_enlarging("Enlarge a picture", SingleExtras, SingleAnswer))
async def single(request: Request) -> Response:
    """By one upscaler or two, blended. Nothing is drawn over it, and its metadata is left out."""
    return await _enlarge(request, SingleExtras)


@router.post("/sdapi/v1/extra-batch-images", **_enlarging("Enlarge several pictures", BatchExtras, BatchAnswer))
async def batch(request: Request) -> Response:
    """As extra-single-image, each by itself."""
    return await _enlarge(request, BatchExtras)


@router.get("/controlnet/version", summary="Which units of ControlNet are understood", responses=errors(401))
async def version() -> dict[str, int]:
    """The version of its API, which clients ask for to see whether it is there."""
    return {"version": 3}


@router.get("/controlnet/model_list", summary="The ControlNets that a unit can name", responses=errors(401))
def model_list(request: Request) -> dict[str, list[str]]:
    """Those of GET /api/controlnets."""
    return {"model_list": list(Adapters(service_of(request).settings).controlnets.files())}


@router.get("/controlnet/module_list", summary="What can be made of a unit's picture", responses=errors(401))
async def module_list() -> dict[str, Any]:
    """Other maps are made by the client."""
    detail = {"model_free": False, "sliders": []}
    return {"module_list": list(PREPROCESSORS), "module_detail": dict.fromkeys(PREPROCESSORS, detail)}


@router.get("/controlnet/settings", summary="How many units a request can have", responses=errors(401))
async def unit_count() -> dict[str, int]:
    """As many as control can have."""
    return {"control_net_unit_count": MOST_CONTROLS}


async def _enlarge(request: Request, kind: type[SingleExtras | BatchExtras]) -> Response:
    service = service_of(request)
    async with asked(request) as body:
        rest, _ = translated(body, FOREIGN)
        options = validated(kind, {name: value for name, value in rest.items() if value is not None})
        upscalers = _upscalers(options, Adapters(service.settings))
        service.engine.admit(None)  # nothing is decoded where there is no room for it
        work = partial(_job, options, upscalers, request_id_of(request), service.settings)
        job = await asyncio.get_running_loop().run_in_executor(service.resolver.decoders, work)
        del body, rest, options, work
    record = await service.jobs.submit(job, owner_of(request), ephemeral=True, api=API)
    done = await waited(request, record)
    return await asyncio.to_thread(lambda: JSONResponse(_answer(done, job.work, kind)))


def _upscalers(options: Extras, adapters: Adapters) -> tuple[Upscaler | ResamplingName, ...]:
    """Raises Invalid for a name that is none."""
    found: list[Upscaler | ResamplingName] = []
    for field in ("upscaler_1", "upscaler_2"):
        name = getattr(options, field)
        if name == NONE:
            continue
        built_in = next((one for one in RESAMPLED if one == name), None)
        if (one := built_in or adapters.upscaler(name, field)) is not None:
            found.append(one)
    # As there: without the first the second is not read.
    used = 0 if options.upscaler_1 == NONE else 2 if options.extras_upscaler_2_visibility else 1
    return tuple(found[:used])


def _job(
    options: SingleExtras | BatchExtras,
    upscalers: tuple[Upscaler | ResamplingName, ...],
    job_id: str,
    settings: Settings,
) -> UpscaleJob:
    """Decodes the pictures, which may take seconds. Raises Invalid and PictureTooLarge."""
    pictures, room = [], MOST_PIXELS
    for field, upload in options.uploads.items():
        picture = read_picture(upload, field=field, max_pixels=room)
        if min(picture.size) < SMALLEST_PICTURE and any(isinstance(one, Upscaler) for one in upscalers):
            raise Invalid(
                f"{field} has {picture.width}×{picture.height} pixels; a network sees nothing in less than "
                f"{SMALLEST_PICTURE} a side. Take Lanczos or Nearest, or send a larger picture.",
                field=field,
            )
        room -= picture.width * picture.height
        pictures.append(picture)
    to = (options.upscaling_resize_w, options.upscaling_resize_h) if options.resize_mode else None
    work = Enlargement(
        pictures=tuple(pictures),
        upscalers=upscalers,
        blend=options.extras_upscaler_2_visibility,
        factor=options.upscaling_resize,
        size=to,
        crop=options.upscaling_crop,
    )
    pixels = sum(math.prod(work.target(picture)) for picture in pictures)
    if upscalers and pixels > upscaling.MOST_PIXELS:
        field = "upscaling_resize_w" if to else "upscaling_resize"
        raise Invalid(
            f"{field} asks for {pixels} pixels, more than the {upscaling.MOST_PIXELS} that a request can have. Ask for "
            "less, or send a smaller picture.",
            field=field,
        )
    return UpscaleJob(id=job_id, work=work, deadline_seconds=settings.deadline_seconds)


def _answer(done: Drawn, work: Enlargement, kind: type[SingleExtras | BatchExtras]) -> dict[str, Any]:
    """Its size makes it a thread's work."""
    pictures = [base64.b64encode(picture).decode("ascii") for picture in done.images]
    said = f"<p>{escape(', '.join(_info(work)))}</p>"
    return {"html_info": said, **({"image": pictures[0]} if kind is SingleExtras else {"images": pictures})}


def _info(work: Enlargement) -> list[str]:
    """AUTOMATIC1111's words for it."""
    if not work.upscalers:
        return []
    sizes = [f"upscale by: {work.factor:g}"] if work.size is None else [f"upscale to: {work.size[0]}x{work.size[1]}"]
    if work.size is not None and work.crop:
        sizes.append(f"crop to: {work.size[0]}x{work.size[1]}")
    names = [f"upscaler{number}: {name}" for number, name in zip(("", " 2"), work.names, strict=False)]
    return [f"Postprocess {words}" for words in (*sizes, *names)]
