"""Settings: from the environment, checked, and nothing read at import."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from app.cli.serve import check_devices, kept_in, page_if_installed
from app.errors import CannotStart
from app.settings import OTHERS, Settings, faults, read_settings


def test_defaults_are_the_contracts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Settings()
    assert (settings.host, settings.port, settings.log_level) == ("127.0.0.1", 7861, "INFO")
    assert (settings.max_batch_size, settings.batch_timeout, settings.api_keys) == (4, 0.5, ())
    assert settings.devices == ("auto",)


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("WAVESPEED_PORT=1234\nWAVESPEED_HOST=::1\nOTHER=1\n")
    for name, value in {
        "WAVESPEED_PORT": "4321",
        "WAVESPEED_DEVICES": "cuda:0, cuda:1",
        "WAVESPEED_API_KEYS": "a,b,",
        "WAVESPEED_LOG_FOLDER": "elsewhere",
        "LD_SERVER_LOGLEVEL": "debug",
        "LD_MAX_BATCH_SIZE": "8",
        "LD_BATCH_TIMEOUT": "0.25",
    }.items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert (settings.port, settings.host) == (4321, "::1")
    assert settings.devices == ("cuda:0", "cuda:1")
    assert settings.api_keys == ("a", "b")
    assert settings.log_folder == Path("elsewhere")
    assert (settings.log_level, settings.max_batch_size, settings.batch_timeout) == ("DEBUG", 8, 0.25)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WAVESPEED_PORT", "65536"),
        ("WAVESPEED_QUEUE_SIZE", "0"),
        ("WAVESPEED_DEVICE", ","),
        ("LD_SERVER_LOGLEVEL", "LOUD"),
        ("LD_MAX_BATCH_SIZE", "17"),
    ],
)
def test_a_bad_setting_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, value: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError) as refused:
        Settings()
    [fault] = faults(refused.value)
    named = {"WAVESPEED_DEVICE": "WAVESPEED_DEVICES"}.get(name, name)
    assert fault.startswith(f"{named}: ")


def test_a_fault_repeats_no_value(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WAVESPEED_API_KEYS", "the secret")
    with pytest.raises(ValidationError) as refused:
        Settings()
    assert faults(refused.value) == ["WAVESPEED_API_KEYS: a key is sent in a header: printable ASCII without spaces."]
    monkeypatch.delenv("WAVESPEED_API_KEYS")
    monkeypatch.setenv("WAVESPEED_JOBS_RESTART", "requeue")
    with pytest.raises(ValidationError) as refused:
        Settings()
    assert faults(refused.value) == [
        "WAVESPEED_JOBS_RESTART=requeue needs WAVESPEED_JOBS_FOLDER: memory outlives no restart."
    ]


@pytest.mark.parametrize(
    ("name", "said"), [("face.pt", "yolo export format=onnx"), ("face.onnx", "there is no file"), ("", "no .onnx file")]
)
def test_a_face_detector_is_a_file_that_can_be_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WAVESPEED_FACE_DETECTOR", name)
    with pytest.raises(ValidationError, match=said):
        Settings()
    (tmp_path / "face.onnx").touch()
    monkeypatch.setenv("WAVESPEED_FACE_DETECTOR", "face.onnx")
    assert Settings().face_detector == Path("face.onnx")


@pytest.mark.parametrize("where", ["environment", ".env"])
@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("WAVESPEED_API_KEY", "WAVESPEED_API_KEYS"),
        ("WAVESPEED_MODEL_FILE", "WAVESPEED_MODELS_FILE"),
        ("wavespeed_alowed_hosts", "WAVESPEED_ALLOWED_HOSTS"),
        ("WAVESPEED_LD_MAX_BATCH_SIZE", "WAVESPEED_MAX_BATCH_SIZE"),
    ],
)
def test_a_variable_that_there_is_not_ends_the_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str, name: str, nearest: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if where == ".env":
        (tmp_path / ".env").write_text(f"{name}=secret\n")
    else:
        monkeypatch.setenv(name, "secret")
    with pytest.raises(CannotStart) as refused:
        read_settings(port=0)
    assert str(refused.value) == f"{name.upper()} is no variable that is read here; the nearest one is {nearest}."


def test_variables_of_the_client_and_a_cluster_are_let_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Kubernetes tells every container of each service; ours may be called wavespeed-api."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("".join(f"WAVESPEED_{name}=x\n" for name in OTHERS))
    for name, value in {
        "WAVESPEED_API_SERVICE_HOST": "10.3.2.1",
        "WAVESPEED_API_SERVICE_PORT_HTTP": "80",
        "WAVESPEED_API_PORT": "tcp://10.3.2.1:80",
        "WAVESPEED_API_PORT_80_TCP": "tcp://10.3.2.1:80",
        "WAVESPEED_API_PORT_80_TCP_ADDR": "10.3.2.1",
    }.items():
        monkeypatch.setenv(name, value)
    assert read_settings() == Settings()
    monkeypatch.setenv("WAVESPEED_API_PORT", "80")
    with pytest.raises(CannotStart, match=r"^WAVESPEED_API_PORT is no variable"):
        read_settings()


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("WAVESPEED_HOST", "", "WAVESPEED_HOST: String should have at least 1 character."),
        ("WAVESPEED_MODELS_FILE", "none.toml", "WAVESPEED_MODELS_FILE: there is no file 'none.toml'."),
        ("WAVESPEED_MODELS_FILE", "/etc", "WAVESPEED_MODELS_FILE: there is no file '/etc'."),
        ("WAVESPEED_FACE_DETECTOR", "x.onnx", "WAVESPEED_FACE_DETECTOR: there is no file 'x.onnx'."),
        ("WAVESPEED_CHECKPOINT_FOLDER", "file", "WAVESPEED_CHECKPOINT_FOLDER: 'file' is no folder."),
        ("WAVESPEED_LORA_FOLDER", "file", "WAVESPEED_LORA_FOLDER: 'file' is no folder."),
        ("WAVESPEED_EMBEDDING_FOLDER", "file", "WAVESPEED_EMBEDDING_FOLDER: 'file' is no folder."),
        ("WAVESPEED_UPSCALER_FOLDER", "file", "WAVESPEED_UPSCALER_FOLDER: 'file' is no folder."),
        (
            "WAVESPEED_DEVICES",
            "GPU 0",
            "WAVESPEED_DEVICES: 'GPU 0' is no device; there are auto, cpu, cuda, and cuda:0, cuda:1, ….",
        ),
        (
            "WAVESPEED_ALLOWED_HOSTS",
            "https://a.example",
            "WAVESPEED_ALLOWED_HOSTS: 'https://a.example' is no name of a host, as images.example: no scheme, no port, "
            "no path, no *.",
        ),
    ],
)
def test_what_a_variable_names_is_looked_at(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, value: str, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setenv(name, value)
    with pytest.raises(CannotStart) as refused:
        read_settings()
    assert str(refused.value) == sentence


def test_what_may_not_be_read_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "models.toml").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # who is root may read everything
    for field, path in (("lora_folder", "mine"), ("models_file", "models.toml")):
        with pytest.raises(CannotStart, match=rf"^WAVESPEED_{field.upper()}: '{path}' cannot be read by this user\.$"):
            read_settings(**{field: path})


def test_an_env_file_that_is_no_text_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_bytes(b"WAVESPEED_PORT=\xff\n")
    with pytest.raises(CannotStart, match=r"^\.env cannot be read: 'utf-8' codec"):
        read_settings()


@pytest.mark.skipif(sys.platform != "linux" or Path("/dev/kfd").exists(), reason="only NVIDIA's driver is asked")
@pytest.mark.parametrize("count", [None, 0, 2])
def test_a_cuda_device_is_one_that_the_driver_counts(monkeypatch: pytest.MonkeyPatch, count: int | None) -> None:
    class Driver:
        def cuInit(self, flags: int) -> int:
            return 0

        def cuDeviceGetCount(self, found: Any) -> int:
            found._obj.value = count
            return 0

    def driver(name: str) -> Driver:
        if count is None:
            raise OSError(f"{name}: cannot open shared object file")
        return Driver()

    monkeypatch.setattr(ctypes, "CDLL", driver)
    check_devices(("auto", "cpu", *(f"cuda:{number}" for number in range(count or 0))))
    missing = "cuda" if not count else f"cuda:{count}"
    with pytest.raises(
        CannotStart, match=rf"^WAVESPEED_DEVICES: there is no '{missing}'; .* {count or 0} CUDA devices"
    ):
        check_devices((missing,))


def test_what_is_kept_lies_in_a_folder_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert kept_in(read_settings()) == Path("jobs")
    monkeypatch.setenv("WAVESPEED_JOBS_FOLDER", "elsewhere")
    assert kept_in(read_settings()) == Path("elsewhere")
    monkeypatch.setenv("WAVESPEED_JOBS_FOLDER", "")
    assert kept_in(read_settings()) is None


def test_the_page_is_where_streamlit_is_unless_it_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, unwanted = (Settings(_env_file=None, page=page) for page in (True, False))  # type: ignore[call-arg]
    monkeypatch.setattr("app.cli.serve.find_spec", lambda name: object())
    assert (page_if_installed(wanted) is None, page_if_installed(unwanted)) == (False, None)
    monkeypatch.setattr("app.cli.serve.find_spec", lambda name: None)
    assert page_if_installed(wanted) is None
