"""An Engine.IO session without a network: what waits for its client, its way to a WebSocket, its heartbeat."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from asgi_ws.exceptions import InvalidMessage
from asgi_ws.transports.packets import Packet, PacketFrame
from asgi_ws.transports.session import Heartbeat, Session

PROBE = Packet("2", "probe")
UPGRADE = Packet("5")


def frame(text: str) -> PacketFrame:
    return PacketFrame("4" + text)


def payloads(frames: list[PacketFrame]) -> list[str | bytes]:
    return [frame.payload for frame in frames]


def test_what_waits_is_taken_in_its_order() -> None:
    session = Session("polling")
    assert not session.answerable
    session.push(frame("a"))
    session.push(frame("b"))
    assert session.answerable
    assert session.waiting == session.written == 4
    session.begin_poll()
    assert payloads(session.take()) == ["4a", "4b"]
    # It is the client's when the server has taken it.
    assert session.waiting == 4
    session.sending(2)
    assert session.waiting == 2
    session.end_poll()
    assert session.waiting == 0


def test_poll_without_anything_is_answered_with_noop() -> None:
    assert payloads(Session("polling").take()) == ["6"]


def test_second_poll_is_a_violation() -> None:
    session = Session("polling")
    session.begin_poll()
    with pytest.raises(InvalidMessage):
        session.begin_poll()
    session.end_poll()
    session.begin_poll()


def test_end_goes_behind_what_waits() -> None:
    session = Session("polling")
    session.push(frame("a"))
    session.closing = True
    assert payloads(session.take()) == ["4a", "1"]


def test_client_that_tries_a_websocket_moves_there() -> None:
    session = Session("polling")
    assert session.probe(PROBE) == "3probe"
    assert session.upgrading
    session.push(frame("a"))
    assert session.probe(UPGRADE) is None
    assert session.transport == "websocket"
    assert payloads(session.move()) == ["4a"]
    assert session.waiting == session.written == 0


def test_client_may_move_without_trying() -> None:
    session = Session("polling")
    assert session.probe(UPGRADE) is None
    assert session.transport == "websocket"


@pytest.mark.parametrize("packet", [Packet("2"), Packet("4", "hello"), Packet("4", b""), Packet("1"), Packet("5", "x")])
def test_wrong_word_on_the_tried_socket_leaves_the_session_where_it_is(packet: Packet) -> None:
    session = Session("polling")
    with pytest.raises(InvalidMessage):
        session.probe(packet)
    assert session.transport == "polling"


def test_second_probe_is_a_wrong_word() -> None:
    session = Session("polling")
    session.probe(PROBE)
    with pytest.raises(InvalidMessage):
        session.probe(PROBE)
    session.give_up_upgrade()
    assert session.probe(PROBE) == "3probe"


class Upgrades(RuleBasedStateMachine):
    """A client as engine.io-client is, and a server that writes whenever it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.session = Session("polling")
        self.written = 0
        self.received: list[int] = []
        self.on_wire: list[PacketFrame] | None = None
        self.polling = False
        self.socket: list[PacketFrame] | None = None
        self.tried = False
        self.paused = False

    def take(self, frames: list[PacketFrame]) -> None:
        self.received += [int(str(frame.payload)[1:]) for frame in frames if str(frame.payload)[0] == "4"]

    @rule(count=st.integers(1, 3))
    def server_writes(self, count: int) -> None:
        for _ in range(count):
            if self.socket is not None:
                self.socket.append(frame(str(self.written)))
            else:
                self.session.push(frame(str(self.written)))
            self.written += 1

    @precondition(lambda self: not self.polling and not self.paused)
    @rule()
    def client_polls(self) -> None:
        self.session.begin_poll()
        self.polling = True

    @precondition(lambda self: self.polling and self.on_wire is None)
    @rule()
    def server_answers(self) -> None:
        if self.session.answerable or self.session.upgrading:
            self.on_wire = self.session.take()

    @precondition(lambda self: self.on_wire is not None)
    @rule()
    def client_hears(self) -> None:
        assert self.on_wire is not None
        self.session.end_poll()
        self.take(self.on_wire)
        self.on_wire, self.polling = None, False

    @precondition(lambda self: not self.tried)
    @rule()
    def client_tries_a_websocket(self) -> None:
        assert self.session.probe(PROBE) == "3probe"
        self.tried = True

    @precondition(lambda self: self.tried and self.socket is None)
    @rule()
    def client_hears_of_the_probe(self) -> None:
        self.paused = True

    @precondition(lambda self: self.tried and not self.paused)
    @rule()
    def websocket_fails(self) -> None:
        self.session.give_up_upgrade()
        self.tried = False

    @precondition(lambda self: self.paused and not self.polling and self.socket is None)
    @rule()
    def client_moves(self) -> None:
        assert self.session.probe(UPGRADE) is None
        self.socket = self.session.move()

    @precondition(lambda self: self.socket is not None)
    @rule()
    def client_reads_the_websocket(self) -> None:
        assert self.socket is not None
        self.take(self.socket)
        self.socket.clear()

    @invariant()
    def nothing_is_lost_or_doubled_or_out_of_order(self) -> None:
        assert self.received == list(range(len(self.received)))

    def teardown(self) -> None:
        for _ in range(3):
            if self.on_wire is not None:
                self.client_hears()
            if self.socket is not None:
                self.client_reads_the_websocket()
            elif not self.paused:
                if not self.polling:
                    self.client_polls()
                if self.session.answerable or self.session.upgrading:
                    self.server_answers()
            elif not self.polling:
                self.client_moves()
            else:
                self.server_answers()
        if self.on_wire is not None:
            self.client_hears()
        if self.paused and self.socket is None:
            self.client_moves()
        if self.socket is not None:
            self.client_reads_the_websocket()
        assert self.received == list(range(self.written))


TestUpgrades = Upgrades.TestCase
TestUpgrades.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


# The heartbeat


def test_ping_is_due_one_interval_behind_the_last_answer() -> None:
    heartbeat = Heartbeat(25, 20, now=100)
    assert heartbeat.due == 125
    assert heartbeat.beat(125, deaf=False).payload == "2"
    assert heartbeat.due == 145
    heartbeat.answered(130)
    assert heartbeat.due == 155


def test_unanswered_ping_is_the_end() -> None:
    heartbeat = Heartbeat(25, 20, now=100)
    heartbeat.beat(125, deaf=False)
    with pytest.raises(TimeoutError):
        heartbeat.beat(145, deaf=False)


def test_answer_that_nobody_asked_for_is_none() -> None:
    heartbeat = Heartbeat(25, 20, now=100)
    heartbeat.answered(110)
    assert heartbeat.due == 125


def test_what_comes_before_the_answer_gives_it_time_once() -> None:
    heartbeat = Heartbeat(25, 20, now=100)
    heartbeat.heard(110)
    assert heartbeat.due == 125
    heartbeat.beat(125, deaf=False)
    heartbeat.heard(140)
    assert heartbeat.due == 160
    heartbeat.heard(150)
    assert heartbeat.due == 160
    with pytest.raises(TimeoutError):
        heartbeat.beat(160, deaf=False)


def test_who_does_not_listen_can_not_say_that_nobody_answered() -> None:
    heartbeat = Heartbeat(25, 20, now=100)
    heartbeat.beat(125, deaf=False)
    assert heartbeat.beat(145, deaf=True).payload == "2"
    assert heartbeat.due == 165
