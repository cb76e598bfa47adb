"""Settings: from the environment, checked, and nothing read at import."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from app.settings import Settings, faults


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
    assert faults(refused.value) == ["WAVESPEED_API_KEYS: a key is sent in a header: printable ASCII without spaces"]
    monkeypatch.delenv("WAVESPEED_API_KEYS")
    monkeypatch.setenv("WAVESPEED_JOBS_RESTART", "requeue")
    with pytest.raises(ValidationError) as refused:
        Settings()
    assert faults(refused.value) == [
        "WAVESPEED_JOBS_RESTART=requeue needs WAVESPEED_JOBS_FOLDER: memory outlives no restart"
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
