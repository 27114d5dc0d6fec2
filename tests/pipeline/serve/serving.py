"""What the tests of the server share: a run's configuration, clips, and a client that waits for an answer."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

import httpx

from pipeline.data.toy import make_sample
from pipeline.data.video import encode_mp4

DEADLINE_S = 120.0
ENDED = ("done", "failed", "cancelled")
QUESTION = "what is the next step ?"


def free_port() -> int:
    """Return a port at which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def toy_clip(number: int = 0) -> bytes:
    """Return an input clip of the toy world as mp4."""
    return encode_mp4(make_sample(number, "test").input_frames, 8.0)


def ask(client: httpx.Client, clip: bytes, *questions: str, **form: Any) -> httpx.Response:
    """Ask ``questions`` about ``clip``."""
    return client.post(
        "/v1/answers", files={"video": ("in.mp4", clip)}, data={"question": list(questions or (QUESTION,)), **form}
    )


def answered(client: httpx.Client, name: str) -> dict[str, Any]:
    """Return an answer when it has ended."""
    until = time.monotonic() + DEADLINE_S
    while time.monotonic() < until:
        answer: dict[str, Any] = client.get(f"/v1/answers/{name}").raise_for_status().json()
        if answer["state"] in ENDED:
            return answer
        time.sleep(0.05)
    raise AssertionError(f"no answer within {DEADLINE_S:g} s: {answer}")


def files_of(root: Path) -> list[str]:
    """Return the names of all files below ``root``."""
    return sorted(path.name for path in root.rglob("*") if path.is_file())


def replica_pid(deployment: str) -> int:
    """Return the process of one replica of a deployment of the served application."""
    import ray
    from ray.util import list_named_actors

    names = [
        actor["name"] for actor in list_named_actors(all_namespaces=True) if f"vans#{deployment}#" in actor["name"]
    ]
    replica = ray.get_actor(names[0], namespace="serve")
    return int(ray.get(replica.__ray_call__.remote(lambda actor: os.getpid()), timeout=60))
