from asgi_ws import Hub

hub = Hub()
hub.channel("room:{name}", presence=True)


async def log(name: str, lines: list[str]) -> None:
    async with hub.presence_events(f"room:{name}") as events:
        async for event in events:
            lines.append(f"{event.data['user']}: {event.data['type']}")
