"""Captions of a supervised run: embedded once into files, with the encoder's own bits, and found there by the next start."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from actors.vdm.policy import VdmPolicy
from cluster.errors import DataError
from pipeline.sft import SftSettings, captions
from pipeline.sft.captions import distinct_captions, frozen_captions
from tests.actors.vdm.pipelines import build


def test_the_frozen_encoder_is_asked_once_and_then_gone(
    toy_shards: Path, tiny_vdm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captions, "PER_FILE", 5)
    shards = [str(path) for path in sorted((toy_shards / "train").glob("*.parquet"))]
    found, cpu = sorted(distinct_captions(shards)), torch.device("cpu")
    settings = SftSettings(policy_kwargs={"negative_prompt": "still"})

    def embedder():
        return frozen_captions(str(tiny_vdm_dir), settings, shards, tmp_path, 0, 1, cpu)

    frozen, policy = embedder(), VdmPolicy.load(tiny_vdm_dir)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == -(-(len(found) + 1) // 5) and not list(tmp_path.glob("*.part"))
    texts = [*found, "still"]
    assert frozen.encoder is None and torch.equal(frozen(texts).rows, policy.embed(texts))
    with safe_open(files[0], framework="pt") as file:
        assert len(file.metadata()["text_encoder"]) == 32
    written = [path.stat().st_mtime_ns for path in files]
    files[0].unlink()  # as if the run had been killed before it: the next start makes what is missing, and no more
    again = embedder()
    assert torch.equal(again(texts).rows, frozen(texts).rows)
    assert [path.stat().st_mtime_ns for path in files[1:]] == written[1:]
    with pytest.raises(DataError, match="was not in the dataset"):
        frozen.row("a caption that nobody wrote")


def test_captions_are_read_from_a_store_too(toy_shards: Path) -> None:
    paths = sorted((toy_shards / "train").glob("*.parquet"))
    assert distinct_captions([f"file://{path}" for path in paths]) == distinct_captions([str(path) for path in paths])


@pytest.mark.parametrize("member", ["wan2.1", "ltx", "ltx condition"])
def test_a_policy_with_stored_captions_has_the_same_loss(member: str, toy_shards: Path, tmp_path: Path) -> None:
    """The transformer alone beside files of captions, in each way that a family reads them."""
    from pipeline.data.toy import make_sample

    shards = [str(path) for path in (toy_shards / "train").glob("*.parquet")]
    (caption, *_) = distinct_captions(shards)
    s = make_sample(0, "train")
    batch = [(s.input_frames[-2:], caption, s.target_frames)] * 2
    folder = build(member, tmp_path / "model")
    whole = VdmPolicy.load(folder)
    bare = VdmPolicy.load(folder, components=("transformer", "vae_encoder"))
    bare.embedder = frozen_captions(str(folder), SftSettings(), shards, tmp_path, 0, 1, torch.device("cpu"))
    losses = [p.sft_loss(batch, generator=torch.Generator().manual_seed(1)).mean for p in (whole, bare)]
    assert torch.equal(losses[0], losses[1])
    assert set(bare.held()) == {"transformer", "vae_encoder"}
