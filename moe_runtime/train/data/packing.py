"""Which samples share a row: whole ones, of at most `max_length` tokens together."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from .samples import Sample

# Samples that are packed together; more of them fill rows hardly better, and take longer.
WINDOW = 4096
# Rows that a stream keeps open to fill.
OPEN_ROWS = 64

Numbered = tuple[int, Sample]


def pack_best_fit(lengths: Sequence[int], max_length: int, seed: int) -> list[list[int]]:
    """Rows as places in `lengths`: best-fit decreasing in windows of an order drawn from `seed`.

    A sample goes, longest first, into the row that it leaves least room in.
    """
    order = np.random.default_rng(seed).permutation(len(lengths)).tolist()
    rows: list[list[int]] = []
    for start in range(0, len(order), WINDOW):
        rooms: list[tuple[int, int]] = []  # of this window's rows, least first, with the row's place
        for place in sorted(order[start : start + WINDOW], key=lambda place: -lengths[place]):
            found = bisect_left(rooms, (lengths[place], -1))
            if found == len(rooms):
                room, row = max_length, len(rows)
                rows.append([])
            else:
                room, row = rooms.pop(found)
            rows[row].append(place)
            insort(rooms, (room - lengths[place], row))
    return rows


class OpenRows:
    """Rows that a stream of samples fills, each sample at once."""

    def __init__(self, max_length: int) -> None:
        self._max_length = max_length
        self._rows: list[tuple[int, list[Numbered]]] = []  # room and samples

    def add(self, numbered: Numbered) -> list[Numbered] | None:
        """Put a sample into the row that it leaves least room in; the oldest row, if it had to be closed."""
        length = len(numbered[1].ids_L)
        fitting = [(room, place) for place, (room, _) in enumerate(self._rows) if room >= length]
        if fitting:
            room, place = min(fitting)
            row = self._rows[place][1]
            row.append(numbered)
            self._rows[place] = (room - length, row)
            return None
        closed = None
        if len(self._rows) == OPEN_ROWS:
            # not the fullest: one that hardly anything fits would never be closed
            closed = self._rows.pop(0)[1]
        self._rows.append((self._max_length - length, [numbered]))
        return closed
