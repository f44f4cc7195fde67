"""Speculative decoding without a second model: what followed the same words earlier is tried, several tokens a pass.

lookup.py finds drafts, pace.py decides whether they pay, passes.py runs them. No torch but in types.
"""

from qmix.speculation.lookup import Draft, Lookup
from qmix.speculation.pace import LONGEST, Pace
from qmix.speculation.passes import Passes, Session

__all__ = ["LONGEST", "Draft", "Lookup", "Pace", "Passes", "Session"]
