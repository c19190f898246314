"""Publishing from synchronous code: a task queue's worker, a script, a shell."""

import asyncio
from typing import Any

from asgi_ws.hub import Hub
from asgi_ws.messages import Position

__all__ = ["check_url", "publish"]


def publish(url: str, channel: str, data: Any) -> Position | None:
    """Publish one thing to a channel of the applications whose hubs have this broker, as `Hub.publish` does, and return
    when the broker has confirmed it. Where the application keeps a history of the channel, this is kept, too.

    It connects and disconnects each time; for more than a few, use `async with Hub(url) as hub`.

    Raises `ValueError` for a URL that isn't a broker's or is this process's own, `BrokerError` when the publication may
    not have gone out, `RuntimeError` when called on an event loop, and what `Hub.publish` does.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(_publish(url, channel, data))
    raise RuntimeError("asgi_ws.publish is for synchronous code; here, use `await hub.publish(channel, data)`")


async def _publish(url: str, channel: str, data: Any) -> Position | None:
    check_url(url)
    async with Hub(url) as hub:
        return await hub.publish(channel, data)


def check_url(url: str) -> None:
    """Raise `ValueError` for a broker that nobody else can reach."""
    if url.startswith("memory:"):
        raise ValueError(f"{url!r} is the memory of one process; from outside, nobody can be reached there")
