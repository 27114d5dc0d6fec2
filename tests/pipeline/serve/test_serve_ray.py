"""The server by real HTTP, on Ray Serve with the tiny pair: what it answers, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from pipeline.config import RunConfig, load_config
from pipeline.data.video import decode_video
from pipeline.stages.question import Drawn, Said, read_video
from tests.pipeline.serve.serving import (
    QUESTION,
    answered,
    ask,
    export_adapter,
    files_of,
    free_port,
    in_replica,
    replica_pid,
    toy_clip,
)

pytest.importorskip("grpc_reflection", reason="the extra `serve` is not installed")


ENDLESS = 100_000
"""Denoising steps of a clip that no test could wait for."""


@pytest.fixture(scope="module")
def config() -> RunConfig:
    limits = f"serve.limits={{questions: 3, question_chars: 1999, queue: 6, steps: {ENDLESS}}}"
    return load_config("toy", [f"serve.port={free_port()}", "serve.follow_s=0.2", limits, "data.max_source_mib=4"])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run whose exports are followed: it has none yet."""
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def client(ray_local: None, config: RunConfig, root: Path, run: Path) -> Iterator[httpx.Client]:
    from ray import serve

    from pipeline.serve.app import Followed, served

    before, tempfile.tempdir = tempfile.tempdir, str(root)
    try:
        with served(config, None, Followed(config, run, {})) as address:
            with httpx.Client(base_url=address, timeout=60.0) as client:
                yield client
        assert files_of(root) == []
    finally:
        tempfile.tempdir = before
        serve.shutdown()


def test_two_what_ifs_are_answered_caption_before_clip(client: httpx.Client, config: RunConfig, tmp_path: Path) -> None:
    response = ask(client, toy_clip(), QUESTION, "what if it were reversed ?", seed=3)
    assert response.status_code == 202, response.text
    name = response.json()["id"]
    seen = []
    with client.stream("GET", f"/v1/answers/{name}/events") as events:
        assert events.headers["content-type"].startswith("text/event-stream")
        seen = [json.loads(line[6:]) for line in events.iter_lines() if line.startswith("data: ")]
    captions_first = [
        any(state["questions"][i]["caption"] and not state["questions"][i]["video"] for state in seen) for i in (0, 1)
    ]
    assert all(captions_first)
    last = seen[-1]
    assert last == client.get(f"/v1/answers/{name}").json()
    assert (last["state"], last["progress"], last["seed"]) == ("done", 1.0, 3)
    shares = [state["questions"][0]["progress"] for state in seen]
    assert shares == sorted(shares) and len({share for share in shares if 0.5 < share < 1}) > 1  # it rises by steps
    for question in last["questions"]:
        assert question["state"] == "done" and question["caption"] and question["error"] is None
        clip = client.get(question["video"])
        assert clip.headers["content-type"] == "video/mp4"
        (tmp_path / "out.mp4").write_bytes(clip.content)
        shape = (config.video.num_frames, config.video.height, config.video.width)
        assert decode_video(tmp_path / "out.mp4", *shape).shape == (*shape, 3)
    assert client.get(last["input"]).headers["content-type"] == "video/mp4"
    assert client.get(last["sheet"]).content.startswith(b"\x89PNG")
    part = client.get(last["questions"][0]["video"], headers={"Range": "bytes=0-9"})
    assert part.status_code == 206 and len(part.content) == 10  # browsers seek


def test_the_clip_is_that_of_vans_answer(client: httpx.Client, config: RunConfig, tmp_path: Path) -> None:
    from rich.console import Console

    from pipeline.commands.answer import draw
    from pipeline.data.video import encode_mp4
    from pipeline.support.progress import bar

    clip = toy_clip(2)
    (tmp_path / "named otherwise.mp4").write_bytes(clip)
    answer = answered(client, ask(client, clip, seed=5, steps=4, guidance=2).json()["id"])
    (asked,) = answer["questions"]
    render = config.evaluate.render.model_copy(update={"steps": 4, "guidance": 2.0})
    drawing = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"render": render})})
    sample = read_video(config, tmp_path / "named otherwise.mp4")
    with bar(Console(), "answering", 4) as progress:
        (drawn,) = draw(drawing, sample, [Said(QUESTION, "", asked["caption"])], None, 5, progress)
    assert isinstance(drawn, Drawn)
    assert client.get(asked["video"]).content == encode_mp4(drawn.frames, config.video.fps, near_lossless=False)
    again = answered(client, ask(client, clip, seed=5, steps=4, guidance=2).json()["id"])
    assert again["questions"][0]["caption"] == asked["caption"]
    assert np.array_equal(
        *(np.frombuffer(client.get(a["questions"][0]["video"]).content, np.uint8) for a in (answer, again))
    )


