"""Decides between GPU and CPU, and plans.

With --device auto, if something keeps the GPU from being used, qmix says what it is and the CPU computes. If the user
names the GPU, or a budget of its memory, it is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from qmix.device import Device
from qmix.engine import vram
from qmix.engine.budgets import needs_without_head
from qmix.engine.kernels import stored_formats
from qmix.engine.machine import Placement
from qmix.errors import QmixError, UsageError
from qmix.forward.lower_device import not_on_device
from qmix.forward.weights import compute_dtype
from qmix.kernels import tuned
from qmix.kernels.device_table import DeviceKernels, choose_device_kernels
from qmix.kernels.table import KernelTable
from qmix.offload.device_needs import scratch_of
from qmix.offload.head import plan_with_head
from qmix.offload.needs import Needs
from qmix.offload.plan import UNMEASURED, Plan
from qmix.offload.plan import plan as make_plan
from qmix.store import Store


def choose_device_and_plan(store: Store, needs: Needs, placement: Placement | None,
                           on_cpu: Callable[[bool], KernelTable], ram: Callable[[], tuple[int, int]],
                           say: Callable[[str], None], opened: ExitStack
                           ) -> tuple[Plan, Device | None, DeviceKernels | None, KernelTable]:
    """on_cpu: makes the CPU's kernels, for it alone or (True) to compute beside a device; ram: as of engine.budget,
    asked when the device's driver has taken what it takes of the process. The plan; the device, closed with `opened`,
    and what computes there, None for the CPU; and the CPU's kernels. Errors as of engine.load."""
    device = None if placement is None else placement.open(store.layout.record_bytes, say)
    if device is not None and placement is not None and (lacking := not_on_device(store.model)):
        device.close()
        if placement.device != "auto" or placement.vram is not None:
            raise UsageError(f"{store.path}: {lacking}", "drop --device and --vram: the CPU computes it")
        say(f"not on {device.name}: {lacking}; the CPU computes")
        device = None
    if device is None or placement is None:
        host = on_cpu(False)
        return _plan_host(store, needs, ram, say), None, None, host
    try:
        host = on_cpu(not placement.exact)
        kernels = _kernels(store, device, host, needs.context, placement, say)
        trunk = needs_without_head(store, needs).with_kernels(store.model.trunk, store.quant, kernels.configs.gemv)
        measured = vram.known(placement, device, say)
        found = make_plan(trunk, *ram(), *placement.vram_budget(device), placement.pin_budget(),
                          measured.beside if measured else UNMEASURED if device.torch_device.type == "cuda" else None)
    except QmixError as e:
        device.close()
        if placement.device != "auto" or placement.vram is not None:
            raise
        say(f"not on {device.name}: {e.message}; the CPU computes")
        host = on_cpu(False)
        return _plan_host(store, needs, ram, say), None, None, host
    except BaseException:
        device.close()
        raise
    opened.callback(device.close)
    if store.model.mtp_head is not None:  # kept until here: the CPU, had it come to that, computes it
        say(f"the multi-token-prediction head is left out: {device.name} does not compute it yet")
        store.leave_out_mtp_head()
    return found, device, kernels, host


def _plan_host(store: Store, needs: Needs, ram: Callable[[], tuple[int, int]], say: Callable[[str], None]) -> Plan:
    """For the CPU alone; without the multi-token-prediction head where plan_with_head says so."""
    if store.model.mtp_head is None:
        return make_plan(needs, *ram())
    found, left_out = plan_with_head(needs, needs_without_head(store, needs), *ram())
    if left_out:
        say(left_out)
        store.leave_out_mtp_head()
    return found


def _kernels(store: Store, device: Device, host: KernelTable, context: int, placement: Placement,
             say: Callable[[str], None]) -> DeviceKernels:
    """Cut as was measured on this card, unless the bits are to depend on no measurement."""
    model = store.model.trunk
    dtype = compute_dtype(model, store.quant, device.half)
    choose = partial(choose_device_kernels, device.torch_device, dtype, *stored_formats(model, store.quant), host,
                     device.triton, scratch_of=partial(scratch_of, model, store.quant, context))
    file = placement.tuned
    if placement.exact or file is None or not device.triton:
        return choose()
    measured = tuned.load(file, tuned.Card.of(device.name, device.torch_device), say)
    if measured is None:
        return choose()
    say(f"the GPU's kernels use the configurations measured on {measured.measured} for {measured.model}: {file}")
    try:
        return choose(configs=measured.configs)
    except UsageError:
        raise
    except Exception as e:  # wrong, or Triton's: it does not compile, or asks for too much
        say(f"the measured configurations fail now ({str(e).splitlines()[0] if str(e) else type(e).__name__}): the "
            "built-in ones are used; run `qmix doctor --tune` again")
        return choose()
