"""Repeats the calls that record.py wrote, with kernels built for the CPU at hand: replay.py FILE FOLDER.

FOLDER has the kernels' libraries, NAME.so. What they write must be the same to the bit: their order of additions is one
on all vectors, where multiply-adds are fused on both sides.
"""

import ctypes
import pickle
import struct
import sys
from collections import Counter
from pathlib import Path


def replay(function: object, arguments: bytes, places: list[tuple[int, int, int]], before: list[bytes]) -> list[bytes]:
    """What lies in the regions afterwards."""
    rooms = [ctypes.create_string_buffer(len(region) + 64) for region in before]
    starts = [-ctypes.addressof(room) % 64 for room in rooms]  # as torch aligns
    for room, start, region in zip(rooms, starts, before, strict=True):
        ctypes.memmove(ctypes.addressof(room) + start, region, len(region))
    own = bytearray(arguments)
    for offset, index, distance in places:
        struct.pack_into("@Q", own, offset, ctypes.addressof(rooms[index]) + starts[index] + distance)
    function(bytes(own))  # type: ignore[operator]
    return [room.raw[start : start + len(region)] for room, start, region in zip(rooms, starts, before, strict=True)]


def differences(expected: list[bytes], regions: list[bytes]) -> str:
    """How many words of 4 bytes differ, and the largest difference of one as a float."""
    words = [
        [x for region in side for (x,) in struct.iter_unpack("=f", region[: len(region) // 4 * 4])]
        for side in (expected, regions)
    ]
    pairs = [(a, b) for a, b in zip(*words, strict=True) if a != b and a == a]
    return f"{len(pairs)} differ, by {max((abs(a - b) / (abs(a) or 1) for a, b in pairs), default=0):.1e} at most"


def main() -> int:
    recorded, folder = Path(sys.argv[1]), Path(sys.argv[2])
    same: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    for library, name, arguments, places, before, after in pickle.loads(recorded.read_bytes()):
        regions = replay(ctypes.CDLL(str(folder / f"{library}.so"))[name], arguments, places, before)
        if regions == after:
            same[name] += 1
        else:
            wrong[name] += 1
            print(f"{name}: {differences(after, regions)}")
    for name in sorted({*same, *wrong}):
        print(f"{name}: {same[name]} calls the same to the bit, {wrong[name]} not")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
