"""An NVIDIA card, through torch.

The stream that computes is torch's current one, in which prompts run too. Copies have streams of their own, which the
threads that copy make current for themselves. Work has run once before it is captured, so Triton has compiled its
kernels and scratch memory is there.
"""

from __future__ import annotations

import gc
from contextlib import AbstractContextManager, suppress

import torch
from torch import Tensor

from qmix.device.device import Event, Stream, Work
from qmix.errors import DoesNotFit, QmixError, UsageError

ARENA = 32 * 2**20  # bytes of page-locked memory for what decoding sends to and fro
CONTEXT = 600 * 2**20  # bytes that a context takes with torch's and Triton's code, at most
OLDEST = (7, 5)  # compute capability; older cards lack what the kernels use


class _Stream:
    """A CUDA stream."""

    def __init__(self, device: Cuda, stream: torch.cuda.Stream | None):
        self._device = device
        self._stream = stream  # None: whatever is current

    def run(self, work: Work) -> None:
        if self._stream is None:
            self._device.launches += 1
            work()
        else:
            with torch.cuda.stream(self._stream):
                work()

    def after(self, event: Event) -> None:
        assert isinstance(event, _Event)
        self._current().wait_event(event.event)

    def record(self) -> Event:
        # Threads that copy sleep until a chunk has landed; the one that computes spins, for microseconds count there.
        event = _Event(torch.cuda.Event(blocking=self._stream is not None))
        event.event.record(self._current())
        return event

    def _current(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device.place) if self._stream is None else self._stream


class _Event:
    def __init__(self, event: torch.cuda.Event):
        self.event = event

    def done(self) -> bool:
        return bool(self.event.query())

    def wait(self) -> None:
        try:
            self.event.synchronize()
        except RuntimeError as e:  # torch.AcceleratorError is one
            raise QmixError(f"the GPU failed: {str(e).splitlines()[0]}", "restart qmix; if it happens again, look at "
                            "dmesg and the card's temperature and power") from None


class Cuda:
    """See device.Device. Make it through `open_cuda`, which says what is wrong where there is none."""

    def __init__(self, index: int):
        self.place = torch.device("cuda", index)
        about = torch.cuda.get_device_properties(self.place)
        self.name = about.name
        self.capability = (about.major, about.minor)
        self.half = torch.bfloat16 if self.capability >= (8, 0) else torch.float16
        self.triton = True
        # What a context takes shows only to who looks before and after, and looking makes one: so it is an upper
        # bound where other programs use the card too, but never more than CONTEXT.
        free, total = torch.cuda.mem_get_info(self.place)
        self._context = min(total - free, CONTEXT)
        self._arena = torch.zeros(ARENA, dtype=torch.uint8, pin_memory=True)
        self._arena_used = 0
        self.trouble = ""
        self.launches = 0
        self.waits = 0
        self.compute: Stream = _Stream(self, None)
        self._capturing = torch.cuda.Stream(self.place)

    def stream(self) -> _Stream:
        return _Stream(self, torch.cuda.Stream(self.place))

    def capture(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        # Not through torch.cuda.graph, which stops the whole card and collects garbage for each of some 64 graphs.
        with torch.cuda.stream(self._capturing):
            try:
                graph.capture_begin(capture_error_mode="thread_local")  # the threads that copy go on meanwhile
                work()
                graph.capture_end()
            except RuntimeError as e:
                with suppress(RuntimeError):  # it must end in any case, and complains of what the work did
                    graph.capture_end()
                self.trouble = f"no CUDA graphs here ({str(e).splitlines()[0]}): every kernel is launched by itself"
                return lambda: self.compute.run(work)

        def launch() -> None:
            self.launches += 1
            graph.replay()

        return launch

    def host(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Out of one piece that was page-locked first of all: WSL may refuse more once the experts' slots are."""
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        start, self._arena_used = self._arena_used, self._arena_used + (nbytes + 255) // 256 * 256
        if self._arena_used > len(self._arena):
            return torch.zeros(shape, dtype=dtype, pin_memory=True)
        return self._arena[start:start + nbytes].view(dtype).view(shape)

    def settle(self) -> None:
        pass  # they go to the same stream

    def wait(self, event: Event) -> None:
        self.waits += 1
        event.wait()

    def memory(self) -> tuple[int, int]:
        free, total = torch.cuda.mem_get_info(self.place)
        return int(free), int(total)

    def limit(self, nbytes: int) -> None:
        # torch counts what it has reserved already.
        held = torch.cuda.memory_reserved(self.place)
        torch.cuda.set_per_process_memory_fraction(min(1.0, (nbytes + held) / self.memory()[1]), self.place)

    def taken(self) -> int:
        return self._context + torch.cuda.memory_reserved(self.place)

    def entered(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self.place)

    def tidy(self) -> None:
        torch.cuda.empty_cache()

    def close(self) -> None:
        torch.cuda.synchronize(self.place)


def open_cuda(index: int = 0) -> Cuda:
    """The card of that number. UsageError where there is none that qmix can use, with the reason."""
    if not torch.cuda.is_available():
        built = torch.version.cuda
        raise UsageError("--device cuda: torch sees no NVIDIA GPU here",
                         "this torch has no CUDA in it: install one of the CUDA builds of pytorch.org" if built is None
                         else "`nvidia-smi` should show the card; `qmix doctor` says more; or use --device cpu")
    if index >= torch.cuda.device_count():
        raise UsageError(f"--device cuda:{index}: there are {torch.cuda.device_count()} GPUs",
                         f"cuda:0 to cuda:{torch.cuda.device_count() - 1}")
    try:
        torch.cuda.set_device(index)
        gc.collect()  # an earlier engine's slots, which only circles of references hold
        torch.cuda.empty_cache()
        card = Cuda(index)
    except RuntimeError as e:
        raise DoesNotFit(f"--device cuda:{index}: {str(e).splitlines()[0]}",
                         "close other programs that use the GPU, or use --device cpu") from None
    if card.capability < OLDEST:
        raise UsageError(f"--device cuda:{index}: {card.name} has compute capability {card.capability[0]}."
                         f"{card.capability[1]}, qmix wants 7.5 or newer", "use --device cpu")
    # Else cuBLAS may add up the parts of a long sum in 16 bits.
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return card
