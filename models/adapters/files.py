"""Weights that a client asks for by name: looked up among the files of a folder, never joined to a path."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from models.errors import ModelError

SUFFIX = ".safetensors"
CONFIG = "config.json"
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_NAMED = 3
_LETTERS = 80


class UnknownFile(ModelError):
    """No file of that name may be loaded. The message names the nearest ones, never a folder of this machine."""


@dataclass(frozen=True, slots=True)
class WeightsFolder:
    """The safetensors files in `path` and its subfolders, by name without suffix; none if there is no such folder.

    A name is a path from the folder, with slashes. A link out of the folder and what lies behind a dot are none of
    them. `kind` is what a message calls them, in the singular. diffusers: a folder with a config.json is one too, as a
    whole. embedded: those that come with the service, which one of the operator's of the same name goes before.
    """

    path: Path | None
    kind: str
    diffusers: bool = False
    embedded: Mapping[str, Path] = field(default_factory=dict)

    def files(self) -> dict[str, Path]:
        """Name → real path, sorted by name."""
        own = {name: real for name, suffix, real in self._contents() if suffix == SUFFIX or real.is_dir()}
        return dict(sorted({**self.embedded, **own}.items()))

    def find(self, name: str) -> tuple[str, Path]:
        """The file called `name`, with or without its suffix, without its folders where no other is called so.

        Returns its whole name and its real path. Raises UnknownFile.
        """
        files = self.files()
        stem = name.removesuffix(SUFFIX)
        if stem in files:
            return stem, files[stem]
        same = [one for one in files if one.endswith(f"/{stem}")] if "/" not in stem and stem else []
        if len(same) == 1:
            return same[0], files[same[0]]
        if same:
            raise UnknownFile(f"More than one {self.kind} is called {_shown(name)!r}: give one of {', '.join(same)}.")
        raise UnknownFile(f"There is no {self.kind} {_shown(name)!r}. {self._remedy(name, files)}")

    def _remedy(self, name: str, files: dict[str, Path]) -> str:
        if name.endswith(PICKLES) or any(other == name and suffix in PICKLES for other, suffix, _ in self._contents()):
            return f"Pickled files can run code when they are read and are never loaded; convert it to {SUFFIX}."
        near = difflib.get_close_matches(name[:_LETTERS], files, n=_NAMED, cutoff=0.4) or list(files)[:_NAMED]
        if not near:
            return f"The server has none; its operator can put {SUFFIX} files into the configured folder."
        return f"Nearest: {', '.join(near)}."

    def _contents(self) -> Iterator[tuple[str, str, Path]]:
        """Each one's name, its suffix and what it really is, sorted; links out of the folder left out."""
        if self.path is None or not self.path.is_dir():
            return
        root = self.path.resolve()
        found = []
        for folder, inner, names in os.walk(root):
            if self.diffusers and CONFIG in names and Path(folder) != root:
                inner.clear()
                found.append(Path(folder))
                continue
            inner[:] = [name for name in inner if not name.startswith(".")]
            found += [Path(folder, name) for name in names if not name.startswith(".")]
        for one in sorted(found):
            if (one.is_file() or one.is_dir()) and (real := one.resolve()).is_relative_to(root):
                suffix = "" if real.is_dir() else one.suffix
                yield one.relative_to(root).as_posix().removesuffix(suffix), suffix, real


def _shown(name: str) -> str:
    """A client's own word, fit for a message."""
    name = name.encode("utf-8", "backslashreplace").decode("utf-8")
    return name if len(name) <= _LETTERS else f"{name[:_LETTERS]}…"
