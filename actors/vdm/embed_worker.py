"""The embed pool's Ray actor: the frozen models in front of the diffusion transformer, loaded here and nowhere else.

It embeds captions with the text encoder and encodes reference frames with the VAE, and with the image encoder where the artist has
one; samplers and learners get the results with their requests, and load none of them. Each caption is encoded alone, so that its
embedding does not depend on what it was asked for with: a request that is sent again, or a run with another pool size, has equal bits.

The class is undecorated, so that it also runs in process; make an actor with ``ray.remote(EmbedWorker).options(…)``.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch

from actors.failures import BadSampleError, InfrastructureError, Outcome, attempt
from actors.offload import Offloader, module_tensors
from actors.policy.protocol import torch_dtype
from actors.pool.protocol import WorkerInfo, worker_info
from actors.records import EmbedRequest, EncodeRequest, FrameEncoding, TextEmbedding
from actors.vdm.family import Family
from actors.vdm.files import (
    held_bytes,
    load_image_encoder,
    load_text_encoder,
    load_vae,
    open_pipeline,
    parameter_hash,
)
from actors.vdm.image_encoder import ImageEncoder
from actors.vdm.settings import ConditioningSection, Tiling
from actors.vdm.text_encoder import CaptionEmbedder


class EmbedWorker:
    """Embeds captions and encodes reference frames. Its models are frozen, so every weights version is the same to it.

    ``dtype`` is the text encoder's; VAE and image encoder are float32. ``conditioning`` says what becomes of reference frames.
    """

    def __init__(
        self,
        name: str,
        model_path: str,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        threads: int = 1,
        negative_prompt: str = "",
        max_text_tokens: int | None = None,
        tiling: Tiling | None = None,
        conditioning: ConditioningSection | None = None,
    ) -> None:
        self.name, self._path, self._dtype, self._device = name, model_path, dtype, torch.device(device)
        self._threads, self._negative, self._max_text_tokens = threads, negative_prompt, max_text_tokens
        self._tiling, self._conditioning = tiling, conditioning
        self._version = 0
        self._vae: Any = None
        self._family: Family | None = None
        self._embedder: CaptionEmbedder | None = None
        self._image_encoder: ImageEncoder | None = None
        self._references = 0
        self._offloader = Offloader(self._device)
        self._busy = threading.Lock()  # one call at a time uses the models; the actor's other thread answers ping()

    @property
    def embedder(self) -> CaptionEmbedder:
        """The text encoder's side; RuntimeError before :meth:`setup`."""
        if self._embedder is None:
            raise RuntimeError(f"embed worker {self.name}: used before setup()")
        return self._embedder

    def setup(self) -> WorkerInfo:
        """Load the models. Raises CheckpointError for a folder that is no pipeline of a known family."""
        torch.set_num_threads(self._threads)
        blueprint = open_pipeline(self._path)
        self._family = blueprint.family(conditioning=self._conditioning)
        encoder, tokenizer = load_text_encoder(blueprint, torch_dtype(self._dtype))
        encoder = encoder.to(self._device).eval().requires_grad_(False)
        self._embedder = CaptionEmbedder(
            encoder, tokenizer, self._family.reading, self._max_text_tokens, cache_bytes=64 << 20
        )
        self._vae = load_vae(blueprint, decoder=False).to(self._device).eval().requires_grad_(False)
        if self._tiling is not None:
            self._tiling.start(self._vae)
        image_encoder = load_image_encoder(blueprint)
        self._image_encoder = image_encoder.to(self._device) if image_encoder is not None else None
        return worker_info(self.name, str(self._device), self._hash())

    def load_weights(self, version: int, payload: list[Any] | None) -> int:
        """Note ``version``; there is nothing to load. Raises ValueError for an actual payload."""
        if payload:
            raise ValueError(
                f"embed worker {self.name} holds frozen models and takes no weights, got version {version}"
            )
        self._version = version
        return version

    def process(self, requests: Sequence[EmbedRequest | EncodeRequest]) -> list[Outcome]:
        """Return ``Ok`` of a :class:`TextEmbedding`, or of a :class:`FrameEncoding`, for each request, in order."""
        with self._busy, self._offloader.used():
            return [attempt(lambda r=request: self._answer(r)) for request in requests]  # type: ignore[misc]

    def weights_hash(self) -> str:
        """Return the hash of the models' parameters, and the version."""
        with self._busy, self._offloader.used():
            return f"{self._hash()}:{self._version}"

    def rest(self) -> int:
        """Move the models to host memory until they are next needed, by whatever needs them; returns the bytes freed."""
        return self._offloader.rest(lambda: module_tensors(*self._models().values()))

    def ping(self) -> str:
        """Return the worker's name."""
        return self.name

    def counters(self) -> dict[str, float]:
        """Return how many captions were embedded and clips' reference frames encoded since the worker's start."""
        return {"captions": float(self.embedder.counters()[0]), "references": float(self._references)}

    def held(self) -> dict[str, int]:
        """Return the bytes of the parameters that this process holds, by component."""
        return {{"vae": "vae_encoder"}.get(part, part): held_bytes(model) for part, model in self._models().items()}

    def _answer(self, request: EmbedRequest | EncodeRequest) -> TextEmbedding | FrameEncoding:
        try:
            if isinstance(request, EmbedRequest):
                return self._embed(request.caption)
            return self._encode(request)
        except torch.OutOfMemoryError as error:
            raise InfrastructureError(f"{self.name}: out of memory: {error}") from error

    def _embed(self, caption: str | None) -> TextEmbedding:
        if caption is not None and not caption.strip():
            raise BadSampleError("the caption is empty")
        rows = self.embedder.row(self._negative if caption is None else caption)
        return TextEmbedding(rows.float().cpu().numpy(), self.embedder.max_tokens)

    def _encode(self, request: EncodeRequest) -> FrameEncoding:
        frames = request.reference_frames
        if frames.ndim != 4 or not len(frames):
            raise BadSampleError(
                f"{request.sample_id}: reference frames must be uint8 (n, H, W, 3), got {frames.dtype} {frames.shape}"
            )
        assert self._family is not None  # setup() comes first, as for the embedder
        latents = self._family.encode_condition(self._vae, frames, self._device, request.num_frames)
        image = None
        if self._image_encoder is not None:
            image = self._family.embed_image(self._image_encoder, frames).cpu().numpy()
        self._references += 1
        return FrameEncoding(latents.cpu().numpy(), image)

    def _models(self) -> dict[str, Any]:
        models = {"vae": self._vae, "text_encoder": self.embedder.encoder}
        return models if self._image_encoder is None else models | {"image_encoder": self._image_encoder.model}

    def _hash(self) -> str:
        return parameter_hash(self._models())
