"""video_similarity and dino_v: features against the source library with tiny random weights, limit cases, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Dinov2Model,
    TimesformerConfig,
    TimesformerModel,
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VideoMAEImageProcessor,
    VJEPA2Config,
    VJEPA2Model,
    VJEPA2VideoProcessor,
    XCLIPConfig,
    XCLIPModel,
    XCLIPTextConfig,
    XCLIPVisionConfig,
)

from actors.scoring.bundled import DinoSimilarity, VideoSimilarity
from actors.scoring.contract import check_reward
from actors.scoring.encoders import MAKES, VideoEncoder, parameters_of
from actors.scoring.model import RewardLoadError, start_model
from cluster.errors import CheckpointError
from pipeline.commands.toy_answers import odd_answers, ordinary_answers
from pipeline.config import load_config
from pipeline.data.toy import make_sample
from pipeline.fleet.kinds import kinds_of
from pipeline.fleet.models import resolve_model
from pipeline.fleet.rewards import BUNDLED
from rewards.similarity import resample_frames
from tests.actors.scoring.encoders import IMAGES, MEAN, SIZE, STD, tiny_dino

pytestmark = pytest.mark.slow

FRAMES = 4
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


def build(make: str, folder: Path) -> Any:
    """Save a tiny random model of ``make`` with its preprocessor; return the library's own class, loaded from there."""
    torch.manual_seed(0)
    processor: Any = VideoMAEImageProcessor(**IMAGES)
    model: Any
    if make == "videomae":
        decoder = {f"decoder_{key}": value for key, value in SMALL.items()}
        config = VideoMAEConfig(image_size=SIZE, patch_size=8, num_frames=FRAMES, tubelet_size=2, **SMALL, **decoder)
        model = VideoMAEForPreTraining(config)  # what is published: with a decoder that no reward asks for
    elif make == "timesformer":
        model = TimesformerModel(TimesformerConfig(image_size=SIZE, patch_size=8, num_frames=FRAMES, **SMALL))
    elif make == "vjepa2":
        small = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2.0}
        predictor = {"pred_hidden_size": 48, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1}
        config = VJEPA2Config(
            crop_size=SIZE, patch_size=8, frames_per_clip=FRAMES, tubelet_size=2, **small, **predictor
        )
        model, processor = VJEPA2Model(config), VJEPA2VideoProcessor(**IMAGES)
    else:
        text = XCLIPTextConfig(vocab_size=50, max_position_embeddings=16, **SMALL)
        mit = {f"mit_{key}": value for key, value in SMALL.items()}
        vision = XCLIPVisionConfig(image_size=SIZE, patch_size=8, num_frames=FRAMES, **SMALL, **mit)
        prompt = {"projection_dim": 32, "prompt_num_attention_heads": 2, "prompt_layers": 1}
        model = XCLIPModel(XCLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), **prompt))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model.eval()


@pytest.fixture(scope="module", params=list(MAKES))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, build(request.param, folder)


def pixels(clip: np.ndarray) -> torch.Tensor:
    """(1, T, 3, H, W): sizes are as the model wants them, so that only the normalisation remains, done here by hand."""
    frames = (resample_frames(clip, FRAMES) / 255.0 - np.array(MEAN)) / np.array(STD)
    return torch.from_numpy(frames).float().permute(0, 3, 1, 2)[None]


