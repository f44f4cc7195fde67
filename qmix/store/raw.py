"""Bytes between files and tensors: no copies, no mapping."""

from __future__ import annotations

import os

import xxhash

from qmix.tensorfile import read_exact

CHUNK = 4 * 2**20  # bytes hashed at a time: they are still in the cache after the read


def digest(data: memoryview | bytes) -> str:
    """xxh3_128 in 32 hex digits."""
    return xxhash.xxh3_128(data).hexdigest()


def checksum(fd: int, offset: int, nbytes: int) -> str:
    """xxh3_128 of a range of a file, read in chunks; EOFError where the file is too short."""
    hasher, buffer = xxhash.xxh3_128(), memoryview(bytearray(min(CHUNK, nbytes)))
    for start in range(0, nbytes, CHUNK):
        chunk = buffer[:min(CHUNK, nbytes - start)]
        read_exact(fd, chunk, offset + start)
        hasher.update(chunk)
    forget(fd, offset, nbytes)
    return hasher.hexdigest()


def forget(fd: int, offset: int, nbytes: int) -> None:
    """Tell the system that a range is not needed again soon: dirty pages start on their way to the disk,
    clean ones leave the page cache, which has better uses than a file that is streamed once."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)
