"""Compile what would be launched on a GPU that is not here: the code under test runs as it is, over tensors without
memory, and each Triton kernel that it launches is compiled to machine code with Triton's run-time specialization.
Nothing runs on any device, nothing is computed.

    with recording((8, 6)) as launches:
        ops.linear(...)                 # torch's operations only work out shapes
    launches[0].registers, launches[0].shared

A stand-in driver names the card to Triton. Tensors are torch's fake ones on the CPU; their addresses are made up, each
memory's on an ALIGNED boundary as a GPU's allocator gives it; what asks for a device's capability is told the card's.
Start Python without TRITON_INTERPRET.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from qmix.kernels import cuda, cuda_grouped, cuda_ops, cuda_prompt  # noqa: F401 (those that ask for the card must be there)

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ALIGNED = 512  # bytes
# Bytes of shared memory that a program may have (CUDA C++ Programming Guide, technical specifications by compute
# capability).
SHARED = {(7, 5): 64, (8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (12, 0): 99}
SHARED = {card: kib * 1024 for card, kib in SHARED.items()}


@dataclass(frozen=True)
class Launch:
    """A kernel as it was compiled for one launch or several.

    grid: of the first; constants: its tl.constexpr arguments; registers: of a thread; spills: bytes of registers that a
    thread stores to memory for want of more; labels: what was going on, and how often it was launched then.
    """

    kernel: str
    module: str
    grid: tuple[int, ...]
    constants: dict[str, Any]
    compiled: Any
    registers: int
    spills: int
    labels: dict[str, int]

    @property
    def shared(self) -> int:
        """Bytes of shared memory that a program takes."""
        return self.compiled.metadata.shared

    @property
    def warps(self) -> int:
        return self.compiled.metadata.num_warps

    @property
    def kinds(self) -> dict[str, str]:
        """Types of the arguments that are not constants, e.g. "*bf16" for pointers."""
        return {name: kind for name, kind in self.compiled.src.signature.items() if kind != "constexpr"}

    @property
    def accumulators(self) -> str:
        """How what the first loop carries is laid out over threads; "" without a loop."""
        text = self.compiled.asm["ttgir"]
        carried = re.search(r"scf\.for .*? -> \((.*?)\)  *:", text)
        names = set(re.findall(r"#\w+", carried[1])) if carried else set()
        return "; ".join(sorted(re.search(rf"^{name} = (.*)$", text, re.M)[1] for name in names))

    @property
    def wgmma(self) -> int:
        return self.compiled.asm["ptx"].count("wgmma.mma_async")

    @property
    def mma(self) -> int:
        return self.compiled.asm["ptx"].count("mma.sync")

    @cached_property
    def machine_code(self) -> list[tuple[int, str]]:
        """(address, instruction) as the disassembler writes them, e.g. (0x460, "LDG.E R8, [R4.64+0x40]")."""
        with NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.compiled.asm["cubin"])
            file.flush()
            text = subprocess.run([TOOLS / "cuobjdump", "-sass", file.name], capture_output=True, text=True, check=True)
        return [(int(address, 16), instruction.strip()) for address, instruction in
                re.findall(r"/\*([0-9a-f]{4,})\*/ +([^;/]+?) *;", text.stdout)]

    @cached_property
    def loop(self) -> Counter[str]:
        """The instructions of the loop with the most of them, by name; of none where the kernel has no loop."""
        loops = [Counter()]
        for address, instruction in self.machine_code:
            jump = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", instruction)
            if jump and int(jump[1], 16) < address:
                body = [text for at, text in self.machine_code if int(jump[1], 16) <= at <= address]
                loops.append(Counter(re.sub(r"^@!?U?P\w+ +", "", text).split()[0].split(".")[0] for text in body))
        return max(loops, key=lambda loop: loop.total())

    @property
    def per_weight(self) -> float | None:
        """Of a GEMV: instructions of its loop, a weight. Each weight meets each of M tokens in one FFMA."""
        if self.kernel != "gemv":
            return None
        return self.loop.total() * self.constants["M"] / self.loop["FFMA"]


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr() + tensor.storage_offset() * tensor.itemsize


class _Driver:
    """What Triton asks a driver before it launches. Each card is a device of its own, since compiled kernels are kept
    by device."""

    def __init__(self, card: tuple[int, int]):
        self._number = 10 * card[0] + card[1]

    def get_current_device(self) -> int:
        return self._number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._number, 32)


class Launches(list[Launch]):
    """In the order of first use. label: what is going on, noted with each."""

    label = ""

    def note(self, function: jit.JITFunction, kernel: Any, grid: tuple[int, ...], given: dict[str, Any],
             log: str) -> None:
        """A launch of `kernel`; log: what the assembler said of it where it has just been compiled."""
        for known in self:
            if known.compiled is kernel:
                known.labels[self.label] = known.labels.get(self.label, 0) + 1
                return
        registers, spills = re.search(r"Used (\d+) registers", log), re.search(r"(\d+) bytes spill stores", log)
        if registers is None or spills is None:
            raise RuntimeError(f"{function.__name__}: the assembler does not say what it used: {log!r:.200}")
        constants = {p.name: given[p.name] for p in function.params if p.is_constexpr and p.name in given}
        self.append(Launch(function.__name__, function.__module__.split(".")[-1], grid, constants, kernel,
                           int(registers[1]), int(spills[1]), {self.label: 1}))


@contextmanager
def recording(card: tuple[int, int]) -> Iterator[Launches]:
    """While it lasts, kernels are compiled for `card` and listed, and tensors are made without memory. Not for several
    threads, and for one card after another only where each is recorded once."""
    if not isinstance(cuda.device_code("cuda_jit").gemv, jit.JITFunction):
        raise RuntimeError("TRITON_INTERPRET is set: kernels would be interpreted, not compiled")
    found, launch = Launches(), jit.JITFunction.run

    def run(self: jit.JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> Any:
        log = io.StringIO()
        with redirect_stdout(log):
            kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        found.note(self, kernel, grid, dict(zip(self.arg_names, args, strict=False)) | kwargs, log.getvalue())
        return kernel

    driver.set_active(_Driver(card))
    with ExitStack() as stack:
        # Modules have names of their own for what they import; all are told.
        for module in [m for name, m in sys.modules.items() if name.startswith("qmix.") and hasattr(m, "capability")]:
            stack.enter_context(patch.object(module, "capability", lambda device: card))
        stack.enter_context(patch.object(cuda, "interpreted", lambda jit: True))  # tensors of the CPU are accepted
        stack.enter_context(patch.object(jit.JITFunction, "run", run))
        cache = stack.enter_context(TemporaryDirectory())
        stack.enter_context(patch.dict(os.environ, TRITON_CACHE_DIR=cache, TRITON_DUMP_PTXAS_LOG="1"))
        stack.enter_context(patch.object(torch.UntypedStorage, "data_ptr", lambda storage: storage._cdata * ALIGNED))
        stack.enter_context(patch.object(FakeTensor, "data_ptr", _address))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield found
