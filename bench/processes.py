"""Measurements in processes of their own, with the allocator settings of a fair comparison."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "20000000000", "MALLOC_TOP_PAD_": "67108864"}
"""The stock allocator gives memory back and fetches it again with every batch; no side is to pay for that."""

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_SECONDS = 3600


@dataclass(frozen=True, kw_only=True)
class Call:
    """A function of this package, `module:function`, to be called in a process of its own.

    Parameters
    ----------
    target, arguments
        The function, and its keyword arguments; both they and the result are JSON.
    threads
        Of torch.
    tuned
        Whether the process has the allocator settings `ALLOCATOR`; else none of them.
    """

    target: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    threads: int = 1
    tuned: bool = True

    def __call__(self) -> Any:
        """Run and give the result.

        Raises
        ------
        RuntimeError
            If the process fails; what it said stands on standard error.
        """
        environment = {name: value for name, value in os.environ.items() if name not in ALLOCATOR}
        environment |= {"OMP_NUM_THREADS": str(self.threads), **(ALLOCATOR if self.tuned else {})}
        command = [sys.executable, "-m", "bench.processes", self.target, json.dumps(self.arguments)]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
        if done.returncode:
            raise RuntimeError(f"bench: {self.target} {dict(self.arguments)} ended with status {done.returncode}")
        return json.loads(done.stdout.splitlines()[-1])


def together(calls: Sequence[Call], workers: int) -> list[Any]:
    """Results of several calls in their order, some at a time: for figures that no other process changes."""
    with ThreadPoolExecutor(max(1, workers)) as pool:
        return list(pool.map(lambda call: call(), calls))


def main() -> None:
    """Call the function that is named, with arguments in JSON, and print its result as the last line."""
    module, _, name = sys.argv[1].partition(":")
    found = getattr(importlib.import_module(module), name)(**json.loads(sys.argv[2]))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
