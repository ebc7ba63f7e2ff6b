"""Time of the layer beside its peers, on a GPU or a CPU.

    python -m benchmarks.layer [--shapes headline] [--parts routed,whole]
                               [--routing uniform,skewed] [--dtype bfloat16] [--deadline SECONDS]

Each provider (`peers`) has to pass the `gate` before it is timed; `timing` says how. "routed" is
the layer without a shared expert, "whole" the one with the segment-wide shared expert. "forward"
runs without gradients; "forward+backward" asks for those of x and of every parameter. Mode "graph"
replays a captured CUDA graph: what kernels take without the host. "forward+backward" has the
``--dropout``, the gate and "forward" have none.

Columns: median (quartiles) of the time; TFLOP/s and GB/s of the work that the definition of the
layer needs (`work`), whatever a provider really executes and moves; time over that of ``segmoe``,
median over the rounds. Forward + backward has columns of `memory` too, and ``segmoe`` the time of
each of its kernels (`profiles`).
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import DTYPES, busiest_expert_share, make_case, release_memory
from benchmarks.gate import Gate, RefusedError, Verdict
from benchmarks.memory import memory_columns
from benchmarks.peers import Provider, build
from benchmarks.profiles import kernel_rows
from benchmarks.runner import Configuration, Emit, Options, run
from benchmarks.timing import Clock, capture, summary, time_interleaved
from benchmarks.work import layer_work
from segmoe_kernels.testing import Inputs


def calls(provider: Provider, inputs: Inputs, passed: str) -> Callable[[], Any]:
    """What is timed of a provider: its forward, or forward and gradients."""
    if passed == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return provider.call(inputs.x)

        return forward
    x = inputs.x.detach().requires_grad_()
    wanted = (x, *provider.module.parameters())

    def forward_backward() -> tuple[Any, ...]:
        return torch.autograd.grad(provider.call(x), wanted, inputs.dy, allow_unused=True)

    return forward_backward


def admit(
    configuration: Configuration, options: Options, emit: Emit
) -> tuple[list[tuple[Provider, Verdict]], Inputs, float]:
    """Build the providers and let those that are correct through.

    Args:
        configuration: what is measured.
        options: which providers, passes and modes.
        emit: gets a row for each pass and mode of those that are not let through.

    Returns:
        ``(providers with their verdicts, inputs, share of the busiest expert)``.
    """
    device = torch.device(configuration.device)
    workload = configuration.find_workload()
    layer, inputs = make_case(
        workload,
        part=configuration.part,
        routing=configuration.routing,
        dtype=DTYPES[configuration.dtype],
        device=device,
        dropout=configuration.dropout,
    )
    layer.eval()

    def refuse(name: str, key: str, why: str) -> None:
        for identity in options.identities():
            if identity["provider"] == name:
                emit({**identity, key: why})

    providers, skipped = build(options.providers, layer, device)
    for name, why in skipped.items():
        refuse(name, "skipped", why)
    gate, admitted, share = Gate(layer, inputs), [], 0.0
    for provider in providers:
        try:
            provider.module.eval()
            admitted.append((provider, gate.check(provider)))
        except RefusedError as error:
            refuse(provider.name, "refused", str(error))
        except Exception as error:  # a peer may break in any way
            refuse(provider.name, "failed", describe(error))
        else:
            ids = provider.route_ids(inputs.x)
            share = busiest_expert_share(ids, workload.shape.num_experts)
        release_memory(device)
    gate.forget()
    release_memory(device)
    return admitted, inputs, share


def describe(error: Exception) -> str:
    """One line of an error."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}"[:300]


def measure(configuration: Configuration, options: Options, emit: Emit) -> None:
    """Time one configuration."""
    admitted, inputs, share = admit(configuration, options, emit)
    clock = Clock(torch.device(configuration.device))
    providers = {provider.name: provider for provider, _ in admitted}
    verdicts = {provider.name: verdict for provider, verdict in admitted}
    workload = configuration.find_workload()
    for mode in options.modes:
        for passed in options.passes:
            functions: dict[str, Callable[[], Any]] = {}
            for provider, _ in admitted:
                provider.module.train(passed != "forward")
                function = calls(provider, inputs, passed)
                if mode == "graph":
                    identity = {"provider": provider.name, "pass": passed, "mode": mode}
                    try:
                        functions[provider.name] = _captured(provider, function)
                    except Exception as error:  # whatever can't be captured
                        key = "skipped" if isinstance(error, _WaitsError) else "failed"
                        emit({**identity, key: describe(error)})
                else:
                    functions[provider.name] = function
            timings = time_interleaved(
                functions, clock, budget_s=options.budget_s, least_rounds=options.rounds
            )
            backward, itemsize = passed != "forward", inputs.x.element_size()
            work = layer_work(workload, configuration.part, backward=backward, itemsize=itemsize)
            for name, timing in timings.items():
                numbers = summary(timing)
                seconds = numbers["time_median_ms"] / 1e3
                row = {
                    "provider": name,
                    "pass": passed,
                    "mode": mode,
                    **numbers,
                    **work,
                    "needed_tflop_per_s": work["needed_gflop"] / 1e3 / seconds,
                    "floor_gb_per_s": work["floor_mb"] / 1e3 / seconds,
                    "busiest_expert_share": share,
                    "error_over_limit": verdicts[name].error_over_limit,
                    "l2_flushed": clock.flushes,
                }
                if name == "segmoe" and mode == "eager":
                    row["kernels"] = kernel_rows(functions[name], clock.device)
                if backward and mode == "eager":
                    row |= memory_columns(providers[name], inputs)
                if "segmoe" in timings:
                    row["time_over_segmoe"] = timing.ratio(timings["segmoe"])
                    row["least_over_segmoe"] = timing.least_ratio(timings["segmoe"])
                emit(row)
            release_memory(clock.device)


class _WaitsError(Exception):
    """A call that waits for the host can't be captured."""


def _captured(provider: Provider, function: Callable[[], Any]) -> Callable[[], None]:
    if provider.waits:
        raise _WaitsError(provider.waits)
    replay, captured = capture(function)
    replay()
    _same(captured, function())
    return replay


def _same(replayed: Any, expected: Any) -> None:
    """A replay has to give what the call gives; sums by atomics may be rounded otherwise."""
    replayed = (replayed,) if isinstance(replayed, Tensor) else replayed
    expected = (expected,) if isinstance(expected, Tensor) else expected
    for ours, theirs in zip(replayed, expected, strict=True):
        if ours is None or theirs is None:
            continue
        error = (ours.float() - theirs.float()).norm()
        allowed = 4 * torch.finfo(theirs.dtype).eps
        if not error <= allowed * theirs.float().norm():
            raise RefusedError(f"a replay errs {error.item():.3g}")


def line(row: dict[str, Any]) -> str:
    """Format the numbers of a row."""
    text = f"{row['time_median_ms']:>10.4f} ms ({row['time_q1_ms']:.4f} to {row['time_q3_ms']:.4f})"
    if "needed_tflop_per_s" in row:
        text += f"{row['needed_tflop_per_s']:>9.2f} TFLOP/s{row['floor_gb_per_s']:>9.1f} GB/s"
    if "time_over_segmoe" in row:
        text += f"{row['time_over_segmoe']:>8.2f} x"
    return text


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    return run(measure, line, __doc__.splitlines()[0], arguments)


if __name__ == "__main__":
    sys.exit(main())
