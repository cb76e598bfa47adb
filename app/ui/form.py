"""What to draw: prompt, model, size, steps, seed, sampler."""

from __future__ import annotations

from collections.abc import Mapping

import streamlit as st

from app.ui.request import DEFAULTS, Model, reads_negative_prompt

OWN_SAMPLER = "euler"  # with which the server pairs a scheduler that comes without a sampler
_LARGEST_SEED = 2**32 - 1


def begin(default: str, models: Mapping[str, Model]) -> Model:
    """The chosen model, the widgets' values being made to fit it."""
    state = st.session_state
    for name, value in DEFAULTS.items():
        state.setdefault(name, value)
    if state["model"] not in models:
        state["model"] = default
    model = models[state["model"]]
    if state["sampler"] not in (None, *model["samplers"]):
        state["sampler"] = None
    if state["scheduler"] not in (None, *_schedulers(model)):
        state["scheduler"] = None
    return model


def _schedulers(model: Model) -> list[str]:
    return list(model["samplers"].get(st.session_state["sampler"] or OWN_SAMPLER, ()))


def prompt() -> None:
    st.text_area("Prompt", key="prompt", max_chars=10_000, height=90)


def show(model: Model, models: Mapping[str, Model]) -> None:
    reads = reads_negative_prompt(model)
    st.text_input(
        "Negative prompt",
        key="negative_prompt",
        max_chars=10_000,
        disabled=not reads,
        placeholder="" if reads else f"{model['name']} reads none: it is a transformer",
    )
    st.selectbox(
        "Model",
        list(models),
        key="model",
        format_func=lambda name: name if models[name]["available"] else f"{name} (not available)",
    )
    if not model["available"]:
        st.warning(f"{model['name']} is not available. {model['reason']}")
    multiple = model["size_multiple"]
    width, height = st.columns(2)
    width.number_input("Width", 64, 2048, step=multiple, key="width", help=f"Pixels, a multiple of {multiple}.")
    height.number_input("Height", 64, 2048, step=multiple, key="height", help=f"Pixels, a multiple of {multiple}.")
    seed, images = st.columns(2)
    seed.number_input("Seed", 0, _LARGEST_SEED, key="seed", placeholder="random", help="Empty draws one.")
    images.number_input("Images", 1, 10, key="num_images", help="Number i is drawn from seed + i.")
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
