"""Prompts to begin with: scenes for the embedded models, examples for the others, and what was asked before."""

from __future__ import annotations

import streamlit as st

from app.client import Client, ClientError
from app.ui.form import held
from app.ui.refusal import explained
from app.ui.request import Model

# What the embedded models were trained on; their recipe's grammar has the same words, and a test compares.
WEATHERS = ("clear", "misty", "snowy", "stormy", "starry")
PLACES = ("forest", "mountains", "desert", "sea", "hills", "island")
TIMES = ("dawn", "noon", "sunset", "twilight", "night")
PARTS = {"weather": WEATHERS, "place": PLACES, "time": TIMES}
EXAMPLES = (
    "a lighthouse on a cliff at sunset, oil painting",
    "portrait of an old sailor, soft window light",
    "a red fox in fresh snow, telephoto",
    "interior of a glass house full of plants, morning",
)
_ASKED_BEFORE = 100  # jobs that are looked through for prompts
_LISTED = 20


def scene(weather: str, place: str, time: str) -> str:
    return f"a {weather} {place} at {time}"


def show(server: Client, model: Model) -> None:
    """Below the prompt: what puts one there by a click."""
    if model["render_sizes"]:
        _words()
    else:
        st.pills("Examples", EXAMPLES, key="example", on_change=_example, label_visibility="collapsed", wrap=True)
    _earlier(server)


def begin() -> None:
    """The rows of a scene show the words of the prompt."""
    words = held("prompt").split()
    for part, choices in PARTS.items():
        st.session_state[f"scene-{part}"] = next((word for word in choices if word in words), None)


def _words() -> None:
    with st.container(key="scene"):
        for part, choices in PARTS.items():
            st.pills(
                part.capitalize(),
                choices,
                key=f"scene-{part}",
                on_change=_compose,
                label_visibility="collapsed",
                wrap=True,
            )


def _compose() -> None:
    state = st.session_state
    parts = [state[f"scene-{part}"] or choices[0] for part, choices in PARTS.items()]
    state["prompt"] = scene(*parts)


def _example() -> None:
    if example := st.session_state["example"]:
        st.session_state["prompt"] = example


def _take(prompt: str) -> None:
    st.session_state["prompt"] = prompt


def _earlier(server: Client) -> None:
    listed = st.popover("Earlier prompts", icon=":material/history:", key="earlier", on_change="rerun")
    if not listed.open:
        return
    with listed:
        try:
            asked = [job.data["request"] or {} for job in server.jobs(_ASKED_BEFORE)]
        except ClientError as error:
            st.error(explained(error))
            return
        prompts = list(dict.fromkeys(str(fields["prompt"]) for fields in asked if "prompt" in fields))
        if not prompts:
            st.caption("Nothing asked yet.")
        for number, prompt in enumerate(prompts[:_LISTED]):
            st.button(_short(prompt), key=f"earlier-{number}", type="tertiary", on_click=_take, args=(prompt,))


def _short(prompt: str) -> str:
    return escaped(prompt if len(prompt) <= 80 else f"{prompt[:79]}…")


def escaped(text: str) -> str:
    """A prompt is no Markdown."""
    return "".join(f"\\{char}" if char in r"\`*_{}[]()#+-.!|$:~<>" else char for char in text.replace("\n", " "))
