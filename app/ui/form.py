"""What to draw: prompt, model, size, steps, seed, sampler; passes, LoRAs and embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import streamlit as st

from app.ui.request import ASPECTS, DEFAULTS, Model, aspect_of, reads_negative_prompt, size_of

OWN_SAMPLER = "euler"  # with which the server pairs a scheduler that comes without a sampler
_LARGEST_SEED = 2**32 - 1
Adapters = Mapping[str, Sequence[str]]
"""The names of GET /api/adapters."""


def held(name: str) -> Any:
    """What the widget of that name holds; one that was not shown yet, or is not any more, what it begins with."""
    return st.session_state.get(name, DEFAULTS[name])


def brought() -> bool:
    """Whether the browser comes with widgets that this session does not know: the server was restarted under it.

    It is told by a widget that nobody sees: it is off where the page is loaded, and on from the next run on.
    """
    state = st.session_state
    first = "settled" not in state
    state["settled"] = True
    if not first:
        state["begun"] = True
    with st.container(key="begun-box"):
        return st.checkbox("begun", key="begun") and first


def begin(default: str, models: Mapping[str, Model], adapters: Adapters, *, as_brought: bool) -> Model:
    """The chosen model, the widgets' values being made to fit it and what is there.

    `as_brought`: leave them as the browser has them, for the run that takes them over.
    """
    state = st.session_state
    if as_brought:
        return models.get(held("model") or default, models[default])
    for name, value in DEFAULTS.items():
        state.setdefault(name, value)
    if state["model"] not in models:
        state["model"] = default
    model = models[state["model"]]
    if state["sampler"] not in (None, *model["samplers"]):
        state["sampler"] = None
    if state["scheduler"] not in (None, *_schedulers(model)):
        state["scheduler"] = None
    if state["upscale"] not in (None, *adapters["upscalers"]):
        state["upscale"] = None
    if state["control_model"] not in adapters["controlnets"]:
        state["control_model"] = next(iter(adapters["controlnets"]), None)
    state["loras"] = [name for name in state["loras"] if name in adapters["loras"]]
    state["aspect"] = aspect_of(state["width"], state["height"], model)
    return model


def values() -> dict[str, Any]:
    """What the widgets hold, by name."""
    weights = {f"lora-{name}": st.session_state.get(f"lora-{name}", 1.0) for name in held("loras")}
    return {name: held(name) for name in DEFAULTS} | weights


def put(values: Mapping[str, Any]) -> None:
    """Have the widgets hold `values`. Before they are shown: in a callback."""
    for name, value in values.items():
        st.session_state[name] = value


def prompt() -> None:
    st.text_area("Prompt", key="prompt", max_chars=10_000, height=90)


def size(model: Model) -> None:
    """Aspect buttons, and the pixels by number."""
    st.pills("Aspect", ASPECTS, key="aspect", on_change=_take_aspect, args=(model,), wrap=True)
    multiple = model["size_multiple"]
    with st.container(horizontal=True, key="pixels"):
        for label in ("Width", "Height"):
            hint = f"Pixels, a multiple of {multiple}."
            st.number_input(label, 64, 2048, step=multiple, key=label.lower(), help=hint, width=104)
        st.number_input("Pictures", 1, 10, key="num_images", help="Number i is drawn from seed + i.", width=104)


def seed() -> None:
    """Kept, or a new one each time."""
    with st.container(horizontal=True, vertical_alignment="bottom", key="seed-row"):
        st.number_input("Seed", 0, _LARGEST_SEED, key="seed", placeholder="a new one each time", width=216)
        st.button(
            "",
            key="dice",
            icon=":material/casino:",
            on_click=put,
            args=({"seed": None},),
            disabled=held("seed") is None,
            help="A new seed each time.",
        )


def finer(model: Model, models: Mapping[str, Model]) -> None:
    """The model, and what most leave to it."""
    st.selectbox(
        "Model",
        list(models),
        key="model",
        format_func=lambda name: name if models[name]["available"] else f"{name} (not available)",
    )
    if not model["available"]:
        st.warning(f"{model['name']} is not available. {model['reason']}")
    with st.expander("Steps, sampler, negative prompt"):
        reads = reads_negative_prompt(model)
        st.text_input(
            "Negative prompt",
            key="negative_prompt",
            max_chars=10_000,
            disabled=not reads,
            placeholder="what it must not show" if reads else f"{model['name']} reads none: it is a transformer",
        )
        steps, guidance = st.columns(2)
        steps.number_input("Steps", 1, 150, key="steps", placeholder=f"{model['steps']} (the model's)")
        guidance.number_input(
            "Guidance scale",
            0.0,
            30.0,
            step=0.5,
            key="guidance_scale",
            placeholder=f"{model['guidance_scale']:g} (the model's)",
        )
        sampler, scheduler = st.columns(2)
        sampler.selectbox("Sampler", list(model["samplers"]), key="sampler", placeholder="the model's own")
        scheduler.selectbox(
            "Scheduler",
            _schedulers(model),
            key="scheduler",
            placeholder="the model's own",
            help="How the sampler's steps are spaced.",
        )
        st.toggle("Previews while drawing", key="enable_preview")


def passes(adapters: Adapters) -> None:
    """What a picture goes through besides."""
    with st.expander("Passes"):
        st.toggle("Hires-fix", key="hires_fix", help="Draw at half the size first, then enlarge and refine.")
        st.toggle("ADetailer", key="adetailer", help="Find faces and draw them anew in detail.")
        st.toggle("Multi-scale", key="multiscale_enabled", help="Run some steps at lower resolution.")
        upscalers = list(adapters["upscalers"])
        st.selectbox(
            "Upscaler",
            upscalers,
            key="upscale",
            placeholder="none" if upscalers else "none here: lay one into upscalers/",
            disabled=not upscalers,
            help="Enlarges the finished picture, as many times as it was made for.",
        )


def styles(adapters: Adapters) -> None:
    """LoRAs with their weights, and embeddings, which a prompt calls by their names."""
    loras, embeddings = list(adapters["loras"]), list(adapters["embeddings"])
    with st.expander("LoRAs, embeddings"):
        st.multiselect(
            "LoRAs",
            loras,
            key="loras",
            placeholder="none" if loras else "none here: lay one into loras/",
            disabled=not loras,
            max_selections=16,
        )
        for name in held("loras"):
            st.session_state.setdefault(f"lora-{name}", 1.0)
            st.slider(f"Weight of {name}", -2.0, 2.0, step=0.05, key=f"lora-{name}")
        if embeddings:
            st.pills("Embeddings", embeddings, key="embedding", on_change=_take_embedding, help="Into the prompt.")
        else:
            st.caption("No embeddings here: lay one into embeddings/, and a prompt calls it by its name.")


def _take_aspect(model: Model) -> None:
    if (name := st.session_state["aspect"]) is not None:
        st.session_state["width"], st.session_state["height"] = size_of(ASPECTS[name], model)


def _take_embedding() -> None:
    if (name := st.session_state["embedding"]) is not None:
        st.session_state["prompt"] = f"{st.session_state['prompt'].rstrip()} {name}".strip()
        st.session_state["embedding"] = None


def _schedulers(model: Model) -> list[str]:
    return list(model["samplers"].get(held("sampler") or OWN_SAMPLER, ()))
