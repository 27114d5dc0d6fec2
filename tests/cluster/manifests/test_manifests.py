"""Manifests on paper: how groups lie on pods and nodes, and that what is written is what KubeRay, Ray and bash read."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cluster import ports
from cluster.manifests import KINDS, Group, ManifestError, RunShape, Site, fold, group_of, render
from cluster.manifests.shape import node_labels, shared_labels
from cluster.manifests.slurm import pack
from cluster.manifests.submit import submit_command
from tests.cluster.manifests.schema import check, custom_resources

GROUPS = (
    group_of("vlm", 2, {"CPU": 2, "GPU": 1}, labels={"vans-role": "vlm"}),
    group_of("vdm", 3, {"CPU": 0.5, "GPU": 1, "fast": 1}, labels={"vans-role": "vdm"}, most=12),
    group_of("reward", 6, {"CPU": 0.5, "GPU": 0.25}, labels={"vans-role": "reward"}),
    group_of(
        "learner", 8, {"CPU": 2, "GPU": 1}, labels={"vans-role": "learner"}, strategy="STRICT_PACK", together=True
    ),
)
ALIKE = tuple(Group(group.name, group.count, group.bundle, {}, group.strategy) for group in GROUPS)  # any node will do
RUN = RunShape("vans_Test.1", GROUPS, ("python", "-m", "pipeline", "train", "toy", "out=/shared/a b"), driver_cpus=2.5)


SERVER = RunShape(
    "ask", GROUPS[:2], (), application={"import_path": "pipeline.serve.build:build", "args": {"config": "toy"}}
)


def documents(kind: str, run: RunShape = RUN, site: Site | None = None) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(render(kind, run, site or Site())[f"{kind}.yaml"]))  # type: ignore[arg-type]


def test_members_lie_on_pods_so_that_single_workers_come_and_go_and_a_learner_stays_together() -> None:
    vlm, vdm, reward, learner = (fold(group, 8, growth=2) for group in GROUPS)
    assert (vlm.count, vlm.most, vlm.resources) == (2, 4, {"CPU": 2, "GPU": 1})
    assert (vdm.count, vdm.most) == (3, 12) and vdm.resources == {
        "CPU": 1,
        "GPU": 1,
        "fast": 1,
    }  # whole CPUs; autoscale's max
    assert (reward.count, reward.members) == (2, 4) and reward.resources == {"CPU": 2, "GPU": 1}  # four share a GPU
    assert (learner.count, learner.most, learner.members) == (1, 1, 8) and learner.resources == {"CPU": 16, "GPU": 8}
    loose = Group("learner", 6, {"GPU": 1.0}, together=True)
    assert (fold(loose, 4).count, fold(loose, 4).members) == (2, 3)  # even ranks, not 4 and 2
    assert fold(Group("learner", 2, {"CPU": 0.5}, together=True), 8).resources == {"CPU": 1}


def test_what_no_node_can_hold_is_refused_with_the_numbers() -> None:
    with pytest.raises(ManifestError, match="one vlm needs 2 GPUs, and a node has 1"):
        fold(Group("vlm", 1, {"GPU": 2.0}), 1)
    with pytest.raises(ManifestError, match=r"8 learner are to be on one node .* need 8 GPUs; a node has 4"):
        fold(GROUPS[3], 4)
    with pytest.raises(ManifestError, match=r"8 learner on one node \(STRICT_PACK\) needs 8 GPUs, and a node has 4"):
        pack(GROUPS, 4)
    with pytest.raises(ManifestError, match="would be '3' in Kubernetes"):
        _ = RunShape("_3", (), ()).slug
    with pytest.raises(ManifestError, match="at most 47"):
        _ = RunShape("r" * 48, (), ()).slug
    with pytest.raises(ManifestError, match="absolute path"):
        Site(shared="data")


def test_equal_nodes_are_as_few_as_the_gpus_allow() -> None:
    nodes = pack(GROUPS, 8)
    assert [node["GPU"] for node in nodes] == [8, 6.5]  # the learner fills the first
    assert nodes[1]["CPU"] == 2 * 2 + 3 * 0.5 + 6 * 0.5 and nodes[1]["fast"] == 3
    spread = Group("vdm", 3, {"GPU": 1.0}, strategy="STRICT_SPREAD")
    assert len(pack((spread,), 8)) == 3


def test_a_label_selector_becomes_labels_that_meet_it() -> None:
    group = Group("vdm", 1, {}, {"zone": "in(a, b)", "gpu": "h100", "disk": "!hdd"})
    assert node_labels(group) == {"zone": "a", "gpu": "h100"}
    assert shared_labels((group, Group("vlm", 1, {}, {"gpu": "h100"}))) == {"zone": "a", "gpu": "h100"}
    with pytest.raises(ManifestError, match="vlm wants nodes with gpu=a100 and another group wants gpu=h100"):
        shared_labels((group, Group("vlm", 1, {}, {"gpu": "a100"})))


def test_kuberay_takes_the_job_and_its_groups_scale_apart() -> None:
    (job,) = documents("rayjob")
    assert (job["apiVersion"], job["kind"], job["metadata"]["name"]) == ("ray.io/v1", "RayJob", "vans-test-1")
    spec = check(job)
    assert spec["entrypoint"] == "python -m pipeline train toy 'out=/shared/a b'"
    assert yaml.safe_load(spec["runtimeEnvYAML"]) == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "600"}}
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "vans-ray-token"}
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    assert list(groups) == ["vlm", "vdm", "reward", "learner"]
    for name, group in groups.items():
        assert group["labels"] == {"vans-role": name}
        assert 1 <= group["minReplicas"] == group["replicas"] <= group["maxReplicas"]
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        limits = container["resources"]["limits"]
        assert limits["nvidia.com/gpu"] == group["resources"]["GPU"] and limits == container["resources"]["requests"]
        assert int(limits["cpu"]) > int(group["resources"]["CPU"])  # Ray's own processes get some too
        assert limits["memory"] == f"{64 * int(group['resources']['GPU'])}Gi"
        assert [entry["key"] for entry in pod["tolerations"]] == ["nvidia.com/gpu"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts == {"shared": "/shared"}
        assert pod["volumes"] == [{"name": "shared", "persistentVolumeClaim": {"claimName": "vans-shared"}}]
    head = cluster["headGroupSpec"]
    assert head["resources"] == {"CPU": "3"}
    assert "nvidia.com/gpu" not in head["template"]["spec"]["containers"][0]["resources"]["limits"]
    for group in (head, *groups.values()):
        pod = group["template"]["spec"]
        assert pod["restartPolicy"] == "Never"  # the autoscaler v2 takes no other
        assert pod["enableServiceLinks"] is False  # a Service called vllm would set VLLM_PORT
        # The operator refuses these there, beside `resources` and `labels`.
        assert not {"num-cpus", "num-gpus", "resources", "labels"} & set(group["rayStartParams"])
    (same,) = documents("raycluster")
    assert same["kind"] == "RayCluster" and same["spec"] == job["spec"]["rayClusterSpec"]


def test_kuberay_takes_the_service_and_ray_serve_its_application() -> None:
    from ray.serve.schema import ServeDeploySchema

    (service,) = documents("rayservice", SERVER)
    assert (service["kind"], service["metadata"]["name"]) == ("RayService", "ask")
    spec = check(service)
    serving = ServeDeploySchema.model_validate(yaml.safe_load(spec["serveConfigV2"]))
    (application,) = serving.applications
    assert application.import_path == SERVER.application["import_path"] and application.args == {"config": "toy"}  # type: ignore[index]
    assert application.route_prefix == "/" and serving.http_options.port == ports.SERVE
    cluster = spec["rayClusterConfig"]
    head, *workers = cluster["headGroupSpec"], *cluster["workerGroupSpecs"]
    assert {"name": "serve", "containerPort": ports.SERVE} in head["template"]["spec"]["containers"][0]["ports"]
    assert [group["groupName"] for group in workers] == ["vlm", "vdm"]
    token = {"name": "vans-serve-token", "key": "token", "optional": False}  # a pod without it would ask nobody for one
    for group in (head, *workers):
        env = {entry["name"]: entry for entry in group["template"]["spec"]["containers"][0]["env"]}
        assert env["VANS_SERVE_TOKEN"]["valueFrom"]["secretKeyRef"] == token
        assert not any(name.startswith("MLFLOW") for name in env)
    policy = yaml.safe_load(render("rayservice", SERVER, Site())["network.yaml"])
    assert ports.SERVE in {port["port"] for port in policy["spec"]["ingress"][1]["ports"]}


def test_the_operators_schemas_take_all_that_is_written_and_refuse_what_they_do_not_know() -> None:
    found = list(custom_resources())
    assert {document["kind"] for document in found} == {"RayJob", "RayCluster", "RayService"}
    for document in found:
        check(document)
    (job,) = documents("rayjob")
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    for field, value, wrong in (
        ("gpus", 1, "'gpus' was unexpected"),
        ("replicas", "two", "'two' is not of type 'integer'"),
        ("resources", {"GPU": 1.5}, "1.5 is not of type 'string'"),
    ):
        with pytest.raises(jsonschema.ValidationError, match=wrong):
            check(json.loads(json.dumps(job)) | {"spec": _with(job["spec"], group | {field: value})})
    del job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
    with pytest.raises(jsonschema.ValidationError, match="'template' is a required property"):
        check(job)


def _with(spec: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    return spec | {"rayClusterSpec": spec["rayClusterSpec"] | {"workerGroupSpecs": [group]}}


def test_kubernetes_takes_what_is_written_for_itself() -> None:
    oracle = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate: 111 MB of schemas")
    run = RunShape("own", GROUPS, ("python",), config_file="name: own\n")
    kinds = set()
    for kind, shape in (("rayjob", run), ("raycluster", run), ("rayservice", SERVER)):
        for name, text in render(kind, shape, Site()).items():  # type: ignore[arg-type]
            for document in yaml.safe_load_all(text) if name.endswith(".yaml") else ():
                for each in _for_kubernetes(document):
                    oracle.validate(each, "1.37", strict=True)
                    kinds.add(each["kind"])
    assert kinds == {"Pod", "ConfigMap", "PersistentVolumeClaim", "NetworkPolicy"}


def _for_kubernetes(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The document, or the pods that KubeRay makes of it."""
    if document["apiVersion"] != "ray.io/v1":
        return [document]
    spec = document["spec"]
    cluster = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    groups = (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    return [{"apiVersion": "v1", "kind": "Pod", **group["template"]} for group in groups]


def test_secrets_are_named_and_never_written(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "RAY_AUTH_TOKEN", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "hush-hush")
    for kind in KINDS:
        shape = SERVER if kind == "rayservice" else RunShape("r", ALIKE, RUN.entrypoint)
        assert "hush-hush" not in "".join(render(kind, shape, Site()).values())
    (job,) = documents("rayjob")
    cluster = job["spec"]["rayClusterSpec"]
    head = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
    secrets = {e["name"]: e["valueFrom"]["secretKeyRef"] for e in head["env"] if "valueFrom" in e}
    assert secrets["HF_TOKEN"] == {"name": "vans-hub", "key": "token", "optional": True}
    assert {secrets[f"MLFLOW_TRACKING_{k}"]["key"] for k in ("URI", "USERNAME", "PASSWORD")} == {
        "uri",
        "username",
        "password",
    }
    for group in cluster["workerGroupSpecs"]:  # only the driver logs
        names = {entry["name"] for entry in group["template"]["spec"]["containers"][0]["env"]}
        assert "HF_TOKEN" in names and not any(name.startswith("MLFLOW") for name in names)


def test_only_the_runs_own_pods_reach_what_asks_for_no_token() -> None:
    files = render("rayjob", RUN, Site())
    policy = yaml.safe_load(files["network.yaml"])
    own, guarded = policy["spec"]["ingress"]
    (job,) = documents("rayjob")
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        labels = group["template"]["metadata"]["labels"].items()
        assert policy["spec"]["podSelector"]["matchLabels"].items() <= labels
        assert own["from"][0]["podSelector"]["matchLabels"].items() <= labels
    assert "ports" not in own and {port["port"] for port in guarded["ports"]} == {ports.DASHBOARD, ports.METRICS}
    claim = yaml.safe_load(files["storage.yaml"])
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"] and claim["metadata"]["name"] == Site().claim


def test_a_configuration_that_is_not_in_the_image_travels_along() -> None:
    run = RunShape("own", GROUPS, ("python",), config_file="name: own\n")
    config, job = documents("rayjob", run)
    assert config["kind"] == "ConfigMap" and config["data"] == {"run.yaml": "name: own\n"}
    spec = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert {"name": "config", "mountPath": "/etc/vans"} in spec["containers"][0]["volumeMounts"]
    assert {"name": "config", "configMap": {"name": config["metadata"]["name"]}} in spec["volumes"]
    with pytest.raises(ManifestError, match="path that all nodes see"):
        render("slurm", run, Site())


def test_the_slurm_script_is_bash_and_asks_for_what_the_groups_need(tmp_path: Path) -> None:
    (name, text), *_ = render("slurm", RunShape("s", ALIKE, RUN.entrypoint, 2.5), Site(shared="/net/a b")).items()
    (tmp_path / name).write_text(text)
    checked = subprocess.run(
        ["bash", "-n", str(tmp_path / name)], capture_output=True, text=True, timeout=20, check=False
    )
    assert checked.returncode == 0, checked.stderr
    asked = dict(line[8:].partition("=")[::2] for line in text.splitlines() if line.startswith("#SBATCH --"))
    assert (asked["--nodes"], asked["--gpus-per-node"], asked["--cpus-per-task"]) == ("2", "8", str(16 + 3 + 2))
    assert asked["--signal"] == "B:USR1@600" and asked["--ntasks-per-node"] == "1" and "--requeue" in asked
    assert "%%" not in text and "shared='/net/a b'" in text
    assert "node_flags=('--resources={\"fast\": 3}')" in text
    assert (
        "#SBATCH --gpus" not in render("slurm", RunShape("s", (Group("vlm", 1, {"CPU": 1.0}),), ()), Site())["s.sbatch"]
    )


def test_rays_launcher_takes_its_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    files = render("launcher", RunShape("l", (Group("vdm", 12, {"GPU": 1.0}),), RUN.entrypoint), Site())
    config = yaml.safe_load(files["cluster.yaml"])
    assert (config["min_workers"], config["provider"]["worker_ips"]) == (1, ["WORKER_1_IP"])
    validate_config(prepare_config(config))  # against the schema that Ray ships
    with pytest.raises(Exception, match="head_port"):
        validate_config(prepare_config(config | {"head_port": 1}))
    head, worker = config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in head and f"$RAY_HEAD_IP:{ports.GCS} " in worker


def test_the_submit_command_gives_a_stopped_run_time_for_its_checkpoint() -> None:
    words = submit_command(RUN)
    assert words[:5] == ["ray", "job", "submit", "--address", f"http://127.0.0.1:{ports.DASHBOARD}"]
    assert json.loads(words[6]) == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "600"}}
    assert tuple(words[words.index("--") + 1 :]) == RUN.entrypoint
    script = render("raycluster", RUN, Site())["submit.sh"]
    assert subprocess.run(["bash", "-n"], input=script, text=True, timeout=20, check=False).returncode == 0
