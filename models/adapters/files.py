"""Weights that a client asks for by name: looked up among the files of a folder, never joined to a path."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from models.base import ModelError

SUFFIX = ".safetensors"
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_NAMED = 3
_LETTERS = 80


class UnknownFile(ModelError):
    """No file of that name may be loaded. The message names the nearest ones, never a folder of this machine."""


@dataclass(frozen=True, slots=True)
class WeightsFolder:
    """The safetensors files that lie directly in `path`, by name without suffix; none if there is no such folder.

    A file that is a link out of the folder is not one of them. `kind` is what a message calls them, in the singular.
    """

    path: Path | None
    kind: str

    def files(self) -> dict[str, Path]:
        """Name → real path, sorted by name."""
        return {file.stem: real for file, real in self._contents() if file.suffix == SUFFIX}

    def find(self, name: str) -> Path:
        """The real path of the file called `name`, given with or without its suffix. Raises UnknownFile."""
        files = self.files()
        stem = name.removesuffix(SUFFIX)
        if stem in files:
            return files[stem]
        raise UnknownFile(f"There is no {self.kind} {_shown(name)!r}. {self._remedy(name, files)}")

    def _remedy(self, name: str, files: dict[str, Path]) -> str:
        if name.endswith(PICKLES) or any(file.stem == name and file.suffix in PICKLES for file, _ in self._contents()):
            return f"Pickled files can run code when they are read and are never loaded; convert it to {SUFFIX}."
        near = difflib.get_close_matches(name[:_LETTERS], files, n=_NAMED, cutoff=0.4) or list(files)[:_NAMED]
        if not near:
            return f"The server has none; its operator can put {SUFFIX} files into the configured folder."
        return f"Nearest: {', '.join(near)}."

    def _contents(self) -> list[tuple[Path, Path]]:
        """Each file of the folder and what it really is, links out of the folder left out."""
        if self.path is None or not self.path.is_dir():
            return []
        root = self.path.resolve()
        pairs = [(file, file.resolve()) for file in sorted(root.iterdir()) if file.is_file()]
        return [(file, real) for file, real in pairs if real.is_relative_to(root)]


def _shown(name: str) -> str:
    """A client's own word, fit for a message."""
    name = name.encode("utf-8", "backslashreplace").decode("utf-8")
    return name if len(name) <= _LETTERS else f"{name[:_LETTERS]}…"
