"""``python -m cluster.wait HOST:PORT --nodes N``: wait until a Ray cluster answers and has its nodes, for scripts that start one."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from cluster.errors import VansError
from cluster.session import ClusterError, join

_PAUSE_S = 1.0


def wait_for_nodes(address: str, nodes: int, timeout_s: float) -> list[str]:
    """Return the addresses of the live nodes, once there are at least ``nodes``.

    Raises ClusterError after ``timeout_s``: nothing answers, or which nodes are there.
    """
    import ray

    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with join(address):
                while True:
                    there = sorted(node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"])
                    if len(there) >= nodes:
                        return there
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"{len(there)} of {nodes} nodes have joined ({', '.join(there)})")
                    time.sleep(_PAUSE_S)
        except TimeoutError as error:
            raise ClusterError(f"Ray at {address}: after {timeout_s:g} s {error}") from None
        except ClusterError as error:
            if time.monotonic() > deadline:
                raise ClusterError(f"Ray at {address}: no answer for {timeout_s:g} s. {error}") from error
        time.sleep(_PAUSE_S)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse ``arguments``, wait, print the nodes; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m cluster.wait", description=__doc__)
    parser.add_argument("address", help="the head's, host:port")
    parser.add_argument("--nodes", type=int, default=1, help="nodes that the cluster is to have")
    parser.add_argument("--timeout", type=float, default=600.0, help="longest wait in seconds")
    wanted = parser.parse_args(arguments)
    try:
        there = wait_for_nodes(wanted.address, wanted.nodes, wanted.timeout)
    except VansError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(there)} node(s): {', '.join(there)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
