"""The first signal is a request, the second the end; what is deferred is finished first. With real signals to this process."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys

import pytest

from pipeline.support.interrupt import RunStopped, StopRequest, stop_on_signals

TOLD = "stopped by {0.name}; go on with --resume"


async def forever(ended: list[str]) -> str:
    try:
        await asyncio.sleep(60)
    finally:
        ended.append("closed")
    return "never"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_cancels_the_work_which_closes_what_it_opened(number: signal.Signals, code: int) -> None:
    ended: list[str] = []
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]

    async def work() -> str:
        asyncio.get_running_loop().call_later(0.05, os.kill, os.getpid(), number)
        return await forever(ended)

    with pytest.raises(RunStopped, match=f"stopped by {number.name}; go on with --resume") as caught:
        with stop_on_signals(TOLD.format) as stop:
            stop.run(work())
    assert ended == ["closed"] and caught.value.exit_code == code
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_deferred_work_is_finished_and_raced_work_is_cancelled() -> None:
    ended: list[str] = []

    async def update() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.1)
        ended.append("updated")

    async def work(stop: StopRequest) -> list[str]:
        with stop.deferred():
            assert await stop.race(asyncio.sleep(0, "rollout")) == "rollout"
            await update()
            assert stop and stop.name == "SIGTERM"
            assert await stop.race(forever(ended)) is None
        return ended

    with stop_on_signals(TOLD.format) as stop:
        assert stop.run(work(stop)) == ["updated", "closed"]


def test_a_failure_of_raced_work_is_raised_and_an_outer_cancellation_ends_it() -> None:
    ended: list[str] = []

    async def fail() -> None:
        raise OSError("disk")

    async def main() -> None:
        with pytest.raises(OSError, match="disk"):
            await StopRequest().race(fail())
        task = asyncio.ensure_future(StopRequest().race(forever(ended)))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert ended == ["closed"]


def test_a_signal_outside_the_event_loop_and_inside_another_block() -> None:
    with pytest.raises(RunStopped, match="outer SIGINT") as caught:
        with stop_on_signals(lambda stop: f"outer {stop.name}"):
            with stop_on_signals(lambda stop: f"inner {stop.name}"):
                os.kill(os.getpid(), signal.SIGINT)
                signal.pause()
    assert caught.value.exit_code == 130


def test_what_ray_makes_of_sigterm_while_it_connects_is_a_stop_too() -> None:
    with pytest.raises(RunStopped, match="SIGTERM"), stop_on_signals(TOLD.format):
        sys.exit(signal.SIGTERM)
    with pytest.raises(SystemExit), stop_on_signals(TOLD.format):
        sys.exit(2)


def test_a_second_signal_ends_a_process_that_does_not_come_to_its_end() -> None:
    script = (
        "import os, signal, time\nfrom pipeline.support.interrupt import stop_on_signals\n"
        "async def work():\n"
        "    print('ready', flush=True)\n"
        "    try:\n        await __import__('asyncio').sleep(60)\n"
        "    finally:\n        print('closing', flush=True); time.sleep(60)\n"
        "with stop_on_signals(lambda stop: 'told') as stop:\n    stop.run(work())\n"
    )
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", script], stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "closing\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    assert "a second signal ends the run at once" in process.stderr.read()
