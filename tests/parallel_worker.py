"""Processes of a group on the CPU, for test_parallel.py: what each rank does, and what it finds.

``run(world, jobs)`` starts the ranks once and hands each of them all jobs, as starting costs more
than most jobs. A job is a function of this file by name, with its arguments; it returns what the
parent asserts on, as plain numbers, or raises.
"""

import multiprocessing
import os
import queue
import sys
import tempfile
import time
import traceback
from pathlib import Path

# Seconds for all jobs of a group; a rank that waits for another in vain is ended then.
LIMIT = 240


def run(world, jobs, limit=LIMIT):
    """Results by job, each a list by rank; raises what a rank raised, or which ranks hang."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        file = f"file://{Path(folder, 'meeting')}"
        ranks = [
            context.Process(
                target=_rank, args=(rank, world, file, jobs, results, limit), daemon=True
            )
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        found, deadline = {}, time.monotonic() + limit
        try:
            while len(found) < world:
                gone = [r for r in range(world) if r not in found and not ranks[r].is_alive()]
                try:
                    rank, value = results.get(timeout=1)
                    found[rank] = value
                except queue.Empty:
                    # A moment after the first that raised: it is seldom the one with the cause.
                    raised = any(isinstance(value, str) for value in found.values())
                    if gone or raised or time.monotonic() > deadline:
                        break
        finally:
            for process in ranks:
                process.join(5 if len(found) == world else 0.1)
                if process.is_alive():
                    process.kill()
    missing = {r: ranks[r].exitcode for r in range(world) if r not in found}
    raised = [f"rank {r} of {world}:\n{v}" for r, v in found.items() if isinstance(v, str)]
    note = f"no result within {limit} s from ranks (exit code, if any): {missing}"
    assert not missing and not raised, "\n".join([*raised, note])  # noqa: PT018  one message
    return [[found[rank][i] for rank in range(world)] for i in range(len(jobs))]


def _rank(rank, world, file, jobs, results, limit):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        import datetime

        import conftest  # noqa: F401  chooses the interpreter
        import torch
        import torch.distributed as dist
        import torch.distributed.nn  # first, as its default arguments keep the group there is

        torch.set_num_threads(1)
        dist.init_process_group("gloo", file, datetime.timedelta(seconds=limit // 2), world, rank)
        found = []
        for name, arguments in jobs:
            import parallel_jobs

            found.append(getattr(parallel_jobs, name)(rank, world, **arguments))
        dist.barrier()
        results.put((rank, found))
        dist.destroy_process_group()
    except BaseException:  # the parent raises it
        results.put((rank, f"{[n for n, _ in jobs]}\n{traceback.format_exc()}"))
