"""What ``vans manifests --kind rayservice`` writes is what Ray Serve builds: its file, read back, makes the application."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._common.utils import import_attr

from cluster.errors import ConfigError
from cluster.manifests import Site
from cluster.variables import SERVE_TOKEN
from pipeline.commands.manifests import write_manifests
from pipeline.serve.build import build

OVERRIDES = ["serve.vdm.replicas=3", "serve.vlm.autoscale={enabled: true, min: 2, max: 5}", "pools.vdm.gpus=0.5"]


@pytest.fixture
def written(tmp_path: Path) -> dict[str, Any]:
    write_manifests("toy", OVERRIDES, "rayservice", tmp_path, Site())
    found: dict[str, Any] = yaml.safe_load((tmp_path / "rayservice.yaml").read_text())
    return found


def application_of(service: dict[str, Any]) -> dict[str, Any]:
    (found,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    return dict(found)


def test_the_file_makes_the_application_with_the_replicas_that_the_run_asks_for(
    written: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SERVE_TOKEN, "long and random")
    application = application_of(written)
    built = import_attr(application["import_path"])(application["args"])
    thinker, artist = built._bound_deployment.init_args[-1]["served"]
    options = [bound._bound_deployment._deployment_config for bound in (thinker, artist)]
    assert (options[0].autoscaling_config.min_replicas, options[0].autoscaling_config.max_replicas) == (2, 5)
    assert options[1].num_replicas == 3


def test_each_replica_has_room_on_the_cluster_beside_it(written: dict[str, Any]) -> None:
    groups = {g["groupName"]: g for g in written["spec"]["rayClusterConfig"]["workerGroupSpecs"]}
    assert (groups["vlm"]["replicas"], groups["vlm"]["maxReplicas"]) == (2, 5)
    assert groups["vdm"]["replicas"] == 2  # two halves of a GPU on one pod, and the third on another
    assert groups["vdm"]["resources"]["GPU"] == "1"


def test_without_a_token_nothing_is_served_on_a_cluster(
    written: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(SERVE_TOKEN, raising=False)
    with pytest.raises(ConfigError, match="VANS_SERVE_TOKEN is not set"):
        build(application_of(written)["args"])


def test_other_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match="config and overrides"):
        build({"run": "toy"})
