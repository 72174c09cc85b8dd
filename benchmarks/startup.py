"""CPU time until a command line is answered, beside `import torch` in the same turns.

python benchmarks/startup.py [--repeats 5]
"""

import argparse
import resource
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMMANDS = {
    "import torch": ["-c", "import torch"],
    "bsim.py --help": ["bsim.py", "--help"],
    "a wrong flag": ["bsim.py", "--epohcs", "100"],
    "a wrong value": ["bsim.py", "--method", "byole"],
    "eval.knn --help": ["-m", "eval.knn", "--help"],
}


def seconds(words: list[str]) -> float:
    """User and system time of the process, imports included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    found = {name: [] for name in COMMANDS}
    for _ in range(options.repeats):
        for name, words in COMMANDS.items():
            found[name].append(seconds(words))
    print("| command | CPU seconds | more than `import torch` | largest |\n| --- | --- | --- | --- |")
    for name, seen in found.items():
        more = [own - torch for own, torch in zip(seen, found["import torch"])]
        print(f"| {name} | {statistics.median(seen):.2f} | {statistics.median(more):+.2f} | {max(more):+.2f} |")


if __name__ == "__main__":
    main()
