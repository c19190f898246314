"""What a client meets behind a path."""

from asgi_ws.endpoints.function import Endpoint, check_async, check_takes, current_app, make_route

__all__ = ["Endpoint", "check_async", "check_takes", "current_app", "make_route"]
