"""What vLLM's worker gains (``worker_extension_cls``): reload weights from a file or a broadcast, hash base weights, count videos.

These methods run where the model is, which may be a process of vLLM's own; arguments and results are therefore plain values. vLLM
imports this module there, which is where its factory learns of our way to transfer weights.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

TRANSFER = "vans_broadcast"
"""What our weight transfer engine is called in vLLM's ``WeightTransferConfig``."""

try:
    WeightTransferEngineFactory.register_engine(TRANSFER, "actors.vlm.transfer", "BroadcastTransferEngine")
except ValueError:  # a second engine in this process
    pass


class WeightsExtension:
    """Mixed into vLLM's worker class; ``self`` is that worker."""

    def vans_reload(self, path: str) -> None:
        """Put the safetensors file ``path`` (the model's own state-dict names) into the live model."""
        from safetensors.torch import load_file

        worker: Any = self
        worker.reload_weights(weights_iterator=iter(load_file(path).items()))

    def vans_receive(self, offer: dict[str, Any]) -> None:
        """Receive the whole model by broadcast into the live one; ``offer`` is an ``actors.weights.Offer`` as a dict.

        Whatever it raises, the model can be reloaded afterwards, and must be: its weights may be of two versions.
        """
        worker: Any = self
        worker.start_weight_update()
        worker.update_weights({"offer": offer})
        worker.finish_weight_update()

    def vans_base_hash(self) -> str:
        """Return a hash of all parameters but LoRA's, as they lie in the worker's memory."""
        worker: Any = self
        model = worker.model_runner.get_model()
        digest = hashlib.blake2b(digest_size=16)
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" not in name and parameter.numel():
                _add(digest, name, parameter.detach())
        for name, module in sorted(model.named_modules()):
            if hasattr(module, "cpu_linear") and module.weight.numel() == 0:
                _add(digest, f"{name}.weight", _packed_weight(module))
        return digest.hexdigest()

    def vans_group_lora(self) -> int:
        """Add adapters by whole matrix products where this is a CPU (see ``actors.vlm.lora_cpu``)."""
        from actors.vlm.lora_cpu import group_lora

        worker: Any = self
        return group_lora(worker.model_runner)

    def vans_count_videos(self) -> None:
        """Count from now on the videos that the model sees; a replayed CUDA graph is not counted."""
        worker: Any = self
        worker.vans_videos = 0
        model = worker.model_runner.get_model()
        embed = model.embed_multimodal

        def counted(**inputs: Any) -> Any:
            embeddings = embed(**inputs)  # one tensor for each video
            worker.vans_videos += len(embeddings)
            return embeddings

        model.embed_multimodal = counted

    def vans_videos_encoded(self) -> int:
        """Return how many videos the vision tower has encoded since the count began."""
        worker: Any = self
        return int(getattr(worker, "vans_videos", 0))


def _packed_weight(layer: Any) -> torch.Tensor:
    """Return (in, out) the weight of a layer whose parameter vLLM has repacked for the CPU and emptied.

    Unit vectors read it out: their products are exact, because all other terms of a sum are zero.
    """
    size = getattr(layer, "input_size_per_partition", layer.input_size)
    with torch.inference_mode():
        return layer.cpu_linear(torch.eye(size, dtype=layer.weight.dtype), layer.weight, None)


def _add(digest: Any, name: str, value: torch.Tensor) -> None:
    digest.update(name.replace(".base_layer.", ".").encode())
    digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
