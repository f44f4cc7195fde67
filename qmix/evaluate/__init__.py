"""`qmix eval`: how good a store is, as perplexity on a text and as distance from a reference store.

windows.py cuts the text, score.py judges logits, tally.py adds up, journal.py keeps what is finished, memory.py
shares a budget between two models, suite.py joins them, report.py is for people. tasks.py, imported only for
`--tasks`, lets the lm-eval harness drive a model.
"""

from qmix.evaluate.report import lines
from qmix.evaluate.suite import Request, about, run

__all__ = ["Request", "about", "lines", "run"]
