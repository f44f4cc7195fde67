"""Work that is given to the device many times, and captured at its second launch."""

from __future__ import annotations

from qmix.device.device import Device, Work


class Repeated:
    """The second launch captures it: by then it has run once, and will likely run often. warm: whether it has been
    captured, so that a launch takes no longer than it must."""

    def __init__(self, device: Device, work: Work):
        self._device = device
        self._work = work
        self._captured: Work | None = None
        self._ran = False

    @property
    def warm(self) -> bool:
        return self._captured is not None

    def launch(self) -> None:
        if self._captured is None and self._ran:
            self._captured = self._device.capture(self._work)
        if self._captured is not None:
            self._captured()
        else:
            self._device.compute.run(self._work)
            self._ran = True
