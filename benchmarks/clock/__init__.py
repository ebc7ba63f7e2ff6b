"""A model of the clock: times of kernels on sm_90 from their machine code, without a GPU.

Ask for a layer, or for one launch with other tiles, in seconds::

    capture = capture_layer(shape)
    time_layer(capture).us("forward", launch_us=1.0)
    (launch,) = capture.kernels("expert_ffn_fwd")
    time_launch(launch.changed(BLOCK_M=64, num_warps=4), shape).us

`capture` catches launches, `compiled` and `sass` read their code, `sm` simulates a multiprocessor,
`work` says how often loops run and what moves, `chip` puts it together, `peers` does the same for
ScatterMoE, `checks` holds it against published times. ``python -m benchmarks.clock`` is the command
line. What it says is modelled, never measured.
"""
