"""The CPU's share of a layer on a device: experts that are not there are computed where their records are, in host
memory, and their rows sent up.

However many experts a layer lacks, the native kernels get them in one call for each half, and their rows go up by one
copy and one launch. Where records are small, what Python does for each of them takes longer than its product: 0.3 ms of
an H200's host, for 0.05 ms of reading 2.7 MB.

T tokens, K experts per token, H hidden, F expert inner.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qmix.device import Device, Repeated, Routed
from qmix.formats import Packed
from qmix.kernels.native import NativeProducts
from qmix.kernels.table import KernelTable
from qmix.offload.one_token import OneToken
from qmix.offload.products import run_together


class Upload:
    """What the CPU has made for one Routed: rows fp32 [T, K, H] in host memory, and computed bool [T, K], which of
    them;
    both in one piece, as they are on the device. send: brings them there."""

    def __init__(self, device: Device, routed: Routed):
        shape = routed.rows.shape
        nbytes, outputs = 4 * shape.numel(), shape[0] * shape[1]
        host = device.host(nbytes + outputs, dtype=torch.uint8)
        self.rows, flags = _parts(host, nbytes, shape)
        self.computed = flags.numpy()  # a few elements, which numpy sets in a tenth of the time
        self.computed[:] = False
        on_device = torch.zeros(nbytes + outputs, dtype=torch.uint8, device=device.torch_device)
        rows, computed = _parts(on_device, nbytes, shape)
        computed, target = computed.unsqueeze(2), routed.rows

        def send() -> None:
            on_device.copy_(host, non_blocking=True)
            torch.where(computed, rows, target, out=target)

        self.send = Repeated(device, send)
        self.one: OneToken | None = None


class HostRows:
    """kernels: the CPU's; views: (w13, w2) of each slot in host memory."""

    def __init__(self, device: Device, kernels: KernelTable, views: Sequence[tuple[Packed, Packed]], top_k: int):
        self._device = device
        self._kernels = kernels
        self._views = views
        self._top_k = top_k
        kinds = {(w13.spec, w2.spec): (w13, w2) for w13, w2 in views}.values()
        natively = all(kernels.computes_natively(w) for pair in kinds for w in pair)
        self._native: NativeProducts | None = kernels.native if natively else None
        self._uploads: dict[Routed, Upload] = {}
        self._fresh = True  # nothing has been made yet since `begin`

    @property
    def joins(self) -> bool:
        """Whether several experts are one call."""
        return self._native is not None

    def begin(self) -> None:
        """A layer's choice is on the host, and so the device has used what it was sent of the layer before."""
        self._fresh = True

    def compute(self, routed: Routed, chosen: Sequence[tuple[int, int]]) -> None:
        """Make the rows of some (expert, its slot in host memory), and have them sent up, again with those that were
        made before since `begin`: these may still be on their way."""
        upload = self._uploads.get(routed)
        if upload is None:
            upload = self._uploads[routed] = Upload(self._device, routed)
        if self._fresh:
            upload.computed[:] = False
            self._fresh = False
        if self._native is None:
            for expert, slot in chosen:
                tokens, ranks = (routed.host_ids == expert).nonzero(as_tuple=True)
                upload.rows[tokens, ranks] = self._kernels.expert(routed.host_x[tokens], *self._views[slot]).float()
        elif routed.tokens == 1:
            self._one_token(self._native, routed, upload, chosen)
        else:
            self._few_tokens(self._native, routed, upload, chosen)
        ids = routed.host_ids.numpy()
        for expert, _ in chosen:
            upload.computed |= ids == expert
        upload.send.launch()

    def _one_token(self, native: NativeProducts, routed: Routed, upload: Upload,
                   chosen: Sequence[tuple[int, int]]) -> None:
        if upload.one is None:
            upload.one = OneToken(native, self._views, self._top_k, upload.rows)
        ranks = {expert: rank for rank, expert in enumerate(routed.host_ids[0].tolist())}
        pairs = [(slot, ranks[expert]) for expert, slot in chosen]
        upload.one.gate_up(routed.host_x, pairs)
        upload.one.down(pairs)

    def _few_tokens(self, native: NativeProducts, routed: Routed, upload: Upload,
                    chosen: Sequence[tuple[int, int]]) -> None:
        some = []
        for expert, slot in chosen:
            tokens, ranks = (routed.host_ids == expert).nonzero(as_tuple=True)
            some.append((self._views[slot], tokens, tokens * self._top_k + ranks))
        run_together(native, routed.host_x, some, upload.rows)


def _parts(whole: Tensor, count: int, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """uint8 -> fp32 [T, K, H], bool [T, K]."""
    return whole[:count].view(torch.float32).view(shape), whole[count:].view(torch.bool).view(shape[:2])
