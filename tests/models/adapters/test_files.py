"""Names of weights: what lies in the folder is found, nothing else ever is."""

from __future__ import annotations

from dataclasses import replace
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
    (inside / ".cache").mkdir()
    (inside / ".cache" / "hidden.safetensors").write_bytes(b"")
    (inside / "away").symlink_to(outside)
    (outside / "secret.safetensors").write_bytes(b"")
    (inside / "alias.safetensors").symlink_to(inside / "ink.safetensors")
    for link in (inside / "link.safetensors", inside / "sub" / "link.safetensors"):
        link.symlink_to(outside / "secret.safetensors")
    (inside / "gone.safetensors").symlink_to(outside / "nothing.safetensors")
    (inside / "loop.safetensors").symlink_to(inside / "loop.safetensors")
    return WeightsFolder(inside, "LoRA")


def test_a_name_finds_its_file_with_or_without_the_suffix(folder: WeightsFolder) -> None:
    ink = (folder.path / "ink.safetensors").resolve()  # type: ignore[operator]
    assert folder.find("ink") == folder.find("ink.safetensors") == ("ink", ink)
    assert folder.find("alias") == ("alias", ink)
    assert list(folder.files()) == ["alias", "ink", "sub/deep"]


def test_a_folder_in_diffusers_format_is_one_where_such_are_asked_for(folder: WeightsFolder) -> None:
    """Whole, whatever lies in it; the folder itself is none, and what leads out of it neither."""
    root = folder.path.resolve()  # type: ignore[union-attr]
    for path in (root / "config.json", root / "sub" / "config.json", root.parent / "outside" / "config.json"):
        path.write_bytes(b"{}")
    (root / "again.v2").symlink_to(root / "sub")
    whole = WeightsFolder(root, "ControlNet", diffusers=True)
    assert whole.files() == {"alias": root / "ink.safetensors", "ink": root / "ink.safetensors", "sub": root / "sub"}
    assert whole.find("sub") == ("sub", root / "sub")
    assert list(folder.files()) == ["alias", "ink", "sub/deep"]


def test_what_comes_with_the_service_is_there_unless_the_operator_has_one_of_its_name(folder: WeightsFolder) -> None:
    ink = folder.find("ink")[1]
    more = replace(folder, embedded={"ink": ink.parent / "x", "blue": ink.parent / "y"})
    assert (more.find("ink"), more.find("blue")) == (("ink", ink), ("blue", ink.parent / "y"))
    assert list(more.files()) == ["alias", "blue", "ink", "sub/deep"]


def test_a_file_of_a_subfolder_is_found_by_its_path_and_where_it_is_the_only_one_by_its_name(
    folder: WeightsFolder,
) -> None:
    deep = (folder.path / "sub" / "deep.safetensors").resolve()  # type: ignore[operator]
    assert folder.find("sub/deep") == folder.find("deep") == folder.find("deep.safetensors") == ("sub/deep", deep)
    (folder.path / "more").mkdir()  # type: ignore[operator]
    for name in ("deep", "ink"):
        (folder.path / "more" / f"{name}.safetensors").write_bytes(b"")  # type: ignore[operator]
    with pytest.raises(UnknownFile, match=r"More than one LoRA is called 'deep': give one of more/deep, sub/deep\."):
        folder.find("deep")
    assert folder.find("ink")[0] == "ink"


@pytest.mark.parametrize(
    "name",
    [
        "link",
        "gone",
        "loop",
        "dir",
        "sub",
        "sub/link",
        "sub/../ink",
        "/deep",
        "hidden",
        ".cache/hidden",
        "away/secret",
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
