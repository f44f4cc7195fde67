"""`qmix eval`: how good a store is, as perplexity on a text and as distance from a reference store.

windows.py cuts the text, score.py judges logits, tally.py adds up, journal.py keeps the finished windows, memory.py
divides a budget between two models, suite.py joins them, report.py prints for people. tasks.py lets the lm-eval harness
drive a model, and is imported only for `--tasks`.
"""

from qmix.evaluate.report import lines
from qmix.evaluate.suite import Request, about, run

__all__ = ["Request", "about", "lines", "run"]
