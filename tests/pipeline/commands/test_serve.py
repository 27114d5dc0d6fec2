"""``vans serve`` before it starts anything: what is refused, and what is said."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.errors import CheckpointError, VansError
from pipeline.cli import app
from pipeline.config import RunConfig, load_config, to_yaml
from pipeline.serve import extra
from pipeline.serve.exports import newest_export, of_run
from tests.pipeline.serve.serving import export_adapter


def told(*words: str, env: dict[str, str | None] | None = None) -> str:
    result = CliRunner().invoke(app, ["serve", *words], env={"VANS_SERVE_TOKEN": None, **(env or {})})
    assert result.exit_code == 2, result.output
    return " ".join(result.output.split())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that has begun and exported nothing."""
    (tmp_path / "config.yaml").write_text(to_yaml(load_config("toy")))
    return tmp_path


def test_a_run_without_an_export_is_said(run: Path) -> None:
    found = told(str(run))
    assert "has not exported anything yet" in found and "vlm_adapter" in found and "vans serve --config" in found


def test_a_folder_that_is_no_run_is_said(tmp_path: Path) -> None:
    assert "no config.yaml in it" in told(str(tmp_path))


def test_a_port_that_is_taken_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert f"port {port}" in (found := told(f"serve.port={port}")) and f"serve.port={port + 1}" in found


def test_another_address_than_loopback_needs_a_token() -> None:
    assert "VANS_SERVE_TOKEN is not set" in told("serve.host=0.0.0.0")
    assert "VANS_SERVE_TOKEN is not set" in told("serve.host=0.0.0.0", env={"VANS_SERVE_TOKEN": "  "})


def test_follow_needs_a_run_and_a_run_has_its_own_models(run: Path) -> None:
    assert "--follow" in told("--follow")
    assert "leave one of the two out" in told(str(run), "--vlm", "tiny")


def test_a_missing_extra_is_refused_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(extra.NEEDED, "a_module_that_nobody_has", "a-module")
    with pytest.raises(VansError) as caught:
        extra.require_extra(install=False)
    assert "not installed: a-module" in str(caught.value)
    assert f"{sys.executable} -m pip install --no-deps -r" in str(caught.value) and "constraints-serve.txt" in str(
        caught.value
    )


def test_the_newest_export_is_the_one_written_last_wherever_it_is(run: Path) -> None:
    config = load_config("toy")
    assert newest_export(config, run, "vdm") is None
    first = exported(run / "checkpoints" / "stage2-step000002" / "vdm_adapter", 2)
    assert newest_export(config, run, "vdm").folder == first
    last = exported(run / "vdm_adapter", 3)
    exported(run / "checkpoints" / "stage2-step000001" / "vdm_adapter", 1)
    (run / "checkpoints" / "stage2-step000009" / "vdm_adapter").mkdir(parents=True)  # being written
    assert newest_export(config, run, "vdm").folder == last


def test_a_model_that_a_run_has_not_trained_is_served_as_it_began(run: Path) -> None:
    config = load_config("toy")
    with pytest.raises(CheckpointError, match="has not exported anything yet"):
        of_run(config, run)
    serving = real_export(config, run)
    assert serving.models.vdm_adapter is None and serving.models.vlm_adapter == str((run / "vlm_adapter").resolve())


def exported(folder: Path, second: int) -> Path:
    import os

    folder.mkdir(parents=True)
    marker = folder / "adapter_config.json"
    marker.write_text("{}")
    os.utime(marker, ns=(second * 10**9, second * 10**9))
    return folder


def real_export(config: RunConfig, run: Path) -> RunConfig:
    """Export an untrained adapter of the tiny thinker, and return what serves it."""
    export_adapter(run / "vlm_adapter", "vlm", 0.0)
    return of_run(config, run)[0]
