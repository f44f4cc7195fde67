"""Speculative decoding without a second model: the continuation of an earlier occurrence of the same words is tried,
several tokens a pass. Or what the model's own multi-token-prediction head guesses.

lookup.py finds drafts, pace.py decides whether they pay, mtp.py whether those of the head do, passes.py runs them. No
torch except in types.
"""

from qmix.speculation.lookup import Draft, Lookup
from qmix.speculation.mtp import MtpPace
from qmix.speculation.pace import LONGEST, Pace
from qmix.speculation.passes import Passes, Session

__all__ = ["LONGEST", "Draft", "Lookup", "MtpPace", "Pace", "Passes", "Session"]
