"""From a checkpoint to a store.

methods (and hqq) choose the codes. gptq chooses them by the inputs of a matrix (inputs), which forward_pass measures:
the model's program on a text (calibration), in fp32, with weights straight from the checkpoint (layer_weights).
calibrated joins gptq and inputs; guide joins the forward pass and the stream; budget says how much memory that takes.
fit chooses a mix of formats by what sensitivity measures. pipeline streams the weights through all this. job
makes a whole store of it, with journal (what is finished), target (the folder it is written to) and report (the
result).
"""

from qmix.quantize.calibration import TOKENS, Calibration
from qmix.quantize.job import quantize_checkpoint
from qmix.quantize.report import Report

__all__ = ["TOKENS", "Calibration", "Report", "quantize_checkpoint"]
