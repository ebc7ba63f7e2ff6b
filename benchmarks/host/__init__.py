"""Host time of a call, on a machine without a GPU: what Python, PyTorch and Triton take to launch.

Triton's whole host path runs, on kernels that its own compiler makes for sm_90: `JITFunction.run`,
its binder, the C launcher of driver.c. `libcuda.c` stands in for libcuda.so.1, whose
cuLaunchKernelEx returns at once, and CPU tensors for those of a device. So these times are without
cuLaunchKernelEx itself (2 to 5 us), PyTorch's CUDA launches (its CPU kernels run in their place, on
a few rows), its allocator (malloc is there instead) and the hand-over to autograd's thread.

Times are CPU time of one thread, in turns with the peers; a ratio is taken within each turn.
"""
