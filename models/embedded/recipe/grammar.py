"""The captions that the embedded models understand: weather × place × time.

A caption names each of the three once. Synonyms widen the vocabulary without widening the world. Fifteen of the 150
triples are held out of training, so that the report can tell composition from memory.
"""

from __future__ import annotations

import re
from dataclasses import astuple, dataclass
from itertools import product
from random import Random

WEATHERS: dict[str, tuple[str, ...]] = {
    "clear": ("sunny", "cloudless"),
    "misty": ("foggy", "hazy"),
    "snowy": ("wintry", "frosty"),
    "stormy": ("rainy", "thundery"),
    "starry": ("starlit",),
}
PLACES: dict[str, tuple[str, ...]] = {
    "forest": ("wood", "woodland"),
    "mountains": ("mountain", "peaks"),
    "desert": ("dunes",),
    "sea": ("ocean",),
    "hills": ("meadows", "hillside"),
    "island": ("islet",),
}
TIMES: dict[str, tuple[str, ...]] = {
    "dawn": ("sunrise", "daybreak"),
    "noon": ("midday",),
    "sunset": ("sundown",),
    "twilight": ("dusk",),
    "night": ("midnight",),
}

TEMPLATES = (
    "a {weather} {place} at {time}",
    "{weather} {place} at {time}",
    "{weather} {place}, {time}",
    "a {place} at {time}, {weather}",
    "{time}, a {weather} {place}",
    "a painting of a {weather} {place} at {time}",
)


@dataclass(frozen=True, slots=True, order=True)
class Triple:
    """One scene of the world: a key of each of the three tables."""

    weather: str
    place: str
    time: str

    def __str__(self) -> str:
        return f"a {self.weather} {self.place} at {self.time}"


TRIPLES = tuple(Triple(*names) for names in product(WEATHERS, PLACES, TIMES))

# Three of each weather and of each time, two or three of each place: every word and most pairs stay in training.
HELD_OUT = (
    Triple("clear", "forest", "dawn"),
    Triple("clear", "desert", "sunset"),
    Triple("clear", "hills", "night"),
    Triple("misty", "mountains", "sunset"),
    Triple("misty", "sea", "night"),
    Triple("misty", "island", "noon"),
    Triple("snowy", "desert", "night"),
    Triple("snowy", "hills", "noon"),
    Triple("snowy", "forest", "twilight"),
    Triple("stormy", "hills", "noon"),
    Triple("stormy", "forest", "twilight"),
    Triple("stormy", "desert", "dawn"),
    Triple("starry", "island", "twilight"),
    Triple("starry", "mountains", "dawn"),
    Triple("starry", "sea", "sunset"),
)
TRAINED = tuple(triple for triple in TRIPLES if triple not in HELD_OUT)


def caption(triple: Triple, rng: Random) -> str:
    """A way of saying `triple`; the plain words half of the time, a synonym otherwise."""

    def word(table: dict[str, tuple[str, ...]], name: str) -> str:
        return name if rng.random() < 0.6 else rng.choice(table[name])

    return rng.choice(TEMPLATES).format(
        weather=word(WEATHERS, triple.weather), place=word(PLACES, triple.place), time=word(TIMES, triple.time)
    )


def labels(triple: Triple) -> tuple[int, int, int]:
    """Positions of the triple's words in the three tables, the classes of the judges."""
    tables = (WEATHERS, PLACES, TIMES)
    return tuple(list(table).index(name) for table, name in zip(tables, astuple(triple), strict=True))  # type: ignore[return-value]


def _words() -> frozenset[str]:
    text = " ".join(TEMPLATES).replace("{", "").replace("}", "")
    named = (word for table in (WEATHERS, PLACES, TIMES) for name, others in table.items() for word in (name, *others))
    return frozenset(re.findall(r"[a-z]+", f"{text} {' '.join(named)} the an in with and")) - {
        "weather",
        "place",
        "time",
    }


WORDS = _words()
