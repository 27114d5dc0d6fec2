"""Tensors that leave their memory and come back: nobody who holds them may notice, and the memory must be free meanwhile."""

from __future__ import annotations

import threading
import time

import torch
from torch import nn

from actors.offload import Offloader, module_tensors

CPU = torch.device("cpu")


def test_memory_is_freed_and_values_return_into_the_same_tensors() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    module.tied = module[0].weight  # one memory, two names
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    view = module[0].weight.detach()[2:4]
    tensors = module_tensors(module, None) + [v for s in optimizer.state.values() for v in s.values()]
    before = [tensor.clone() for tensor in tensors]

    offloader = Offloader(CPU)
    for _ in range(2):
        freed = offloader.unload(tensors)
        storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}
        assert freed == sum(b.nbytes for b in {t.untyped_storage()._cdata: b for t, b in zip(tensors, before)}.values())
        assert all(storage.nbytes() == 0 for storage in storages.values())
        assert offloader.unload(tensors) == 0  # it is away already
        offloader.load()
        offloader.load()
        assert all(torch.equal(one, other) for one, other in zip(tensors, before, strict=True))
        assert torch.equal(view, module[0].weight[2:4]) and module.tied is module[0].weight
        with torch.no_grad():
            module[0].weight.add_(1.0)  # the next time, it is the new values that return
            before = [tensor.clone() for tensor in tensors]


def test_what_cannot_be_freed_and_what_is_elsewhere_stays() -> None:
    shared = torch.ones(4)
    shared.numpy()  # from now on its memory is numpy's too
    elsewhere = torch.ones(4, device="meta")
    offloader = Offloader(CPU)
    assert offloader.unload([shared, elsewhere, torch.empty(0)]) == 0
    assert torch.equal(shared, torch.ones(4))


def test_rest_waits_for_users_and_a_user_waits_for_nobody_but_the_load() -> None:
    tensor, offloader = torch.arange(4.0), Offloader(CPU)
    order: list[str] = []

    def use(name: str) -> None:
        with offloader.used():
            time.sleep(0.1)
            assert float(tensor.sum()) == 6.0
            order.append(name)

    users = [threading.Thread(target=use, args=(f"user {i}",)) for i in range(2)]
    for user in users:
        user.start()
    time.sleep(0.03)
    assert offloader.rest(lambda: [tensor]) == 16
    order.append("rest")
    assert sorted(order[:2]) == ["user 0", "user 1"] and order[2] == "rest" and offloader.away
    use("later")
    assert not offloader.away
    for user in users:
        user.join()
