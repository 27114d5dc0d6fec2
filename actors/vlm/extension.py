"""Two methods that vLLM's worker gains (``worker_extension_cls``): reload weights from a file, and hash the base weights.

They run where the model is, which may be a process of vLLM's own; arguments and results are therefore plain text.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch


class WeightsExtension:
    """Mixed into vLLM's worker class; ``self`` is that worker."""

    def vans_reload(self, path: str) -> None:
        """Put the safetensors file ``path`` (the model's own state-dict names) into the live model."""
        from safetensors.torch import load_file

        worker: Any = self
        worker.reload_weights(weights_iterator=iter(load_file(path).items()))

    def vans_base_hash(self) -> str:
        """Return a hash of all parameters but LoRA's, as they lie in the worker's memory."""
        worker: Any = self
        digest = hashlib.blake2b(digest_size=16)
        for name, parameter in sorted(worker.model_runner.get_model().named_parameters()):
            if "lora_" in name:
                continue
            data = parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            digest.update(name.replace(".base_layer.", ".").encode())
            digest.update(data.tobytes())
        return digest.hexdigest()
