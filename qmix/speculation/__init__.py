"""Speculative decoding without a second model: the continuation of an earlier occurrence of the same words is tried,
several tokens a pass.

lookup.py finds drafts, pace.py decides whether they pay, passes.py runs them. No torch except in types.
"""

from qmix.speculation.lookup import Draft, Lookup
from qmix.speculation.pace import LONGEST, Pace
from qmix.speculation.passes import Passes, Session

__all__ = ["LONGEST", "Draft", "Lookup", "Pace", "Passes", "Session"]
