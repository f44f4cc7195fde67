"""Limits torch to one thread while a pool of threads does the work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """No threads of torch's own meanwhile: the pool has the work, and on a busy machine the two would
    only wait for each other. Sums then do not depend on a number of threads either."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
