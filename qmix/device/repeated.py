"""Work that is given to the device again and again."""

from __future__ import annotations

from qmix.device.device import Device, Work


class Repeated:
    """The second launch captures it: by then it has run once, and will likely run often."""

    def __init__(self, device: Device, work: Work):
        self._device = device
        self._work = work
        self._captured: Work | None = None
        self._ran = False

    def launch(self) -> None:
        if self._captured is None and self._ran:
            self._captured = self._device.capture(self._work)
        if self._captured is not None:
            self._captured()
        else:
            self._device.compute.run(self._work)
            self._ran = True