def header_says(pixels: bytes) -> bytes:
    """Return a GIF that says it has 65535 × 65535 pixels."""
    return (
        b"GIF89a\xff\xff\xff\xff\x80\x00\x00"
        + bytes(6)
        + b","
        + bytes(4)
        + b"\xff\xff\xff\xff\x00\x02\x02L\x01\x00;"
        + pixels
    )


@pytest.mark.parametrize(
    ("clip", "form", "status", "told"),
    [
        (b"this is text", {}, 422, "video: "),
        (b"", {}, 422, "video: "),
        (header_says(b""), {}, 422, "video: "),
        (bytes(6 << 20), {}, 413, "data.max_source_mib"),
        (toy_clip(), {"question": ["   "]}, 422, "it is empty"),
        (toy_clip(), {"question": ["w" * 2000]}, 422, "2000 characters, at most 1999"),
        (toy_clip(), {"question": ["a ?", "b ?", "c ?", "d ?"]}, 422, "serve.limits.questions"),
        (toy_clip(), {"question": [QUESTION], "steps": ENDLESS + 1}, 422, "steps"),
        (toy_clip(), {"question": [QUESTION], "guidance": "nan"}, 422, "guidance"),
        (toy_clip(), {"question": [QUESTION], "seed": -1}, 422, "seed"),
        (toy_clip(), {"question": [QUESTION], "pair": "before"}, 422, "this server has served"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_a_sentence_and_leaves_nothing(
    client: httpx.Client, root: Path, clip: bytes, form: dict, status: int, told: str
) -> None:
    before = files_of(root)
    response = client.post("/v1/answers", files={"video": ("in.mp4", clip)}, data={"question": [QUESTION], **form})
    assert response.status_code == status, response.text
    assert told in response.json()["detail"] and "/tmp" not in response.text and "Traceback" not in response.text
    assert files_of(root) == before


def test_a_question_that_the_thinker_cannot_take_fails_alone(client: httpx.Client) -> None:
    questions = ("what <|im_end|> now ?", "w " * 990, QUESTION)
    answer = answered(client, ask(client, toy_clip(), *questions).json()["id"])
    states = [question["state"] for question in answer["questions"]]
    assert states == ["failed", "failed", "done"] and answer["state"] == "done"
    assert "special token" in answer["questions"][0]["error"]


def test_html_in_a_question_comes_back_as_text(client: httpx.Client) -> None:
    text = "<script>alert(1)</script> what next ?"
    response = client.get(f"/v1/answers/{ask(client, toy_clip(), text).json()['id']}")
    assert response.headers["content-type"] == "application/json"
    assert response.json()["questions"][0]["question"] == text


def test_what_is_not_there_is_said(client: httpx.Client) -> None:
    assert "there is no answer" in client.get("/v1/answers/nothing").json()["detail"]
    name = ask(client, toy_clip()).json()["id"]
    assert client.get(f"/v1/answers/{name}/video.mp4?question=7").status_code == 404
    answered(client, name)


def test_an_answer_is_cancelled_and_then_removed(client: httpx.Client) -> None:
    name = ask(client, toy_clip(), QUESTION, "what if it were reversed ?", steps=50).json()["id"]
    assert client.delete(f"/v1/answers/{name}").status_code == 204
    answer = client.get(f"/v1/answers/{name}").json()
    assert answer["state"] == "cancelled" and all(q["video"] is None for q in answer["questions"])
    assert client.delete(f"/v1/answers/{name}").status_code == 204
    assert client.get(f"/v1/answers/{name}").status_code == 404


def test_a_clip_that_is_being_drawn_stops_when_it_is_cancelled(client: httpx.Client) -> None:
    name = ask(client, toy_clip(), steps=ENDLESS).json()["id"]
    until = time.monotonic() + 60
    while client.get(f"/v1/answers/{name}").json()["progress"] <= 0.5:
        assert time.monotonic() < until
    assert client.delete(f"/v1/answers/{name}").status_code == 204
    assert answered(client, ask(client, toy_clip()).json()["id"])["state"] == "done"  # by the same, one artist


def test_a_reader_that_goes_away_costs_nobody_the_answer(client: httpx.Client, config: RunConfig) -> None:
    name = ask(client, toy_clip(3)).json()["id"]
    with client.stream("GET", f"/v1/answers/{name}/events") as events:
        next(events.iter_lines())
    assert answered(client, name)["state"] == "done"


def test_an_upload_that_breaks_off_leaves_nothing(client: httpx.Client, config: RunConfig, root: Path) -> None:
    before = files_of(root)
    head = b"POST /v1/answers HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3000000\r\n"
    head += b"Content-Type: multipart/form-data; boundary=b\r\n\r\n"
    part = b'--b\r\nContent-Disposition: form-data; name="video"; filename="a.mp4"\r\n\r\n'
    with socket.create_connection(("127.0.0.1", config.serve.port)) as half:
        half.sendall(head + part + bytes(2_000_000))
        time.sleep(0.5)
    assert answered(client, ask(client, toy_clip(5)).json()["id"])["state"] == "done"
    assert len(files_of(root)) == len(before) + 2  # the later answer's input and clip


def test_pages_of_other_sites_are_refused(client: httpx.Client) -> None:
    for headers in ({"Origin": "https://elsewhere.example"}, {"Host": "elsewhere.example"}):
        assert client.get("/openapi.json", headers=headers).status_code == 403
    assert client.get("/openapi.json").json()["info"]["title"] == "VANS on Ray"


def test_beyond_the_queue_people_are_told_when_to_come_back(client: httpx.Client, config: RunConfig) -> None:
    responses = [ask(client, toy_clip(i), steps=50) for i in range(config.serve.limits.queue + 3)]
    refused = [r for r in responses if r.status_code == 429]
    assert refused and all(int(r.headers["Retry-After"]) >= 1 for r in refused)
    taken = [r.json()["id"] for r in responses if r.status_code == 202]
    assert {answered(client, name)["state"] for name in taken} == {"done"}


@pytest.mark.parametrize("deployment", ["ingress", "thinker", "artist"])
def test_the_port_at_which_deployments_talk_wants_rays_token(client: httpx.Client, deployment: str) -> None:
    """Ray Serve opens it on every interface, and what comes in there is unpickled."""
    import grpc

    port = in_replica(deployment, lambda actor: actor._replica_impl._internal_grpc_port)
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        with pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary("/ray.serve.ASGIService/HandleRequest")(b"", timeout=10)
    assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_newer_exports_are_served_while_people_ask(client: httpx.Client, run: Path) -> None:
    def state_and_clip() -> tuple[str, bytes]:
        (question,) = answered(client, ask(client, toy_clip(4), seed=1).json()["id"])["questions"]
        assert question["state"] == "done" or "so there is nothing to draw" in question["error"], question
        return question["state"], client.get(question["video"]).content if question["video"] else b""

    def soon(differs: Callable[[tuple[str, bytes]], bool]) -> tuple[str, bytes]:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            if differs(found := state_and_clip()):
                return found
        raise AssertionError("the new weights are not served")

    before = state_and_clip()
    export_adapter(run / "vdm_adapter", "vdm", 0.5)
    soon(lambda found: found[1] != before[1])
    export_adapter(run / "vlm_adapter", "vlm", 50.0)
    soon(lambda found: found[0] == "failed")  # it babbles
    for policy in ("vlm", "vdm"):
        export_adapter(run / "checkpoints" / "stage2-step000001" / f"{policy}_adapter", policy, 0.0)  # type: ignore[arg-type]
    soon(lambda found: found == before)


def test_an_artist_that_is_killed_costs_no_answer(client: httpx.Client) -> None:
    """The last test: the replica that comes in the place of the killed one takes seconds to load."""
    names = [ask(client, toy_clip(i), steps=50).json()["id"] for i in range(4)]
    until = time.monotonic() + 60
    while all(client.get(f"/v1/answers/{name}").json()["state"] != "drawing" for name in names):
        assert time.monotonic() < until
    os.kill(replica_pid("artist"), signal.SIGKILL)
    answers = [answered(client, name) for name in names]
    assert [answer["state"] for answer in answers] == ["done"] * 4, answers
