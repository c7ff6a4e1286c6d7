"""Perform the runs that the studies still lack. A killed run starts over. A finished one is repeated only if its test
had questions of fewer templates than later ones have, after all missing ones.

python -m recipes.queue methods plateau --processes 2

This includes tuning the learning rates, so which runs come next depends on the results so far.
"""

import argparse
import logging
import multiprocessing
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from recipes.studies.catalogue import STUDIES
from recipes.studies.parts.run import Run, perform
from recipes.studies.parts.store import Store
from recipes.studies.parts.study import Study

logger = logging.getLogger("recipes.queue")

RESULTS = Path("recipes/studies/results/runs.jsonl")
ATTEMPTS = 2
"""How many times a run is tried before it is given up."""


def main(words: Sequence[str] | None = None) -> int:
    """Work until no run is missing or the time is up. Return 1 if runs failed."""
    arguments = parse(words)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    studies = [STUDIES[name] for name in arguments.studies]
    store = Store(arguments.results)
    if arguments.list:
        for run in missing(studies, store):
            logger.info("%s", describe(run))
        return 0
    queue = Queue(store, arguments.processes, arguments.threads)
    deadline = None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    queue.work(studies, deadline)
    return 1 if queue.failed else 0


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        "python -m recipes.queue", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("studies", nargs="*", default=list(STUDIES), help=f"among {', '.join(STUDIES)}; default: all")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of results, to read and to append to")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="processor threads of each run")
    parser.add_argument("--minutes", type=float, help="start no run after this time")
    parser.add_argument("--list", action="store_true", help="only list the missing runs, as far as they are known")
    arguments = parser.parse_args(words)
    if unknown := set(arguments.studies) - STUDIES.keys():
        parser.error(f"no study named {', '.join(sorted(unknown))}; there are {', '.join(STUDIES)}.")
    return arguments


def missing(studies: Sequence[Study], store: Store) -> dict[Run, None]:
    """Return the runs that are still to do, each once, in the order of the studies; then those to do again."""
    to_do = [run for study in studies for run in study.missing(store)]
    return dict.fromkeys(to_do + [run for study in studies for run in study.narrow(store)])


class Queue:
    """Worker processes that perform runs, and the one file that collects their results.

    Attributes:
        failed: run -> number of failed attempts, until one succeeds.
    """

    def __init__(self, store: Store, processes: int, threads: int) -> None:
        self.store, self.processes, self.threads = store, processes, threads
        self.failed: Counter[Run] = Counter()

    def work(self, studies: Sequence[Study], deadline: float | None) -> None:
        """Perform the missing runs in order; start none after `deadline`, a time of `time.monotonic`."""
        running: dict[Future, Run] = {}
        pool = self._pool()
        while True:
            if deadline is None or time.monotonic() < deadline:
                for run in missing(studies, self.store):
                    if len(running) == self.processes:
                        break
                    if run not in running.values() and self.failed[run] < ATTEMPTS:
                        running[pool.submit(perform, run)] = run
            if not running:
                break
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                self._take(future, running.pop(future))
            if any(isinstance(future.exception(), BrokenProcessPool) for future in done):
                # A worker was killed, which breaks the pool and loses the other runs, too.
                running.clear()
                pool.shutdown(cancel_futures=True)
                pool = self._pool()
        pool.shutdown()

    def _take(self, future: Future, run: Run) -> None:
        if (error := future.exception()) is not None:
            self.failed[run] += 1
            logger.error("failed: %s", describe(run), exc_info=error)
            return
        result = future.result()
        self.store.add(result)
        self.failed.pop(run, None)
        logger.info("%d done: %s: %s, %.0f s", len(self.store), describe(run), result["means"], result["seconds"])

    def _pool(self) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(self.processes, context, initializer=start_worker, initargs=(self.threads,))


def start_worker(threads: int) -> None:
    """Set up a worker process."""
    torch.set_num_threads(threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """End this process when the queue's process ends, since nothing would collect its result."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def describe(run: Run) -> str:
    """Describe a run in one line."""
    budget = "" if run.budget is None else f" {100 * run.budget:g} %"
    more = "".join(
        f" {each}" for each in (run.fields, run.selected_on, run.dtype) if each not in ("{}", None, "bfloat16")
    )
    return f"{run.task} {run.method}{budget}{more}, rate {run.rate:g}, seed {run.seed}, {run.split}"


if __name__ == "__main__":
    sys.exit(main())
