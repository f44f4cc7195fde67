"""An NVIDIA card, through torch.

The compute stream is torch's current stream, in which prompts run too. Copies have streams of their own, and each
thread that copies makes its stream current for itself. Work runs once before it is captured, so that Triton has
compiled its kernels and scratch memory exists.
"""

from __future__ import annotations

import gc
from contextlib import AbstractContextManager, suppress
from threading import get_ident

import torch
from torch import Tensor

from qmix.device import nvml
from qmix.device.device import Event, Stream, Work, failure
from qmix.errors import DoesNotFit, UsageError

ARENA = 32 * 2**20  # bytes of page-locked memory for what decoding sends to and fro
CONTEXT = 600 * 2**20  # bytes that a context takes with torch's and Triton's code, at most: where it is not measured
FAILURES = 3  # captures that may fail before no more are tried
OLDEST = (7, 5)  # compute capability; older cards lack what the kernels use


class _Stream:
    """A CUDA stream."""

    def __init__(self, device: Cuda, stream: torch.cuda.Stream | None):
        self._device = device
        self._stream = stream  # None: whatever is current
        self._entered: int | None = None  # the thread whose current stream it stays

    def enter(self) -> None:
        if self._stream is not None:
            torch.cuda.set_stream(self._stream)
            self._entered = get_ident()

    def run(self, work: Work) -> None:
        if self._stream is None:
            self._device.launches += 1
            work()
        elif self._entered == get_ident():
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
        # By its number: torch looks a device up several times as long.
        return torch.cuda.current_stream(self._device.torch_device.index) if self._stream is None else self._stream


class _Event:
    def __init__(self, event: torch.cuda.Event):
        self.event = event

    def done(self) -> bool:
        return bool(self.event.query())

    def wait(self) -> None:
        try:
            self.event.synchronize()
        except RuntimeError as e:  # torch.AcceleratorError is one
            raise failure(e) from None


