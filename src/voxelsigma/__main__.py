"""Run the command line: `python -m voxelsigma`."""

from voxelsigma.hosts.cli import main

if __name__ == "__main__":
    main()
