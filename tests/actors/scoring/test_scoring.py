"""CLIP features against stock transformers, and the scorer's promises: independence, honesty about failure, caching."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from actors.failures import Failure, Ok
from actors.scoring.clip import ClipScorer
from actors.scoring.features import FeatureCache, content_key
from actors.scoring.scorer import BUILT_IN, VIDEO_FEATURES, Scorer
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


def test_the_cache_gives_the_same_values_and_stays_bounded(clip: ClipScorer, request_for) -> None:
    requests = [request_for(i % 3, ("clip_v",), clip=noise(i)) for i in range(9)]
    cached, bare = Scorer(clip), Scorer(clip, cache_mib=0.0)
    assert [o.value for o in cached.score(requests)] == [o.value for o in bare.score(requests)]
    again = [o.value for o in cached.score(requests)]
    assert again == [o.value for o in bare.score(requests)]
    assert cached.cache.hits >= 9 + 3 and bare.cache.hits == 0 and len(bare.cache) == 0


def test_least_recently_used_features_make_room() -> None:
    cache = FeatureCache(max_bytes=3 * 400)
    rows = {name: np.full(100, i, np.float32) for i, name in enumerate(b"abcd")}
    for name in b"abc":
        cache.put(bytes([name]), rows[name])
    assert cache.get(b"a") is rows[ord("a")]
    cache.put(b"d", rows[ord("d")])
    assert cache.get(b"b") is None and cache.get(b"a") is not None and cache.bytes == 1200
    cache.put(b"e", np.zeros(1000, np.float32))
    assert cache.get(b"e") is None and len(cache) == 3
    x = noise(0)
    assert content_key(x) == content_key(x.copy()) == content_key(x[:, ::-1][:, ::-1])
    assert content_key(x) != content_key(x.reshape(9, 32, 32 * 3, 1))


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
