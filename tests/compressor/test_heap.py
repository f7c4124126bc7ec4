"""Memory that is free goes back to the system."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import weakref
from dataclasses import dataclass
from typing import Any

import pytest

from mskip.compressor.heap import give_back

FILL_FREE_AND_GIVE_BACK = """
from mskip.compressor.heap import give_back

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

before = resident()
pieces, between = [], []
for number in range(2_000):
    pieces.append(bytearray(64_000))  # from the heap: 128 MB in all
    between.append(bytearray(600 + number % 7))  # too large for Python's own pools
print(resident() - before)
pieces.clear()
print(resident() - before)
give_back()
print(resident() - before)
assert len(between) == 2_000
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "malloc_trim"),
    reason="GNU's C library only",
)
def test_holes_between_what_stays_go_back() -> None:
    # In a process of its own: here the heap has room already, from the tests before.
    printed = subprocess.run(
        [sys.executable, "-c", FILL_FREE_AND_GIVE_BACK], check=True, capture_output=True, text=True
    )
    held, freed, given_back = map(int, printed.stdout.split())
    assert held > 0.9 * 128_000_000
    assert freed > 0.9 * held  # the pieces are free, and still resident
    assert given_back < 0.2 * held


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
