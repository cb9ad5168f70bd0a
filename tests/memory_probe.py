"""Run one average in a fresh process; print its peak beyond ``import wavg``, and what was promised.

Usage: memory_probe.py GLOB OUTPUT WEIGHTS[;WEIGHTS...] MAX_MEMORY [RECORD]
"""

import json
import os
import sys

import wavg


def status(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def main() -> None:
    inputs, output, weights, max_memory, *record = sys.argv[1:]
    before = status("VmRSS")
    report = wavg.average_checkpoints(
        inputs,
        output,
        weights=weights.split(";"),
        max_memory=max_memory,
        overwrite=True,
        record=record[0] if record else "inputs",
    )[0]
    print(
        json.dumps(
            {
                "measured": status("VmHWM") - before,
                "projected": report.plan.projected_memory,
                "allowed": report.plan.options.max_memory,
                "bytes_read": report.plan.bytes_read,
            }
        )
    )
    os._exit(0)


if __name__ == "__main__":
    main()
