"""CLIP features of frames and captions, from any transformers CLIP folder.

Responsible for preprocessing, batching and truncation counts. Not responsible for what features mean (``rewards``), for
caching (``features``) or for Ray (``worker``).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

from actors.loading import load_whole
from actors.scoring.hashing import modules_hash
from cluster.errors import CheckpointError

ROW_MULTIPLE = 8
"""Batches are padded to a multiple of this: on a CPU, features then do not depend on what shares the batch."""


class ClipScorer:
    """A frozen CLIP. Features are float32 and not normalised.

    ``path``: a folder (or hub name) with config, safetensors, preprocessor and tokenizer. ``batch``: most frames or
    captions in one forward pass. ``name`` labels metrics; by default it is the folder's name. Raises CheckpointError
    for a folder that is not a CLIP model.
    """

    def __init__(
        self, path: str | Path, *, device: str = "cpu", dtype: str = "float32", batch: int = 64, name: str | None = None
    ) -> None:
        try:
            self.model: Any = load_whole(CLIPModel, str(path), "a CLIP model", dtype=getattr(torch, dtype))
            self.images: Any = CLIPImageProcessor.from_pretrained(str(path))
            self.tokenizer: Any = AutoTokenizer.from_pretrained(str(path))
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{path} is not a transformers CLIP folder with safetensors weights: {error}"
            ) from error
        self.model = self.model.to(device).eval().requires_grad_(False)
        self.device = torch.device(device)
        self.batch = max(ROW_MULTIPLE, batch - batch % ROW_MULTIPLE)
        self.name = name or _label(Path(path))
        self.dim = int(self.model.config.projection_dim)
        positions = int(self.model.config.text_config.max_position_embeddings)
        self.max_tokens = min(positions, int(self.tokenizer.model_max_length))
        self.truncated = 0
        """Captions cut at the tokenizer's limit since the start."""

    def image_features(self, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return float32 (T, D) for each of the uint8 (T, H, W, 3) RGB ``clips``, whose sizes and lengths may differ.

        Frames are resized (bicubic), centre-cropped and normalised as the folder's preprocessor says.
        """
        for clip in clips:
            if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[-1] != 3 or min(clip.shape) < 1:
                raise TypeError(f"frames must be uint8 (T, H, W, 3) with T ≥ 1, not {clip.dtype} {clip.shape}")
        done: list[torch.Tensor] = []
        waiting: list[torch.Tensor] = []
        # Frames of one size are prepared together: the preprocessor's cost is by call rather than by frame.
        for _, alike in itertools.groupby(clips, key=lambda clip: clip.shape[1:]):
            frames = np.concatenate(list(alike))  # a copy: Ray hands out read-only arrays, which torch must not share
            for start in range(0, len(frames), self.batch):
                waiting.append(self._pixels(frames[start : start + self.batch]))
                if sum(map(len, waiting)) >= self.batch:
                    pixels = torch.cat(waiting)
                    done.append(self._vision(pixels[: self.batch]))
                    waiting = [pixels[self.batch :]]
        if sum(map(len, waiting)):
            done.append(self._vision(torch.cat(waiting)))
        features = torch.cat(done).numpy() if done else np.zeros((0, self.dim), np.float32)
        return [part.copy() for part in np.split(features, np.cumsum([len(c) for c in clips])[:-1])] if clips else []

    def text_features(self, captions: Sequence[str]) -> tuple[np.ndarray, list[bool]]:
        """Return float32 (N, D), and for each caption whether ``max_tokens`` cut it (``truncated`` counts them)."""
        texts = list(captions)
        if not texts:
            return np.zeros((0, self.dim), np.float32), []
        cut = [
            len(ids) > self.max_tokens for ids in self.tokenizer(texts, truncation=False, verbose=False)["input_ids"]
        ]
        self.truncated += sum(cut)
        tokens = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        parts = [
            self._text(ids[start : start + self.batch], mask[start : start + self.batch])
            for start in range(0, len(texts), self.batch)
        ]
        return torch.cat(parts).numpy(), cut

    def parameter_hash(self) -> str:
        """Return a hash of all parameters and buffers, equal for equal weights."""
        return modules_hash(self.model)

    def _pixels(self, frames: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(frames).permute(0, 3, 1, 2).to(self.device)
        return self.images(tensor, return_tensors="pt", device=str(self.device))["pixel_values"]

    @torch.inference_mode()
    def _vision(self, pixels: torch.Tensor) -> torch.Tensor:
        padded = _padded(pixels.to(self.device, self.model.dtype))
        return _features(self.model.get_image_features(pixel_values=padded))[: len(pixels)].float().cpu()

    @torch.inference_mode()
    def _text(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        output = self.model.get_text_features(
            input_ids=_padded(ids.to(self.device)), attention_mask=_padded(mask.to(self.device))
        )
        return _features(output)[: len(ids)].float().cpu()


def _features(output: Any) -> torch.Tensor:
    """Return the projected features: transformers returns a tensor or an output around it, by version."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def _padded(rows: torch.Tensor) -> torch.Tensor:
    missing = -len(rows) % ROW_MULTIPLE
    return torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])]) if missing else rows


def _label(path: Path) -> str:
    generic = path.name in {"clip", "model", "checkpoint"} and path.parent.name
    return f"{path.parent.name}-{path.name}" if generic else path.name
