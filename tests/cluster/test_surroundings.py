"""A process in odd surroundings is put right, or is told in one message what to change."""

from __future__ import annotations

import errno
import gc
import os
import pickle
import pwd
import tempfile
import time
from pathlib import Path

import pytest

from cluster.session import ClusterError, _start_embedded, runtime_env
from cluster.storage import disk_error
from cluster.surroundings import LONGEST_TEMPORARY, service_links, settle, worker_hook


def test_what_kubernetes_makes_of_a_service_s_name_is_dropped_and_nothing_else() -> None:
    links = {
        "VLLM_PORT": "tcp://10.0.0.1:8000",
        "MLFLOW_PORT": "udp://10.0.0.1:5000",
        "MASTER_PORT": "tcp://10.0.0.2:1",
    }
    others = {
        "VLLM_HOST_IP": "10.0.0.1",
        "MASTER_PORT_2": "1",
        "RAY_PORT": "6379",
        "HOME": "/tmp",
        "USER": "a",
        "X": "tcp://a",
    }
    environ = {**links, **others}
    assert sorted(service_links(environ)) == sorted(links)
    settle(environ)
    assert {name: environ[name] for name in others} == others
    assert not links.keys() & environ.keys()


def test_workers_drop_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    import cloudpickle

    monkeypatch.setattr("cluster.surroundings.COLLECT_AFTER_S", 0.0)
    hook = pickle.loads(cloudpickle.dumps(runtime_env({}, {}, embedded=False)["worker_process_setup_hook"]))
    monkeypatch.setenv("VLLM_PORT", "tcp://10.0.0.1:8000")
    monkeypatch.setenv("MASTER_PORT", "29500")
    hook()
    assert "VLLM_PORT" not in os.environ
    assert os.environ["MASTER_PORT"] == "29500"
    assert "cluster." not in cloudpickle.dumps(hook).decode("latin-1").replace("cluster.packages", "").replace(
        "cluster.surroundings", ""
    )


def test_a_worker_imports_its_libraries_without_the_garbage_collector_and_has_it_back_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cluster.surroundings.COLLECT_AFTER_S", 0.5)
    try:
        worker_hook(None)()
        assert not gc.isenabled()
        if (child := os.fork()) == 0:
            os._exit(0 if gc.isenabled() else 1)
        assert os.waitpid(child, 0)[1] == 0
        deadline = time.monotonic() + 10
        while not gc.isenabled():
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        gc.enable()


@pytest.mark.parametrize("home", ["", "/proc/nowhere", "relative"])
def test_a_process_without_a_home_and_a_name_gets_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    def unknown(uid: int) -> object:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    environ = {"HOME": home} if home else {}
    settle(environ)
    assert environ["HOME"] == str(tmp_path / f"vans-home-{os.getuid()}")
    assert Path(environ["HOME"]).stat().st_mode & 0o777 == 0o700
    assert environ["USER"] == f"uid{os.getuid()}"


def test_sockets_go_to_a_short_folder_where_tmpdir_is_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 60)
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    environ = {"HOME": "/tmp", "USER": "a"}
    settle(environ)
    assert environ["RAY_TMPDIR"] == environ["VLLM_RPC_BASE_PATH"] == "/tmp"
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    with pytest.raises(ClusterError, match=f"set RAY_TMPDIR to a folder of at most {LONGEST_TEMPORARY} bytes"):
        _start_embedded(1, 0, 80, {})


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/a/b"), "/a/b: No space left on device; make room there"),
        (OSError(errno.EROFS, "Read-only file system", "/a/b"), "/a/b: Read-only file system; write to another folder"),
        (OSError("[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device"), "make room"),
        (PermissionError(errno.EACCES, "Permission denied", "/a"), "/a: Permission denied; correct the rights"),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), None),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/a"), None),
        (ValueError("No space left on device"), None),
    ],
)
def test_a_disk_s_error_is_one_line_with_the_cure(error: Exception, told: str | None) -> None:
    found = disk_error(error)
    assert found is None if told is None else told in str(found)
