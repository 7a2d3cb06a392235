"""Runs the benchmark; see ``jax_ep.bench.cli``."""

import sys

from jax_ep.bench import cli

if __name__ == "__main__":
    rows = cli.main()
    sys.exit(1 if any("error" in row and not row["baseline"] for row in rows) else 0)
