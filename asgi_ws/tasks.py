"""Tasks and their owner."""

import asyncio
from collections.abc import Coroutine
from typing import Any

__all__ = ["Tasks"]


class Tasks(set[asyncio.Task[Any]]):
    """The tasks that somebody has started and that haven't ended: he owns them, and ends them when he stops."""

    def start(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run `work` in a task of its own."""
        task = asyncio.create_task(work, name=name)
        self.add(task)
        task.add_done_callback(self.discard)
        return task

    async def cancel(self) -> None:
        """Cancel them, and wait until they have ended. Those that are started meanwhile aren't among them."""
        tasks = list(self)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
