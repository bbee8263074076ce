"""When a host is left alone, by a clock of our own."""

from __future__ import annotations

from tasks.download.politeness import HostGate


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_host_rests_after_so_many_refusals_in_a_row() -> None:
    clock = Clock()
    gate = HostGate(connections=4, rest_after=3, max_rest_s=600, clock=clock)
    for _ in range(2):
        gate.note_answer("a.example", busy=True, retry_after_s=30)
    gate.note_answer("a.example", busy=False, retry_after_s=0)
    for _ in range(2):
        gate.note_answer("a.example", busy=True, retry_after_s=30)
    assert not gate.is_resting("a.example")
    gate.note_answer("a.example", busy=True, retry_after_s=30)
    assert gate.is_resting("a.example")
    assert not gate.is_resting("b.example")
    clock.now = 29.9
    assert gate.is_resting("a.example")
    clock.now = 30.1
    assert not gate.is_resting("a.example")


def test_rests_double_where_the_host_does_not_say_and_have_a_limit() -> None:
    clock = Clock()
    gate = HostGate(connections=4, rest_after=1, max_rest_s=10, clock=clock)
    lengths = []
    for _ in range(6):
        gate.note_answer("a.example", busy=True, retry_after_s=0)
        length = 0
        while gate.is_resting("a.example"):
            clock.now += 1
            length += 1
        lengths.append(length)
    assert lengths == [1, 2, 4, 8, 10, 10]


def test_a_host_cannot_ask_for_more_than_the_limit() -> None:
    clock = Clock()
    gate = HostGate(connections=4, rest_after=1, max_rest_s=10, clock=clock)
    gate.note_answer("a.example", busy=True, retry_after_s=1e9)
    clock.now = 10.0
    assert not gate.is_resting("a.example")
