"""`qmix bench`: how fast a store runs, in the manner of llama-bench, and what limits its speed.

cases.py says what is timed, text.py on which text, and work.py how much that must move and compute at least.
roofline.py measures how fast this machine could go, and device.py the same for a GPU. measure.py times the cases,
report.py makes rows of the results, suite.py joins them.
"""

from qmix.bench.cases import Case, make_cases, numbers
from qmix.bench.report import cells
from qmix.bench.suite import Request, run
from qmix.bench.text import recorded_text

__all__ = ["Case", "Request", "cells", "make_cases", "numbers", "recorded_text", "run"]
