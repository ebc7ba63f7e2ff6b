"""Facts about captures and one compiled kernel, as JSON: its own process, since it compiles."""

import json
import sys

from benchmarks.clock import chip, compiled, measured, work
from benchmarks.clock.capture import OperatorCall, capture_layer
from benchmarks.clock.machine import SENSITIVITY
from benchmarks.clock.tables import check_rows, kernel_row
from benchmarks.shapes import find_workloads


def main():
    facts = {}
    million = capture_layer(find_workloads("64-8-2-5-1e6")[0].shape)
    facts["names"] = [
        [call.name for call in calls] for calls in (million.forward, million.backward)
    ]
    (router,) = million.kernels("route_fwd")
    facts["x_bytes"] = router.tensors["x_rows.ptr"]
    tiles = {"expert_ffn_dw_tile": {"block_n": 128}}
    both = (million, capture_layer(million.shape, tiles=tiles))
    facts["dw_grids"] = [c.kernels("expert_ffn_dw")[0].grid for c in both]
    single = capture_layer(find_workloads("64-4-1-5-1e6")[0].shape)
    facts["single"] = [call.name for call in single.forward]
    (launch,) = single.kernels("sum_splits")
    times = {n: launch.changed(num_splits=n) for n in (64, 202, 404)}
    shape = single.shape
    facts["sum_splits_us"] = [chip.time_launch(call, shape).us for call in times.values()]
    kernel = launch.kernel
    facts["digests"] = [kernel.digest, launch.changed(num_warps=8).kernel.digest]
    facts["loops"] = [[loop.name, loop.unrolled] for loop in kernel.root.walk()]
    facts["reads"] = sorted({n for i in kernel.root.inner[0].body for n in i.reads_from})
    facts["resident"] = chip.resident_programs(kernel)
    facts["registers"] = kernel.registers
    for name, call in {
        "no such number": lambda: launch.changed(BLOCK_Q=1),
        "no trips": lambda: chip.time_kernel(launch, work.Work((work.Programs(1),))),
    }.items():
        try:
            call()
        except ValueError as error:
            facts[name] = str(error)
    compiled._KERNELS.clear()
    facts["read again"] = launch.kernel.root == kernel.root
    facts["checks"] = {name: check_rows(machine) for name, machine in SENSITIVITY.items()}
    sort = OperatorCall("sort", 0, 0, 0, 10_000, (10_000,))
    times = [chip.time_launch(call, shape) for call in (launch, sort)]
    profiled = [
        {"kernel": "sum_splits_kernel", "time_us": 7.0},
        {"kernel": "radixSortKernel", "time_us": 40.0},
    ]
    calls = [kernel_row(time) for time in times]
    facts["compared"] = measured.compare(calls, profiled)
    facts["why not"] = measured.why_not()
    shared = capture_layer(
        find_workloads("64-4-1-5-1e6")[0].shape, shared_expert="segment", backward=False
    )
    facts["mm"] = next(vars(c) for c in shared.forward if c.name == "mm")
    passes = [c for c in shared.forward if c.name.startswith(("shared", "mm", "_combine"))]
    facts["shared"] = [[c.name for c in passes], sum(chip.time_launch(c, shape).us for c in passes)]
    json.dump(facts, sys.stdout)


if __name__ == "__main__":
    main()
