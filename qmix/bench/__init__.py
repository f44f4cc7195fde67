"""`qmix bench`: how fast a store runs, in the manner of llama-bench, and what keeps it from running faster.

cases.py says what is timed, text.py of which text, work.py what that must move and compute at least, roofline.py
how fast this machine could, device.py what a GPU has of its own, measure.py times it, report.py makes rows of it,
suite.py joins them.
"""

from qmix.bench.cases import Case, make_cases, numbers
from qmix.bench.report import cells
from qmix.bench.suite import Request, run
from qmix.bench.text import recorded_text

__all__ = ["Case", "Request", "cells", "make_cases", "numbers", "recorded_text", "run"]
