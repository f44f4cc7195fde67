"""What this machine has: memory that may be used, cores, and how fast bytes move.

memory.py and cores.py answer at once and are re-exported here. disk.py and bandwidth.py measure, which takes seconds,
so they are imported only by the code that measures. `hardware.memory` is the function of that name.
"""

from qmix.hardware.address_space import address_space_left
from qmix.hardware.cores import check_threads, compute_cores, physical_cores
from qmix.hardware.memory import Memory, cgroup_limits, is_wsl, memory, peak_bytes, resident_bytes

__all__ = ["Memory", "address_space_left", "cgroup_limits", "check_threads", "compute_cores", "is_wsl", "memory",
           "peak_bytes", "physical_cores", "resident_bytes"]
