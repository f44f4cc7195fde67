"""`qmix doctor`: what this machine has and what is wrong with it (report.py, its GPU in gpu.py), and the measurement of
configurations of the GPU's kernels (tuning.py)."""

from qmix.commands.doctor.report import run
from qmix.commands.doctor.tuning import tune

__all__ = ["run", "tune"]
