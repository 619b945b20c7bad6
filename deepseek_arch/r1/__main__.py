"""One stage in this process: `accelerate launch -m deepseek_arch.r1 zero --config zero.yaml --out runs/zero`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(args: Sequence[str] | None = None) -> None:
    """Runs a stage from its file."""
    parser = argparse.ArgumentParser(prog="python -m deepseek_arch.r1", description=__doc__)
    parser.add_argument("name", help="name of the stage")
    parser.add_argument("--config", type=Path, required=True, help="its file")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="change a field; repeatable")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    parser.add_argument("--progress", action="store_true", help="draw bars while training")
    given = parser.parse_args(args)
    from .pipeline.single import run_file

    run_file(given.name, given.config, given.out, given.set, given.seed, given.progress)


if __name__ == "__main__":
    main()
