"""A real embedded cluster: where it listens, who can join it, what its workers see, and room that is reserved or refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from subprocess import PIPE

import psutil
import pytest
import ray

from cluster.errors import PlacementError
from cluster.resources import Ask, PlacementPlan, place
from cluster.session import Session, connect
from tests.processes import kill

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_alone")]


class Probe:
    """Tells where it is and what it sees."""

    def look(self) -> tuple[str, str, str | None]:
        import actors.records
        import cluster.names

        assert actors.records.__file__
        group = ray.util.get_current_placement_group()
        return cluster.names.__file__, os.environ["OMP_NUM_THREADS"], group.id.hex() if group else None


def on_sigterm(*_: object) -> None:
    """Stands for the handler of a run that wants to save before it ends."""


@pytest.fixture(scope="module")
def session(ray_alone: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """An embedded cluster of 8 slots, started from a folder that is not the clone."""
    before, here = signal.signal(signal.SIGTERM, on_sigterm), Path.cwd()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    try:
        with connect(local_cpus=8, object_store_mib=128) as session:
            yield session
        assert not ray.is_initialized()
        assert signal.getsignal(signal.SIGTERM) is on_sigterm
    finally:
        os.chdir(here)
        signal.signal(signal.SIGTERM, before)


def test_embedded_cluster_is_private_and_keeps_the_sigterm_handler(session: Session) -> None:
    assert session.embedded and session.address.startswith("127.0.0.1:")
    assert session.view().total()["CPU"] == 8
    assert signal.getsignal(signal.SIGTERM) is on_sigterm
    family = {process.pid for process in psutil.Process().children(recursive=True)} | {os.getpid()}
    listening = {c.laddr.ip for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.pid in family}
    assert listening <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"} and listening
    with connect() as inner:  # inside a session: the same one, and it outlives the inner block
        assert inner.address == session.address and not inner.embedded
    assert ray.is_initialized()


def test_workers_get_their_bundles_and_beyond_them_plain_resources(session: Session) -> None:
    plan = PlacementPlan((Ask("vdm", 1, 0.5), Ask("learner", 2, 1.0), Ask("reward", 2, 0.0)))
    actor = ray.remote(Probe)
    with place(plan, 20) as room:
        assert room.group("reward") is None and room.group("learner").bundle_count == 2
        names = ("vdm-0", "vdm-1")
        probes = [actor.options(**room.options("vdm", name)).remote() for name in names]
        inside, outside = ray.get([probe.look.remote() for probe in probes], timeout=60)
        assert inside[:2] == outside[:2] == (str(Path(__file__).parents[2] / "cluster" / "names.py"), "1")
        assert inside[2] == room.group("vdm").id.hex() and outside[2] is None
        assert room.options("reward", "reward-0") == {"num_cpus": 0.0, "num_gpus": 0.0, "resources": {}}
        with pytest.raises(KeyError, match="no role 'vlm'; it has vdm, learner, reward"):
            room.options("vlm", "vlm-0")
        for probe in probes:
            ray.kill(probe)


def test_no_room_is_an_error_that_names_what_is_asked_and_what_there_is(session: Session) -> None:
    began = time.monotonic()
    with pytest.raises(
        PlacementError, match=r"(?s)learner needs CPU 9.*asked: +learner: 9 × \(CPU 1\).*CPU 8 on 1 node"
    ):
        place(PlacementPlan((Ask("learner", 9, 1.0),)), 30)
    assert time.monotonic() - began < 2  # the cluster could never hold it: no waiting
    with place(PlacementPlan((Ask("first", 6, 1.0),)), 20):
        began = time.monotonic()
        with pytest.raises(PlacementError, match=r"(?s)after 1 s there is still no room for third.*free: CPU [01]"):
            place(PlacementPlan((Ask("second", 1, 1.0), Ask("third", 4, 1.0))), 1)
        assert time.monotonic() - began < 4
    with place(PlacementPlan((Ask("all", 8, 1.0),)), 20):  # nothing of the refused plan is still held
        pass


def test_another_driver_joins_by_ray_address_and_its_workers_import_this_project(session: Session) -> None:
    story = """
import ray
from cluster.session import connect
with connect(local_cpus=1) as session:
    @ray.remote(num_cpus=0.5)
    def look():
        import actors.failures, cluster.names, os
        return cluster.names.slot_of("vdm-3"), os.environ["FROM_JOB"], os.environ["OMP_NUM_THREADS"]
    print("joined", not session.embedded, ray.get(look.remote(), timeout=60), session.view().total()["CPU"])
"""
    root = str(Path(__file__).parents[2])
    job = {"runtime_env": {"env_vars": {"FROM_JOB": "yes", "OMP_NUM_THREADS": "3"}}, "metadata": {}}
    env = os.environ | {"RAY_ADDRESS": session.address, "PYTHONPATH": root}
    env["RAY_JOB_CONFIG_JSON_ENV_VAR"] = json.dumps(job)  # as Ray does for a submitted job
    result = subprocess.run([sys.executable, "-c", story], env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "joined True (3, 'yes', '3') 8.0" in result.stdout
    assert ray.is_initialized() and session.view().total()["CPU"] == 8  # leaving does not end what it joined


STRANGERS = {
    "no token": {"RAY_AUTH_MODE": "disabled"},
    "wrong token": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "5ec2e7" * 10},
}


@pytest.fixture(scope="module")
def strangers(session: Session) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Drivers that try to join, side by side: each spends most of its time with waiting for the cluster."""
    story = """
import time
from cluster.session import ClusterError, connect
import ray
began = time.monotonic()
try:
    with connect():
        print("joined")
except ClusterError as error:
    print("refused", round(time.monotonic() - began), error)
"""
    assert os.environ["RAY_AUTH_MODE"] == "token"  # Ray sets it for the cluster that it starts for us
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}
    env |= {"RAY_ADDRESS": session.address, "PYTHONPATH": str(Path(__file__).parents[2])}
    with ExitStack() as stack:
        started = {}
        for name, credentials in STRANGERS.items():
            started[name] = subprocess.Popen(
                [sys.executable, "-c", story], env=env | credentials, stdout=PIPE, stderr=PIPE, text=True
            )
            stack.callback(kill, started[name])
        yield started


@pytest.mark.parametrize("name", STRANGERS)
def test_a_driver_without_the_clusters_token_is_refused_and_told_what_to_set(
    strangers: dict[str, subprocess.Popen[str]], name: str
) -> None:
    told, errors = strangers[name].communicate(timeout=120)
    assert told.startswith("refused"), told + errors[-3000:]
    assert int(told.split()[1]) < 60 and "RAY_AUTH_TOKEN_PATH" in told
    assert "5ec2e7" not in told + errors


def test_the_embedded_clusters_token_is_readable_by_its_owner_alone(session: Session) -> None:
    if {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        pytest.skip("the environment names a token of its own")
    assert (Path.home() / ".ray" / "auth_token").stat().st_mode & 0o077 == 0
