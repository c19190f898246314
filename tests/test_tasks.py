import asyncio

import pytest

from asgi_ws.tasks import Tasks

pytestmark = pytest.mark.anyio


async def test_a_task_belongs_to_its_owner_until_it_has_ended() -> None:
    tasks, go = Tasks(), asyncio.Event()

    async def work() -> None:
        await go.wait()

    task = tasks.start(work(), "some work")
    assert set(tasks) == {task}
    assert task.get_name() == "some work"
    go.set()
    await task
    await asyncio.sleep(0)
    assert not tasks


async def test_whoever_stops_ends_them_and_waits_for_that() -> None:
    tasks = Tasks()
    ended = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append(True)

    for _ in range(3):
        tasks.start(work(), "some work")
    await asyncio.sleep(0)
    await tasks.cancel()
    assert ended == [True] * 3
    await tasks.cancel()
