"""Converts between directories of inputs and corpora/TARGET, where each input follows its length
(little-endian u32).

    python3 pack.py TARGET SEEDS FOUND        pack all files of SEEDS and the shortest
                                              files of FOUND, up to 96 KiB
    python3 pack.py --unpack TARGET FOLDER    unpack the inputs into FOLDER
"""

import hashlib
import struct
import sys
from pathlib import Path

HERE, MOST = Path(__file__).parent, 96 << 10


def pack(target, first, rest):
    seeds = [p.read_bytes() for p in sorted(first.iterdir())]
    found = sorted({p.read_bytes() for p in rest.iterdir()} - set(seeds), key=lambda data: (len(data), data))
    packed, left = b"", MOST
    for data in seeds + found:
        if data in seeds or len(data) <= left:
            packed += struct.pack("<I", len(data)) + data
            left -= len(data)
    (HERE / "corpora" / target).write_bytes(packed)


def unpack(target, folder):
    packed = HERE / "corpora" / target
    rest = packed.read_bytes() if packed.exists() else b""
    while rest:
        end = 4 + struct.unpack("<I", rest[:4])[0]
        data, rest = rest[4:end], rest[end:]
        (folder / hashlib.sha1(data).hexdigest()).write_bytes(data)


if sys.argv[1] == "--unpack":
    unpack(sys.argv[2], Path(sys.argv[3]))
else:
    pack(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
