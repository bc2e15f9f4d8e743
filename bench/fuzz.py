"""Corrupt streams for some minutes and read them: `python -m bench.fuzz --seconds 600 --seed 1`, from the root.

`--recordings FOLDER` adds recorded streams to the made ones. Progress goes to standard error, a summary to standard
output. The first stream that ends in neither items nor a clean error, in time and in little memory, gives exit code 1,
the seed and the case that make it again, and a file with its bytes.
"""

import sys

from tests.gadgets.fuzzing import main

if __name__ == "__main__":
    sys.exit(main(["--seconds", "600", *sys.argv[1:]]))
