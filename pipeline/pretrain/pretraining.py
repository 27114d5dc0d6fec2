"""``vans pretrain``: the tiny pair, the tiny CLIP and a tiny video encoder from random weights, with a measured quality line each.

Responsible for the order of the parts, the processes they run in, progress, and the folder that comes out. Two lanes run side
by side, one thread each: VAE then artist; CLIP, thinker, video encoder. Then both models of the pair are fine-tuned by
``pipeline.sft``, the code a real run uses (Ray Train, FSDP2, Ray Data), on shards of the toy world, a quarter of them Chinese: the
result is the SFT pair that Joint-GRPO starts from. Every part is a pure function of (seed, effort) and the parts before it.
"""

from __future__ import annotations

import json
import multiprocessing
import queue
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

from rich.console import Console

from actors.vdm.settings import ConditioningSection
from cluster.errors import ConfigError, TrainingError
from pipeline.lock import hold
from pipeline.support import terminal
from pipeline.support.progress import Bar, bar, bars, waiting

SFT = "sft"
LANES: tuple[tuple[str, ...], ...] = (("vae", "artist"), ("clip", "thinker", "video"))
PAIR = (("thinker", "vlm", "sft"), ("artist", "vdm", "artist"))
"""Part, folder and data of what is fine-tuned."""
PARTS = (*(part for lane in LANES for part in lane), SFT)
_POLL_S = 1.0


@dataclass(frozen=True)
class Effort:
    """How long each part trains, and what the artist is conditioned on. The defaults are the bundled tiny models'."""

    vae_steps: int = 1200
    clip_steps: int = 1500
    artist_steps: int = 1400
    artist_samples: int = 4000
    thinker_steps: int = 900
    thinker_samples: int = 5000
    video_steps: int = 500
    quality_samples: int = 128
    sft_steps: int = 300
    sft_samples: int = 2560
    sft_batch: int = 64
    sft_lr: float = 3e-4
    sft_ranks: int = 2
    conditioning: ConditioningSection = field(default_factory=ConditioningSection)


def pretrain(
    out_dir: str | Path,
    seed: int = 0,
    *,
    effort: Effort | None = None,
    parts: tuple[str, ...] = PARTS,
    console: Console | None = None,
) -> dict[str, Any]:
    """Trains ``parts`` (the artist needs a VAE, trained now or before) and writes vlm/, vdm/, clip/, video/ and quality.json.

    Returns what quality.json holds. Raises ConfigError for a part that is not there, and TrainingError with the traceback of one
    that failed.
    """
    if unknown := [part for part in parts if part not in PARTS]:
        raise ConfigError(f"no part {', '.join(unknown)}; the parts are {', '.join(PARTS)}")
    console = console or terminal.console()
    effort = effort or Effort()
    with hold(Path(out_dir), "vans pretrain", name=f"--out {out_dir}"):
        return _pretrain(Path(out_dir), seed, effort, parts, console)


def _pretrain(out: Path, seed: int, effort: Effort, parts: tuple[str, ...], console: Console) -> dict[str, Any]:
    """Train in a folder that is this process's own."""
    terminal.keep_log_in(out)
    started = time.monotonic()
    quality: dict[str, Any] = _read(out / "quality.json")
    context = multiprocessing.get_context("spawn")
    messages: Queue[tuple[Any, ...]] = context.Queue()
    lanes = []
    for lane in LANES:
        chosen = tuple(part for part in lane if part in parts)
        if chosen:
            process = context.Process(target=_run_lane, args=(chosen, str(out), seed, effort, messages), daemon=True)
            process.start()
            lanes.append(process)
    try:
        _follow_lanes(lanes, messages, quality, console)
    finally:
        for process in lanes:
            if process.is_alive():
                process.terminate()
            process.join(timeout=10)
    if SFT in parts:
        # What was trained before and stays as it is has been fine-tuned then.
        pair = [model for model in PAIR if model[0] in parts] or list(PAIR)
        _fine_tune(pair, out, seed, effort, quality, console)
    _forget_paths(out)
    quality["seed"] = seed
    quality["effort"] = asdict(effort) | {"conditioning": effort.conditioning.model_dump()}
    quality["wall_s"] = round(time.monotonic() - started, 1)
    quality["size_mb"] = {name: round(_size(out / name) / 2**20, 2) for name in ("vlm", "vdm", "clip", "video")}
    (out / "quality.json").write_text(json.dumps(quality, indent=2, sort_keys=True) + "\n")
    console.print(f"the tiny pair is in {out}: {quality['size_mb']} MB, {quality['wall_s'] / 60:.1f} min")
    return quality


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def _forget_paths(folder: Path) -> None:
    """diffusers notes in a config where a model was loaded from; a model that travels should not tell."""
    for path in folder.rglob("config.json"):
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def _follow_lanes(
    lanes: list[Any], messages: Queue[tuple[Any, ...]], quality: dict[str, Any], console: Console
) -> None:
    """Shows progress and collects quality lines until every lane has said that it is done."""
    open_lanes = len(lanes)
    with bars(console) as new_bar:
        shown: dict[str, Bar] = {}
        while open_lanes:
            try:
                kind, part, *rest = messages.get(timeout=_POLL_S)
            except queue.Empty:
                dead = [p for p in lanes if not p.is_alive() and p.exitcode not in (0, None)]
                if dead:
                    raise TrainingError(f"a pretraining process died with exit code {dead[0].exitcode}") from None
                continue
            if kind == "step":
                done, steps, loss = rest
                if part not in shown:
                    shown[part] = new_bar(part, steps)
                shown[part].follow(done, {"loss": loss})
            elif kind == "quality":
                quality[part] = rest[0]
                line = ", ".join(f"{name} {value:.3f}" for name, value in rest[0].items())
                console.print(f"{part}: {line}", highlight=False, soft_wrap=True)
            elif kind == "error":
                raise TrainingError(f"pretraining of {part} failed:\n{rest[0]}")
            elif kind == "done":
                open_lanes -= 1


