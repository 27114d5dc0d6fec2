"""The reward worker as a Ray actor."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from actors.failures import Ok
from actors.scoring.scorer import Scorer
from actors.scoring.worker import RewardWorker

COMPONENTS = ("format", "rouge_l", "clip_v", "clip_score")


@pytest.fixture(scope="module")
def worker(ray_local: None, tiny_clip_dir: Path) -> Iterator[ray.actor.ActorHandle]:
    actor = (
        ray.remote(RewardWorker)
        .options(num_cpus=0.5, max_restarts=0)
        .remote("reward-0", str(tiny_clip_dir), COMPONENTS)
    )
    yield actor
    ray.kill(actor)


def test_the_worker_follows_the_protocol_and_scores_as_the_scorer_does(worker, clip, request_for) -> None:
    info = ray.get(worker.setup.remote(), timeout=120)
    assert info.name == "reward-0" and info.device == "cpu" and info.model_hash == clip.parameter_hash()
    requests = [request_for(i, COMPONENTS) for i in range(5)]
    outcomes = ray.get(worker.process.remote(requests), timeout=60)
    expected = Scorer(clip).score(requests)
    assert all(isinstance(o, Ok) for o in outcomes)
    assert [o.value for o in outcomes] == [o.value for o in expected]
    assert ray.get(worker.rest.remote(), timeout=30) >= 0  # gives up what memory it can, and wakes for the next request
    assert [o.value for o in ray.get(worker.process.remote(requests), timeout=60)] == [o.value for o in expected]
    assert ray.get(worker.load_weights.remote(3, None), timeout=30) == 3
    assert ray.get(worker.weights_hash.remote(), timeout=30) == f"{clip.parameter_hash()}:3"
    assert ray.get(worker.ping.remote(), timeout=30) == "reward-0"
    assert ray.get(worker.fvd_extractor.remote(), timeout=30) == Scorer(clip).fvd_extractor
    assert ray.get(worker.stats.remote(), timeout=30)["cache_misses"] > 0


def test_a_wrong_component_stops_the_worker_at_its_start(tiny_clip_dir: Path) -> None:
    with pytest.raises(Exception, match="unknown reward component 'beauty'"):
        RewardWorker("reward-1", str(tiny_clip_dir), ("clip_v", "beauty")).setup()
    with pytest.raises(RuntimeError, match="before setup"):
        RewardWorker("reward-1", str(tiny_clip_dir)).process([])
