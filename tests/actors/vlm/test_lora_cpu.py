"""An adapter's product for all its tokens at once is vLLM's own, token by token, and tokens without an adapter keep their output."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow

IN, RANK, PARTS, SLOTS = 24, 4, (16, 8, 8), 2


def add(slots: list[int], grouped: bool, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what is added to an output of the tokens with ``slots``, the output before, and the sum by plain products."""
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    from actors.vlm.lora_cpu import GroupedLora

    generator = torch.Generator().manual_seed(len(slots))

    def draw(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator).to(dtype)

    x, y = draw(len(slots), IN), draw(len(slots), sum(PARTS))
    a = tuple(draw(SLOTS, 1, RANK, IN) for _ in PARTS)
    b = tuple(draw(SLOTS, 1, part, RANK) for part in PARTS)
    wrapper = (GroupedLora if grouped else PunicaWrapperCPU)(64, 8, device="cpu")
    ids = [11, 22]  # of the adapters in the two slots
    mapping = LoRAMapping(tuple(ids[s] if s >= 0 else 0 for s in slots), (), is_prefill=True)
    wrapper.update_metadata(mapping, ids, SLOTS + 1, 64)
    out = y.clone()
    wrapper.add_lora_linear(out, x, a, b, 0.5, PARTS)
    rows = []
    for token, before, slot in zip(x.float(), y.float(), slots):
        delta = [0.5 * (u[slot, 0].float() @ token) @ v[slot, 0].float().T for u, v in zip(a, b)]
        rows.append(before + torch.cat(delta) if slot >= 0 else before)
    return out, y, torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slots", [[0] * 9, [1] * 5, [0, 0, 1, 1, 1, 0], [1]], ids=str)
def test_grouped_products_are_vllms(slots: list[int], dtype: torch.dtype) -> None:
    ours, before, plain = add(slots, True, dtype)
    theirs, _, _ = add(slots, False, dtype)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-1}
    torch.testing.assert_close(ours, theirs, **close)
    torch.testing.assert_close(ours.float(), plain, **close)
    assert (ours - before).abs().max() > 1


def test_a_token_without_an_adapter_keeps_its_output_beside_one_that_has_one() -> None:
    ours, before, plain = add([-1, 0, -1, 1], True, torch.float32)
    assert torch.equal(ours[[0, 2]], before[[0, 2]])
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    assert torch.equal(add([-1, -1], True, torch.float32)[0], add([-1, -1], True, torch.float32)[1])


@pytest.mark.parametrize("slots", [[0, 0, 0], [1, 0, 1]], ids=str)
def test_logits_are_vllms(slots: list[int]) -> None:
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    from actors.vlm.lora_cpu import GroupedLora

    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(len(slots), IN, generator=generator), torch.randn(len(slots), 40, generator=generator)
    a = torch.randn(SLOTS, 1, RANK, IN, generator=generator)
    b = torch.randn(SLOTS, 1, 32, RANK, generator=generator)  # the logits are padded beyond the vocabulary
    found = []
    for kind in (GroupedLora, PunicaWrapperCPU):
        wrapper, out = kind(64, 8, device="cpu"), y.clone()
        ids = tuple((11, 22)[s] for s in slots)
        wrapper.update_metadata(LoRAMapping(ids, ids, is_prefill=True), [11, 22], SLOTS + 1, 64)
        wrapper.add_lora_logits(out, x, a, b, 0.5)
        found.append(out)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[0][:, 32:], y[:, 32:]) and not torch.equal(found[0], y)
