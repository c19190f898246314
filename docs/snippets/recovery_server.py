from collections.abc import AsyncIterator

from asgi_ws import Hub, Position, SubscriberTooSlow

hub = Hub()
hub.channel("orders", history=1000)


async def orders(since: Position | None = None) -> AsyncIterator[int]:
    """All orders since a position, and those that are still to come."""
    while True:
        async with hub.subscribe("orders", since=since) as publications:
            if since is None:
                since = publications.recovery.position
            elif not publications.recovery.recovered:
                raise RuntimeError(f"what followed {since} isn't kept any more: read the database")
            try:
                async for publication in publications:
                    since = publication.position
                    yield publication.data
                return  # the hub has stopped
            except SubscriberTooSlow:
                continue
