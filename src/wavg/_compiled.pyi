from typing import Any

import numpy.typing as npt

_Bytes = npt.NDArray[Any]

def settle(
    block: _Bytes,
    outs: _Bytes,
    flags: _Bytes,
    counts: _Bytes,
    matrix: _Bytes,
    rows: _Bytes,
    source: int,
    target: int,
    start: int,
    descriptors: _Bytes,
    offsets: _Bytes,
    /,
) -> tuple[int, int, bool]: ...
