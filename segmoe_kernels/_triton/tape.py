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

from segmoe_kernels._triton.dispatch import is_heard
from segmoe_kernels._triton.prepared import LISTENER, is_watched, launch_arguments
from segmoe_kernels.pipeline import no_autocast

__all__ = ["taped"]

# Of each function. Lengths that change with every batch make no more.
_MOST_TAPES = 256
# Where tensors begin that share an allocation, in bytes.
_BETWEEN = 256

_aten = torch.ops.aten
_ALLOCATIONS = {
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.new_empty.default,
}


class Recorder(TorchDispatchMode):
    """Numbers all tensors, inputs first, and keeps what happened to them.

    Attributes:
        steps: ``(operator, its arguments, numbers of its results)``, or
            ``(None, (kernel, compiled, grid, arguments), ())``.
        places: of each tensor: the number of the one that it is a view of, its bytes behind that.
    """

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []  # kept, for an id may come back
        self.numbers: dict[int, int] = {}
        self.places: list[tuple[int, int]] = []
        self.steps: list[tuple[Any, Any, tuple[int, ...]]] = []
        for tensor in inputs:
            self._number(tensor, None)
        # One that is given twice may be two the next time.
        self.refused = len(self.tensors) < len(inputs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        results = found if isinstance(found, tuple | list) else (found,)
        if not all(isinstance(result, Tensor) for result in results):
            self.refused = True  # something read from a tensor
            return found
        self._expect((args, kwargs))
        base = args[0] if _is_view(func) else None
        numbers = tuple(self._number(result, base) for result in results)
        self.steps.append((func, (args, kwargs or {}), numbers))
        return found

    def launched(self, kernel: Any, compiled: Any, grid: Any, args: tuple[Any, ...]) -> None:
        """Keep a launch."""
        self._expect(args)
        self.steps.append((None, (kernel, compiled, grid, args), ()))

    def _expect(self, given: Any) -> None:
        if any(id(tensor) not in self.numbers for tensor in _tensors_of(given)):
            self.refused = True  # one from elsewhere
            for tensor in _tensors_of(given):
                self._number(tensor, None)

    def number(self, tensor: Tensor) -> int:
        """A tensor's number."""
        return self.numbers[id(tensor)]

    def _number(self, tensor: Tensor, base: Tensor | None) -> int:
        number = self.numbers.get(id(tensor))
        if number is None:
            number = self.numbers[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor)
            place = (number, 0)
            if base is not None:
                owner, offset = self.places[self.number(base)]
                place = (owner, offset + tensor.data_ptr() - base.data_ptr())
            self.places.append(place)
        return number


def _is_view(func: Any) -> bool:
    aliases = [result.alias_info for result in func._schema.returns]
    return bool(aliases) and all(a is not None and not a.is_write for a in aliases)


def _allocates(func: Any, result: Tensor) -> bool:
    return func in _ALLOCATIONS and result.is_contiguous()


class Tape:
    """A recorded function, as lists of what to do with ``held``, its tensors by their numbers.

    Launches take their arguments from ``values``: constants, pointers, and tuples of these.
    """

    def __init__(self, recorder: Recorder, inputs: list[Tensor], result: Any) -> None:
        self.kind = type(result)
        self.outputs = [None if t is None else recorder.number(t) for t in _listed(result)]
        self.device = inputs[0].device
        self.values: list[Any] = []
        self.slots: dict[Any, int] = {}
        self.steps: list[tuple[Any, ...]] = []
        self.kernels = []
        kept, pointed, needed = self._needed(recorder)
        self.room = 0
        self.pointers: list[tuple[int, int]] = []  # of inputs: slot, number
        self.new: list[tuple[int, int | None, Any, torch.dtype]] = []
        self.shared: list[tuple[int, int]] = []  # slot, bytes behind the first
        for number in range(len(inputs)):
            if number in pointed:
                self.pointers.append((self._slot(("pointer", number)), number))
        for func, given, numbers in kept:
            if func is None:
                self._add_launch(recorder, *given)
            elif _allocates(func, recorder.tensors[numbers[0]]):
                self._add_allocation(recorder.tensors[numbers[0]], numbers[0], pointed, needed)
            else:
                self._add_call(recorder, func, *given, numbers, pointed)
        self.held = [None] * (len(recorder.tensors) - len(inputs))

    def _needed(self, recorder: Recorder) -> tuple[list[Any], set[int], set[int]]:
        """Steps that have an effect, tensors that kernels point at, tensors that have to be some."""
        kept, pointed = [], set()
        needed = {number for number in self.outputs if number is not None}
        for step in reversed(recorder.steps):
            func, given, numbers = step
            if func is None:
                pointed |= {recorder.places[recorder.number(t)][0] for t in _tensors_of(given[-1])}
            elif not _allocates(func, recorder.tensors[numbers[0]]):
                used = not needed.isdisjoint(numbers) or not pointed.isdisjoint(numbers)
                if not used and not func._schema.is_mutable:
                    continue
                needed |= {*numbers, *(recorder.number(t) for t in _tensors_of(given))}
            kept.append(step)
        return kept[::-1], pointed, needed

    def _slot(self, key: Any, value: Any = None) -> int:
        slot = self.slots.get(key)
        if slot is None:
            slot = self.slots[key] = len(self.values)
            self.values.append(value)
        return slot

    def _add_allocation(
        self, tensor: Tensor, number: int, pointed: set[int], needed: set[int]
    ) -> None:
        slot = self._slot(("pointer", number)) if number in pointed else None
        if number in needed:
            self.new.append((number, slot, tensor.shape, tensor.dtype))
        elif slot is not None:
            self.shared.append((slot, self.room))
            self.room += -(-tensor.nbytes // _BETWEEN) * _BETWEEN

    def _add_call(
        self,
        recorder: Recorder,
        func: Any,
        args: Any,
        kwargs: Any,
        numbers: tuple[int, ...],
        pointed: set[int],
    ) -> None:
        def held(value: Any) -> Any:
            if isinstance(value, Tensor):
                return _Number(recorder.number(value))
            return type(value)(map(held, value)) if isinstance(value, tuple | list) else value

        made = [(n, self._slot(("pointer", n)) if n in pointed else None) for n in numbers]
        named = {name: held(value) for name, value in kwargs.items()}
        self.steps.append((None, func, held(args), named, made))

    def _add_launch(
        self, recorder: Recorder, kernel: Any, compiled: Any, grid: Any, args: tuple[Any, ...]
    ) -> None:
        before: list[tuple[int, Callable[[Any], Any]]] = []

        def place(value: Any) -> int:
            if isinstance(value, Tensor):
                number, offset = recorder.places[recorder.number(value)]
                slot = self._slot(("pointer", number))
                if offset == 0:
                    return slot
                return made((slot, "+", offset), lambda values: values[slot] + offset)
            if isinstance(value, tuple):
                slots = tuple(map(place, value))
                return made(slots, _getter(slots))
            return self._slot((type(value), value), value)

        def made(key: Any, get: Callable[[Any], Any]) -> int:
            known = key in self.slots
            slot = self._slot(key)
            if not known:
                before.append((slot, get))
            return slot

        get = _getter(tuple(map(place, args)))
        front = launch_arguments(compiled, grid, 0)
        tail = (*front[4:],)
        self.steps.append((compiled.run, front[:3], tail, before, get, kernel.constants))
        self.kernels.append((kernel, compiled))

    def play(self, inputs: list[Tensor]) -> Any:
        """Do what was recorded; None where a pointer is less aligned than it was then."""
        values, held = self.values.copy(), inputs + self.held
        aligned = 0
        for slot, number in self.pointers:
            values[slot] = pointer = inputs[number].data_ptr()
            aligned |= pointer
        if aligned & 15:
            return None
        empty, device = torch.empty, self.device
        for number, slot, shape, dtype in self.new:
            held[number] = tensor = empty(shape, dtype=dtype, device=device)
            if slot is not None:
                values[slot] = tensor.data_ptr()
        if self.room:
            room = empty(self.room, dtype=torch.uint8, device=device)
            start = room.data_ptr()
            for slot, offset in self.shared:
                values[slot] = start + offset
        stream = driver.active.get_current_stream(driver.active.get_current_device())
        for run, front, tail, before, get, *rest in self.steps:
            if run is None:
                self._call(front, tail, before, get, held, values)
                continue
            for slot, make in before:
                values[slot] = make(values)
            run(*front, stream, *tail, *get(values), *rest[0])
        outputs = [None if number is None else held[number] for number in self.outputs]
        return outputs[0] if self.kind is Tensor else self.kind(outputs)

    def _call(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        made: list[tuple[int, int | None]],
        held: list[Any],
        values: list[Any],
    ) -> None:
        def given(value: Any) -> Any:
            if type(value) is _Number:
                return held[value]
            return type(value)(map(given, value)) if isinstance(value, tuple | list) else value

        found = func(*map(given, args), **{name: given(value) for name, value in kwargs.items()})
        results = found if isinstance(found, tuple | list) else (found,)
        for (number, slot), result in zip(made, results, strict=True):
            held[number] = result
            if slot is not None:
                values[slot] = result.data_ptr()


def taped(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, played back where a call is as one before it.

    Args:
        function: of tensors and options, the first a tensor; it returns tensors or None.

    Returns:
        A function of the same arguments, in order.
    """
    if knobs.runtime.interpret or torch.version.hip is not None:
        return function
    # None is for what was seen once, False for what can't be played.
    tapes: dict[Any, Tape | bool | None] = {}

    @wraps(function)
    def call(*args: Any) -> Any:
        if is_heard(args) or LISTENER.recorder is not None or is_watched():
            return function(*args)
        key = _key(args)
        tape = tapes.get(key, _UNSEEN)
        if tape is _UNSEEN:
            if len(tapes) >= _MOST_TAPES:
                tapes.clear()
            tapes[key] = None
        elif tape is None:
            found, tapes[key] = _record(function, args)
            return found
        elif tape is not False:
            inputs = [arg for arg in args if isinstance(arg, Tensor)]
            device = inputs[0].get_device()
            if device < 0 or device == driver.active.get_current_device():
                found = tape.play(inputs)
            else:
                with torch.cuda.device(device):
                    found = tape.play(inputs)
            if found is not None:
                return found
        return function(*args)

    call.tapes = tapes
    return call


_UNSEEN: Any = object()


def _key(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """All that a function decides from."""
    key: list[Any] = [args[0].get_device()]
    for arg in args:
        if isinstance(arg, Tensor):
            key += (arg.shape, arg.stride(), arg.dtype)
        else:
            key.append(tuple(arg) if type(arg) is list else arg)
    return tuple(key)


def _record(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, Tape | bool | None]:
    """What the function returns, and its tape."""
    inputs = [arg for arg in args if isinstance(arg, Tensor)]
    aligned = 0
    for tensor in inputs:
        aligned |= tensor.data_ptr()
    recorder = Recorder(inputs)
    if recorder.refused or aligned & 15:
        return function(*args), None
    LISTENER.recorder = recorder
    try:
        with recorder:
            found = function(*args)
    finally:
        LISTENER.recorder = None
    return found, False if recorder.refused else Tape(recorder, inputs, found)


class _Number(int):
    """A tensor's number among a call's arguments."""


def _getter(slots: tuple[int, ...]) -> Callable[[Any], Any]:
    """The function of ``values`` that returns a tuple of some."""
    if len(slots) > 1:
        return itemgetter(*slots)
    return lambda values: tuple(values[slot] for slot in slots)


def _listed(result: Any) -> Any:
    return (result,) if isinstance(result, Tensor) else result


def _tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, tuple | list):
        return []
    return [tensor for part in value for tensor in _tensors_of(part)]
