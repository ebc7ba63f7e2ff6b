"""What a PyTorch operator reads and writes, as a dispatch mode sees it."""

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

# Operators that touch no element.
FREE = {
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "lift_fresh",
    "new_empty",
    "new_empty_strided",
    "set_",
}
_OVERWRITES = {"copy_", "fill_", "zero_"}


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors of a tree, each once."""
    return list({id(t): t for t in tree_leaves(tree) if isinstance(t, Tensor)}.values())


def read_arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments without those that are only written to."""
    if func._overloadpacket.__name__ in _OVERWRITES:
        args = args[1:]
    written = {argument.name for argument in func._schema.arguments if argument.is_out}
    return args, [value for key, value in kwargs.items() if key not in written]


def touches(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    """Whether an operator touched an element: one on none, or a view, is free."""
    if func.is_view or func._overloadpacket.__name__ in FREE:
        return False
    return any(t.numel() for t in outputs) and not _is_view_of(outputs, inputs, func)


def _is_view_of(outputs: list[Tensor], inputs: list[Tensor], func: Any) -> bool:
    """Whether a reshape or a contiguous, which is_view does not report, did nothing."""
    places = {(t.data_ptr(), t.shape) for t in inputs}
    return not func._schema.is_mutable and all((t.data_ptr(), t.shape) in places for t in outputs)


def distinct_bytes(tensor: Tensor) -> int:
    """Bytes of the elements, those of an expanded dimension once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= 1 if stride == 0 and size else size
    return elements * tensor.element_size()
