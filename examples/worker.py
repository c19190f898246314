"""Publishes from outside to the pages of feed.py, by the broker that both are given:

BROKER_URL=redis://localhost asgi-ws run examples.feed:app --workers 2
BROKER_URL=redis://localhost python -m examples.worker

or python -m examples.worker redis://localhost
"""

import asyncio
import os
import sys

import asgi_ws
from asgi_ws import Hub


def finished(url: str) -> None:
    """In synchronous code, as a task queue's worker or a cron job is: one call, which connects and disconnects."""
    position = asgi_ws.publish(url, "news", "the job is done")
    print(f"published at {position}")


async def work(url: str) -> None:
    """In asynchronous code, or for more than a few: one connection for all."""
    async with Hub(url) as hub:
        for percent in range(0, 100, 20):
            await hub.publish("news", f"the job is at {percent} %")
            await asyncio.sleep(0.1)


if __name__ == "__main__":
    url = sys.argv[1] if len(sys.argv) > 1 else os.environ["BROKER_URL"]
    asyncio.run(work(url))
    finished(url)
