"""What can go wrong, as one tree. Whose fault it was is in the name; what to do is in the words.

AsgiWsError
├── ConnectionClosed      the client is gone, or we closed the connection
├── InvalidMessage        the client sent what can't be read
├── InvalidChannel        no channel can have this name
├── InvalidPosition       these words aren't a position
├── SubscriptionDenied    a rule or a limit said no
├── SubscriberTooSlow     a subscription on the server's side was left unread for too long
├── PublicationsLost      publications are missing that the channel's history hasn't got any more
├── CommandError          a command of a client of the Centrifuge protocol fails
├── InvalidToken          a token isn't right
│   └── TokenExpired      it was right once
├── HubNotRunning         the hub was used before it was started
└── BrokerError           a publication may not have gone out
"""

__all__ = [
    "AsgiWsError",
    "BrokerError",
    "CommandError",
    "ConnectionClosed",
    "HubNotRunning",
    "InvalidChannel",
    "InvalidMessage",
    "InvalidPosition",
    "InvalidToken",
    "PublicationsLost",
    "SubscriberTooSlow",
    "SubscriptionDenied",
    "TokenExpired",
]


class AsgiWsError(Exception):
    """Every error that asgi_ws raises on purpose, other than those of a developer's mistake."""


class ConnectionClosed(AsgiWsError):
    """The connection has ended: nothing can be sent to the client, and all that it sent has been received.

    `code` and `reason` are the close frame's (RFC 6455 section 7.4), whoever sent it; 1006 when there was none.
    `clean` tells a closing handshake from a connection that was lost.
    """

    def __init__(self, code: int, reason: str = "", clean: bool = True) -> None:
        super().__init__(code, reason, clean)
        self.code = code
        self.reason = reason
        self.clean = clean

    def again(self) -> "ConnectionClosed":
        """The same to be raised anew: an exception that is raised twice collects the tracebacks of both."""
        return ConnectionClosed(self.code, self.reason, self.clean)

    def __str__(self) -> str:
        how = "closed" if self.clean else "lost"
        return f"the connection was {how} with code {self.code}" + (f": {self.reason}" if self.reason else "")


class InvalidMessage(AsgiWsError):
    """The client sent a message that can't be read. Where nobody catches it, the connection is closed with
    `close_code` and `reason`."""

    def __init__(self, reason: str, close_code: int = 1007) -> None:
        super().__init__(reason, close_code)
        self.reason = reason
        self.close_code = close_code

    def __str__(self) -> str:
        return self.reason


class InvalidChannel(AsgiWsError, ValueError):
    """No channel can have this name. Where nobody catches it, the connection whose handler used it is closed with
    1008."""


class InvalidPosition(AsgiWsError, ValueError):
    """These words aren't a position in a channel. Where nobody catches it, the connection whose handler used them is
    closed with 1008."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f"not a position: {self.text[:100]!r}"


class SubscriptionDenied(AsgiWsError):
    """A connection may not subscribe to the channel. Where nobody catches it, the connection is closed with 1008."""

    def __init__(self, channel: str, reason: str = "not allowed") -> None:
        super().__init__(channel, reason)
        self.channel = channel
        self.reason = reason

    def __str__(self) -> str:
        return f"subscribing to {self.channel!r} was refused: {self.reason}"


class SubscriberTooSlow(AsgiWsError):
    """More was published to the channel than `Limits.outbox_size` holds while `hub.subscribe` was left unread."""

    def __init__(self, channel: str) -> None:
        super().__init__(channel)
        self.channel = channel

    def __str__(self) -> str:
        return f"the subscription to {self.channel!r} was not read fast enough; read it in a task of its own"


class PublicationsLost(AsgiWsError):
    """Publications to a channel with a history are missing, and can't be had any more: the broker has lost them. What
    was made of the earlier ones has to be loaded anew."""

    def __init__(self, channel: str) -> None:
        super().__init__(channel)
        self.channel = channel

    def __str__(self) -> str:
        return f"publications to {self.channel!r} were lost; load its state anew and subscribe again"


_COMMAND_ERRORS = {
    100: "internal server error",
    101: "unauthorized",
    102: "unknown channel",
    103: "permission denied",
    104: "method not found",
    105: "already subscribed",
    106: "limit exceeded",
    107: "bad request",
    108: "not available",
    109: "token expired",
    110: "expired",
    111: "too many requests",
    112: "unrecoverable position",
}


class CommandError(AsgiWsError):
    """A client's command is answered with this error. Raised by functions that serve clients of the Centrifuge
    protocol: codes of your own are 400 to 1999, and the protocol's own need no message. A `temporary` one has clients
    try again by themselves.

    Raises `ValueError` for a code that clients don't take from a server.
    """

    def __init__(self, code: int, message: str = "", temporary: bool = False) -> None:
        message = message or _COMMAND_ERRORS.get(code, "")
        if not 100 <= code <= 1999 or not message:
            raise ValueError(
                f"CommandError({code!r}, {message!r}): take a code from 400 to 1999, and say what is wrong"
            )
        super().__init__(code, message, temporary)
        self.code = code
        self.message = message
        self.temporary = temporary

    def __str__(self) -> str:
        return f"{self.message} ({self.code})"


class InvalidToken(AsgiWsError):
    """A token isn't valid: not signed by whom it has to be, expired, or not meant for this application."""


class TokenExpired(InvalidToken):
    """The token was right until it expired: the client is to come back with a new one."""


class HubNotRunning(AsgiWsError, RuntimeError):
    """The hub was used while it isn't running."""

    def __str__(self) -> str:
        return (
            "the hub isn't running: add WebSocketMiddleware with this hub to the application that serves the request, "
            "or use `async with hub`"
        )


class BrokerError(AsgiWsError):
    """The broker didn't confirm: a publication may not have gone out. `__cause__` is its client's own error."""
