"""The board's mailbox, as the plain asyncio object that Ray turns into an actor."""

from __future__ import annotations

import asyncio
import time

from actors.control import Board


def test_request_reaches_the_run_at_once_and_its_answer_whoever_asked() -> None:
    async def story() -> None:
        board = Board()
        assert (await board.read())[0] == ""
        began = time.monotonic()
        run = asyncio.create_task(board.exchange("look 1", {}, 30.0))
        await asyncio.sleep(0)
        first, second = (asyncio.create_task(board.ask(text, 30.0)) for text in ("a", "b"))
        requests = await run
        while len(requests) < 2:  # both, in one exchange or two
            requests |= await board.exchange("look 2", {}, 30.0)
        assert sorted(requests.values()) == ["a", "b"]
        answers = {number: f"done {text}" for number, text in requests.items()}
        assert await board.exchange("look 3", answers, 0.01) == {}
        assert await asyncio.gather(first, second) == ["done a", "done b"]
        assert time.monotonic() - began < 10  # nobody waited for a deadline
        text, age = await board.read()
        assert text == "look 3" and 0 <= age < 10

    asyncio.run(story())


def test_request_that_the_run_does_not_take_in_time_is_withdrawn() -> None:
    async def story() -> None:
        board = Board()
        assert await board.ask("resize", 0.05) is None
        assert await board.exchange("look", {}, 0.01) == {}
        late = asyncio.create_task(board.ask("resize", 0.1))
        taken = await board.exchange("look", {}, 5.0)
        assert await late is None
        assert await board.exchange("look", dict.fromkeys(taken, "done"), 0.01) == {}  # an answer for nobody

    asyncio.run(story())
