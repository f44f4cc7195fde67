"""Requests that wait for the engine: bounded, and served in turns between clients, so that one which sends many at once
does not keep the others waiting."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Full(Exception):
    """There are as many waiting as there may be."""


class Empty(Exception):
    """Nothing came in the given time."""


class FairQueue(Generic[Item]):
    """Any thread may call any method. limit: how many may wait, all clients together."""

    def __init__(self, limit: int):
        self._limit = limit
        self._waiting: OrderedDict[str, deque[Item]] = OrderedDict()  # of each client; whose turn is next comes first
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        with self._changed:
            return self._count()

    def put(self, client: str, item: Item) -> None:
        """Wait behind this client's earlier items. Full where there is no room or the queue is closed."""
        with self._changed:
            if self._closed or self._count() >= self._limit:
                raise Full
            self._waiting.setdefault(client, deque()).append(item)
            self._changed.notify()

    def get(self, timeout: float | None = None) -> Item | None:
        """The next one, when there is one; None as soon as the queue is closed and empty. Empty after `timeout`
        seconds without either."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._waiting or self._closed, timeout):
                raise Empty
            if not self._waiting:
                return None
            client, items = self._waiting.popitem(last=False)
            item = items.popleft()
            if items:
                self._waiting[client] = items
            return item

    def drop(self, item: Item) -> bool:
        """Take out an item that need not wait any longer; whether it was there."""
        with self._changed:
            for client, items in self._waiting.items():
                if item in items:
                    items.remove(item)
                    if not items:
                        del self._waiting[client]
                    return True
            return False

    def close(self) -> list[Item]:
        """Nothing more comes; what was waiting."""
        with self._changed:
            self._closed = True
            left = [item for items in self._waiting.values() for item in items]
            self._waiting.clear()
            self._changed.notify_all()
            return left

    def _count(self) -> int:
        return sum(map(len, self._waiting.values()))
