"""CRC-32C: google_crc32c's class, and a slower one of the same numbers for machines without it.

A block is cut into lanes whose registers numpy moves on side by side, byte by byte. The register is linear in what it
read, so that two neighbouring lanes join by moving the first on over as many zero bytes as the second has.
"""

import functools
from typing import Any

import numpy as np

LANE, LANES = 256, 4096  # bytes in a lane; most lanes side by side
BITS = np.arange(32, dtype=np.uint32)


@functools.cache
def table() -> np.ndarray:
    """The register after one byte, by (register ^ byte) & 255; the polynomial of Castagnoli, bits reversed."""
    crc = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        crc = (crc >> np.uint32(1)) ^ np.where(crc & np.uint32(1), np.uint32(0x82F63B78), np.uint32(0))
    return crc


def step(crc: Any, byte: Any) -> Any:
    """A register, or an array of them, after a byte for each."""
    return table()[(crc ^ byte) & np.uint32(255)] ^ (crc >> np.uint32(8))


@functools.cache
def zeros(count: int) -> np.ndarray:
    """What each bit of a register is after `count` zero bytes, a power of two."""
    if count == 1:
        return step(np.uint32(1) << BITS, 0)
    half = zeros(count // 2)
    return moved(half, half)


def moved(crc: np.ndarray, images: np.ndarray) -> np.ndarray:
    bits = (crc[:, None] >> BITS) & np.uint32(1)  # (N, 32)
    return np.bitwise_xor.reduce(bits * images, axis=1)


class Plain:
    """As google_crc32c.Checksum, at some 65 MB/s where that makes gigabytes."""

    def __init__(self, data: bytes = b""):
        self.crc: np.uint32 = np.uint32(0xFFFFFFFF)
        self.update(data)

    def update(self, data) -> None:
        rest = np.frombuffer(data, dtype=np.uint8)
        while len(rest) >= LANE:
            lanes = min(LANES, 1 << (len(rest) // LANE).bit_length() - 1)
            block, rest = rest[: lanes * LANE], rest[lanes * LANE :]
            crc = np.zeros(lanes, dtype=np.uint32)
            crc[0] = self.crc
            for byte in np.ascontiguousarray(block.reshape(lanes, LANE).T):
                crc = step(crc, byte)
            size = LANE
            while len(crc) > 1:
                crc, size = moved(crc[0::2], zeros(size)) ^ crc[1::2], size * 2
            self.crc = crc[0]
        for value in rest:
            self.crc = step(self.crc, value)

    def digest(self) -> bytes:
        return int(self.crc ^ np.uint32(0xFFFFFFFF)).to_bytes(4, "big")


try:
    from google_crc32c import Checksum as Fast
except ImportError:  # it comes with google-cloud-storage, which a machine without a bucket need not have
    Checksum: Any = Plain
else:
    Checksum = Fast
