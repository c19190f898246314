from starlette.testclient import TestClient

from examples.chat import app


def test_chat() -> None:
    with (
        TestClient(app) as client,
        client.websocket_connect("/chat/lobby") as ann,
        client.websocket_connect("/chat/lobby") as bob,
    ):
        ann.send_text("hello")
        assert ann.receive_text() == "hello"
        assert bob.receive_text() == "hello"
