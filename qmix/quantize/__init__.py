"""From a checkpoint to a store.

methods (and hqq) choose the codes. gptq chooses them by the inputs of a matrix, which calibration measures (calibrated
joins the two). pipeline streams the experts through them. job makes a whole store of it, with journal (what is
finished), target (the folder it is written to) and report (the result).
"""

from qmix.quantize.calibration import TOKENS, Calibration
from qmix.quantize.job import quantize_checkpoint
from qmix.quantize.report import Report

__all__ = ["TOKENS", "Calibration", "Report", "quantize_checkpoint"]
