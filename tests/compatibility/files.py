"""All kinds of file that `docs/compatibility.md` lists."""

from __future__ import annotations

from tests.compatibility.checkpoint_files import CHECKPOINTS
from tests.compatibility.embedding_files import EMBEDDINGS
from tests.compatibility.lora_files import LORAS
from tests.compatibility.rows import FileRow

FILES: tuple[FileRow, ...] = (*CHECKPOINTS, *LORAS, *EMBEDDINGS)
