"""What the tests of the server share: a run's configuration, clips, and a client that waits for an answer."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

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


def put(page: Any, clip: bytes | None, *questions: str) -> None:
    """Ask on a page of the playground, in a browser: about ``clip``, or about nothing."""
    if clip is not None:
        page.set_input_files("#video input[type=file]", {"name": "in.mp4", "mimeType": "video/mp4", "buffer": clip})
        page.wait_for_selector("#video video")
    page.fill("#questions textarea", "\n".join(questions))
    page.click("#ask")


@contextmanager
def serving_process(*words: str) -> Iterator[str]:
    """Run ``vans serve`` with ``words`` in a process of its own and yield its address; stopped as Ctrl-C stops it.

    RuntimeError with what it said where it ends before it has one.
    """
    command = [sys.executable, "-m", "pipeline", "serve", "--no-install", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            assert server.stdout is not None
            said = []
            for line in server.stdout:
                said.append(line)
                if line.startswith("open "):
                    yield line.split()[1]
                    return
            raise RuntimeError("".join(said))
        finally:
            server.send_signal(signal.SIGINT)
            server.communicate(timeout=120)


def export_adapter(folder: Path, role: Literal["vlm", "vdm"], size: float) -> None:
    """Write an adapter of the tiny ``role`` as a run does. With ``size`` 0 it changes nothing, with a large one everything."""
    import torch

    from actors.learner.adapters import model_layers
    from actors.weights.files import write_folder
    from pipeline.fleet.models import resolve_model

    layers = model_layers(resolve_model("tiny", role), role)
    ends = ("q_proj", "attn1.to_q")
    names = sorted(name for name in layers if name.endswith(ends) and "visual" not in name)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name in names:
        rows, columns = layers[name]
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(2, columns, generator=generator)
        tensors[f"base_model.model.{name}.lora_B.weight"] = size * torch.randn(rows, 2, generator=generator)
    targets = sorted({name.rpartition(".")[2] for name in names} if role == "vlm" else names)
    write_folder(folder, {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": targets}, tensors)


def files_of(root: Path) -> list[str]:
    """Return the names of all files below ``root``."""
    return sorted(path.name for path in root.rglob("*") if path.is_file())


def replica_pid(deployment: str) -> int:
    """Return the process of one replica of a deployment of the served application."""
    return int(in_replica(deployment, lambda actor: os.getpid()))


def in_replica(deployment: str, call: Callable[[Any], Any]) -> Any:
    """Return what ``call`` finds in the process of one replica, of which it gets the actor."""
    import ray
    from ray.util import list_named_actors

    names = [
        actor["name"] for actor in list_named_actors(all_namespaces=True) if f"vans#{deployment}#" in actor["name"]
    ]
    replica = ray.get_actor(names[0], namespace="serve")
    return ray.get(replica.__ray_call__.remote(call), timeout=60)
