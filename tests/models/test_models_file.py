"""The models file: its documented example is read, and each mistake is named with its place and remedy."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from models.base import Hub
from models.embedded import SPECS
from models.families import FAMILIES
from models.models_file import BadModelsFile, Contents, Entry, embedded, read

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
GOOD = '[[models]]\nname = "mine"\nfamily = "sd15"\nfolder = "sd15"\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A place with what the example and GOOD name, without content."""
    for name in ("sd15", "/srv/models/flux-dev"):
        path = tmp_path / name.lstrip("/")
        path.mkdir(parents=True)
        (path / "model_index.json").write_text("{}")
    (tmp_path / "checkpoints" / "vae").mkdir(parents=True)
    for name in ("sdxl.safetensors", "vae/sdxl-fp16-fix.safetensors"):
        (tmp_path / "checkpoints" / name).write_bytes(b"")
    (tmp_path / "old.ckpt").write_bytes(b"")
    (tmp_path / "weights.onnx").write_bytes(b"")
    (tmp_path / "bare").mkdir()
    return tmp_path


def written(folder: Path, text: str) -> Path:
    path = folder / "models.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_without_a_file_the_embedded_models_are_served() -> None:
    assert read(None) == embedded()
    assert (embedded().default, embedded().default_flux) == ("tiny-sd", "tiny-flux")


def test_the_documented_example_is_read(folder: Path) -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", DOCUMENT, flags=re.DOTALL)
    configuration = read(written(folder, example.replace('"/srv/', f'"{folder}/srv/')))
    specs = {spec.name: spec for spec in configuration.specs}
    assert specs["dreams"].source == Hub(
        "stable-diffusion-v1-5/stable-diffusion-v1-5", "451f4fe16113bff5a5d2269ed5ad43b0592e9a14", "fp16"
    )
    assert specs["xl"].source == folder / "checkpoints" / "sdxl.safetensors"
    assert specs["xl"].config is None
    assert specs["xl"].parts == {"vae": folder / "checkpoints" / "vae" / "sdxl-fp16-fix.safetensors"}
    assert (specs["xl"].vae_tiling, specs["xl"].vae_slicing, specs["xl"].steps) == (True, True, 30)
    assert (specs["dev"].offload, specs["dev"].dtype) == ("model", "bfloat16")
    assert {"tiny-sd", "tiny-flux"} <= set(specs)
    assert (configuration.default, configuration.default_flux) == ("dreams", "dev")
    assert all(spec.family in FAMILIES for spec in configuration.specs)


def test_every_key_and_every_family_is_documented() -> None:
    for name in (*Entry.model_fields, *Contents.model_fields, *FAMILIES):
        assert f"`{name}`" in DOCUMENT, name


def test_the_embedded_models_stay_unless_switched_off(folder: Path) -> None:
    assert read(written(folder, GOOD)).specs[1:] == SPECS
    alone = read(written(folder, "embedded = false\n" + GOOD))
    assert [spec.name for spec in alone.specs] == ["mine"]
    assert (alone.default, alone.default_flux) == ("mine", None)
    with_both = read(written(folder, 'default = "mine"\n' + GOOD))
    assert (with_both.default, with_both.default_flux) == ("mine", "tiny-flux")


