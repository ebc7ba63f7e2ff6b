"""Expert parallelism and training on several ranks: gloo processes against one process."""

from pathlib import Path

import pytest
from parallel_worker import run
from programs import run_python

from benchmarks.parallel_model import Setting, exchanged_bytes

pytest.importorskip("triton")

# Options of the layer, batch sizes by rank.
CASES = [
    ({}, [2], {}),
    ({"num_experts": 5, "top_k": 3, "bias": True}, [2, 0, 3], {"masked": True}),
    ({"num_experts": 2, "top_k": 1, "shared_expert": None}, [1, 3], {}),
    ({"num_experts": 1, "top_k": 1, "bias": True, "gated": True}, [2, 1], {"masked": True}),
    ({"expert_scope": "segment", "gated": True, "activation": "silu"}, [2, 1], {"masked": True}),
    ({"expert_scope": "projected", "bias": True}, [1, 2], {"masked": True}),
    ({"causal": True, "shared_expert": "token"}, [2, 1], {}),
    ({"router_temperature": 0.1, "aux_loss_weight": 0.1, "z_loss_weight": 0.1}, [2, 0], {}),
    ({"segment_size": 1, "pooling": "mean", "renormalize": False}, [0, 2], {"average": True}),
    ({"backend": "triton", "bias": True}, [1, 0, 2], {"masked": True}),
    ({"backend": "triton", "top_k": 1, "num_experts": 3, "shared_expert": None}, [1], {}),
]


def jobs(world):
    """What each world runs, once."""
    found = [
        ("equals_one_process", {"options": options, "sizes": sizes, **more})
        for options, sizes, more in CASES
    ]
    found += [("first_rank_wins_and_gather_gives_it_back", {}), ("frozen_parts_do_not_hang", {})]
    found += [("refuses_before_sending", {}), ("empty_and_nested_batches", {})]
    found += [("dropout_and_checkpoints", {"backend": "reference"})]
    found += [("data_parallel", {"sharded": sharded}) for sharded in (False, True)]
    found.append(("bytes_sent", {"size": 2}))
    if world > 2:
        found.append(("groups_of_some_ranks", {}))
    if world != 3:
        found.append(("fully_sharded", {}))
    if world == 2:
        found.append(("statistics_of_all_ranks", {}))
        found += [("dtensor_weights", {}), ("fully_sharded_parts", {})]
        found += [("dropout_and_checkpoints", {"backend": "triton"})]
    if world == 4:  # two ranks without an expert
        found += [("autocast_as_one_process", {}), ("compiled_as_eager", {})]
    return found


@pytest.mark.parametrize(
    "world", [1, 2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4))]
)
def test_ranks_compute_what_one_process_does(world):
    results = run(world, jobs(world))
    named = {name: found for found, (name, _) in zip(results, jobs(world), strict=True)}
    sent = named["bytes_sent"]
    for found in named.get("statistics_of_all_ranks", ()):
        assert found == {"steps": [2 * (1 + 2)] * 2, "epoch": 12}
    setting = Setting(0, 3, 4, 6, 5, top_k=2, bytes_each=4)
    for rank, found in enumerate(sent):
        away = sum(found["to"]) - found["to"][rank]
        served = sum(other["to"][rank] for other in sent) - found["to"][rank]
        assert found["sent"] == exchanged_bytes(setting, away, served, world, rank)
        assert (sum(found["sent"]) > 0) == (world > 1)
    for (options, *_), experts in zip(CASES, results, strict=False):
        assert sum(experts) == options.get("num_experts", 4)
        assert max(experts) - min(experts) <= 1


@pytest.mark.slow
def test_a_rank_that_hangs_fails_the_test_with_its_name():
    with pytest.raises(AssertionError, match=r"(?s)rank 0 of 2:.*barrier.*no result .*\{1: "):
        run(2, [("stuck", {})], limit=30)


def test_the_example_runs_under_torchrun_and_learns():
    words = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    options = ("--steps=10", "--batch-size=16")
    done = run_python(*words, "examples/expert_parallel.py", *options, without=())
    lines = done.stdout.splitlines()
    losses = [float(line.split()[-1]) for line in lines if line.startswith("step")]
    assert len(losses) == 3
    assert losses[-1] < 0.7 * losses[0]
    assert "rank 0: [" in lines[-1]
    assert "rank 1: [" in lines[-1]


# Runs the example as one rank, and prints its group's threads before and after the group ends.
COUNT_THREADS = """
import os, pathlib, runpy, sys
import torch.distributed as dist

def count():
    tasks = pathlib.Path("/proc/self/task").glob("*/comm")
    print("threads", sum("gloo" in task.read_text() for task in tasks))

destroy = dist.destroy_process_group
dist.destroy_process_group = lambda: (count(), destroy())
sys.argv = ["expert_parallel.py", "--steps=1", "--batch-size=2"]
runpy.run_path("examples/expert_parallel.py", run_name="__main__")
count()
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are listed on Linux only")
def test_the_example_leaves_no_thread_of_its_group():
    # One that outlives the interpreter aborts the process now and then.
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    done = run_python("-c", COUNT_THREADS, without=(), **place)
    before, after = [int(s.split()[1]) for s in done.stdout.splitlines() if s.startswith("threads")]
    assert before > 0
    assert after == 0
