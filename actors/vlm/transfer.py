"""vLLM's native weight transfer (``WeightTransferEngine``), with our broadcast as the way the tensors come.

Responsible for receiving in vLLM's own process, one receiver per GPU of a tensor-parallel engine, and for handing the tensors to
vLLM's layerwise reload, which cuts, fuses and repacks them. Imported by vLLM alone, through the registration in ``extension``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from actors.weights.broadcast import Offer, receive_broadcast


@dataclass
class NoInit(WeightTransferInitInfo):
    """Nothing is set up before the first transfer: each version has a rendezvous of its own."""


@dataclass
class BroadcastInfo(WeightTransferUpdateInfo):
    """``offer``: an :class:`actors.weights.Offer` as a dict."""

    offer: dict[str, Any]


class BroadcastTransferEngine(WeightTransferEngine):
    """Receives the model's own state dict by broadcast and loads it message by message."""

    init_info_cls = NoInit
    update_info_cls = BroadcastInfo

    def init_transfer_engine(self, init_info: NoInit) -> None:
        """Nothing to do."""

    _begun = False  # layers wait for their tensors

    def start_weight_update(self) -> None:
        """Nothing to do before the first tensors have come: there may be none."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive and load; the transfer itself waits until the tensors are there, so nothing needs a device-wide wait."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: BroadcastInfo) -> None:
        """Receive all tensors and load them; BroadcastError where they do not come."""
        try:
            for batch in receive_broadcast(Offer(**update_info.offer), self.device):
                if not self._begun:
                    initialize_layerwise_reload(self.model)
                    self._begun = True
                self.model.load_weights(batch)
        except BaseException:
            # Layers that got a part of their tensors would count them again in the reload that has to follow.
            self.finish_weight_update()
            raise

    def finish_weight_update(self) -> None:
        """Let vLLM process what is left, and go back to normal loading."""
        if self._begun:
            self._begun = False
            finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing is held between transfers."""