class Cuda:
    """See device.Device. Make it through `open_cuda`, which says what is wrong where there is none. before: bytes of
    the card that were in use before this process had a context there, where that is known."""

    def __init__(self, index: int, before: int | None = None):
        self.torch_device = torch.device("cuda", index)
        about = torch.cuda.get_device_properties(self.torch_device)
        self.name = about.name
        self.capability = (about.major, about.minor)
        self.half = torch.bfloat16 if self.capability >= (8, 0) else torch.float16
        self.triton = True
        self._context, self._used = self._context_bytes(before)
        self._reserved = torch.cuda.memory_reserved(self.torch_device)
        self._arena = _page_locked((ARENA,), torch.uint8)
        self._arena_used = 0
        self.trouble = ""
        self.launches = 0
        self.waits = 0
        self.compute: Stream = _Stream(self, None)
        self._capturing = torch.cuda.Stream(self.torch_device)
        # One pool for all graphs: they run one after the other, and what a graph allocates does not outlive it. With
        # a pool for each, every graph of a store in nf4 would hold the memory of a decoded tile.
        self._pool = torch.cuda.graph_pool_handle()
        self._first: torch.cuda.CUDAGraph | None = None  # torch lets no graph into a pool that all others have left
        self._failed: list[torch.cuda.CUDAGraph] = []

    def _context_bytes(self, before: int | None) -> tuple[int, int]:
        """(bytes that the context takes, bytes of the card in use with it).

        Only the driver's management library can say what was in use before. Where it cannot be asked, or there was a
        context already, all that is in use is an upper bound, but never more than CONTEXT."""
        free, total = torch.cuda.mem_get_info(self.torch_device)  # makes the context, if there is none
        after = None if before is None else _in_use(self.torch_device.index)
        used = total - free
        bound = min(used - torch.cuda.memory_reserved(self.torch_device), CONTEXT)
        measured = 0 if before is None or after is None else after - before
        return (measured if 0 < measured <= used else bound), used

    def stream(self) -> _Stream:
        return _Stream(self, torch.cuda.Stream(self.torch_device))

    def capture(self, work: Work) -> Work:
        if len(self._failed) >= FAILURES:
            return lambda: self.compute.run(work)
        graph = torch.cuda.CUDAGraph()
        # Not through torch.cuda.graph, which stops the whole card and collects garbage for each of some 64 graphs.
        with torch.cuda.stream(self._capturing):
            try:
                # thread_local: the threads that copy go on meanwhile.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                work()
                graph.capture_end()
            except BaseException as e:
                self._abandon(graph)
                if not isinstance(e, Exception):  # interrupted
                    raise
                self.trouble = f"no CUDA graphs here ({_line(e)}): kernels are launched one by one, which is slower"
                return lambda: self.compute.run(work)
        self._first = self._first or graph

        def launch() -> None:
            self.launches += 1
            graph.replay()

        return launch

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a capture that failed: in the stream, which capture_end does in any case, and in torch's allocator, which
        capture_end does only where all went well. The allocator would ask the graph at every later allocation whether
        it belongs to it. That of page-locked memory has no such end and goes on asking, so the graph is kept and its
        pool is not used again."""
        with suppress(RuntimeError):
            graph.capture_end()
        with suppress(RuntimeError, AttributeError):  # it has ended
            torch._C._cuda_endAllocateToPool(self.torch_device.index, self._pool)
        self._failed.append(graph)
        self._pool, self._first = torch.cuda.graph_pool_handle(), None

    def host(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Out of one piece that was page-locked first of all: WSL may refuse more once the experts' slots are."""
        nbytes, start = torch.Size(shape).numel() * dtype.itemsize, self._arena_used
        if start + nbytes > len(self._arena):
            return _page_locked(shape, dtype)
        self._arena_used = start + (nbytes + 255) // 256 * 256
        return self._arena[start:start + nbytes].view(dtype).view(shape)

    def synchronize(self) -> None:
        pass  # they go to the same stream

    def wait(self, event: Event) -> None:
        self.waits += 1
        event.wait()

    def memory(self) -> tuple[int, int]:
        free, total = torch.cuda.mem_get_info(self.torch_device)
        return int(free), int(total)

    def limit(self, nbytes: int) -> None:
        # torch counts what it has reserved already.
        held = torch.cuda.memory_reserved(self.torch_device)
        torch.cuda.set_per_process_memory_fraction(min(1.0, (nbytes + held) / self.memory()[1]), self.torch_device)

    def taken(self) -> int:
        return self._context + torch.cuda.memory_reserved(self.torch_device)

    def beside(self) -> int:
        free, total = self.memory()
        return max(0, total - free - self._used - (torch.cuda.memory_reserved(self.torch_device) - self._reserved))

    def entered(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self.torch_device)

    def tidy(self) -> None:
        torch.cuda.empty_cache()

    def close(self) -> None:
        with suppress(RuntimeError):  # of a card that has failed: who waited for it was told
            torch.cuda.synchronize(self.torch_device)


def _in_use(index: int) -> int | None:
    """Bytes of the card in use by all programs, asked without making a context; None where that cannot be asked."""
    return nvml.used_bytes(f"GPU-{torch.cuda.get_device_properties(index).uuid}")


def _page_locked(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.zeros(shape, dtype=dtype, pin_memory=True)


def _line(e: BaseException) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0]


def open_cuda(index: int = 0) -> Cuda:
    """The card of that number. UsageError where there is none that qmix can use, with the reason."""
    if not torch.cuda.is_available():
        built = torch.version.cuda
        raise UsageError("--device cuda: torch sees no NVIDIA GPU here",
                         "this torch was built without CUDA: install a CUDA build (pytorch.org)" if built is None
                         else "`nvidia-smi` should show the card; `qmix doctor` says more; or use --device cpu")
    if index >= torch.cuda.device_count():
        raise UsageError(f"--device cuda:{index}: there are {torch.cuda.device_count()} GPUs",
                         f"cuda:0 to cuda:{torch.cuda.device_count() - 1}")
    try:
        before = _in_use(index)  # CUDA 12 and later make the context in set_device
        torch.cuda.set_device(index)
        gc.collect()  # an earlier engine's slots, which only circles of references hold
        torch.cuda.empty_cache()
        card = Cuda(index, before)
    except RuntimeError as e:
        raise DoesNotFit(f"--device cuda:{index}: {_line(e)}",
                         "close other programs that use the GPU, or use --device cpu") from None
    if card.capability < OLDEST:
        raise UsageError(f"--device cuda:{index}: {card.name} has compute capability {card.capability[0]}."
                         f"{card.capability[1]}, qmix needs 7.5 or newer", "use --device cpu")
    # Else cuBLAS may add up the parts of a long sum in 16 bits.
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return card
