"""What a model must go on doing when its FFNs become experts of segments: `Probe`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import is_dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from segmoe_kernels import validation as check
from segmoe_kernels.layer import SegMoE
from segmoe_kernels.models.adapters import mixes_steps
from segmoe_kernels.models.dense import evaluating

# Fractions of the largest output. A property held before a swap if the rest is rounding: weights
# of fresh models are so small that a true dependence may be a few 1e-4. After the swap what the
# layers mix is of the size of the output itself.
ROUNDING, CLOSE = 1e-5, 3e-4
_NARROW = {torch.float16, torch.bfloat16}
# Of an output, and of the output on changed inputs: what should be equal.
Pairs = Callable[[Tensor, Tensor], list[tuple[Tensor, Tensor]]]


class _Trial(NamedTuple):
    """Changed inputs, and what of the outputs may not depend on the change.

    ``rows`` says whether a layer's rows on the old and the new inputs, (..., T, D), tell that they
    are no steps; None where it can't say. ``base`` are the inputs before the change, if other ones.
    """

    rule: str
    inputs: Any
    pairs: Pairs | None
    rows: Callable[[Tensor, Tensor], bool | None] = lambda *_: None
    base: Any = None


class _Seen(NamedTuple):
    """What a call gave, and which rows it sent to each layer."""

    outputs: list[Tensor]
    rows: dict[str, Tensor]
    calls: int


class Probe:
    """Properties of a model on example inputs, told before a swap and asked for after it.

    Whether experts mix what they should not is a matter of structure; but what they mix may be seen
    by chance only, and not at all where all start as copies of one FFN. So each output of a layer
    gets a sum over what the layer may look at added to it.
    """

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self.model, self.inputs = model, inputs
        self.trials = list(_trials(inputs))
        plain = _run(model, inputs)
        self.held: list[list[bool]] = []
        for trial in self.trials:
            base = plain if trial.base is None else _run(model, trial.base)
            changed = _run(model, trial.inputs)
            self.held.append(_holds(trial, base.outputs, changed.outputs, ROUNDING))

    def broken(self, layers: Mapping[str, SegMoE]) -> Iterator[tuple[str, str]]:
        """``(module or "", rule)`` of what does not hold with the layers in the model."""
        layers = {name: layer for name, layer in layers.items() if mixes_steps(layer)}
        if not layers:
            return
        plain = _run(self.model, self.inputs, layers, layers)
        told: dict[tuple[str, str], list[bool]] = {}
        for trial, held in zip(self.trials, self.held, strict=True):
            changed = _run(self.model, trial.inputs, layers, layers)
            base = plain if trial.base is None else _run(self.model, trial.base, layers, layers)
            for name, rows in changed.rows.items():
                wrong = trial.rows(base.rows[name], rows)
                if wrong is not None:
                    told.setdefault((name, trial.rule), []).append(wrong)
            holds = _holds(trial, base.outputs, changed.outputs, CLOSE)
            if any(was and not now for was, now in zip(held, holds, strict=False)):
                yield "", trial.rule
        # By chance one trial alone may look so, as where features are dead.
        yield from (found for found, wrong in told.items() if all(wrong))

    def unseen(self, layers: Mapping[str, SegMoE]) -> Iterator[str]:
        """Layers that the example doesn't reach, or from which nothing reaches the outputs."""
        layers = {name: layer for name, layer in layers.items() if mixes_steps(layer)}
        plain = _run(self.model, self.inputs).outputs
        for name, layer in layers.items():
            mixed = _run(self.model, self.inputs, {name: layer}, layers)
            alone = name in mixed.rows and mixed.rows[name].shape[-2] == 1
            if alone or all(_close(*pair) for pair in zip(plain, mixed.outputs, strict=True)):
                yield name

    def calls(self, layers: Mapping[str, SegMoE]) -> int:
        """How often one forward calls the layers, all of them together."""
        return _run(self.model, self.inputs, watched=layers).calls


