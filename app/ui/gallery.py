"""The caller's finished jobs, as the server keeps them: they outlive this page, and the server's restart."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import streamlit as st

from app.client import Client, ClientError, Job
from app.ui.difference import thumbnail
from app.ui.refusal import explained
from app.ui.scenes import escaped

AT_ONCE = 12  # cards, and as many more for each press of the button below
LEFT_OUT = "left_out"
"""In a job's request: the fields that the server does not keep, which held pictures."""
_THUMBNAILS = 512  # kept in the page's process, of all callers


@dataclass(eq=False)
class Drawn:
    """A job that is done. `request` is what was asked, as it is kept; `answer` what was said of the pictures."""

    job: Job
    request: Mapping[str, Any]
    answer: Mapping[str, Any]
    pictures: tuple[bytes, ...]
    plain: Drawn | None = None  # the same seeds uncached, once it was asked for

    @classmethod
    def of(cls, job: Job) -> Drawn:
        """Raises ClientError for one that is not done, or no longer kept."""
        result = job.result()
        return cls(job, job.data.get("request") or {}, result.report, result.images)

    @property
    def cached(self) -> bool:
        return bool(self.answer["cache"]["strategy"] != "none")

    @property
    def comparable(self) -> bool:
        """Whether there is a picture without a cache to hold it against."""
        return self.cached and LEFT_OUT not in self.request

    @property
    def prompt(self) -> str:
        return str(self.request.get("prompt", "a picture"))

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
        if "sampler" in self.request:
            parts.append(self.request["sampler"])
        match cache["strategy"]:
            case "deepcache":
                parts.append(f"DeepCache {cache['interval']}, {cache['depth']}")
            case "first_block":
                parts.append(f"FBCache {self.request.get('fbcache_threshold', cache.get('threshold', ''))}".rstrip())
            case "fitted":
                parts.append(f"fitted forecast, {cache['computed']} calls of {cache['fitted_calls']}")
            case _:
                parts.append("uncached")
        return " · ".join(parts)


@dataclass(frozen=True, slots=True)
class Card:
    """What the gallery shows of a job: a JPEG, and words."""

    picture: bytes
    count: int
    settings: str
    comparable: bool


@dataclass(frozen=True, slots=True)
class Actions:
    """What can be done with a picture: each takes the job, as it was opened, and the number of its picture."""

    open: Callable[[Drawn], None]
    reuse: Callable[[Drawn], None]
    begin_from: Callable[[Drawn, int], None]
    uncached: Callable[[Drawn], None]
    upscale: Callable[[Drawn], None]
    delete: Callable[[Drawn], None]


def show(server: Client, owner: str, actions: Actions, upscaler: str | None, *, busy: bool) -> None:
    """`owner`: whose gallery it is, so that thumbnails of one caller are not another's."""
    shown = st.session_state.setdefault("gallery-shown", AT_ONCE)
    try:
        jobs = [job for job in server.jobs(min(200, 4 * shown + 1)) if job.state in ("done", "queued", "running")]
    except ClientError as error:
        st.error(explained(error))
        return
    if failure := st.session_state.get("gallery-failure"):
        st.error(failure)
    st.session_state["gallery-failure"] = None
    if not jobs:
        st.info("Nothing drawn yet. What you generate is kept here by the server, over its restarts too.")
        return
    with st.container(horizontal=True, key="gallery"):
        for job in jobs[:shown]:
            with st.container(border=True, width=340, key=f"card-{job.id}"):
                _card(job, owner, actions, upscaler, busy=busy)
    st.caption("The server keeps these until it needs the room or their time is over: the oldest go first.")
    if len(jobs) > shown:
        st.button("More", key="gallery-more", on_click=_more, icon=":material/expand_more:")


def _more() -> None:
    st.session_state["gallery-shown"] += AT_ONCE


def _card(job: Job, owner: str, actions: Actions, upscaler: str | None, *, busy: bool) -> None:
    prompt = str((job.data.get("request") or {}).get("prompt", ""))
    if job.state != "done":
        st.caption(f"{'waits' if job.state == 'queued' else 'is drawn'}: {escaped(prompt)}")
        return
    try:
        card = _seen(owner, job.id, job)
    except ClientError as error:  # forgotten since it was listed
        st.caption(explained(error))
        return
    st.image(card.picture, alt=prompt or "a picture", width="stretch")
    words = f"{card.count} × " if card.count > 1 else ""
    st.caption(f"{words}{escaped(prompt if len(prompt) <= 60 else prompt[:59] + '…')}", help=card.settings)
    with st.container(horizontal=True):
        st.button("Open", key=f"open-{job.id}", on_click=_do, args=(job, actions.open))
        menu = st.popover("", icon=":material/more_vert:", key=f"menu-{job.id}", on_change="rerun", help="More")
        if menu.open:
            with menu:
                buttons(
                    lambda action, *more: _do(job, action, *more),
                    lambda: Drawn.of(job).pictures[0],
                    job.id,
                    actions,
                    upscaler,
                    busy=busy,
                    comparable=card.comparable,
                    place="card-",
                )


def buttons(
    do: Callable[..., None],
    data: bytes | Callable[[], bytes],
    identity: str,
    actions: Actions,
    upscaler: str | None,
    *,
    busy: bool,
    comparable: bool,
    number: int = 0,
    place: str = "",
) -> None:
    """Of one picture. `do`: calls an action with the opened job and what else it takes; `number`: of the picture.

    `place`: before the job in the widgets' keys, since a picture's card and its result are on one page.
    """

    def button(label: str, name: str, icon: str, *arguments: Any, hint: str | None = None, off: bool = False) -> None:
        st.button(
            label,
            key=f"{name}-{place}{identity}",
            icon=f":material/{icon}:",
            on_click=do,
            args=arguments,
            help=hint,
            disabled=off,
        )

    button("Reuse settings", "reuse", "tune", actions.reuse)
    button(
        "Begin from it", "begin", "image", actions.begin_from, number, hint="img2img: draw over it, or a part of it."
    )
    button(
        "Redraw uncached",
        "uncached",
        "hourglass",
        actions.uncached,
        off=busy or not comparable,
        hint="The same seed without a cache.",
    )
    none = "No upscaler is here: lay one into upscalers/."
    button("Upscale", "upscale", "open_in_full", actions.upscale, off=busy or upscaler is None, hint=upscaler or none)
    name = f"wavespeed-{identity[:8]}-{number}.png"
    hint = "With its settings as text."
    st.download_button(
        "Download",
        data,
        name,
        "image/png",
        key=f"png-{place}{identity}",
        on_click="ignore",
        icon=":material/download:",
        help=hint,
    )
    button("Delete", "delete", "delete", actions.delete, hint="With its pictures, for good.")


def _do(job: Job, action: Callable[..., None], *more: Any) -> None:
    """Of a card: the job is fetched first."""
    try:
        action(Drawn.of(job), *more)
    except ClientError as error:
        st.session_state["gallery-failure"] = explained(error)


@st.cache_data(max_entries=_THUMBNAILS, show_spinner=False)
def _seen(owner: str, identity: str, _job: Job) -> Card:
    drawn = Drawn.of(_job)
    return Card(thumbnail(drawn.pictures[0]), len(drawn.pictures), drawn.settings(), drawn.comparable)


def under_way(server: Client) -> Job | None:
    """A job of the caller's that is not done: this page was loaded anew meanwhile. None where the server is away."""
    try:
        found = [job for job in server.jobs(1) if not job.ended]
    except ClientError:
        return None
    return found[0] if found and found[0].data["created"] > time.time() - 3600 else None
