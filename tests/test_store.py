"""A name to a local folder."""

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from flora.errors import UsageError
from flora.store import fetch


def test_a_folder_is_itself(tmp_path, monkeypatch):
    assert fetch(tmp_path) == tmp_path
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert fetch("org/name") == Path("org/name")


@pytest.mark.parametrize("source", ["nowhere", "./org/name", "/org/name", "a/b/c", "../x"])
def test_what_can_be_no_repository_is_not_looked_for(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(UsageError, match="there is no adapter folder") as caught:
        fetch(source)
    assert source in str(caught.value)


def test_a_repository_gives_the_two_files_alone(tmp_path, monkeypatch):
    asked = {}

    def download(name, allow_patterns):
        asked[name] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert fetch("org/name") == tmp_path
    assert asked == {"org/name": ["adapter_config.json", "adapter_model.safetensors"]}


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("offline\nsecond line"), OSError()])
def test_a_repository_that_cannot_be_had_is_one_line(error, monkeypatch):
    def download(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(UsageError, match="here or on the hub") as caught:
        fetch("org/name")
    assert "\n" not in str(caught.value)
    assert "org/name" in str(caught.value)
