"""Write the tables and pictures of the studies from the results so far.

python -m recipes.studies methods plateau
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from recipes.queue import RESULTS
from recipes.studies.catalogue import STUDIES
from recipes.studies.parts.report import write_report
from recipes.studies.parts.store import Store


def main(words: Sequence[str] | None = None) -> None:
    """Write the reports of the named studies."""
    parser = argparse.ArgumentParser(
        "python -m recipes.studies", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("studies", nargs="*", help=f"among {', '.join(STUDIES)}; default: all")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of results; the reports go beside it")
    arguments = parser.parse_args(words)
    if unknown := set(arguments.studies) - STUDIES.keys():
        parser.error(f"no study named {', '.join(sorted(unknown))}; there are {', '.join(STUDIES)}.")
    store = Store(arguments.results)
    for name in arguments.studies or STUDIES:
        write_report(STUDIES[name], store, arguments.results.parent)


if __name__ == "__main__":
    main()
