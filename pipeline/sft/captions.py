"""Captions of a supervised run embedded once, before training: the frozen text encoder is gone when the transformer comes.

Each rank embeds its share of the dataset's distinct captions, each caption alone, and writes them to safetensors files that
all ranks read one caption at a time; a start after a failure finds them there. Keys are hashes of the captions; the folder
belongs to one model, dataset and settings, and each file names the hash of the encoder's weights.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from actors.policy.protocol import torch_dtype
from actors.vdm.families import Blueprint
from actors.vdm.files import load_text_encoder, load_tokenizer, open_pipeline, parameter_hash
from actors.vdm.text_encoder import CaptionEmbedder
from cluster.errors import DataError
from pipeline.data.schema import open_shard
from pipeline.sft.settings import SftSettings
from pipeline.support.location import parse_location

PER_FILE = 1024


def frozen_captions(
    model: str, settings: SftSettings, shards: Sequence[str], folder: Path, rank: int, world: int, device: torch.device
) -> CaptionEmbedder:
    """Return an embedder without an encoder that knows every caption of ``shards`` and the negative prompt.

    Collective: all ``world`` ranks call it, with a ``folder`` that all of them see. The encoder computes in
    ``settings.learner.dtype``. Raises CheckpointError for a model that is no pipeline of a known family.
    """
    source = open_pipeline(model)
    captions = sorted({*distinct_captions(shards), settings.policy_kwargs.get("negative_prompt", "")})
    folder.mkdir(parents=True, exist_ok=True)
    shares = [captions[each::world] for each in range(world)]
    files = [[_file(folder, r, world, k) for k in range(0, len(share), PER_FILE)] for r, share in enumerate(shares)]
    if not all(path.is_file() for path in files[rank]):
        _write(source, settings, shares[rank], files[rank], device)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    stored = StoredCaptions([path for own in files for path in own], device)
    limit = settings.policy_kwargs.get("max_text_tokens")
    reading, tokenizer = source.family().reading, load_tokenizer(source)
    return CaptionEmbedder(None, tokenizer, reading, limit, settings.tuning.cache_mib * 2**20, stored=stored)


def distinct_captions(shards: Sequence[str]) -> set[str]:
    """Return the captions in Parquet ``shards``; a damaged row group has none, and its rows are quarantined later."""
    found: set[str] = set()
    for path in shards:
        with open_shard(parse_location(path)) as file:
            for group in range(file.num_row_groups):
                try:
                    column = file.read_row_group(group, columns=["caption"])["caption"]
                except (pa.ArrowException, OSError):
                    continue
                found.update(caption for caption in column.to_pylist() if caption and caption.strip())
    return found


class StoredCaptions:
    """Embeddings (tokens, D) by caption, read from safetensors files when they are asked for."""

    def __init__(self, files: Sequence[Path], device: torch.device) -> None:
        self._device = device
        self._files = [safe_open(path, framework="pt") for path in files]  # type: ignore[no-untyped-call]
        self._places = {key: file for file in self._files for key in file.keys()}  # noqa: SIM118 - no mapping

    def __len__(self) -> int:
        return len(self._places)

    def __call__(self, caption: str) -> Tensor:
        """Return the embedding of ``caption``; DataError where the dataset did not have it when the run began."""
        file = self._places.get(caption_key(caption))
        if file is None:
            raise DataError(f"caption {caption[:80]!r} was not in the dataset when its captions were embedded")
        tensor: Tensor = file.get_tensor(caption_key(caption)).to(self._device)
        return tensor


def caption_key(caption: str) -> str:
    """Return the name under which an embedding is stored."""
    return hashlib.blake2b(caption.encode(), digest_size=16).hexdigest()


def _file(folder: Path, rank: int, world: int, first: int) -> Path:
    return folder / f"captions-{rank}-of-{world}-{first:07d}.safetensors"


def _write(
    source: Blueprint, settings: SftSettings, captions: list[str], files: list[Path], device: torch.device
) -> None:
    """Embed ``captions`` into ``files``; the encoder is freed on return."""
    encoder, tokenizer = load_text_encoder(source, torch_dtype(settings.learner.dtype))
    encoder = encoder.to(device).eval().requires_grad_(False)
    facts = {"text_encoder": parameter_hash({"text_encoder": encoder}), "dtype": settings.learner.dtype}
    limit = settings.policy_kwargs.get("max_text_tokens")
    embedder = CaptionEmbedder(encoder, tokenizer, source.family().reading, limit, cache_bytes=1)
    for part, path in zip(_parts(captions), files, strict=True):
        if not path.is_file():
            rows = {caption_key(caption): embedder.row(caption).cpu().contiguous() for caption in part}
            beside = path.with_suffix(".part")
            save_file(rows, str(beside), metadata=facts)
            os.replace(beside, path)


def _parts(captions: list[str]) -> Iterator[list[str]]:
    for first in range(0, len(captions), PER_FILE):
        yield captions[first : first + PER_FILE]