MISTAKES = {
    "a misspelt key": (GOOD + 'folde = "x"\n', r"number 1: there is no key 'folde'. The nearest is 'folder'"),
    "a misspelt key at the top": ("embeded = true\n" + GOOD, r"no key 'embeded'. The nearest is 'embedded'"),
    "another program's key": (GOOD.replace("folder =", "path ="), r"no key 'path'. The nearest is 'folder'"),
    "a misspelt family": (GOOD.replace('"sd15"', '"sd-15"', 1), r"no family 'sd-15'. The nearest is 'sd15'"),
    "no family": ('[[models]]\nname = "a"\nfolder = "sd15"\n', r"model 'a': family is required with folder"),
    "no source": ('[[models]]\nname = "a"\nfamily = "sd15"\n', r"give one of folder, file and hub"),
    "two sources": (GOOD + 'hub = "a/b"\n', r"not folder and hub"),
    "a missing folder": (GOOD.replace('folder = "sd15"', 'folder = "sd16"'), r"there is no folder .*sd16"),
    "a pickle": (GOOD.replace('folder = "sd15"', 'file = "old.ckpt"\nconfig = "sd15"'), r"is a pickle.*safetensors"),
    "a pickle that is not there": (GOOD.replace('folder = "sd15"', 'file = "no.pt"'), r"a .pt file is a pickle"),
    "another format": (GOOD.replace('folder = "sd15"', 'file = "weights.onnx"'), r"none of .safetensors, .gguf"),
    "a file as folder": (GOOD.replace('folder = "sd15"', 'folder = "old.ckpt"'), r"is a file"),
    "a family of one's own without config": (
        GOOD.replace('folder = "sd15"', 'file = "checkpoints/sdxl.safetensors"').replace('"sd15"', '"sd"'),
        r"sd is for models that you trained.* Name under config a folder",
    ),
    "a file that says no family": (
        '[[models]]\nname = "a"\nfile = "checkpoints/sdxl.safetensors"\n',
        r"sdxl.safetensors is empty",
    ),
    "a part that is not there": (
        GOOD.replace('folder = "sd15"', 'file = "checkpoints/sdxl.safetensors"') + 'vae = "no.safetensors"\n',
        r"there is no file .*no.safetensors",
    ),
    "a part with a folder": (GOOD + 'vae = "old.safetensors"\n', r"vae goes with file"),
    "a config without index": (
        GOOD.replace('folder = "sd15"', 'file = "checkpoints/sdxl.safetensors"\nconfig = "bare"'),
        r"holds no model_index.json",
    ),
    "config with a folder": (GOOD + 'config = "sd15"\n', r"config goes with file"),
    "revision with a folder": (GOOD + 'revision = "main"\n', r"revision goes with hub"),
    "a hub id of one word": (GOOD.replace('folder = "sd15"', 'hub = "sd15"'), r"hub = 'sd15'"),
    "a hub address": (GOOD.replace('folder = "sd15"', 'hub = "https://x.y/a/b"'), r"hub = 'https"),
    "a name with a slash": (GOOD.replace('"mine"', '"../mine"'), r"name = '../mine'"),
    "a name twice": (GOOD + GOOD, r"two models are named 'mine'"),
    "an embedded name": (GOOD.replace('"mine"', '"tiny-sd"'), r"two models are named 'tiny-sd'"),
    "steps of text": (GOOD + 'steps = "many"\n', r"steps = 'many'"),
    "too many steps": (GOOD + "steps = 1000\n", r"steps = 1000"),
    "an unknown dtype": (GOOD + 'dtype = "int4"\n', r"dtype = 'int4'"),
    "an unknown default": ('default = "mien"\n' + GOOD, r"default = 'mien' is none of the models"),
    "a default Flux that is none": ('default_flux = "mine"\n' + GOOD, r"default_flux = 'mine' is none"),
    "nothing at all": ("embedded = false\n", r"there is no model"),
    "no TOML": ("models = [\n", r"models.toml: "),
    "a table for the list": ('[models]\nname = "a"\n', r"models = "),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(mistake: str, folder: Path) -> None:
    text, message = MISTAKES[mistake]
    path = written(folder, text)
    with pytest.raises(BadModelsFile, match=message) as failure:
        read(path)
    assert str(failure.value).startswith(str(path))


def test_a_file_that_is_not_there_or_not_text_is_named(folder: Path) -> None:
    with pytest.raises(BadModelsFile, match=r"absent.toml"):
        read(folder / "absent.toml")
    (folder / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadModelsFile, match=r"binary.toml"):
        read(folder / "binary.toml")


def test_paths_start_at_the_files_own_folder(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    shutil.move(folder / "sd15", folder / "bare" / "sd15")
    assert read(written(folder / "bare", GOOD)).specs[0].source == folder / "bare" / "sd15"


def test_a_gguf_file_and_what_the_rest_is_kept_in_are_read(folder: Path) -> None:
    (folder / "flux.gguf").write_bytes(b"")
    text = GOOD.replace('folder = "sd15"', 'file = "flux.gguf"\nconfig = "sd15"\nquantization = "fp8"')
    spec = read(written(folder, text)).specs[0]
    assert (spec.source, spec.quantization) == (folder / "flux.gguf", "fp8")
