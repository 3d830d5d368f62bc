"""A task that swallows a cancel ends all the same."""

import asyncio

from producer.end_tasks import end_tasks


async def test_a_task_that_swallows_cancels_is_cancelled_until_it_ends() -> None:
    swallowed: list[int] = []

    async def stubborn() -> None:
        while len(swallowed) < 3:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                swallowed.append(1)

    async def failing() -> None:
        raise ValueError("seen by nobody else")

    tasks = [asyncio.create_task(stubborn()), asyncio.create_task(failing())]
    await asyncio.sleep(0)
    await end_tasks(*tasks)
    assert len(swallowed) == 3 and all(task.done() for task in tasks)


async def test_no_tasks_are_ended_at_once() -> None:
    await end_tasks()
