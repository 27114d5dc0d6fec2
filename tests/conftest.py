"""What every test stands on: an offline, single-threaded environment, one shared local Ray, tiny models and toy data.

The environment is set before anything heavy is imported, because torch, vLLM and Ray read it at import.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_COMPILE_DISABLE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVSPACE": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "VANS_STRICT_METRICS": "1",
    # Whoever runs the tests may have credentials of their own, which are not for here.
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_EC2_METADATA_DISABLED": "true",
}
os.environ.update(ENVIRONMENT)
for _name in (
    *("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID", "RAY_ADDRESS"),
    *(
        "AWS_PROFILE",
        "AWS_SESSION_TOKEN",
        "AWS_ENDPOINT_URL",
        "AWS_ENDPOINT_URL_S3",
        "AWS_REGION",
        "AWS_DEFAULT_REGION",
    ),
):
    os.environ.pop(_name, None)

# Collecting imports torch, transformers, diffusers and more: the garbage collector would go over all that again and again.
gc.disable()

import pytest  # noqa: E402 - the environment comes first

from tests.browser import chromium  # noqa: E402
from tests.s3_server import S3Server  # noqa: E402


def starts_ray(item: pytest.Item) -> bool:
    """Return whether the test needs Ray, vLLM or a GPU, by its marks, its file's name or its fixtures."""
    marked = any(item.get_closest_marker(name) for name in ("ray", "vllm", "gpu"))
    return marked or item.path.name.endswith("_ray.py") or "_ray_session" in getattr(item, "fixturenames", ())


def place(item: pytest.Item) -> int:
    """Return when the file of ``item`` comes: 0 where it shares the one Ray, 1 where it ends that for its own, 2 without Ray."""
    if item.get_closest_marker("ray") is None:
        return 2
    return int("ray_alone" in getattr(item, "fixturenames", ()))


@pytest.hookimpl(tryfirst=True)  # before pytest leaves tests out by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test that needs Ray, and begin with the files that share one: it is not started again and again.

    Two processes that share the files so have the short ones at the end, where both shall be at work.
    """
    first: dict[Path, int] = {}
    for item in items:
        if starts_ray(item):
            item.add_marker(pytest.mark.ray)
        first[item.path] = min(place(item), first.get(item.path, 2))
    items.sort(key=lambda item: first[item.path])


def pytest_collection_finish(session: pytest.Session) -> None:
    """Let the garbage collector work from here on, and leave what the imports made alone."""
    gc.enable()
    gc.freeze()


RAY_SLOTS = 8
"""CPU slots of the tests' Ray: more than cores, because the tiny workers share them."""


def start_ray() -> None:
    """Start the embedded Ray of the tests, unless one is running in this process."""
    import ray

    from cluster.session import runtime_env

    if not ray.is_initialized():
        ray.init(
            address="local",
            runtime_env=runtime_env(os.environ, {}, embedded=True),  # as a run's workers have it
            num_cpus=RAY_SLOTS,
            object_store_memory=200 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
        )


def stop_ray() -> None:
    """Stop the Ray that this process started, and no other."""
    import ray

    if ray.is_initialized():
        ray.shutdown()


@pytest.fixture(scope="session")
def _ray_session() -> Iterator[None]:
    yield
    stop_ray()


@pytest.fixture(scope="module")
def ray_local(_ray_session: None) -> None:
    """An embedded Ray of ``RAY_SLOTS`` slots, shared by all modules; a module ends the actors that it started."""
    start_ray()


@pytest.fixture(scope="module")
def ray_alone(_ray_session: None) -> Iterator[None]:
    """No Ray running when the module starts, and none left behind: for tests that start a cluster of their own."""
    stop_ray()
    yield
    stop_ray()


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """An S3-compatible server on loopback, in a process of its own; each test makes a bucket of its own."""
    server = S3Server()
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, of Playwright's synchronous API; where there is none the test is skipped (tests/browser.py)."""
    with chromium() as found:
        yield found


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny models with random weights."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def tiny_vlm_dir(models_dir: Path) -> Path:
    """Transformers folder of the tiny Qwen3-VL, random weights."""
    from pipeline.pretrain.architectures import build_tiny_vlm

    return build_tiny_vlm(models_dir / "vlm", seed=0)


@pytest.fixture(scope="session")
def tiny_qwen25_dir(models_dir: Path) -> Path:
    """Transformers folder of a tiny Qwen2.5-VL, random weights."""
    from tests.actors.vlm.qwen25 import build_tiny_qwen25

    return build_tiny_qwen25(models_dir / "qwen25", seed=0)


@pytest.fixture(scope="session")
def tiny_vdm_dir(models_dir: Path) -> Path:
    """Diffusers WanPipeline folder of the tiny artist, random weights."""
    from pipeline.pretrain.architectures import build_tiny_vdm

    return build_tiny_vdm(models_dir / "vdm", seed=0)


@pytest.fixture(scope="session")
def tiny_clip_dir(models_dir: Path) -> Path:
    """Transformers folder of the tiny CLIP, random weights."""
    from pipeline.pretrain.architectures import build_tiny_clip

    return build_tiny_clip(models_dir / "clip", seed=0)


@pytest.fixture(scope="session")
def toy_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``train/`` (24 samples), ``val/`` and ``test/`` (8 each) of the toy world."""
    from pipeline.data.toy.shards import write_toy

    folder = tmp_path_factory.mktemp("toy")
    write_toy(folder, train=24, test=8, seed=0)
    return folder