def test_features_equal_the_library_s_own(made: tuple[str, Path, Any]) -> None:
    make, folder, model = made
    clip = make_sample(0, "test").target_frames
    encoder = VideoEncoder(str(folder), "cpu", "float32", batch=4, cache_mib=1.0)
    (whole,) = encoder.features([clip], moments=False)
    given = pixels(clip)
    with torch.inference_mode():
        if make == "vjepa2":  # its processor crops a larger picture, whatever size it is given
            video = list(resample_frames(clip, FRAMES))
            given = VJEPA2VideoProcessor.from_pretrained(folder)(videos=[video], return_tensors="pt")[
                "pixel_values_videos"
            ]
            tokens = model(pixel_values_videos=given, skip_predictor=True).last_hidden_state[0]
            expected, in_time = tokens.mean(0), tokens.reshape(FRAMES // 2, -1, tokens.shape[-1]).mean(1)
        elif make == "videomae":
            tokens = model.videomae(pixel_values=given).last_hidden_state[0]
            expected, in_time = tokens.mean(0), tokens.reshape(FRAMES // 2, -1, tokens.shape[-1]).mean(1)
        elif make == "timesformer":
            tokens = model(pixel_values=given).last_hidden_state[0]
            expected, in_time = tokens[0], torch.stack([tokens[1 + t :: FRAMES].mean(0) for t in range(FRAMES)])
        else:
            pooled = model.get_video_features(pixel_values=given)
            expected, in_time = (pooled if isinstance(pooled, torch.Tensor) else pooled.pooler_output)[0], None
    assert whole == pytest.approx(expected.numpy(), abs=1e-5)
    if in_time is None:
        with pytest.raises(CheckpointError, match="one feature for a whole clip"):
            encoder.features([clip[::-1]], moments=True)
        return
    encoder = VideoEncoder(str(folder), "cpu", "float32", batch=4, cache_mib=1.0)
    assert encoder.features([clip], moments=True)[0] == pytest.approx(in_time.numpy(), abs=1e-5)


def test_every_make_keeps_a_reward_s_promises(made: tuple[str, Path, Any]) -> None:
    make, folder, model = made
    found = check_reward(
        BUNDLED["video_similarity"], ordinary_answers(), odd_answers(), options={"path": str(folder)}, elsewhere=False
    )
    assert {p.name for p in found if p.verdict != "kept"} == set(), found
    base = model.videomae if make == "videomae" else model
    assert (
        VideoSimilarity(str(folder)).parameters()
        == sum(p.numel() for p in base.parameters())
        == parameters_of(str(folder))
    )


def values(reward: Any, *clips: np.ndarray) -> list[float]:
    truth = make_sample(0, "test").target_frames
    request = ordinary_answers()[0]
    return reward.score([replace(request, clip=clip, target_frames=truth) for clip in clips])


@pytest.mark.parametrize("options", [{}, {"level": "moments"}, {"level": "moments", "warp": True}])
def test_the_bundled_encoder_sees_an_event_and_not_a_picture(options: dict[str, Any]) -> None:
    reward = VideoSimilarity(resolve_model("tiny", "video"), **options)
    start_model("video_similarity", reward, "cpu", "float32")
    truth = make_sample(0, "test").target_frames
    frozen = np.repeat(truth[:1], len(truth), axis=0)
    right, still = values(reward, truth, frozen)
    assert right == pytest.approx(1.0, abs=1e-6) and still < 0.6


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Dinov2Model]:
    folder = tmp_path_factory.mktemp("dino")
    return folder, tiny_dino(folder)


def test_dino_v_is_the_mean_cosine_of_the_library_s_pooled_features(dino: tuple[Path, Dinov2Model]) -> None:
    folder, model = dino
    reward = DinoSimilarity(str(folder))
    start_model("dino_v", reward, "cpu", "float32")
    truth, other = make_sample(0, "test").target_frames, make_sample(5, "test").target_frames

    def pooled(clip: np.ndarray) -> torch.Tensor:
        given = torch.from_numpy((clip / 255.0 - np.array(MEAN)) / np.array(STD)).float().permute(0, 3, 1, 2)
        with torch.inference_mode():
            return torch.nn.functional.normalize(model(pixel_values=given).pooler_output, dim=-1)

    expected = float((pooled(other) * pooled(truth)).sum(-1).mean())
    same, apart = values(reward, truth, other)
    assert same == pytest.approx(1.0, abs=1e-6) and apart == pytest.approx(expected, abs=1e-5) and apart < 0.9999
    found = check_reward(
        BUNDLED["dino_v"], ordinary_answers(), odd_answers(), options={"path": str(folder)}, elsewhere=False
    )
    assert {p.name for p in found if p.verdict != "kept"} == set(), found


def test_what_is_no_encoder_is_refused(dino: tuple[Path, Dinov2Model], tmp_path: Path) -> None:
    with pytest.raises(
        RewardLoadError, match="is a 'dinov2'; video encoders here are videomae, vjepa2, timesformer, xclip"
    ):
        start_model("video_similarity", VideoSimilarity(str(dino[0])), "cpu", "float32")
    with pytest.raises(RewardLoadError, match="not the folder of a transformers model"):
        start_model("video_similarity", VideoSimilarity(str(tmp_path)), "cpu", "float32")
    with pytest.raises(RewardLoadError, match="write clip or moments"):
        VideoSimilarity("x", level="tokens")  # type: ignore[arg-type]
    with pytest.raises(RewardLoadError, match="set level: moments"):
        VideoSimilarity("x", warp=True)
    build("xclip", tmp_path)
    with pytest.raises(RewardLoadError, match="a xclip has one feature for a whole clip; set level: clip"):
        start_model("video_similarity", VideoSimilarity(str(tmp_path), level="moments"), "cpu", "float32")


def test_the_configuration_names_them_and_finds_their_folders() -> None:
    config = load_config("toy", ["stage2.rewards.weights={clip_score: 1.0, video_similarity: 1.0}"])
    arguments = kinds_of(config)["video_similarity"].arguments(config)
    assert arguments["path"] == BUNDLED["video_similarity"] and arguments["options"]["path"] == resolve_model(
        "tiny", "video"
    )
    named = ["models.rewards={late: {model: video_similarity, options: {path: /no/such, level: moments, warp: true}}}"]
    config = load_config("toy", [*named, "stage2.rewards.weights={late: 1.0}"])
    with pytest.raises(CheckpointError, match=r"models.rewards.late.options.path='/no/such': no such folder"):
        kinds_of(config)["late"].arguments(config)
    config = load_config(
        "toy",
        ["models.rewards={dino_v: {model: dino_v, options: {path: tiny}}}", "stage2.rewards.weights={dino_v: 1.0}"],
    )
    with pytest.raises(CheckpointError, match="no tiny encoder of pictures"):
        kinds_of(config)["dino_v"].arguments(config)
