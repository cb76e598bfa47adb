"""What a row of checkpoint_files.py is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from models.base import Prediction
from models.loading.recognise import WORDS, Role
from tests.compatibility.layouts import Layout, autoencoder, clip_l, holding, t5
from tests.compatibility.rows import FileRow, Group
from tests.models.original import stable_diffusion


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRow(FileRow):
    """A file or folder `ink`. model: the family of the networks that it is made of, "" where of none.

    precision: see `test_checkpoints.written`. beside: what lies in files of its own → their precision; Stable
    Diffusion's autoencoder lies in a whole checkpoint. others: their layouts, in place of `BESIDE`'s. header: the
    file's metadata. scheduler: of a distilled model. drawn: it draws, too.
    """

    group: Group = "Checkpoint"
    layout: Layout
    precision: str = "F16"
    beside: Mapping[Role, str] = field(default_factory=dict)
    others: Mapping[Role, Layout] = field(default_factory=dict)
    header: Mapping[str, str] = field(default_factory=dict)
    prediction: Prediction = "epsilon"
    terminal_snr: bool = False
    scheduler: str = ""
    drawn: bool = False


BESIDE: Mapping[Role, Layout] = {"clip_l": clip_l, "t5": t5, "vae16": autoencoder, "vae4": stable_diffusion}
"""What the file of a part holds."""
PARTS: Mapping[Role, str] = {"clip_l": "F16", "t5": "F16", "vae16": "F32"}  # Flux's, as they are shared most
MISSING = "put what is missing into the folder of checkpoints"


def served(
    kind: str,
    model: str,
    layout: Layout,
    key: str,
    precision: str = "F16",
    beside: Mapping[Role, str] | None = None,
    **more: object,
) -> CheckpointRow:
    kind = f"{kind}, {precision}"
    if beside:
        parts = (f"{WORDS[role].partition(' ')[2]} ({of})" for role, of in beside.items())
        kind += f"; beside it {', '.join(parts)}"
    found = {"precision": precision, "beside": beside or {}, **more}
    return CheckpointRow(kind=kind, model=model, layout=layout, key=key, **found)  # type: ignore[arg-type]


def refused(kind: str, model: str, layout: Layout, key: str, reason: str) -> CheckpointRow:
    said = f"ink.safetensors {reason}."
    return CheckpointRow(kind=kind, model=model, layout=layout, key=key, said=said, refused=True)


def loose(kind: str, reason: str, shapes: Mapping[str, tuple[int, ...]]) -> CheckpointRow:
    return refused(kind, "", holding(shapes), next(iter(shapes), ""), reason)


def part(role: Role, model: str, layout: Layout, key: str, kind: str = "") -> CheckpointRow:
    words = WORDS[role]
    reason = f"is {words}: a part that models here take, and no model by itself"
    return refused(kind or f"{words.partition(' ')[2]} alone", model, layout, key, reason)
