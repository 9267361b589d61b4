"""How right is the memory plan? Each case of plans/cases.py in a process of its own, on a CPU.

    python benchmarks/plan_memory.py --out benchmarks/results/plan-memory.jsonl [--only NAME ...]

A row has the planned bytes and the peak of live tensor bytes in the second step, with the plan's
parts, and beside them what the process held at most of real memory (resident set, by the kernel's
count) above what it held before the training: loading and the libraries' scratch are in that.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from plans.cases import CASES
from rows.provenance import installed_version, read_commit

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


def main() -> int:
    """Parse, run, write rows; exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, help="JSONL file that rows are appended to")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="cases to run")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(options.worker, options.folder)))
        return 0
    known = [case.name for case in CASES]
    if unknown := set(options.only) - set(known):
        parser.error(f"no case is called {sorted(unknown)[0]}; there are {', '.join(known)}")
    about = describe()
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only or known:
            row = about | in_process(name, Path(folder))
            print(line(row), file=sys.stderr)
            if options.out:
                with options.out.open("a") as out:
                    out.write(json.dumps(row) + "\n")
    return 0


def in_process(name: str, folder: Path) -> dict[str, Any]:
    """One case's row. Raises: CalledProcessError when its process failed."""
    command = [sys.executable, __file__, "--worker", name, "--folder", str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(name: str, folder: Path) -> dict[str, Any]:
    """One case in this process, on one thread."""
    os.environ["ZEPHYR_LITE_HOME"] = str(folder / "cache")
    import torch

    from plans.rig import build, run

    torch.set_num_threads(1)
    case = next(case for case in CASES if case.name == name)
    build(case, folder)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of resident bytes begins anew
    before = resident_bytes("VmRSS")
    outcome = run(case, folder)
    return {
        "case": asdict(case),
        "planned_bytes": outcome.planned,
        "live_bytes": outcome.live,
        "error_percent": round(100 * outcome.error, 3),
        "parts": asdict(outcome.parts) | {"host": outcome.host.total},
        "rss_bytes": resident_bytes("VmHWM") - before,
    }


def resident_bytes(field: str) -> int:
    """What this process holds now (VmRSS), or held at most (VmHWM), by Linux' count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = next(line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return 1024 * int(kib)


def describe() -> dict[str, Any]:
    """What is the same in all rows."""
    return {
        "benchmark": "plan_memory",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": read_commit(),
        "device": f"cpu ({platform.machine()})",
        "threads": 1,
        "versions": {name: installed_version(name) for name in LIBRARIES},
    }


def line(row: dict[str, Any]) -> str:
    """A row for a person."""
    sizes = [f"{row[key] / 1e6:9.1f}" for key in ("planned_bytes", "live_bytes", "rss_bytes")]
    words = "{} MB planned {} MB live {} MB resident".format(*sizes)
    return f"{row['case']['name']:20}{words}  {row['error_percent']:+.2f} %"


if __name__ == "__main__":
    sys.exit(main())
