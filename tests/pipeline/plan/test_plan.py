"""``vans plan`` of the real pair: memory and seconds against hand calculations, refusals with cures that cure, tables and JSON."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

from actors.architectures import cost
from actors.vdm.shapes import VdmTokens
from cluster.hardware import GIB, parse_gpus, rates_of
from pipeline.cli import app
from pipeline.config import RunConfig, load_config
from pipeline.config.load import parse_config
from pipeline.fleet.models import resolve_model
from pipeline.plan import Plan, load_models, make_plan
from pipeline.plan.memory import CONTEXT, processes
from pipeline.plan.models import Models
from pipeline.plan.plan import overrides, with_overrides
from pipeline.plan.report import as_json, duration, show

REAL: dict[str, Any] = {
    "models": {
        "vlm": "Qwen/Qwen2.5-VL-3B-Instruct",
        "vdm": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "clip": "openai/clip-vit-large-patch14",
    },
    "video": {
        "num_frames": 33,
        "height": 352,
        "width": 640,
        "input_frames": 16,
        "vlm_height": 252,
        "vlm_width": 448,
        "reference_frames": 6,
    },
    "stage1": {"steps": 800, "text": {"max_tokens": 256}},
    "stage2": {"steps": 1000, "text": {"max_tokens": 256, "temperature": 0.0}},
    "pools": {
        "vlm": {"gpus": 1, "dtype": "bfloat16", "max_model_len": 2048, "kv_cache_mib": None},
        "vdm": {"workers": 3, "gpus": 1, "dtype": "bfloat16", "max_batch": 4},
        "embed": {"workers": 1, "gpus": 0.5, "dtype": "bfloat16"},
        "reward": {"gpus": 0.5},
    },
    "learner": {"ranks": 2, "gpus": 1, "dtype": "bfloat16", "micro_batch": 2, "activation_checkpointing": True},
}
VLM, TRANSFORMER, TEXT_ENCODER, VAE = 3_754_622_976, 1_418_996_800, 5_680_910_336, 126_892_531  # published parameters
COLOCATED = (
    "cluster.layout=colocated",
    *(f"pools.{pool}.workers=2" for pool in ("vlm", "embed", "vdm", "reward")),
    *(f"pools.{pool}.gpus=0.2" for pool in ("vlm", "embed", "vdm", "reward")),
    "learner.gpus=0.2",
    "pools.vlm.gpu_memory_utilization=0.3",
)


@pytest.fixture(scope="module")
def models() -> Models:
    return load_models(real())


def real(*texts: str) -> RunConfig:
    return with_overrides(parse_config(REAL), texts)


def plan(config: RunConfig, gpus: str, models: Models) -> Plan:
    hardware = parse_gpus(gpus)
    return make_plan(config, hardware, rates_of(hardware), models)


def printed(found: Plan) -> str:
    console = Console(width=150, file=io.StringIO(), color_system=None)
    show(found, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_memory_is_parameters_times_bytes_where_it_is_that(models: Models) -> None:
    found = plan(real(), "1x7x80".removeprefix("1x"), models)
    assert found.fits, found.problems
    engine, embedder, sampler, scorer, *learners = found.processes
    assert engine.parts["weights"] == pytest.approx(2 * (VLM + 2 * cost.lora_parameters(models.vlm, 8)))
    assert engine.total == pytest.approx(0.85 * 80 * GIB)  # vLLM takes what it is given
    assert embedder.parts["weights"] == 2 * TEXT_ENCODER + 4 * VAE
    assert sampler.parts["weights"] == 2 * (TRANSFORMER + cost.lora_parameters(models.vdm, 8)) + 4 * VAE
    assert scorer.parts["weights"] == 4 * models.parameters["clip", "model"]
    for learner, whole, model in zip(learners, (VLM, TRANSFORMER), (models.vlm, models.vdm), strict=True):
        adapter = cost.lora_parameters(model, 8)
        assert learner.parts["weights"] == pytest.approx(4 * (whole + adapter) / 2)  # float32, sharded over two ranks
        assert learner.parts["optimizer"] == pytest.approx(8 * adapter / 2)
        assert learner.loading == 4 * whole + CONTEXT  # each rank loads all of it before it is sharded
    shares = {tuple(sorted({m.role for m in gpu.members})) for gpu in found.gpus}
    assert shares == {("vlm",), ("vdm",), ("embed", "reward"), ("learner",)}
    both = next(gpu for gpu in found.gpus if len(gpu.members) == 2)
    assert found.peaks[both.node, both.index] == pytest.approx(embedder.total + scorer.total)


def test_without_an_embed_pool_each_sampler_holds_the_text_encoder(models: Models) -> None:
    alone = plan(real("pools.embed.workers=0"), "7x80", models)
    sampler = next(kind for kind in alone.processes if kind.role == "vdm")
    adapter = cost.lora_parameters(models.vdm, 8)
    assert sampler.parts["weights"] == 2 * (TRANSFORMER + adapter + TEXT_ENCODER) + 4 * VAE
    assert [demand.role for demand in alone.stages[0].demands] == ["vlm", "vdm", "reward", "learner"]


def test_a_reward_with_a_model_stands_on_gpus_with_its_weights() -> None:
    """video_similarity says its parameters before it loads any; a class that says none, or cannot be imported, is told."""
    here = "tests.actors.scoring.my_judges"
    texts = [
        f"models.rewards={{video_similarity: {{model: video_similarity, dtype: bfloat16}}, bright: {{model: '{here}:Brightness'}}, "
        "away: {model: 'not_installed_here:Judge'}}",
        "stage2.rewards.weights={clip_v: 1.0, video_similarity: 1.0, bright: 0.1, away: 0.1}",
        "pools.rewards={video_similarity: {workers: 2, gpus: 0.5}, bright: {gpus: 0.5}}",
    ]
    config = real(*texts)
    found = plan(config, "9x80", load_models(config))
    kinds = {kind.role: kind for kind in found.processes}
    stored = load_file(resolve_model("tiny", "video") + "/model.safetensors")
    assert kinds["video_similarity"].parts == {
        "weights": 2.0 * sum(tensor.numel() for tensor in stored.values()),
        "CUDA context": CONTEXT,
    }
    assert kinds["bright"].parts == kinds["away"].parts == {"CUDA context": CONTEXT}
    standing = [member.role for gpu in found.gpus for member in gpu.members]
    assert standing.count("video_similarity") == 2 and standing.count("bright") == 1
    told = "\n".join(found.assumptions)
    assert "reward video_similarity: its activations and seconds are not counted" in told
    assert "does not say its parameters()" in told and "cannot import 'not_installed_here'" in told
    scored = [demand for stage in found.stages for demand in stage.demands if demand.role == "video_similarity"]
    assert [(d.name, d.unit_s) for d in scored] == [("score video_similarity", 0.0)], "stage 2 alone weighs it"


def test_seconds_are_flops_over_the_stated_rate(models: Models) -> None:
    hardware = parse_gpus("7x80")
    rates = rates_of(hardware, "h100")
    stage1, stage2 = make_plan(real(), hardware, rates, models).stages
    draw = next(demand for demand in stage2.demands if demand.name == "draw")
    forward = models.vdm.shapes.transformer_flops(
        VdmTokens(6 * 880, 9 * 880, 512)
    ).total  # 22 × 40 tokens a latent frame
    decoding = models.vdm.shapes.decode_flops(33, 352, 640).total
    assert draw.units == 64 and draw.unit_s == pytest.approx(10 * forward / rates.bf16 + decoding / rates.tf32)
    learn = next(demand for demand in stage2.demands if demand.name == "learn")
    # Two steps of the window: reference, forward, recomputed, and a backward that costs a forward, attention's two; the old
    # pass is made for the ratio gate, in every tenth update.
    # No gradient goes to captions, nor before the first adapter, where nothing is recomputed either.
    parts = models.vdm.shapes.transformer_flops(VdmTokens(6 * 880, 9 * 880, 512))
    assert learn.unit_s == pytest.approx(
        2 * (4.1 * parts.linear + 5.1 * parts.attention + 3.1 * parts.condition + 2.1 * parts.frozen) / rates.bf16
    )
    checked = make_plan(real("stage2.grpo.gate_every=1"), hardware, rates, models).stages[1]
    assert next(d for d in checked.demands if d.name == "learn").unit_s == pytest.approx(
        2 * (5 * parts.linear + 6 * parts.attention + 4 * parts.condition + 3 * parts.frozen) / rates.bf16
    )
    guided = make_plan(real("stage2.render.guidance=5"), hardware, rates, models).stages[1]
    assert next(d for d in guided.demands if d.name == "learn").unit_s == pytest.approx(2 * learn.unit_s)
    for texts, completions in (([], 2), (["learner.micro_completions=8"], 8), (["learner.shared_prompts=false"], 1)):
        # Completions that stand behind one prompt share its work: two at a time, or a group where memory allows.
        update = cost.completion_flops(models.vlm, models.prompt, 256, completions).update(
            lora=True, checkpointing=True, kl=real().stage1.grpo.kl_beta > 0, old_pass=False
        )
        old = 0.1 * cost.completion_flops(models.vlm, models.prompt, 256, completions).total
        found = next(d for d in make_plan(real(*texts), hardware, rates, models).stages[0].demands if d.name == "learn")
        assert found.unit_s == pytest.approx((update.total + old) / rates.bf16)
    think = next(demand for demand in stage1.demands if demand.name == "think")
    assert think.fixed_s == pytest.approx(256 * 2 * VLM / rates.bandwidth)  # every token reads all weights once
    assert {demand.name for demand in stage1.demands} == {"think", "embed", "draw", "score", "learn"}


@pytest.mark.parametrize(
    ("texts", "gpus", "what"),
    [
        (["learner.activation_checkpointing=false"], "7x40", "VDM learner"),
        (["pools.vdm.max_batch=64"], "7x40", "sampler, 22 clip"),
        (["pools.vlm.max_model_len=512"], "7x80", "exceed pools.vlm.max_model_len=512"),
        (["learner.gpus=0.5"], "7x80", "NCCL refuses"),
        (["learner.ranks=8", "learner.context_parallel=8"], "16x80", "must divide the artist's attention heads (12)"),
        (
            ["pools.vdm.context_parallel=8", "pools.vdm.gpus=8"],
            "40x80",
            "pools.vdm.context_parallel=8 must divide the artist's",
        ),
        ([], "4x80", "asks for 7 of 4 GPU"),
        (["learner.ranks=6", "learner.placement=STRICT_PACK", "pools.vdm.workers=1"], "2x4x80", "STRICT_PACK"),
        ([*COLOCATED, "pools.vlm.gpus=0.5"], "4x80", "1.3"),
        ([*COLOCATED, "pools.vlm.gpu_memory_utilization=0.9"], "2x80", "vLLM engine"),
    ],
)
def test_what_does_not_fit_is_said_with_a_cure_that_cures(
    models: Models, texts: list[str], gpus: str, what: str
) -> None:
    config = real(*texts)
    found = plan(config, gpus, models)
    assert not found.fits and what in " ".join(problem.what for problem in found.problems)
    for problem in found.problems:
        assert problem.cure, problem.what
        config = with_overrides(config, problem.cure.split())
    assert plan(config, gpus, models).fits, plan(config, gpus, models).problems


def test_what_nothing_helps_is_said_too(models: Models) -> None:
    found = plan(real(), "7x8", models)  # 3.75 billion weights do not fit into 8 GiB
    assert not found.fits and any(not problem.cure for problem in found.problems)
    assert "nothing that this plan can tell" in printed(found)


def test_ranks_that_share_a_clip_keep_a_part_of_its_activations_each(models: Models) -> None:
    apart, shared = (plan(real(*texts), "9x80", models) for texts in ((), ("learner.context_parallel=2",)))
    assert apart.fits and shared.fits
    one, two = (found.processes[-1] for found in (apart, shared))
    assert (one.does, two.does) == (
        "VDM learner, 2 trajectory(ies) at a time",
        "VDM learner, 2 trajectory(ies) at a time on 2 ranks",
    )
    assert 0.5 <= two.parts["activations"] / one.parts["activations"] < 0.52  # captions are not shared
    assert two.parts["weights"] == one.parts["weights"]
    assert all(split.gpus["learner"] % 2 == 0 for split in shared.splits)


def test_samplers_that_share_clips_stand_on_whole_groups_of_gpus(models: Models) -> None:
    shares = ("pools.vdm.context_parallel=2", "pools.vdm.gpus=2")
    apart, shared = (plan(real(*texts), "16x80", models) for texts in ((), shares))
    assert apart.fits and shared.fits
    stood = [sum(member.role == "vdm" for gpu in found.gpus for member in gpu.members) for found in (apart, shared)]
    assert stood == [real().pools.vdm.workers, 2 * real().pools.vdm.workers]
    one, two = (next(kind for kind in found.processes if kind.role == "vdm") for found in (apart, shared))
    assert two.does == f"{one.does} on 2 GPUs, the first of them" and two.parts["weights"] == one.parts["weights"]
    slow, fast = (next(d for d in found.stages[0].demands if d.name == "draw").unit_s for found in (apart, shared))
    assert 0.5 * slow < fast < slow  # the decoder's part is not shared
    assert shared.splits and all(split.gpus["vdm"] % 2 == 0 and not split.colocated for split in shared.splits)


def test_resting_pools_make_room_for_the_learner(models: Models) -> None:
    awake = plan(real(*COLOCATED), "2x80", models)
    resting = plan(
        real(*COLOCATED, "pools.vlm.rest=true", "pools.vdm.rest=true", "learner.offload=all"), "2x80", models
    )
    assert [sorted({m.role for m in gpu.members}) for gpu in awake.gpus] == [
        ["embed", "learner", "reward", "vdm", "vlm"]
    ] * 2
    kinds = {kind.role: kind for kind in resting.processes}
    learner = max((kind for kind in resting.processes if kind.role == "learner"), key=lambda kind: kind.total)
    small = kinds["embed"].total + kinds["reward"].total
    assert awake.peaks[0, 0] == pytest.approx(small + kinds["vlm"].total + kinds["vdm"].total + learner.total)
    sampling = small + kinds["vlm"].total + kinds["vdm"].total + CONTEXT
    learning = small + 2 * CONTEXT + learner.total
    assert resting.peaks[0, 0] == pytest.approx(max(sampling, learning))
    assert resting.peaks[0, 0] < awake.peaks[0, 0]
    moved = kinds["vlm"].parts["weights"] + kinds["vdm"].parts["weights"]
    moved += max(k.parts["weights"] + k.parts["optimizer"] for k in resting.processes if k.role == "learner")
    assert resting.stages[0].switch_s == pytest.approx(2 * moved / 25e9) and awake.stages[0].switch_s == 0.0


def test_proposed_splits_fit_and_are_as_fast_as_they_say(models: Models) -> None:
    found = plan(real(), "8x80", models)
    assert [split.colocated for split in found.splits] == [False, True]
    for split in found.splits:
        other = plan(with_overrides(real(), overrides(found.config, split).split()), "8x80", models)
        assert other.fits, other.problems
        for stage in other.stages:
            assert other.step_s(stage) == pytest.approx(split.step_s[stage.name], rel=1e-6)
    balanced = found.splits[0]
    assert sum(balanced.gpus.values()) == 8
    assert balanced.run_s <= sum(stage.steps * found.step_s(stage) for stage in found.stages)


def test_tables_and_json_say_the_same(models: Models) -> None:
    found = plan(real(), "7x80", models)
    text, values = printed(found), json.loads(json.dumps(as_json(found)))
    assert text.rstrip().endswith("fits") and "not measurements: H100: 40% of its peaks" in text
    assert values["fits"] and text.count("← slowest") == 2
    for described in values["stages"]:
        slowest = max(described["demands"], key=lambda demand: demand["seconds"])
        assert slowest["name"] == described["bottleneck"]
    for stage, described in zip(found.stages, values["stages"], strict=True):
        assert described["step_s"] == pytest.approx(found.step_s(stage), abs=1e-3)
        assert duration(found.step_s(stage)) in text
    assert all(overrides(found.config, split) in text for split in found.splits)
    assert sum(len(gpu["members"]) for gpu in values["gpus"]) == 8
    assert [duration(s) for s in (0.42, 12.3, 119, 200, 7300, 200000)] == [
        "0.42 s",
        "12 s",
        "119 s",
        "3.3 min",
        "2.0 h",
        "2.3 d",
    ]


def test_the_command_answers_with_its_exit_code() -> None:
    runner = CliRunner()
    toy = runner.invoke(app, ["plan", "toy", "--gpus", "8x80"])
    assert toy.exit_code == 0 and "on CPUs" in toy.output and "per reserved core" in toy.output, toy.output
    small = runner.invoke(app, ["plan", "toy", "learner.gpus=1", "learner.ranks=3", "--gpus", "2x80", "--json"])
    assert small.exit_code == 1 and json.loads(small.output)["fits"] is False
    assert runner.invoke(app, ["plan", "toy", "--gpus", "many"]).exit_code == 2


def test_reference_latents_count_as_many_tokens_as_they_are_and_one_time_costs_less(models: Models) -> None:
    """Of a clip take=3 are kept: 3 of 44x80 latents in patches of 2x2; with one time no token has a modulation of its own."""
    clip = real("video.conditioning.references=clip", "video.conditioning.take=3")
    shared = real("video.conditioning.references=clip", "video.conditioning.take=3", "video.conditioning.time=shared")
    apart, together = load_models(clip).clip_tokens, load_models(shared).clip_tokens
    assert (apart.reference, apart.target) == (3 * 22 * 40, 9 * 22 * 40) == (together.reference, together.target)
    assert apart.times and not together.times and models.clip_tokens.times
    flops = [models.vdm.shapes.transformer_flops(tokens).total for tokens in (together, apart, models.clip_tokens)]
    assert flops == sorted(flops) and flops[0] < flops[1]


def test_an_image_encoder_stands_where_the_vaes_encoder_does_and_a_given_frame_takes_no_tokens_before_the_clip() -> (
    None
):
    run = load_config("vans_wan_i2v")
    models, image_encoder = load_models(run), 630_766_080
    assert (models.clip_tokens.reference, models.clip_tokens.target) == (
        0,
        9 * 22 * 40,
    )  # of 1 given frame and 32 drawn ones
    found = {process.role: process.parts["weights"] for process in processes(run, models, 80.0)}
    assert found["embed"] == 2 * TEXT_ENCODER + 4 * (VAE + image_encoder)
    alone = {
        p.role: p.parts["weights"]
        for p in processes(load_config("vans_wan_i2v", ["pools.embed.workers=0"]), models, 80.0)
    }
    assert alone["vdm"] - found["vdm"] == 2 * TEXT_ENCODER + 4 * image_encoder
