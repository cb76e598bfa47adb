"""Names of weights: what lies in the folder is found, nothing else ever is."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.adapters.files import UnknownFile, WeightsFolder


@pytest.fixture
def folder(tmp_path: Path) -> WeightsFolder:
    inside, outside = tmp_path / "loras", tmp_path / "outside"
    (inside / "sub").mkdir(parents=True)
    outside.mkdir()
    for path in (inside / "ink.safetensors", inside / "old.pt", inside / "sub" / "deep.safetensors"):
        path.write_bytes(b"")
    (inside / "dir.safetensors").mkdir()
    (outside / "secret.safetensors").write_bytes(b"")
    (inside / "alias.safetensors").symlink_to(inside / "ink.safetensors")
    (inside / "link.safetensors").symlink_to(outside / "secret.safetensors")
    (inside / "gone.safetensors").symlink_to(outside / "nothing.safetensors")
    (inside / "loop.safetensors").symlink_to(inside / "loop.safetensors")
    return WeightsFolder(inside, "LoRA")


def test_a_name_finds_its_file_with_or_without_the_suffix(folder: WeightsFolder) -> None:
    ink = (folder.path / "ink.safetensors").resolve()  # type: ignore[operator]
    assert folder.find("ink") == folder.find("ink.safetensors") == folder.find("alias") == ink
    assert list(folder.files()) == ["alias", "ink"]


@pytest.mark.parametrize(
    "name",
    [
        "link",
        "gone",
        "loop",
        "dir",
        "deep",
        "sub/deep",
        "../outside/secret",
        "..\\outside\\secret",
        "..",
        ".",
        "",
        "/etc/passwd",
        "C:\\x",
        "%2e%2e/outside/secret",
        "ink\0",
        "ink/",
        "file:///etc/passwd",
        "\ud800",
        "x" * 5000,
        "user/repo",
    ],
)
def test_nothing_else_is_found(folder: WeightsFolder, name: str) -> None:
    with pytest.raises(UnknownFile) as failure:
        folder.find(name)
    message = str(failure.value)
    assert message.encode()
    assert len(message) < 300
    assert str(folder.path) not in message


def test_the_remedy(folder: WeightsFolder, tmp_path: Path) -> None:
    with pytest.raises(UnknownFile, match=r"no LoRA 'inc'\. Nearest: ink"):
        folder.find("inc")
    for name in ("old", "old.pt", "anything.ckpt"):
        with pytest.raises(UnknownFile, match=r"never loaded; convert it to \.safetensors"):
            folder.find(name)
    for empty in (WeightsFolder(None, "LoRA"), WeightsFolder(tmp_path / "missing", "LoRA")):
        with pytest.raises(UnknownFile, match="The server has none"):
            empty.find("ink")
