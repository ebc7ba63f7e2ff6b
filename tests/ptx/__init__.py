"""Execute the PTX that Triton emits, in NumPy: values, races, stray accesses; needs no GPU.

`parse` reads PTX, `translate` makes each instruction a function on all threads at once, `numerics`
has the arithmetic, `memory` the state spaces and who touched each byte, `warps` what a warp does
together, `proxies` copies and products that run by themselves, `machine` steps through the blocks,
`harness` puts it under the launches of a package. Names are those of the PTX manual.
"""