def check_inputs(inputs: Any) -> None:
    """Refuse example inputs in which nothing can be changed."""
    name = "replace_ffn"
    if not isinstance(inputs, Mapping | tuple | list):
        rule = "be a tuple of arguments or a dict of keyword arguments"
        check.fail_type(name, "example_inputs", rule, type(inputs).__name__)
    tensors = _tensors(inputs)
    if not tensors or tensors[0].ndim < 2 or len(tensors[0]) < 2:
        rule = "begin with a tensor of at least 2 sequences, (B, T, ...)"
        got = [tuple(tensor.shape) for tensor in tensors]
        check.fail_value(name, "example_inputs", rule, got)
    if any(tensor.is_meta for tensor in tensors):
        check.fail_value(name, "example_inputs", "have values", "tensors on meta")
    if _reversed(tensors[0]).equal(tensors[0]) or tensors[0].roll(1, 0).equal(tensors[0]):
        rule = "have sequences that differ, and from their reverse, too"
        check.fail_value(name, "example_inputs", rule, "equal ones")


def _tensors(value: Any) -> list[Tensor]:
    """All tensors of arguments or outputs, in order."""
    if isinstance(value, Tensor):
        return [value]
    if is_dataclass(value) and not isinstance(value, Mapping):
        value = vars(value)
    if isinstance(value, Mapping):
        value = tuple(value.values())
    inside = value if isinstance(value, tuple | list) else ()
    return [tensor for part in inside for tensor in _tensors(part)]


