"""Memory that is free goes back to the system."""

from __future__ import annotations

import ctypes
import gc
import sys
import weakref
from dataclasses import dataclass
from typing import Any

import pytest

from mskip.compressor.heap import give_back

PIECE, COUNT = 64_000, 2_000
"""Bytes that the C library takes from its heap, and how many of them: 128 MB."""


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "malloc_trim"),
    reason="GNU's C library only",
)
def test_holes_between_what_stays_go_back() -> None:
    before = resident()
    pieces, between = [], []
    for number in range(COUNT):
        pieces.append(bytearray(PIECE))
        between.append(bytearray(600 + number % 7))  # too large for Python's own pools
    held = resident() - before
    assert held > 0.9 * PIECE * COUNT
    pieces.clear()
    assert resident() - before > 0.9 * held  # they are free, and still resident
    give_back()
    assert resident() - before < 0.2 * held
    assert len(between) == COUNT


def test_cycles_are_freed_first() -> None:
    @dataclass
    class Holder:
        me: Any = None

    gc.collect()
    gc.disable()
    try:
        holder = Holder()
        holder.me = holder
        held = weakref.ref(holder)
        del holder
        assert held() is not None
        give_back()
        assert held() is None
    finally:
        gc.enable()


def test_where_the_c_library_has_no_such_thing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    give_back()
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(ctypes, "CDLL", None)
    give_back()
