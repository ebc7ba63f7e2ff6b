"""What a function launches, written down once and played back: allocations, launches, no more.

A body decides from shapes, strides, dtypes, options and settings alone, and deciding takes longer
than a small kernel. `taped` runs a function as it is the first time that it sees a set of these;
the second time it writes down each allocation, each launch with its arguments, and each operator of
PyTorch's between them; from then on it does these. Tensors that no one but kernels sees share one
allocation.
"""

from collections.abc import Callable
from functools import wraps
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.runtime.driver import driver

from segmoe_kernels._triton.kernels import LISTENER, is_watched
from segmoe_kernels.autograd import autocast_is_on
from segmoe_kernels.options import settings

__all__ = ["forget", "taped"]

# Classes of arguments that say all of themselves.
_VALUES = {type(None), bool, int, float, str, list, tuple}
# What is known of each function: None was seen once, False can't be played back.
TAPES: list[dict[Any, Any]] = []
# Of each function. Lengths that change with every batch make no more.
_MOST_TAPES = 256
# Multiples of this many bytes lie between tensors that share an allocation.
_ALIGNMENT = 256

_aten = torch.ops.aten
_EMPTY = {_aten.empty.memory_format, _aten.empty_like.default, _aten.new_empty.default}


class Recorder(TorchDispatchMode):
    """Numbers all tensors, inputs first, and keeps what happened to them, in order.

    Attributes:
        steps: ``(operator, its arguments, its named arguments, numbers of its results)``, or
            ``(None, arguments of the kernel, (kernel, compiled, grid), ())``.
        places: of each tensor: the number of the one that it is a view of, its bytes behind that.
        refused: something can't be played back.
    """

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()
        # Kept, for an id may come back.
        self.tensors: list[Tensor] = []
        self.detached: list[Tensor] = []
        self.numbers: dict[int, int] = {}
        self.places: list[tuple[int, int]] = []
        self.steps: list[tuple[Any, ...]] = []
        for tensor in inputs:
            self._add(tensor, None)
        # One that is given twice may be two the next time.
        self.refused = len(self.tensors) < len(inputs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        found = func(*args, **named)
        results = found if isinstance(found, tuple | list) else (found,)
        self._know(args, *named.values())
        if any(isinstance(arg, tuple | list) and _tensors_of(arg) for arg in args):
            self.refused = True
        if func is _aten.detach.default:  # `empty_like` ends in one
            self.numbers[id(found)] = self.numbers[id(args[0])]
            self.detached.append(found)
        elif all(isinstance(result, Tensor) for result in results):
            numbers = tuple(self._add(t, args[0] if _is_view(func) else None) for t in results)
            self.steps.append((func, args, named, numbers))
        else:  # read from a tensor
            self.refused = True
        return found

    def launched(self, kernel: Any, compiled: Any, grid: Any, args: tuple[Any, ...]) -> None:
        """Keep a launch."""
        self._know(args)
        self.steps.append((None, args, (kernel, compiled, grid), ()))

    def _know(self, *given: Any) -> None:
        for tensor in _tensors_of(given):
            if id(tensor) not in self.numbers:
                self.refused = True  # it came from elsewhere
                self._add(tensor, None)

    def _add(self, tensor: Tensor, base: Tensor | None) -> int:
        number = self.numbers.get(id(tensor))
        if number is None:
            number = self.numbers[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor)
            place = (number, 0)
            if base is not None:
                owner, offset = self.places[self.numbers[id(base)]]
                place = (owner, offset + tensor.data_ptr() - base.data_ptr())
            self.places.append(place)
        return number


def _is_view(func: Any) -> bool:
    aliases = [result.alias_info for result in func._schema.returns]
    return bool(aliases) and all(a is not None and not a.is_write for a in aliases)


class Tape:
    """A recorded call, as what to do with lists.

    ``held`` has the tensors by their numbers; ``values`` has numbers, pointers, and tuples of
    these, which launches take their arguments from.
    """

    def __init__(self, recorder: Recorder, num_inputs: int, result: Any) -> None:
        self.recorder: Any = recorder
        self.single = isinstance(result, Tensor)
        self.kind = type(result)
        results = (result,) if self.single else result
        self.held: list[Any] = [None] * (len(recorder.tensors) - num_inputs)  # and constants
        self.num_inputs = num_inputs
        self.outputs = [self._number(tensor) for tensor in results]
        self.values: list[Any] = []
        self.slots: dict[Any, int] = {}
        self.steps: list[Callable[[list[Any], list[Any], int], None]] = []
        self.hooks: list[list[Any]] = []  # of the kernels
        self.compiled: list[Any] = []  # kept, as launches know their functions' handles alone
        self.room = 0  # bytes of those that share an allocation
        self.new: list[tuple[Any, ...]] = []  # number, slot of its pointer, shape, strides, dtype
        self.shared: list[tuple[int, int]] = []  # slot, bytes behind the first
        kept, self.pointed, self.needed = self._used(recorder.steps)
        inputs = sorted(number for number in self.pointed if number < num_inputs)
        self.pointers = [(self._slot(("pointer", number)), number) for number in inputs]
        for func, given, named, made in kept:
            if func is None:
                self._add_launch(given, *named)
            elif self._is_empty(func, made[0]):
                self._add_allocation(recorder.tensors[made[0]], made[0])
            elif (base := self._base(func, made)) is not None:
                self._add_view(base, recorder.tensors[made[0]], made[0])
            else:
                self._add_call(func, given, named, made)
        del self.recorder, self.slots, self.pointed, self.needed

    def _is_empty(self, func: Any, number: int) -> bool:
        x, made = self.recorder.tensors[0], self.recorder.tensors[number]
        return func in _EMPTY and made.is_contiguous() and made.device == x.device

    def _base(self, func: Any, made: tuple[int, ...]) -> int | None:
        """What a view begins with, if that says where it is."""
        base, offset = self.recorder.places[made[0]]
        return base if _is_view(func) and len(made) == 1 and offset == 0 else None

    def _used(self, steps: list[Any]) -> tuple[list[Any], set[int], set[int]]:
        """Steps with an effect; tensors that kernels point at; those that have to be tensors."""
        numbers, places = self.recorder.numbers, self.recorder.places
        kept, pointed, needed = [], set(), set(self.outputs)
        for step in reversed(steps):
            func, given, named, made = step
            tensors = {numbers[id(tensor)] for tensor in _tensors_of((given, named))}
            if func is None:
                pointed |= {places[number][0] for number in tensors}
            elif not self._is_empty(func, made[0]):
                if not func._schema.is_mutable and (needed | pointed).isdisjoint(made):
                    continue
                base = self._base(func, made)
                needed |= tensors.union(made) if base is None else {base, *made}
            kept.append(step)
        return kept[::-1], pointed, needed

    def _number(self, value: Any) -> int:
        """Where a tensor or a constant is among those held."""
        if isinstance(value, Tensor):
            return int(self.recorder.numbers[id(value)])
        self.held.append(value)
        return self.num_inputs + len(self.held) - 1

    def _slot(self, key: Any, value: Any = None) -> int:
        slot: int = self.slots.setdefault(key, len(self.values))
        if slot == len(self.values):
            self.values.append(value)
        return slot

    def _pointer(self, number: int) -> int | None:
        return self._slot(("pointer", number)) if number in self.pointed else None

    def _add_allocation(self, tensor: Tensor, number: int) -> None:
        slot = self._pointer(number)
        if number in self.needed:
            self.new.append((number, slot, tensor.shape, tensor.stride(), tensor.dtype))
        elif slot is not None:
            self.shared.append((slot, self.room))
            self.room += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT

    def _add_view(self, base: int, tensor: Tensor, number: int) -> None:
        shape, strides = tensor.shape, tensor.stride()

        def view(held: list[Any], _: list[Any], __: int) -> None:
            held[number] = held[base].as_strided(shape, strides)

        self.steps.append(view)

    def _add_call(self, func: Any, args: Any, named: dict[str, Any], made: tuple[int, ...]) -> None:
        get = _getter(tuple(map(self._number, args)))
        numbers = {name: self._number(value) for name, value in named.items()}
        # The same operator, past the parsing of its schema.
        run = getattr(torch._C._VariableFunctions, func._schema.name.partition("::")[2], func)
        results = [(number, self._pointer(number)) for number in made]

        def call(held: list[Any], values: list[Any], _: int) -> None:
            found = run(*get(held), **{name: held[number] for name, number in numbers.items()})
            listed = found if isinstance(found, tuple | list) else (found,)
            for (number, slot), result in zip(results, listed, strict=True):
                held[number] = result
                if slot is not None:
                    values[slot] = result.data_ptr()

        self.steps.append(call)

    def _add_launch(self, args: tuple[Any, ...], kernel: Any, compiled: Any, grid: Any) -> None:
        before: list[tuple[int, Callable[[Any], Any]]] = []

        def derived(key: Any, get: Callable[[Any], Any]) -> int:
            known = key in self.slots
            slot = self._slot(key)
            if not known:
                before.append((slot, get))
            return slot

        def place(value: Any) -> int:
            if isinstance(value, Tensor):
                number, offset = self.recorder.places[self.recorder.numbers[id(value)]]
                slot = self._slot(("pointer", number))
                return derived((slot, offset), lambda v: v[slot] + offset) if offset else slot
            if isinstance(value, tuple) and _tensors_of(value):
                slots = tuple(map(place, value))
                return derived((tuple, slots), _getter(slots))
            return self._slot((type(value), value), value)

        get = _getter(tuple(map(place, args)))
        blocks, run = (*grid, 1, 1)[:3], compiled.run
        function, metadata = compiled.function, compiled.packed_metadata
        constants, hooks = kernel.constants, (None, None, None)

        def launch(_: list[Any], values: list[Any], stream: int) -> None:
            for slot, make in before:
                values[slot] = make(values)
            run(*blocks, stream, function, metadata, *hooks, *get(values), *constants)

        self.steps.append(launch)
        self.hooks.append(kernel.pre_run_hooks)
        self.compiled.append(compiled)

    def play(self, inputs: list[Tensor]) -> Any:
        """Do it with other tensors; None where a pointer is less aligned, or a kernel watched."""
        values, aligned = self.values.copy(), 0
        for slot, number in self.pointers:
            values[slot] = pointer = inputs[number].data_ptr()
            aligned |= pointer
        if aligned & 15 or any(self.hooks):
            return None
        held, device, empty = inputs + self.held, inputs[0].device, torch.empty_strided
        for number, slot, shape, strides, dtype in self.new:
            held[number] = tensor = empty(shape, strides, dtype=dtype, device=device)
            if slot is not None:
                values[slot] = tensor.data_ptr()
        if self.room:
            room = empty((self.room,), (1,), dtype=torch.uint8, device=device)
            start = room.data_ptr()
            for slot, offset in self.shared:
                values[slot] = start + offset
        stream = driver.active.get_current_stream(max(0, inputs[0].get_device()))
        for step in self.steps:
            step(held, values, stream)
        outputs = [held[number] for number in self.outputs]
        return outputs[0] if self.single else self.kind(outputs)


def _getter(slots: tuple[int, ...]) -> Callable[[Any], Any]:
    """The function that returns a tuple of some values."""
    if len(slots) > 1:
        return itemgetter(*slots)
    return lambda values: tuple(values[slot] for slot in slots)


def _tensors_of(value: Any) -> list[Tensor]:
    value = (*value.values(),) if isinstance(value, dict) else value
    if isinstance(value, tuple | list):
        return [tensor for part in value for tensor in _tensors_of(part)]
    return [value] if isinstance(value, Tensor) else []


def taped(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function without autocast, played back where a call is as one before it.

    Args:
        function: of tensors and options, the first a tensor; it returns tensors or None.

    Returns:
        A function of the same arguments, in order.
    """
    ordinary = knobs.runtime.interpret or torch.version.hip is not None
    run = function if ordinary else _played(function)

    @wraps(function)
    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or not autocast_is_on(args[0].device.type):
            return run(*args)
        # Kernels take what they are given: a product that is cast would not fit them, nor what was
        # written down outside of autocast.
        with torch.autocast(args[0].device.type, enabled=False):
            return run(*args)

    return call


def _played(function: Callable[..., Any]) -> Callable[..., Any]:
    tapes: dict[Any, Any] = {}

    def call(*args: Any) -> Any:
        if _is_heard(args[0]) or is_watched():
            return function(*args)
        inputs: list[Tensor] = []
        key = _key(args, inputs)
        tape: Any = tapes.get(key, _UNSEEN) if key is not None else False
        if tape is False:
            return function(*args)
        if tape is _UNSEEN:
            if len(tapes) >= _MOST_TAPES:
                tapes.clear()
            tapes[key] = None
            return function(*args)
        if tape is None:
            found, tapes[key] = _record(function, args, inputs)
            return found
        device = inputs[0].get_device()
        if device < 0 or device == driver.active.get_current_device():
            found = tape.play(inputs)
        else:
            with torch.cuda.device(device):
                found = tape.play(inputs)
        return function(*args) if found is None else found

    TAPES.append(tapes)
    return call


def forget() -> None:
    """Write everything down anew: for those who change what functions decide."""
    for tapes in TAPES:
        tapes.clear()


_UNSEEN: Any = object()


def _is_heard(x: Tensor) -> bool:
    """Whether something between a call and its kernels has a say: compilers, modes, transforms."""
    return bool(
        torch.compiler.is_compiling()
        or LISTENER.recorder is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
        or not (x.is_cuda or x.is_cpu)
    )


def _key(args: tuple[Any, ...], inputs: list[Tensor]) -> tuple[Any, ...] | None:
    """All that a function decides from, or None; adds the tensors to inputs."""
    x, now, recorded = args[0], settings(), torch.is_grad_enabled()
    if not now.replay:
        return None
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    key: list[Any] = [now, x.get_device(), tf32]
    for arg in args:
        kind = type(arg)
        if kind is Tensor or kind is nn.Parameter:
            if (recorded and arg.requires_grad) or arg.is_neg():  # whose memory has other signs
                return None
            inputs.append(arg)
            key += (arg.shape, arg.stride(), arg.dtype)
        elif kind in _VALUES:
            key.append(tuple(arg) if kind is list else arg)
        else:
            return None
    return tuple(key)


def _record(
    function: Callable[..., Any], args: tuple[Any, ...], inputs: list[Tensor]
) -> tuple[Any, Any]:
    """What the function returns, and its tape."""
    recorder = Recorder(inputs)
    if recorder.refused or any(tensor.data_ptr() & 15 for tensor in inputs):
        return function(*args), None
    LISTENER.recorder = recorder
    try:
        with recorder:
            found = function(*args)
    finally:
        LISTENER.recorder = None
    return found, False if recorder.refused else Tape(recorder, len(inputs), found)
