import sys

from asgi_ws.tables import Table


def test_table_gives_memory_back() -> None:
    table: Table[int, str] = Table()
    empty = sys.getsizeof(table)
    for round_ in range(3):
        for number in range(10_000):
            table[number] = str(number)
        full = sys.getsizeof(table)
        for number in range(9_990):
            del table[number]
        assert sys.getsizeof(table) < full / 8, round_
        assert list(table.items()) == [(number, str(number)) for number in range(9_990, 10_000)]
    table.clear()
    table[0] = ""
    del table[0]
    assert sys.getsizeof(table) < empty + 20_000


def test_small_table_is_left_as_it_is() -> None:
    table: Table[int, None] = Table()
    for number in range(1000):
        table[number] = None
    full = sys.getsizeof(table)
    for number in range(1000):
        del table[number]
    assert sys.getsizeof(table) == full
