"""From a checkpoint to a store.

methods (and hqq) choose the codes; or gptq, by what calibration finds that a matrix is given (calibrated joins the
two). pipeline streams the experts through them; job makes a whole store of it, with journal (what is finished),
target (where it goes) and report (what came out).
"""

from qmix.quantize.calibration import TOKENS, Calibration
from qmix.quantize.job import quantize_checkpoint
from qmix.quantize.report import Report

__all__ = ["TOKENS", "Calibration", "Report", "quantize_checkpoint"]
