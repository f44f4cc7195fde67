"""The engine: the one place where a store, a placement plan, the model and the experts meet.

load(folder) -> Engine; Engine.session() -> Session with a KV cache of its own; Engine.step advances sessions together.
One pass runs at a time (a lock), on the caller's thread.
"""

from qmix.engine.budgets import budget, needs_of
from qmix.engine.engine import Engine
from qmix.engine.kernels import select_kernels
from qmix.engine.loading import load
from qmix.engine.machine import Placement
from qmix.engine.session import Session

__all__ = ["Engine", "Placement", "Session", "budget", "load", "needs_of", "select_kernels"]