def _changed(inputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Arguments with each tensor changed."""
    inputs = dict(inputs) if isinstance(inputs, Mapping) else inputs
    return tree_map_only(Tensor, change, inputs)


def _trials(inputs: Any) -> Iterator[_Trial]:
    """Sequences are dimension 0 of the first tensor, time is 1; values stay valid token ids."""
    first = _tensors(inputs)[0]
    batch, length = first.shape[:2]

    def reverse_others(x: Tensor) -> Tensor:
        return torch.cat([x[:1], _reversed(x[1:])]) if x.ndim > 1 and len(x) == batch else x

    def same_first(old: Tensor, new: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [(old[:1], new[:1])] if old.ndim and old.shape[0] == batch else []

    rule = "keep its independence of the sequences in a batch"
    yield _Trial(rule, _changed(inputs, reverse_others), same_first)
    # Behind each length that patches may have: an output may have one row for a patch.
    for cut in range(1, length):
        if length % cut == 0 or cut == length - 1:
            yield from _of_the_future(inputs, cut)
    for dim in range(1, first.ndim):
        if first.shape[dim] > 1:
            yield _of_order(inputs, dim)
            if dim > 1:
                yield _of_others(inputs, dim)
    yield from _of_hidden_steps(inputs)


def _of_the_future(inputs: Any, cut: int) -> Iterator[_Trial]:
    """Change the steps behind a cut: what lies before must not see it, and may have no width."""
    batch, length = _tensors(inputs)[0].shape[:2]

    def roll_future(x: Tensor, dim: int) -> Tensor:
        if x.ndim < 2 or x.shape[:2] != (batch, length):
            return x
        return torch.cat([x[:, :cut], x[:, cut:].roll(1, dim)], 1)

    def same_past(old: Tensor, new: Tensor) -> list[tuple[Tensor, Tensor]]:
        past = _past(old.shape[1], cut, length) if old.ndim > 1 and len(old) == batch else 0
        return [(old[:, :past], new[:, :past])] if past else []

    def time_is_width(old: Tensor, new: Tensor) -> bool | None:
        past = _past(old.shape[-1], cut, length)
        if past == 0 or cut == length - 1 or old.shape != new.shape:
            return None
        future = range(past, old.shape[-1])
        kept = _close(old[..., :past], new[..., :past])
        return kept and not any(_close(old[..., i], new[..., i]) for i in future)

    exchanged = _changed(inputs, partial(roll_future, dim=0))
    yield _Trial("keep its causality", exchanged, same_past)
    # Not exchanged, so that a mean over time stays.
    reordered = _changed(inputs, partial(roll_future, dim=1))
    rule = "have steps for the rows of its FFNs, not for their width"
    yield _Trial(rule, reordered, None, time_is_width)


def _of_order(inputs: Any, dim: int) -> _Trial:
    """Change the order of a dimension."""
    first = _tensors(inputs)[0]
    order = _order(first.shape[dim]).to(first.device)

    def permute(x: Tensor) -> Tensor:
        fits = x.ndim > dim and x.shape[dim] == len(order)
        return x.index_select(dim, order) if fits else x

    def same(old: Tensor, new: Tensor) -> list[tuple[Tensor, Tensor]]:
        dims = [d for d in range(1, old.ndim) if old.shape[d] == len(order)]
        return [(old, new), *((old.index_select(d, order), new) for d in dims)]

    def permuted(old: Tensor, new: Tensor) -> bool | None:
        if dim == 1 or old.shape[-2] != len(order) or old.shape != new.shape:
            return None
        return not _close(old, new) and _close(old.index_select(-2, order), new)

    rule = f"keep its equivariance under permutations of dimension {dim}"
    if dim == 1:
        rule += " (steps have an order in models with positions)"
    return _Trial(rule, _changed(inputs, permute), same, permuted)


def _of_others(inputs: Any, dim: int) -> _Trial:
    """Change one variate alone, as variates with weights of their own have an order."""
    first = _tensors(inputs)[0]
    size = first.shape[dim]

    def exchange_one(x: Tensor) -> Tensor:
        if x is not first:
            return x
        one, others = x.split([1, size - 1], dim)
        return torch.cat([one.roll(1, 0), others], dim)

    def same_others(old: Tensor, new: Tensor) -> list[tuple[Tensor, Tensor]]:
        dims = [d for d in range(1, old.ndim) if old.shape[d] == size]
        return [(old.narrow(d, 1, size - 1), new.narrow(d, 1, size - 1)) for d in dims]

    def one_row(old: Tensor, new: Tensor) -> bool | None:
        if old.shape[-2] != size or old.shape != new.shape:
            return None
        return not _close(old, new) and _close(old[..., 1:, :], new[..., 1:, :])

    rule = f"keep its independence along dimension {dim}"
    return _Trial(rule, _changed(inputs, exchange_one), same_others, one_row)


def _of_hidden_steps(inputs: Any) -> Iterator[_Trial]:
    """Change steps that a mask hides: of the example where it hides some, else of its end."""
    first, *others = _tensors(inputs)
    batch, length = first.shape[:2]
    for mask in others:
        if mask.shape != (batch, length) or not ((mask == 0) | (mask == 1)).all():
            continue
        hiding, bits = mask, mask == 1
        if not bits.any() and not (mask.dtype == torch.bool or mask.is_floating_point()):
            continue  # perhaps indices, of which 1 may be none
        if bits.all() or not bits.any():
            hiding, bits = mask.clone(), bits.clone()
            hiding[:, length // 2 :] = (~bits[:, :1]).to(mask.dtype)
            bits[:, length // 2 :] = ~bits[:, :1]
        # Whether 1 hides or shows is the model's matter: the other way nothing holds before.
        for hidden in (bits, ~bits):
            yield _of_hidden(inputs, mask, hiding, hidden.to(first.device))


def _of_hidden(inputs: Any, mask: Tensor, hiding: Tensor, hidden: Tensor) -> _Trial:
    first = _tensors(inputs)[0]

    def hide(x: Tensor) -> Tensor:
        return hiding if x is mask else x

    def exchange_hidden(x: Tensor) -> Tensor:
        where = hidden.view(*hidden.shape, *[1] * (x.ndim - 2))
        return torch.where(where, x.flip(1).roll(1, 0), x) if x is first else hide(x)

    def same_visible(old: Tensor, new: Tensor) -> list[tuple[Tensor, Tensor]]:
        if old.shape != new.shape or old.shape[:2] != hidden.shape:
            return [(old, new)]  # a loss, or what was pooled
        visible = ~hidden.to(old.device)
        return [(old[visible], new[visible])]

    rule = "keep its independence of the steps that a mask hides"
    base = None if hiding is mask else _changed(inputs, hide)
    return _Trial(rule, _changed(inputs, exchange_hidden), same_visible, base=base)


def _reversed(x: Tensor) -> Tensor:
    return x.flip(tuple(range(1, x.ndim)))


def _past(size: int, cut: int, length: int) -> int:
    """How many of ``size`` steps or patches lie before a cut."""
    return cut * size // length if length % size == 0 else 0


def _order(size: int) -> Tensor:
    """A permutation that is no rotation, under which circular convolutions are equivariant, too."""
    generator = torch.Generator().manual_seed(0)
    start = torch.arange(size, device="cpu")
    while True:
        order = torch.randperm(size, generator=generator, device="cpu")
        if ((order - start) % size != order[0]).any() or (size == 2 and order[0] == 1):
            return order


def _run(
    model: nn.Module,
    inputs: Any,
    mixed: Mapping[str, SegMoE] | None = None,
    watched: Mapping[str, SegMoE] | None = None,
) -> _Seen:
    """Call a model in eval mode, the same random numbers each time."""
    rows: dict[str, Tensor] = {}
    calls: list[str] = []
    with ExitStack() as after:
        after.enter_context(evaluating(model))
        after.enter_context(_in_float32(model))
        inputs = _changed(inputs, _widened)
        cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        after.enter_context(torch.random.fork_rng(cuda))
        torch.manual_seed(0)
        for name, layer in (watched or {}).items():

            def keep(_: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                rows[name] = args[0]
                calls.append(name)

            after.callback(layer.register_forward_pre_hook(keep).remove)
        for layer in (mixed or {}).values():
            after.callback(layer.register_forward_hook(_mix).remove)
        out = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    return _Seen([x for x in _tensors(out) if x.is_floating_point()], rows, len(calls))


def _widened(x: Tensor) -> Tensor:
    """What has 16 bits in float32."""
    return x.float() if x.dtype in _NARROW else x


@contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """Parameters and buffers of 16 bits in float32: their rounding would hide what depends on what.

    Afterwards each has the very memory that it had.
    """
    tensors = [w for w in (*model.parameters(), *model.buffers()) if w.dtype in _NARROW]
    kept = [(w, w.data) for w in tensors if type(w.data) is Tensor]
    try:
        for weight, data in kept:
            weight.data = _widened(data)
        yield
    finally:
        for weight, data in kept:
            weight.data = data


def _mix(layer: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
    """Add to each step a sum over the segment that decides its experts."""
    assert isinstance(layer, SegMoE)
    x, size = args[0], layer.segment_size
    if len(args) > 1 and args[1] is not None:
        x = x.masked_fill(~args[1][..., None], 0)  # padding
    length = x.shape[-2]
    segments = F.pad(x, (0, 0, 0, -length % size)).unflatten(-2, (-1, size))
    # A weight for each step, so that an order inside a segment matters.
    weights = torch.linspace(1, 2, size, dtype=x.dtype, device=x.device)[:, None]
    seen = (segments * weights).sum(-2, keepdim=True)
    if layer.causal:
        seen = F.pad(seen, (0, 0, 0, 0, 1, 0))[..., :-1, :, :]
    mixed: Tensor = y + seen.expand(segments.shape).flatten(-3, -2)[..., :length, :]
    return mixed


def _holds(
    trial: _Trial, old: Sequence[Tensor], new: Sequence[Tensor], tolerance: float
) -> list[bool]:
    if trial.pairs is None:
        return []
    pairs = [pair for tensors in zip(old, new, strict=True) for pair in trial.pairs(*tensors)]
    return [_close(*pair, tolerance) for pair in pairs]


def _close(expected: Tensor, actual: Tensor, tolerance: float = CLOSE) -> bool:
    """Equal up to a fraction of the largest element."""
    if expected.shape != actual.shape or expected.numel() == 0:
        return expected.shape == actual.shape
    largest = expected.abs().amax() * tolerance
    return bool((expected - actual).abs().amax() <= largest)
