"""LoRAs and embeddings by name: what a request may use of the operator's folders, and GET /api/adapters."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import APIRouter, Request

from app.api.answers import errors
from app.api.schemas import GenerateRequest
from app.api.service import service_of
from app.engine.base import ModelInfo
from app.errors import Invalid
from app.settings import Settings
from models.base import Embedding, Lora
from models.embedding import mentioned
from models.files import UnknownFile, WeightsFolder
from models.prompt import BadPrompt, parse

router = APIRouter(tags=["models"])


@router.get("/api/adapters", summary="The LoRAs and embeddings that a request can name", responses=errors(401))
def adapters(request: Request) -> dict[str, list[str]]:
    """Read from the folders at each call. Whether one fits a model is seen when it is used."""
    folders = Adapters.of(service_of(request).settings)
    return {"loras": list(folders.loras.files()), "embeddings": list(folders.embeddings.files())}


@dataclass(frozen=True, slots=True)
class Adapters:
    """The operator's two folders."""

    loras: WeightsFolder
    embeddings: WeightsFolder

    @classmethod
    def of(cls, settings: Settings) -> Adapters:
        return cls(WeightsFolder(settings.lora_folder, "LoRA"), WeightsFolder(settings.embedding_folder, "embedding"))

    def named(self, request: GenerateRequest) -> tuple[Lora, ...]:
        """The LoRAs of the request. Raises Invalid for a name that is not a file of the folder."""
        found = []
        for index, lora in enumerate(request.loras):
            try:
                path = self.loras.find(lora.name)
            except UnknownFile as error:
                raise Invalid(str(error), field=f"loras.{index}.name") from None
            found.append(Lora(name=path.stem, path=path, weight=lora.weight))
        return tuple(found)

    def mentioned(self, request: GenerateRequest, model: ModelInfo) -> tuple[tuple[Embedding, ...], list[str]]:
        """The embeddings whose names the prompts hold, and what to tell the user of them."""
        found = mentioned(self.embeddings.files(), (request.prompt, request.negative_prompt))
        if not found or model.cache != "first_block":
            return found, []
        names = ", ".join(embedding.name for embedding in found)
        return (), [f"{model.name} takes no embeddings; these names were read as plain words: {names}."]


NONE = Adapters(WeightsFolder(None, "LoRA"), WeightsFolder(None, "embedding"))


def check_prompts(request: GenerateRequest, model: ModelInfo) -> None:
    """Raises Invalid for weights that nothing can be drawn with. To a transformer, brackets are plain text."""
    if model.cache == "first_block":
        return
    for name in ("prompt", "negative_prompt"):
        try:
            parse(getattr(request, name))
        except BadPrompt as error:
            raise Invalid(str(error), field=name) from None
