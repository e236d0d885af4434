"""upslope, and Stable-Baselines3 with sb3-contrib, on the same work, alternately: steps per CPU second of training."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def measure(command: list[str], core: int) -> dict:
    """Run one side pinned to one core with one thread; its RESULT line."""
    single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    done = subprocess.run(
        command,
        cwd=HERE,
        env={**os.environ, **single},
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    raise SystemExit(f"{' '.join(command)} printed no result:\n{done.stdout}\n{done.stderr}")


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):,.0f} ({min(values):,.0f}-{max(values):,.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--peer-python", required=True, help="an interpreter that has stable-baselines3 and sb3-contrib"
    )
    parser.add_argument("--cases", default="a,b,c,d,e,e2,r", help="the cases to run, with commas between")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each side per case")
    parser.add_argument("--core", type=int, default=0, help="which core to pin every run to")
    parser.add_argument("--vectorization", default="auto", choices=["auto", "sync", "native"])
    parser.add_argument("--out", type=Path, help="write every run as JSON lines")
    options = parser.parse_args()
    records = []
    print("| case | upslope, steps per CPU second | SB3 | ratio of medians, and of pairs |\n|---|---|---|---|")
    for case in options.cases.split(","):
        rates: dict[str, list[float]] = {"upslope": [], "sb3": []}
        for seed in range(1, options.seeds + 1):
            commands = {
                "upslope": [sys.executable, "upslope_side.py", case, str(seed), options.vectorization],
                "sb3": [str(Path(options.peer_python).absolute()), "sb3_side.py", case, str(seed)],
            }
            for side, command in commands.items():
                record = measure(command, options.core)
                records.append(record)
                rates[side].append(record["steps_per_cpu_second"])
        pairs = [ours / theirs for ours, theirs in zip(rates["upslope"], rates["sb3"], strict=True)]
        ratio = statistics.median(rates["upslope"]) / statistics.median(rates["sb3"])
        times = f"{ratio:.2f} ({min(pairs):.2f}-{max(pairs):.2f})"
        print(f"| {case} | {spread(rates['upslope'])} | {spread(rates['sb3'])} | {times} |", flush=True)
    if options.out:
        options.out.write_text("".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    main()
