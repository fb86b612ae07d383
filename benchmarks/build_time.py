"""Seconds to build the native extension from nothing, with a process a core. Needs cmake, ninja and nanobind. Prints one JSON object."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args()
    settings = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    with tempfile.TemporaryDirectory() as folder:
        configure = [
            "cmake", "-S", ROOT / "native", "-B", folder, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
        ]  # fmt: skip
        began = time.perf_counter()
        for command in (configure, ["cmake", "--build", folder, "--parallel", str(given.jobs)]):
            done = subprocess.run(command, capture_output=True, text=True, env=settings, check=False)
            if done.returncode:
                raise SystemExit(f"{command[0]} failed (are cmake, ninja and nanobind installed?):\n{done.stderr or done.stdout}")
        seconds = time.perf_counter() - began
        if not [*Path(folder).glob("_native*")]:
            raise SystemExit("nothing was built")
    print(json.dumps({"seconds": seconds, "jobs": given.jobs}))


if __name__ == "__main__":
    main()
