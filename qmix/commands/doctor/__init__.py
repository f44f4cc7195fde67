"""`qmix doctor`: command.py has the flags. report.py says what this machine has and what is wrong with it, its GPU in
gpu.py and the speed of its kernels in speeds.py. tuning.py measures configurations of the GPU's kernels."""
