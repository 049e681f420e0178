"""What `import dha_peft` costs over importing peft and transformers: the least of several fresh interpreters.

python benchmarks/import_time.py
"""

from __future__ import annotations

import subprocess
import sys

RUNS = 7
CODE = """
import time, peft, transformers
wall, cpu = time.perf_counter(), time.process_time()
import dha_peft
print(time.perf_counter() - wall, time.process_time() - cpu)
"""


def main() -> None:
    found = [
        subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True) for _ in range(RUNS)
    ]
    wall, cpu = zip(*(map(float, done.stdout.split()) for done in found), strict=True)
    print(f"least of {RUNS}: {min(wall):.3f} s, of which {min(cpu):.3f} s of processor time")


if __name__ == "__main__":
    main()
