"""The machine that is modelled: what each number is and where it comes from.

"(memory)" marks what was written down from memory of microbenchmark papers and not looked up, or
guessed; `checks` says how far totals move when those are wrong.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Machine:
    """One GPU of sm_90. Times are in clocks of a multiprocessor (SM), rates in bytes a second.

    Attributes:
        name: of the product.
        num_sms: multiprocessors; NVIDIA H100 and H200 SXM data sheets.
        clock_hz: of an SM under load. The dense bf16 peak of the data sheet, 989 TFLOP/s, is 4,096
            FLOPs a clock on 132 SMs at 1.83 GHz; products run below it.
        hbm_rate: 4.8e12 on the H200's data sheet, of which a copy reaches 0.9 (memory).
        l2_rate: of scattered rows (memory).
        l2_swizzled_rate: where neighbouring programs read the same tiles (memory).
        l2_bytes: what of the 50 MB of L2 holds data of one launch for the next (memory).
        registers: 32-bit registers of an SM; CUDA C++ Programming Guide, compute capabilities.
        shared_bytes: shared memory of an SM that programs can take; same table.
        reserved_shared_bytes: shared memory that each program takes for the system; same table.
        max_warps: of an SM; same table.
        max_programs: of an SM; same table.
        start: from the choice of a program to its first instruction (memory, guess).
        l1_latency: of a load that hits L1, as spilled registers do (memory).
        shared_latency: of a load from shared memory (memory).
        l2_latency: of a load that hits L2 (memory).
        dram_latency: of a load that misses L2 (memory).
        barrier_latency: from the last warp's arrival at a barrier on (memory).
        shuffle_latency: of a shuffle between lanes (memory).
        integer_busy: clocks that an integer instruction holds its pipe: 64 lanes an SM; table of
            arithmetic throughput in the CUDA C++ Programming Guide.
        special_busy: the same of MUFU, 16 lanes an SM; same table.
        mma_busy: clocks of an mma.sync m16n8k16 of 16 bits: 62 % of wgmma's rate (memory).
        dense_rate: FLOPs a second of a vendor's 16-bit product that fills the chip (memory).
    """

    name: str = "H200 SXM"
    num_sms: int = 132
    clock_hz: float = 1.83e9
    hbm_rate: float = 0.9 * 4.8e12
    l2_rate: float = 6.5e12
    l2_swizzled_rate: float = 10e12
    l2_bytes: float = 45e6
    registers: int = 65536
    shared_bytes: int = 228 * 1024
    reserved_shared_bytes: int = 1024
    max_warps: int = 64
    max_programs: int = 32
    start: float = 500.0
    l1_latency: float = 38.0
    shared_latency: float = 30.0
    l2_latency: float = 270.0
    dram_latency: float = 700.0
    barrier_latency: float = 24.0
    shuffle_latency: float = 24.0
    integer_busy: float = 2.0
    special_busy: float = 8.0
    mma_busy: float = 6.5
    dense_rate: float = 700e12


H200 = Machine()

# What is from memory, replaced by values at the other end of what is plausible.
SENSITIVITY = {
    "as it is": H200,
    "integer pipe at full rate": replace(H200, integer_busy=1.0),
    "barriers twice as fast": replace(H200, barrier_latency=12.0),
    "L2 after 200 clocks": replace(H200, l2_latency=200.0),
    "DRAM after 500 clocks": replace(H200, dram_latency=500.0),
    "DRAM after 900 clocks": replace(H200, dram_latency=900.0),
    "programs start at once": replace(H200, start=0.0),
    "programs start after 1,000 clocks": replace(H200, start=1000.0),
    "1.7 GHz": replace(H200, clock_hz=1.7e9),
}
