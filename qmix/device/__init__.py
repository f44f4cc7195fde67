"""A device computes and holds the fast tier: a GPU, or the CPU in its place.

`device.py` says what a device is. `cuda.py` is an NVIDIA card through torch. `standin.py` is the CPU, with threads for
streams, so that everything that orders work on a device runs, and is tested, on any machine.
"""

from qmix.device.device import Device, Event, Stream
from qmix.device.repeated import Repeated
from qmix.device.routed import Routed
from qmix.device.standin import StandIn

__all__ = ["Device", "Event", "Repeated", "Routed", "StandIn", "Stream"]
