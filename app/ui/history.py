"""What was drawn in this session, newest first, with settings to draw by again."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import streamlit as st

from app.client import Generated
from app.ui.difference import thumbnail
from app.ui.request import DEFAULTS

LONGEST = 30  # runs
_numbers = itertools.count(1)


@dataclass(eq=False)
class Drawn:
    """A finished request. `values` are the widgets' at the time; `answer` is the server's, without its pictures."""

    values: Mapping[str, Any]
    body: Mapping[str, Any]
    answer: Mapping[str, Any]
    pictures: tuple[bytes, ...]
    plain: Drawn | None = None  # the same seeds uncached, once it was asked for
    number: int = field(default_factory=lambda: next(_numbers))
    thumbnail: bytes = b""

    @classmethod
    def of(cls, values: Mapping[str, Any], body: Mapping[str, Any], generated: Generated) -> Drawn:
        return cls(values, body, generated.report, generated.images, thumbnail=thumbnail(generated.image))

    @property
    def cached(self) -> bool:
        return bool(self.answer["cache"]["strategy"] != "none")

    @property
    def prompt(self) -> str:
        return str(self.body["prompt"])

    @property
    def hit_rate(self) -> float:
        return float(self.answer["cache"]["hit_rate"])

    @property
    def denoise_seconds(self) -> float:
        return float(self.answer["timings"]["denoise_seconds"])

    def settings(self) -> str:
        """In a line."""
        answer, cache = self.answer, self.answer["cache"]
        parts = [answer["model"], f"{answer['width']}×{answer['height']}", f"{answer['steps']} steps"]
        parts.append(f"seed {answer['seeds'][0]}")
        if "sampler" in self.body:
            parts.append(self.body["sampler"])
        match cache["strategy"]:
            case "deepcache":
                parts.append(f"DeepCache {cache['interval']}, {cache['depth']}")
            case "first_block":
                parts.append(f"FBCache {self.body['fbcache_threshold']:g}")
            case _:
                parts.append("uncached")
        return " · ".join(parts)


def runs() -> list[Drawn]:
    """Newest first."""
    kept: list[Drawn] = st.session_state.setdefault("history", [])
    return kept


def add(drawn: Drawn) -> None:
    runs().insert(0, drawn)
    del runs()[LONGEST:]


def _reuse(drawn: Drawn) -> None:
    for name in DEFAULTS:
        st.session_state[name] = drawn.values[name]
    st.session_state["seed"] = drawn.answer["seeds"][0]
    st.session_state["model"] = drawn.answer["model"]
    _show(drawn)


def _show(drawn: Drawn) -> None:
    st.session_state["shown"] = drawn
    st.session_state["tab"] = "Draw"


def show() -> None:
    if not runs():
        st.info("Nothing drawn yet. What you generate is listed here until you close the page.")
    for drawn in runs():
        with st.container(border=True, key=f"run-{drawn.number}"):
            picture, words = st.columns([1, 3], vertical_alignment="center")
            picture.image(drawn.thumbnail, alt=drawn.prompt)
            words.markdown(f"**{_escaped(drawn.prompt)}**")
            words.caption(drawn.settings())
            words.caption(f"denoised in {drawn.denoise_seconds:.2f} s, hit rate {drawn.hit_rate:.2f}")
            with words.container(horizontal=True):
                st.button("Reuse settings", key=f"reuse-{drawn.number}", on_click=_reuse, args=(drawn,))
                st.button("Show", key=f"show-{drawn.number}", on_click=_show, args=(drawn,))


def _escaped(text: str) -> str:
    """A prompt is no Markdown."""
    return "".join(f"\\{char}" if char in r"\`*_{}[]()#+-.!|$:~<>" else char for char in text.replace("\n", " "))
