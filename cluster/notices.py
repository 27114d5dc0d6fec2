"""What Ray tells every driver of a cluster about its nodes and workers, as a line of ours each. Ray's files have the rest.

Ray prints these notices on the driver's standard output, whatever ``log_to_driver`` says. That of a lost node ends with the last
lines of its raylet's log, a dump of state, once from each of the node's agents. Not responsible for errors of tasks and actors, which
reach the driver as exceptions.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from cluster.harmless import printable

log = logging.getLogger(__name__)

_LOST = re.compile(r"The node with node id: \S+ and address: (?P<address>\S+) .*has been marked dead")
# The raylet's end, from its agents, beside the notice of the lost node; a worker's end, which its pool reports with what it did.
_SAID_ELSEWHERE = ("Raylet is terminated.", "A worker died or was killed")
_LONGEST = 300


def notice(text: str, folder: str) -> str | None:
    """Return the line for people about what Ray says in ``text``; None where something of ours says it.

    ``folder``: where the nodes of the session keep Ray's logs.
    """
    if lost := _LOST.search(text):
        return (
            f"Ray has lost the node {lost['address']}: its raylet has ended, or has not answered for too long. Why is in Ray's "
            f"logs, {folder} on that node and on the head"
        )
    if text.startswith(_SAID_ELSEWHERE):
        return None
    return f"Ray: {printable(' '.join(text.split()), _LONGEST)} (Ray's logs: {folder} on each node)"


@contextmanager
def notices(folder: Callable[[], str]) -> Iterator[None]:
    """Log Ray's notices as warnings within the block, each once, in the place of Ray's own printing.

    ``folder`` returns where Ray's logs are; it is asked when there is a notice, thus after Ray has been initialised.
    """
    from ray._private import worker

    printing = worker.print_to_stdstream
    told: set[str] = set()

    def tell(data: Mapping[str, Any], ignore_prefix: bool = False) -> None:
        for text in data["lines"]:
            line = None if text in told else notice(text, folder())
            told.add(text)
            if line is not None:
                log.warning("%s", line)

    worker.print_to_stdstream = tell
    try:
        yield
    finally:
        worker.print_to_stdstream = printing
