"""Names, defaults, lazy loading, and a light import."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from models.base import ModelSpec
from models.errors import LoadFailed, UnknownModel
from models.registry import Registry

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def registry(sd_spec: ModelSpec, flux_spec: ModelSpec, tmp_path: Path) -> Registry:
    broken = ModelSpec(name="broken", family="sd", source=tmp_path / "absent", steps=0, guidance_scale=0.0)
    return Registry([sd_spec, flux_spec, broken], default="random-sd", default_flux="random-flux")


def test_an_unknown_name_is_answered_with_the_nearest(registry: Registry) -> None:
    with pytest.raises(UnknownModel, match=r"no model 'random-fulx'. Nearest: random-flux"):
        registry.get("random-fulx")
    with pytest.raises(UnknownModel, match=r"Nearest: random-sd, random-flux, broken"):
        registry.spec("???")


def test_a_model_is_loaded_once_and_when_asked(registry: Registry) -> None:
    assert registry.loaded == ()
    model = registry.get("random-sd")
    assert registry.get("random-sd") is model
    assert registry.loaded == ("random-sd",)


def test_a_failed_load_is_not_kept(registry: Registry) -> None:
    with pytest.raises(LoadFailed):
        registry.get("broken")
    assert registry.loaded == ()


def test_rows_are_json_and_tell_models_apart(registry: Registry) -> None:
    rows = {row["name"]: row for row in json.loads(json.dumps(registry.describe()))}
    assert list(rows) == ["random-sd", "random-flux", "broken"]
    sd, flux, broken = rows.values()
    assert (sd["cache"], sd["native_width"], sd["steps"], sd["guidance_scale"]) == ("deepcache", 512, 20, 7.5)
    assert [branch["branch"] for branch in sd["branches"]] == list(range(12))  # four levels of two layers, as SD1.5
    assert sd["samplers"]["ddim"] == ["normal", "sgm_uniform"]
    assert (flux["cache"], flux["branches"], flux["size_multiple"]) == ("first_block", [], 16)
    assert set(flux["samplers"]) == {"euler", "heun"}
    assert broken["branches"] == []
    assert "model_index.json is missing" in broken["error"]
    assert (broken["steps"], broken["guidance_scale"]) == (0, 0.0)  # a spec's zero is a value, not an absence
    assert sd["error"] is flux["error"] is None
    assert registry.loaded == ()


def test_a_model_that_nothing_foresaw_keeps_its_row_and_leaves_the_others_theirs(
    sd_spec: ModelSpec, tmp_path: Path
) -> None:
    odd = ModelSpec(name="odd", family="sd", source=tmp_path / "odd")
    shutil.copytree(sd_spec.source, odd.source)
    config = odd.source / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "layers_per_block": -1}))  # diffusers: IndexError
    rows = {row["name"]: row for row in Registry([odd, sd_spec], "random-sd", None).describe()}
    assert (rows["random-sd"]["error"], bool(rows["odd"]["error"])) == (None, True)


def test_specs_that_contradict_one_another_are_refused(sd_spec: ModelSpec) -> None:
    with pytest.raises(ValueError, match="one name"):
        Registry([sd_spec, sd_spec], default="random-sd", default_flux="random-sd")
    strange = ModelSpec(name="strange", family="gan", source=sd_spec.source)
    with pytest.raises(ValueError, match="'gan'"):
        Registry([strange], default="strange", default_flux="strange")
    with pytest.raises(UnknownModel):
        Registry([sd_spec], default="random-sd", default_flux="absent")


def test_the_light_part_imports_neither_torch_nor_diffusers() -> None:
    code = (
        "import sys, models.base, models.registry, models.sampling.samplers, models.limits\n"
        "print(sorted({'torch', 'diffusers', 'transformers', 'numpy', 'PIL'} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
