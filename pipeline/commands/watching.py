"""``vans status``, ``vans profile``, ``vans scale``: a run's pools and times, watched and changed while it goes on."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.commands.program import print_plain, wide_console

RunArgument = Annotated[str, typer.Argument(help="The run's folder, or its name together with `--address`.")]
Address = Annotated[
    str | None, typer.Option(help="Ray's address, `host:6379` or `auto`; default: the one in the run's folder.")
]


def status(
    run: RunArgument,
    address: Address = None,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh once a second, until Ctrl-C.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON instead of tables.")] = False,
) -> None:
    """Show the pools of a run that goes on: workers, weights, queues, times, throughput (docs/operations.md).

    Examples: `vans status runs/toy`, `vans status runs/toy --watch`, `vans status toy --address auto --json`
    """
    import json

    from pipeline.control.client import open_run
    from pipeline.control.show import tables
    from pipeline.control.show import watch as watch_run

    console = wide_console(120)
    with open_run(run, address) as client:
        if watch and not as_json:
            watch_run(client, console)
            return
        view, age_s = client.view()
        if as_json:
            print_plain(json.dumps(json.loads(view.to_json()) | {"age_s": round(age_s, 1)}))
        else:
            console.print(tables(view, age_s))


def profile(
    run: Annotated[str, typer.Argument(help="Folder of a run, such as runs/toy; it may go on or have ended.")],
    last: Annotated[
        int | None, typer.Option(min=1, help="Mean over the last N steps of each stage; default: all.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show where the steps of a run went: pools' busy, idle and waiting seconds, the driver's chain, lower bound and bottleneck.

    Examples: `vans profile runs/toy`, `vans profile runs/toy --last 10 --json`
    """
    import json

    from pipeline.tracking.profile import read_profiles, tables

    profiles = read_profiles(run, last)
    if as_json:
        print_plain(json.dumps([found.as_json() for found in profiles]))
    else:
        wide_console(120).print(tables(profiles))


def scale(
    run: RunArgument,
    sizes: Annotated[list[str], typer.Argument(help="New sizes, such as `vlm=3 vdm=6`.", metavar="POOL=WORKERS…")],
    address: Address = None,
    timeout: Annotated[float, typer.Option(min=1.0, help="Longest wait for the run's answer, in seconds.")] = 30.0,
) -> None:
    """Give pools of a run other sizes while it goes on. New workers start beside the others; leaving ones finish their calls.

    Examples: `vans scale runs/toy vdm=4`, `vans scale runs/toy vlm=3 vdm=6 reward=2`
    """
    from pipeline.control.client import open_run, parse_sizes

    wanted = parse_sizes(sizes)
    with open_run(run, address) as client:
        for line in client.scale(wanted, timeout).lines():
            print_plain(line)