def _fine_tune(
    models: Sequence[tuple[str, str, str]],
    out: Path,
    seed: int,
    effort: Effort,
    quality: dict[str, Any],
    console: Console,
) -> None:
    """SFT of ``models`` by ``vans sft``'s own code, then their quality lines again: the ones that count."""
    from actors.learner.settings import LearnerSection
    from cluster.session import connect
    from pipeline.config.training import SftModelSection, SftOptimSection
    from pipeline.data.toy import write_toy
    from pipeline.sft import SftSettings, run_sft

    settings = SftSettings(
        SftModelSection(
            steps=effort.sft_steps,
            batch=effort.sft_batch,
            optim=SftOptimSection(lr=effort.sft_lr, ema=0.95),
            checkpoint_every=0,
        ),
        LearnerSection(ranks=effort.sft_ranks, cpus=1.0, placement="PACK"),
        seed=seed,
        reference_frames=2,
        conditioning=effort.conditioning,
    )
    with tempfile.TemporaryDirectory(prefix="vans-pretrain-") as scratch, connect():
        data = Path(scratch) / "data"
        with waiting(console, "writing the fine-tuning data as Parquet shards"):
            rows = effort.sft_samples
            write_toy(data, train=1, test=0, seed=seed, sft=rows, artist=rows, language="mixed")
        for part, kind, split in models:
            tuned = Path(scratch) / kind
            with bar(console, f"sft {part}", effort.sft_steps) as progress:
                result = run_sft(kind, out / kind, data / split, tuned, settings, on_metrics=progress.follow)  # type: ignore[arg-type]
            for leftover in ("sft.json", "checkpoints", "captions"):
                _remove(tuned / leftover)
            shutil.rmtree(out / kind)
            shutil.copytree(tuned, out / kind)
            line = _QUALITY[part](out, effort)
            quality[part] = {
                **line,
                "before_sft": quality.get(part, {}),
                "sft": {
                    "loss_first": result.loss_first,
                    "loss_last": result.loss_last,
                    "wall_s": round(result.wall_s, 1),
                },
            }
            told = ", ".join(f"{name} {value:.3f}" for name, value in line.items())
            console.print(f"{part} after sft: {told}", highlight=False, soft_wrap=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _run_lane(parts: tuple[str, ...], out: str, seed: int, effort: Effort, messages: Queue[tuple[Any, ...]]) -> None:
    """Child process: trains the lane's parts one after another on one thread."""
    import diffusers
    import torch
    import transformers

    torch.set_num_threads(1)
    for library in (transformers, diffusers):  # their own bars for files of a few megabytes
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    part = parts[0]
    try:
        for part in parts:
            started = time.process_time()

            def tick(step: int, steps: int, loss: float, part: str = part) -> None:
                if step % 10 == 9 or step == steps - 1:
                    messages.put(("step", part, step + 1, steps, loss))

            line = _TRAIN[part](Path(out), seed, effort, tick)
            messages.put(("quality", part, {**line, "cpu_s": round(time.process_time() - started, 1)}))
        messages.put(("done", part))
    except Exception:  # noqa: BLE001 - told to the parent, which raises
        # Crosses a process border: the parent raises it again with this text.
        messages.put(("error", part, traceback.format_exc()))


def _train_vae(out: Path, seed: int, effort: Effort, tick: Callable[[int, int, float], None]) -> Mapping[str, float]:
    import torch
    from diffusers import AutoencoderKLWan

    from .architectures import build_tiny_vdm
    from .vae import measure_latents, train_vae, vae_quality

    shutil.rmtree(out / "vdm", ignore_errors=True)
    folder = build_tiny_vdm(out / "vdm", seed) / "vae"
    vae = AutoencoderKLWan.from_pretrained(folder)
    train_vae(vae, steps=effort.vae_steps, seed=seed, tick=tick)
    mean, std = measure_latents(vae)
    vae.register_to_config(latents_mean=mean, latents_std=std)
    # Stored in half the bytes; the quality below, and the artist, are the stored weights'.
    vae.to(torch.bfloat16).to(torch.float32)
    line = vae_quality(vae, count=effort.quality_samples)
    vae.to(torch.bfloat16).save_pretrained(folder, safe_serialization=True)
    return line


def _train_artist(out: Path, seed: int, effort: Effort, tick: Callable[[int, int, float], None]) -> Mapping[str, float]:
    from .architectures import FLOW_SHIFT, build_tiny_text_encoder, build_tiny_transformer
    from .artist import artist_quality, drawings, load_artist, train_artist

    policy = load_artist(out / "vdm", FLOW_SHIFT, effort.conditioning)
    assert policy.embedder is not None
    # A part trained again starts from random weights again.
    policy.module.load_state_dict(build_tiny_transformer(seed).state_dict())
    encoder = policy.embedder.encoder
    encoder.load_state_dict(build_tiny_text_encoder(encoder.config.vocab_size, seed).state_dict())
    items = drawings(effort.artist_samples, seed, effort.conditioning)
    train_artist(policy, items, steps=effort.artist_steps, seed=seed, tick=tick)
    module: Any = policy.module
    module.save_pretrained(out / "vdm" / "transformer", safe_serialization=True)
    encoder.save_pretrained(out / "vdm" / "text_encoder", safe_serialization=True)
    return artist_quality(policy, count=effort.quality_samples)


def _measure_artist(out: Path, effort: Effort) -> Mapping[str, float]:
    from .architectures import FLOW_SHIFT
    from .artist import artist_quality, load_artist

    artist = load_artist(out / "vdm", FLOW_SHIFT, effort.conditioning)
    return artist_quality(artist, count=effort.quality_samples)


def _measure_thinker(out: Path, effort: Effort) -> Mapping[str, float]:
    from actors.vlm.policy import VlmPolicy

    from .thinker import thinker_quality

    return thinker_quality(VlmPolicy.load(out / "vlm"), count=effort.quality_samples)


def _train_clip(out: Path, seed: int, effort: Effort, tick: Callable[[int, int, float], None]) -> Mapping[str, float]:
    from transformers import CLIPModel

    from .architectures import build_tiny_clip, clip_processor
    from .clip import clip_quality, train_clip

    shutil.rmtree(out / "clip", ignore_errors=True)
    folder = build_tiny_clip(out / "clip", seed)
    model = CLIPModel.from_pretrained(folder)
    train_clip(model, clip_processor(), steps=effort.clip_steps, seed=seed, tick=tick)
    model.save_pretrained(folder, safe_serialization=True)
    return clip_quality(model, clip_processor(), scenes=effort.quality_samples // 2)


def _train_video(out: Path, seed: int, effort: Effort, tick: Callable[[int, int, float], None]) -> Mapping[str, float]:
    from transformers import VideoMAEModel

    from .architectures import build_tiny_video_encoder
    from .video_encoder import train_video_encoder, video_quality

    shutil.rmtree(out / "video", ignore_errors=True)
    folder = build_tiny_video_encoder(out / "video", seed)
    model = VideoMAEModel.from_pretrained(folder)
    train_video_encoder(model, steps=effort.video_steps, seed=seed, tick=tick)
    model.save_pretrained(folder, safe_serialization=True)
    return video_quality(model, scenes=effort.quality_samples // 2)


def _train_thinker(
    out: Path, seed: int, effort: Effort, tick: Callable[[int, int, float], None]
) -> Mapping[str, float]:
    from actors.vlm.policy import VlmPolicy
    from pipeline.data.toy.world import language_of, make_sample

    from .architectures import build_tiny_vlm
    from .thinker import thinker_quality, train_thinker

    shutil.rmtree(out / "vlm", ignore_errors=True)
    folder = build_tiny_vlm(out / "vlm", seed)
    policy = VlmPolicy.load(folder, cache_size=effort.thinker_samples)
    samples = [make_sample(i, "sft", seed, language_of(i, "mixed")) for i in range(effort.thinker_samples)]
    train_thinker(policy, samples, steps=effort.thinker_steps, seed=seed, tick=tick)
    policy.export(folder)
    return thinker_quality(policy, count=effort.quality_samples)


_TRAIN: dict[str, Callable[[Path, int, Effort, Callable[[int, int, float], None]], Mapping[str, float]]] = {
    "vae": _train_vae,
    "artist": _train_artist,
    "clip": _train_clip,
    "thinker": _train_thinker,
    "video": _train_video,
}
_QUALITY: dict[str, Callable[[Path, Effort], Mapping[str, float]]] = {
    "artist": _measure_artist,
    "thinker": _measure_thinker,
}
