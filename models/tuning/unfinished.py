"""What a calibration has measured so far, on disk, so that an interrupted one goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from models.errors import LoadFailed

from .profile import save


class Unfinished:
    """JSON values by name, in a file that each new one is written to. Raises LoadFailed where it cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._values: dict[str, Any] = {}
        try:
            if path.is_file():
                self._values = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise LoadFailed(f"{path} holds no unfinished calibration: {error}. Delete it, and begin anew.") from error
        self._save()

    def known(self, name: str, measure: Callable[[], Any]) -> Any:
        """The value of this name; measured, and kept, if there is none."""
        if name not in self._values:
            self._values[name] = measure()
            self._save()
        return self._values[name]

    def _save(self) -> None:
        save(self.path, json.dumps(self._values))

    def forget(self) -> None:
        """The calibration is done: the next one begins anew."""
        self.path.unlink(missing_ok=True)
