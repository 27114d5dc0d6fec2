"""The learner's process group listens on the address that it is told, and on no other."""

from __future__ import annotations

from typing import Any

import psutil
import torch
import torch.multiprocessing as mp

from actors.learner.sharding import free_address, join_group


def meet(rank: int, address: str, answers: Any) -> None:
    join_group(address, rank, 2, "127.0.0.1", 60, torch.device("cpu"))
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    listening = {c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.status == "LISTEN"}
    answers.put((float(total), listening))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_ranks_meet_on_loopback_alone() -> None:
    context = mp.get_context("spawn")
    answers, address = context.Queue(), free_address("127.0.0.1")
    ranks = [context.Process(target=meet, args=(rank, address, answers), daemon=True) for rank in range(2)]
    for rank in ranks:
        rank.start()
    found = [answers.get(timeout=90) for _ in ranks]
    for rank in ranks:
        rank.join(30)
    assert [total for total, _ in found] == [2.0, 2.0]
    assert set().union(*(ips for _, ips in found)) == {"127.0.0.1"}  # the store's and gloo's
