"""The tiny architectures load with the stock classes, and pretraining improves each model and repeats itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPModel, VideoMAEModel

from actors.vdm.settings import ConditioningSection
from cluster.errors import ConfigError, TrainingError
from pipeline.data.toy import FRAMES, SIZE, Event, Scene, Thing, make_sample
from pipeline.data.toy.language import LANGUAGES, sight
from pipeline.fleet.models import ASSETS
from pipeline.pretrain import Effort, pretrain
from pipeline.pretrain.architectures import (
    build_tiny_clip,
    build_tiny_clip_model,
    build_tiny_vae,
    build_tiny_vdm,
    build_tiny_vlm,
    clip_processor,
)
from pipeline.pretrain.clip import clip_frame, clip_quality, train_clip
from pipeline.pretrain.muon import orthogonalise
from pipeline.pretrain.tokenizers import qwen_tokenizer, word_tokenizer
from pipeline.pretrain.video_encoder import contrast, video_quality

_QUICK = Effort(
    vae_steps=2,
    clip_steps=2,
    artist_steps=2,
    artist_samples=8,
    thinker_steps=2,
    thinker_samples=8,
    video_steps=2,
    quality_samples=4,
    sft_steps=2,
    sft_samples=8,
    sft_batch=4,
    sft_ranks=1,  # two ranks are the business of test_finetuning_ray.py
)


def test_vdm_folder_is_a_wan_pipeline_that_draws(tmp_path: Path) -> None:
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(build_tiny_vdm(tmp_path / "vdm", seed=1))
    pipe.set_progress_bar_config(disable=True)
    out = pipe(
        "the red circle rises", height=SIZE, width=SIZE, num_frames=FRAMES, num_inference_steps=2, guidance_scale=1.0
    )
    assert out.frames.shape == (1, FRAMES, SIZE, SIZE, 3)
    assert len(pipe.vae.config.latents_mean) == pipe.vae.config.z_dim


def test_vae_keeps_every_frame() -> None:
    vae = build_tiny_vae(0)
    video = torch.rand(1, 3, FRAMES, SIZE, SIZE) * 2 - 1
    latents = vae.encode(video).latent_dist.mode()
    assert vae.decode(latents).sample.shape == video.shape
    moved = video.clone()
    moved[:, :, -1] = 0
    assert not torch.equal(vae.encode(moved).latent_dist.mode()[:, :, -1], latents[:, :, -1])


def test_clip_folder_loads_with_its_processor(tmp_path: Path) -> None:
    from transformers import AutoProcessor

    folder = build_tiny_clip(tmp_path / "clip", seed=1)
    model, processor = CLIPModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    sample = make_sample(0, "test")
    inputs = processor(images=list(sample.target_frames), text=[sample.caption], return_tensors="pt", padding=True)
    assert model(**inputs).logits_per_image.shape == (FRAMES, 1)
    assert processor.tokenizer.unk_token_id not in inputs["input_ids"][0].tolist()


def test_vlm_folder_reads_a_video_and_a_question(tmp_path: Path) -> None:
    from actors.vlm.policy import VlmPolicy

    policy = VlmPolicy.load(build_tiny_vlm(tmp_path / "vlm", seed=1))
    samples = [make_sample(i, "sft") for i in range(3)]
    loss = policy.sft_loss([(s.asked, s.answer_text) for s in samples])
    loss.mean.backward()
    assert np.isfinite(loss.metrics["loss"])
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in policy.module.parameters())


def test_vlm_tokenizer_is_lossless_and_short_on_the_grammar() -> None:
    tokenizer = qwen_tokenizer()
    for language, most in (("en", 40), ("zh", 40)):
        for i in range(20):
            text = make_sample(i, "sft", language=language).answer_text
            ids = tokenizer(text).input_ids
            assert tokenizer.decode(ids) == text
            assert len(ids) < most
    assert tokenizer.decode(tokenizer("Ünïcode, 42 °C!").input_ids) == "Ünïcode, 42 °C!"


@pytest.mark.parametrize("clip", [False, True])
def test_word_tokenizers_know_every_word_and_cut_chinese_at_its_wordings(clip: bool) -> None:
    tokenizer = word_tokenizer(max_length=16, clip=clip)
    framing = 2 if clip else 1
    assert len(tokenizer("红色的圆形向左移动").input_ids) == 4 + framing
    assert len(tokenizer("the red circle moves left").input_ids) == 5 + framing
    rng = np.random.default_rng(0)
    for i in range(40):
        for language in LANGUAGES:
            sample = make_sample(i, "sft", language=language)
            things = [(t.colour, t.shape, "") for t in sample.scene.things]
            things[0] = (*things[0][:2], str(rng.choice(list(LANGUAGES[language].states))))
            for text in (sample.caption, sight(things, rng, language)):
                ids = tokenizer(text).input_ids
                assert tokenizer.unk_token_id not in ids and len(ids) <= 16, text
    assert tokenizer.unk_token_id in tokenizer("狗在叫").input_ids


def test_orthogonalise_brings_singular_values_to_about_one() -> None:
    torch.manual_seed(0)
    for shape in ((8, 40), (40, 8)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape), iterations=8))
        assert values.min() > 0.6 and values.max() < 1.3


def test_clip_learns_from_frames_and_texts() -> None:
    losses: list[float] = []
    train_clip(build_tiny_clip_model(0), clip_processor(), steps=40, seed=0, tick=lambda *step: losses.append(step[2]))
    assert len(losses) == 40 and np.mean(losses[-5:]) < np.mean(losses[:5]) - 1.0


def test_clip_frames_are_told_by_what_they_show() -> None:
    scene = Scene("night", (Thing("red", "circle", 8.0, 8.0), Thing("blue", "square", 24.0, 24.0)))
    resting, there = ("red", "circle"), {"", "bottom right"}
    states = {
        (verb, step): clip_frame(scene, Event("red", "circle", verb), step / 6).states()
        for verb in ("rise", "grow", "fade", "whiten")
        for step in range(7)
    }
    assert all(shown[("blue", "square")] == there for shown in states.values())
    assert [states["grow", step].get(resting) for step in (0, 2, 3, 6)] == [{"", "top left"}] * 2 + [{"", "large"}] * 2
    assert states["rise", 4][resting] == {""}  # it is no longer where it was, and has no state of its own
    assert [states["fade", step].get(resting) for step in (3, 5, 6)] == [{"", "faint"}, {"", "faint"}, None]
    assert [states["whiten", step].get(resting) for step in (5, 6)] == [{"", "pale"}, None]
    shows = [clip_frame(scene, Event("red", "circle", "fade"), step / 6).shows_event for step in range(7)]
    assert shows == [False] * 3 + [True] * 3 + [False]


def test_the_video_encoders_loss_is_the_supervised_contrastive_one() -> None:
    features = torch.nn.functional.normalize(torch.randn(7, 5, generator=torch.Generator().manual_seed(0)), dim=-1)
    labels = ["rise", "fall", "rise", "nothing", "rise", "nothing", "alone"]
    terms = []
    for i, label in enumerate(labels):
        others = [j for j in range(7) if j != i]
        whole = sum(np.exp(float(features[i] @ features[j]) / 0.1) for j in others)
        alike = [np.exp(float(features[i] @ features[j]) / 0.1) for j in others if labels[j] == label]
        terms += [-np.mean(np.log(np.array(alike) / whole))] if alike else []
    assert len(terms) == 5  # what has no positive asks for nothing
    assert float(contrast(features, labels)) == pytest.approx(np.mean(terms), rel=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_pretrain_writes_every_folder_with_a_quality_line(tmp_path: Path) -> None:
    from diffusers import WanPipeline

    out = tmp_path / "tiny"
    quality = pretrain(out, seed=0, effort=_QUICK)
    assert json.loads((out / "quality.json").read_text()) == json.loads(json.dumps(quality))
    assert {"psnr_clip", "follow_reconstructed"} <= set(quality["vae"])
    assert {"follow_seen", "follow_unseen"} <= set(quality["artist"])
    assert {"event_greedy", "event_shuffled", "event_zh"} <= set(quality["thinker"])
    assert {"event_accuracy", "video_frozen"} <= set(quality["video"])
    for part in ("artist", "thinker"):
        assert quality[part]["sft"]["loss_last"] > 0 and set(quality[part]["before_sft"]) - {"cpu_s"} <= set(
            quality[part]
        )
    pipe = WanPipeline.from_pretrained(out / "vdm")
    assert pipe.vae.dtype == torch.float32 and any(s != 1.0 for s in pipe.vae.config.latents_std)
    assert sum(quality["size_mb"].values()) < 14


def test_an_artist_of_the_other_conditioning_is_trained_and_judged_with_the_whole_clip() -> None:
    from pipeline.pretrain.architectures import FLOW_SHIFT
    from pipeline.pretrain.artist import artist_quality, drawings, load_artist, train_artist

    how = ConditioningSection(references="clip", take=2, time="shared")
    artist = load_artist(ASSETS / "vdm", FLOW_SHIFT, how)
    items = drawings(4, 0, how)
    assert {item.references.shape for item in items} == {(FRAMES, SIZE, SIZE, 3)}
    before = {name: tensor.clone() for name, tensor in artist.module.state_dict().items()}
    train_artist(artist, items, steps=2, seed=0, batch=2)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in artist.module.state_dict().items())
    assert set(artist_quality(artist, count=2)) >= {"follow_seen", "follow_ground_truth"}


def test_a_part_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no part painter; the parts are vae, artist"):
        pretrain(tmp_path, parts=("painter",))


def test_a_part_that_fails_stops_the_run_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="pretraining of artist failed"):
        pretrain(tmp_path, effort=_QUICK, parts=("artist",))  # without a VAE to draw with


def test_the_bundled_encoders_see_what_quality_json_says() -> None:
    """CLIP grants a frozen clip its appearance and no event; the video encoder grants it nothing."""
    clip, video = (json.loads((ASSETS / "quality.json").read_text())[name] for name in ("clip", "video"))
    seen = clip_quality(CLIPModel.from_pretrained(ASSETS / "clip"), clip_processor(), scenes=16)
    for name in ("clip_t_right", "clip_t_still", "clip_t_wrong", "clip_v_still", "clip_v_wrong"):
        assert seen[name] == pytest.approx(clip[name], abs=0.05)
    assert seen["clip_v_still"] > seen["clip_v_wrong"] and seen["clip_t_right"] > seen["clip_t_still"] + 0.1
    found = video_quality(VideoMAEModel.from_pretrained(ASSETS / "video"), scenes=16)
    for name in ("event_accuracy", "video_right", "video_wrong", "video_frozen"):
        assert found[name] == pytest.approx(video[name], abs=0.05)
    assert found["event_accuracy"] > 0.9 and found["video_frozen"] < found["video_right"] - 0.5
    assert (ASSETS / "video" / "model.safetensors").stat().st_size <= 3 * 2**20


def test_bundled_models_are_small_and_reconstruct_what_quality_json_says() -> None:
    from diffusers import AutoencoderKLWan

    from pipeline.pretrain.vae import vae_quality

    quality = json.loads((ASSETS / "quality.json").read_text())
    assert sum(f.stat().st_size for f in ASSETS.rglob("*") if f.is_file()) < 14 * 2**20
    vae = AutoencoderKLWan.from_pretrained(ASSETS / "vdm" / "vae", torch_dtype=torch.float32)
    measured = vae_quality(vae, count=16)
    assert abs(measured["psnr_clip"] - quality["vae"]["psnr_clip"]) < 1.5
    assert measured["follow_reconstructed"] >= 0.9
