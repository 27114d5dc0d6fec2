"""CLIP features against stock transformers, and the scorer's promises: independence, honesty about failure, caching."""

import asyncio
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from actors.failures import BadSampleError, Failure, InfrastructureError, Ok
from actors.scoring.clip import ClipScorer
from actors.scoring.components import BUILT_IN, VIDEO_FEATURES
from actors.scoring.scorer import Scorer
from actors.scoring.video import TorchScriptExtractor
from cluster.errors import CheckpointError
from rewards.errors import RewardError


def noise(seed: int, frames: int = 9, height: int = 32, width: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def projected(output: object) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.pooler_output  # type: ignore[attr-defined]


def test_features_equal_stock_transformers(clip: ClipScorer, tiny_clip_dir: Path) -> None:
    model, processor = CLIPModel.from_pretrained(tiny_clip_dir), CLIPProcessor.from_pretrained(tiny_clip_dir)
    frames, captions = noise(0, frames=3, height=48, width=70), ["the red ball rises", "the blue box"]
    images = processor(images=[Image.fromarray(f) for f in frames], return_tensors="pt")
    texts = processor(text=captions, return_tensors="pt", padding=True)
    with torch.inference_mode():
        expected = projected(model.get_image_features(pixel_values=images["pixel_values"])).numpy()
        expected_text = projected(model.get_text_features(**texts)).numpy()
    assert clip.image_features([frames])[0] == pytest.approx(expected, abs=1e-5)
    assert clip.text_features(captions)[0] == pytest.approx(expected_text, abs=1e-5)


def test_features_do_not_depend_on_what_shares_the_batch(clip: ClipScorer) -> None:
    """Bitwise, so that a request sent again, to a worker with another batch, has the same reward."""
    clips = [noise(i, frames=n, height=h) for i, (n, h) in enumerate([(9, 32), (1, 32), (33, 40), (70, 32), (5, 64)])]
    together = clip.image_features(clips)
    assert [f.shape for f in together] == [(len(c), clip.dim) for c in clips]
    assert all(np.array_equal(clip.image_features([c])[0], f) for c, f in zip(clips, together))
    captions = ["the red ball rises", "the cyan box", "the mauve wedge heads west"]
    vectors, _ = clip.text_features(captions)
    assert all(np.array_equal(clip.text_features([c])[0][0], v) for c, v in zip(captions, vectors))
    assert clip.image_features([]) == [] and clip.text_features([])[0].shape == (0, clip.dim)


def test_long_captions_are_cut_and_counted(clip: ClipScorer, request_for) -> None:
    before = clip.truncated
    long = "the red ball rises " * 20
    _, cut = clip.text_features(["the red ball rises", long])
    assert cut == [False, True] and clip.truncated == before + 1
    scores = Scorer(clip).score([request_for(0, ("clip_score",), caption=long)])[0].value
    assert scores.diagnostics["caption_truncated"] == 1.0


def test_a_wrong_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not the folder of a CLIP model"):
        ClipScorer(tmp_path)


def test_ground_truth_scores_one_and_diagnostics_ride_along(clip: ClipScorer, request_for) -> None:
    outcome = Scorer(clip).score([request_for(0, (*BUILT_IN, VIDEO_FEATURES))])[0]
    scores = outcome.value
    assert scores.values["format"] == scores.values["rouge_l"] == 1.0
    assert scores.values["clip_v"] == pytest.approx(1.0)
    assert scores.values["clip_score"] == max(0.0, scores.values["clip_t"])
    assert scores.diagnostics["motion_ratio"] == 1.0 and scores.diagnostics["copy_excess"] == 0.0
    assert np.array_equal(scores.features["clip"], scores.features["target"])


def test_a_frozen_video_loses_to_the_truth(clip: ClipScorer, request_for) -> None:
    frozen = np.repeat(request_for(0, ()).last_input_frame[None], 9, axis=0)
    truth, still = (
        o.value for o in Scorer(clip).score([request_for(0, ("clip_v",)), request_for(0, ("clip_v",), clip=frozen)])
    )
    assert still.values["clip_v"] < truth.values["clip_v"]
    assert still.diagnostics["motion_ratio"] < 0.2 < truth.diagnostics["motion_ratio"]
    assert still.diagnostics["copy_excess"] > 0.0


def test_a_malformed_answer_needs_no_clip(clip: ClipScorer, request_for) -> None:
    scores = Scorer(clip).score([request_for(0, ("format", "rouge_l"), text="junk", caption="", clip=None)])[0].value
    assert scores.values == {"format": 0.0, "rouge_l": 0.0} and scores.diagnostics == {}


@pytest.fixture
def my_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "scorer_test_rewards.py").write_text(
        "import numpy as np\n"
        "def redness(*, clip, **_):\n    return clip[..., 0].mean() / 255\n"
        "def broken(**_):\n    raise ZeroDivisionError('the scorer is broken')\n"
        "def undefined(**_):\n    return float('nan')\n"
        "def wordy(**_):\n    return 'good'\n"
        "def vandal(*, target_frames, **_):\n    target_frames[:] = 0\n    return 1.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "scorer_test_rewards"
    sys.modules.pop("scorer_test_rewards", None)


def test_a_custom_reward_scores_by_path_and_by_alias(clip: ClipScorer, request_for, my_rewards: str) -> None:
    path = f"{my_rewards}:redness"
    request = request_for(0, ("red", path))
    values = Scorer(clip, custom={"red": path}).score([request])[0].value.values
    assert values["red"] == values[path] == pytest.approx(request.clip[..., 0].mean() / 255)
    with pytest.raises(RewardError, match="built-in names"):
        Scorer(clip, custom={"clip_v": path})


def test_a_scorer_that_fails_is_a_failure_and_not_a_zero(clip: ClipScorer, request_for, my_rewards: str) -> None:
    """Each failure is classed, names its cause, and leaves the neighbours in the batch alone."""
    empty = np.zeros((0, 32, 32, 3), np.uint8)
    requests = [
        request_for(0, ("clip_v",)),
        request_for(1, ("clip_v", f"{my_rewards}:broken")),
        request_for(2, (f"{my_rewards}:undefined",)),
        request_for(3, ("clip_v",), clip=empty),
        request_for(4, ("clip_v",), clip=None),
        request_for(5, ("clip_score",), caption=" "),
        request_for(6, ("beauty",)),
        request_for(7, (f"{my_rewards}:vandal",)),
        request_for(9, ("clip_v",), clip=np.zeros((9, 32, 32), np.uint8)),
        request_for(10, ("clip_v",), clip=np.zeros((9, 32, 32, 3), np.float32)),
        request_for(11, (f"{my_rewards}:wordy",)),
        request_for(8, ("clip_v",)),
    ]
    outcomes = Scorer(clip).score(requests)
    assert [type(o) for o in outcomes] == [Ok, *[Failure] * 10, Ok]
    kinds = [o.kind for o in outcomes[1:-1]]
    assert kinds == ["data", "data", "data", "bug", "data", "bug", "data", "data", "data", "data"]
    causes = ["scorer is broken (scorer_test_rewards.py, line 5, in broken)", "is nan", "no picture", "need a clip"]
    causes += ["empty caption", "'beauty'", "read-only", "uint8 (9, 32, 32)", "float32", "must return a float"]
    for outcome, cause in zip(outcomes[1:-1], causes, strict=True):
        assert cause in outcome.message
    assert "ZeroDivisionError" in outcomes[1].traceback
    alone = Scorer(clip).score([requests[-1]])[0]
    assert outcomes[-1].value.values == alone.value.values


@pytest.fixture
def odd_rewards(monkeypatch: pytest.MonkeyPatch):
    """A module of rewards that misbehave; ``calls`` counts."""
    module = ModuleType("odd_test_rewards")
    module.calls = []  # type: ignore[attr-defined]

    def raising(error: BaseException, times: int) -> Any:
        def reward(*, sample_id: str, **_: Any) -> float:
            module.calls.append(sample_id)  # type: ignore[attr-defined]
            if len(module.calls) <= times:  # type: ignore[attr-defined]
                raise error
            return 0.5

        return reward

    rewards = {
        "leaving": raising(SystemExit(3), 9),
        "cancelled": raising(asyncio.CancelledError(), 9),
        "asserting": raising(AssertionError("no clip like that"), 9),
        "stopping": raising(StopIteration(), 9),
        "bad_sample": raising(BadSampleError("mine"), 9),
        "offline": raising(ConnectionError("the judge is away"), 9),
        "late": raising(TimeoutError("no answer"), 9),
        "full": raising(MemoryError(), 9),
        "gpu_full": raising(torch.OutOfMemoryError("no room"), 9),
        "machine": raising(InfrastructureError("the judge restarts"), 9),
        "twice": raising(ConnectionError("the judge is away"), 2),
        "nothing": lambda **_: None,
        "infinite": lambda **_: math.inf,
        "huge": lambda **_: 1e39,
        "largest": lambda **_: -float(np.finfo(np.float32).max),
        "spelt": lambda **_: "0.5",
        "many": lambda **_: np.zeros(4),
        "scalar": lambda **_: np.float32(0.25),
        "hung": lambda sample_id, **_: time.sleep(60) if sample_id == "1" else 0.5,
        "slow": lambda **_: time.sleep(0.05) or 0.5,
    }
    for name, function in rewards.items():
        setattr(module, name, function)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.mark.parametrize("limit", [math.inf, 30.0])
@pytest.mark.parametrize(
    ("name", "cause", "calls"),
    [
        ("leaving", "raised SystemExit: 3 (test_scoring.py, line", 1),
        ("cancelled", "raised CancelledError", 1),
        ("asserting", "raised AssertionError: no clip like that", 1),
        ("stopping", "raised StopIteration", 1),
        ("bad_sample", "raised BadSampleError: mine", 1),
        ("offline", "raised in each of 3 tries, the last time ConnectionError: the judge is away", 3),
        ("late", "the last time TimeoutError: no answer", 3),
        ("full", "the last time MemoryError", 3),
        ("gpu_full", "the last time OutOfMemoryError: no room", 3),
        ("machine", "the last time InfrastructureError: the judge restarts", 3),
        ("nothing", "returned None; it must return a float", 0),
        ("infinite", "is inf", 0),
        ("huge", "is 1e+39", 0),
        ("spelt", "returned '0.5'; it must return a float", 0),
        ("many", "returned array([0., 0., 0., 0.]); it must return a float", 0),
    ],
)
def test_whatever_a_custom_reward_does_is_that_answers_failure(
    clip: ClipScorer, request_for, odd_rewards, name: str, cause: str, calls: int, limit: float
) -> None:
    scorer = Scorer(clip, custom={"odd": f"odd_test_rewards:{name}"}, custom_timeout_s=limit, wait_s=0.0)
    odd, other = scorer.score([request_for(0, ("format", "odd")), request_for(1, ("format",))])
    assert isinstance(odd, Failure) and odd.kind == "data" and cause in odd.message and isinstance(other, Ok)
    assert len(odd_rewards.calls) == calls


def test_a_judge_that_answers_the_third_time_is_heard(clip: ClipScorer, request_for, odd_rewards) -> None:
    names = ("twice", "largest", "scalar")
    scorer = Scorer(clip, custom={n: f"odd_test_rewards:{n}" for n in names}, wait_s=0.0)
    values = scorer.score([request_for(0, names)])[0].value.values
    assert values == {"twice": 0.5, "largest": -float(np.finfo(np.float32).max), "scalar": 0.25}
    assert len(odd_rewards.calls) == 3


def test_a_custom_reward_that_hangs_on_one_answer_loses_that_answer_alone(
    clip: ClipScorer, request_for, odd_rewards
) -> None:
    scorer = Scorer(clip, custom={n: f"odd_test_rewards:{n}" for n in ("hung", "slow")}, custom_timeout_s=0.5)
    requests = [replace(request_for(i, ("hung", "slow")), sample_id=str(i)) for i in range(3)]
    first, hung, last = scorer.score(requests)
    assert isinstance(hung, Failure) and hung.kind == "data" and "took longer than 0.5 s for one answer" in hung.message
    assert first.value.values == last.value.values == {"hung": 0.5, "slow": 0.5}


def test_not_even_an_interrupt_of_a_custom_reward_ends_its_worker(clip: ClipScorer, request_for, odd_rewards) -> None:
    def interrupting(**_: Any) -> float:
        raise KeyboardInterrupt("mine")

    odd_rewards.interrupting = interrupting
    scorer = Scorer(clip, custom={"odd": "odd_test_rewards:interrupting"}, custom_timeout_s=30.0)
    (outcome,) = scorer.score([request_for(0, ("odd",))])
    assert (
        isinstance(outcome, Failure) and outcome.kind == "data" and "raised KeyboardInterrupt: mine" in outcome.message
    )


def test_a_text_that_no_tokenizer_takes_leaves_its_neighbours_alone(
    clip: ClipScorer, request_for, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lone surrogate is the sample's fault; an error of the shared pass over a batch is put where it belongs."""
    requests = [request_for(i, ("clip_t",), caption=c) for i, c in enumerate(("red", "r\ud800d", "blue"))]
    outcomes = Scorer(clip).score(requests)
    assert [type(o) for o in outcomes] == [Ok, Failure, Ok]
    assert outcomes[1].kind == "data" and "the caption is not Unicode text" in outcomes[1].message
    tokenizer = clip.tokenizer

    def refusing(texts: list[str], **options: Any) -> Any:
        if "odd" in texts:
            raise BadSampleError("odd text")
        return tokenizer(texts, **options)

    monkeypatch.setattr(clip, "tokenizer", refusing)
    requests = [request_for(i, ("clip_t",), caption=c) for i, c in enumerate(("red", "odd", "blue"))]
    outcomes = Scorer(clip).score(requests)
    assert [type(o) for o in outcomes] == [Ok, Failure, Ok] and outcomes[1].kind == "data"


@pytest.mark.parametrize("truth", ["\U0001f408\u27a1", "?!\u2026", "", "  \n"])
def test_a_truth_that_rouge_cannot_read_is_data_and_the_other_components_are_there(
    clip: ClipScorer, request_for, truth: str
) -> None:
    whole, rest = (
        replace(request_for(0, names), reference_caption=truth)
        for names in ((*BUILT_IN, VIDEO_FEATURES), tuple(n for n in BUILT_IN if n != "rouge_l"))
    )
    lost, found = Scorer(clip).score([whole, rest])
    assert isinstance(lost, Failure) and lost.kind == "data" and "letters or digits" in lost.message
    assert set(found.value.values) == set(BUILT_IN) - {"rouge_l"}


def test_the_cache_gives_the_same_values_and_stays_bounded(clip: ClipScorer, request_for) -> None:
    requests = [request_for(i % 3, ("clip_v",), clip=noise(i)) for i in range(9)]
    cached, bare = Scorer(clip), Scorer(clip, cache_mib=0.0)
    assert [o.value for o in cached.score(requests)] == [o.value for o in bare.score(requests)]
    again = [o.value for o in cached.score(requests)]
    assert again == [o.value for o in bare.score(requests)]
    assert cached.cache.hits >= 9 + 3 and bare.cache.hits == 0 and len(bare.cache) == 0


def test_any_torchscript_network_extracts_video_features(tmp_path: Path) -> None:
    class Mean(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x.mean(dim=[2, 3, 4]), x.new_full([1, 1], float(x.shape[2]))], dim=1)

    torch.jit.script(Mean()).save(str(tmp_path / "mean.pt"))
    extractor = TorchScriptExtractor(tmp_path / "mean.pt", "mean-colour", size=16)
    feature = extractor(np.full((4, 32, 32, 3), 255, np.uint8))
    assert feature == pytest.approx([1, 1, 1, 10], abs=1e-5), "four frames are stretched to the ten that I3D needs"
    (tmp_path / "junk.pt").write_bytes(b"junk")
    torch.jit.script(torch.nn.Linear(3, 3)).save(str(tmp_path / "linear.pt"))
    torch.jit.script(torch.nn.Identity()).save(str(tmp_path / "identity.pt"))
    for name, message in (
        ("junk.pt", "not a TorchScript"),
        ("none.pt", "no such file"),
        ("linear.pt", r"cannot take float32 \(1, 3, 10, 224, 224\)"),
        ("identity.pt", r"returned \(1, 3, 10, 224, 224\), expected \(1, D\)"),
    ):
        with pytest.raises(CheckpointError, match=message):
            TorchScriptExtractor(tmp_path / name, "x")
