import pickle

import pytest

from asgi_ws import exceptions
from asgi_ws.exceptions import (
    AsgiWsError,
    BrokerError,
    CommandError,
    ConnectionClosed,
    HubNotRunning,
    InvalidMessage,
    SubscriberTooSlow,
    SubscriptionDenied,
    TokenExpired,
)

ALL = [getattr(exceptions, name) for name in exceptions.__all__]
EXAMPLES = [
    ConnectionClosed(1000),
    ConnectionClosed(4001, "bye", clean=False),
    InvalidMessage("not JSON"),
    SubscriptionDenied("room:1"),
    SubscriberTooSlow("room:1"),
    HubNotRunning(),
    BrokerError("no answer"),
    CommandError(400, "no", temporary=True),
    TokenExpired(),
]


@pytest.mark.parametrize("error", ALL)
def test_there_is_one_tree(error: type[Exception]) -> None:
    assert issubclass(error, AsgiWsError)


def test_the_tree_in_the_docstring_is_complete() -> None:
    for name in exceptions.__all__:
        assert name in (exceptions.__doc__ or "")


@pytest.mark.parametrize("error", EXAMPLES, ids=repr)
def test_errors_can_be_pickled(error: AsgiWsError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_connection_closed_tells_a_closing_handshake_from_a_lost_connection() -> None:
    assert str(ConnectionClosed(1000)) == "the connection was closed with code 1000"
    assert str(ConnectionClosed(4001, "bye")) == "the connection was closed with code 4001: bye"
    assert str(ConnectionClosed(1006, clean=False)) == "the connection was lost with code 1006"


def test_connection_closed_again_is_equal_but_has_no_traceback() -> None:
    with pytest.raises(ConnectionClosed) as raised:
        raise ConnectionClosed(4001, "bye", clean=False)
    again = raised.value.again()
    assert (again.code, again.reason, again.clean) == (4001, "bye", False)
    assert again is not raised.value
    assert again.__traceback__ is None


def test_invalid_message_carries_the_close_code() -> None:
    error = InvalidMessage("$.x: Expected `int`")
    assert (error.reason, error.close_code) == ("$.x: Expected `int`", 1007)
    assert InvalidMessage("too deep", 1009).close_code == 1009
    assert str(error) == "$.x: Expected `int`"


def test_errors_name_the_channel() -> None:
    denied = SubscriptionDenied("room:1")
    assert (denied.channel, denied.reason) == ("room:1", "not allowed")
    assert str(denied) == "subscribing to 'room:1' was refused: not allowed"
    slow = SubscriberTooSlow("room:1")
    assert slow.channel == "room:1"
    assert "'room:1'" in str(slow)


def test_hub_not_running_is_a_runtime_error_and_says_what_to_do() -> None:
    assert issubclass(HubNotRunning, RuntimeError)
    assert "add WebSocketMiddleware" in str(HubNotRunning())
    assert "async with hub" in str(HubNotRunning())


def test_a_commands_error_has_a_code_and_words() -> None:
    error = CommandError(103)
    assert (error.code, error.message, error.temporary) == (103, "permission denied", False)
    assert str(CommandError(400, "not today")) == "not today (400)"
    for code, message in ((99, "x"), (2000, "x"), (400, "")):
        with pytest.raises(ValueError, match="400 to 1999"):
            CommandError(code, message)
