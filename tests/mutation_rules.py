"""Faults by rule: what may go wrong in the syntax tree of a kernel or of a launcher.

Rules know Triton and PyTorch, not the names of this package. Left alone is what no result shows:
hints to the compiler, shapes of blocks, a conversion that a store makes anyway, what a masked load
fills in, addresses of 64 bits and barriers (`ptx_faults` drops those), and refusals.
"""

import ast
import hashlib
import itertools
from collections import defaultdict, namedtuple

HINTS = {"num_stages", "num_warps", "disable_licm", "other", "input_precision", "n_rounds"}
SHAPED = {"arange", "zeros", "full", "reshape", "static_assert"}
COMMUTATIVE = {"maximum", "minimum", "max", "min", "fma"}
COMPARISONS = {"Lt": "<=", "LtE": "<", "Gt": ">=", "GtE": ">", "Eq": "!=", "NotEq": "=="}
NARROWER = {"float64": "float32", "float32": "float16", "int32": "int8", "uint32": "uint8"}
OPERATORS = {"BitAnd": "mask", "BitOr": "mask", "Add": "offset", "Sub": "offset"}
OPERATORS |= dict.fromkeys(["Mult", "Div", "FloorDiv", "Mod"], "factor")
IN_KERNELS = {"mask", "comparison", "offset", "factor", "accumulation", "number"}
IN_LAUNCHERS = {"stride", "fill"}
IN_BOTH = {"statement", "bound", "dtype", "swap", "branch"}
# A place with one fault for it; the digest tells whether its function is another now.
Site = namedtuple("Site", "file rule name line what digest start end text")


def plant(site, source):
    """Return the file's text with the fault in it."""
    whole = source.encode()
    return (whole[: site.start] + site.text.encode() + whole[site.end :]).decode()


def text_of(node):
    """An operand's text, in parentheses where it needs them."""
    text = ast.unparse(node)
    return f"({text})" if isinstance(node, (ast.BinOp, ast.Compare, ast.IfExp)) else text


def called(node):
    """The last word of what a call names; "" for a launch and for what is no call."""
    function = getattr(node, "func", None)
    return getattr(function, "attr", getattr(function, "id", ""))


def in_operators(node):
    """``(rule, node, text in its place, what goes wrong)`` of operators, numbers and branches."""
    kind = type(getattr(node, "op", getattr(node, "ops", [node])[0])).__name__
    if isinstance(node, ast.BinOp) and kind in OPERATORS:
        rule, left, right = OPERATORS[kind], text_of(node.left), text_of(node.right)
        yield rule, node, left, f"`{right}` left out"
        if rule == "mask" or kind == "Mult":
            yield rule, node, right, f"`{left}` left out"
        if rule == "offset":
            text = f"({left} {'-' if kind == 'Add' else '+'} {right})"
            yield rule, node, text, f"`{text}`"
    elif isinstance(node, ast.Compare) and kind in COMPARISONS:
        text = f"{text_of(node.left)} {COMPARISONS[kind]} {text_of(node.comparators[0])}"
        yield "comparison", node, text, f"`{text}`"
    elif isinstance(node, ast.AugAssign):
        text = f"{ast.unparse(node.target)} = {ast.unparse(node.value)}"
        yield "accumulation", node, text, f"`{text}`"
    elif isinstance(node, ast.Constant) and type(node.value) in {int, float}:
        value = node.value
        text = repr(value + 1 if isinstance(value, int) or value == 0 else value * 1.01)
        yield "number", node, text, f"{text} for {value}"
    elif isinstance(node, ast.IfExp) or (kind == "If" and not isinstance(node.body[0], ast.Raise)):
        yield "branch", node.test, "False", f"`{ast.unparse(node.test)}` never holds"


def in_calls(node):
    """The same of calls of Triton and PyTorch: what is loaded, stored, launched and allocated."""
    name, text = called(node), ast.unparse(node) if called(node) else ""
    if name in {"load", "store"} and any(k.arg == "mask" for k in node.keywords):
        kept = [k for k in node.keywords if k.arg not in {"mask", "other"}]
        yield "mask", node, ast.unparse(ast.Call(node.func, node.args, kept)), "no mask"
    elif name == "range":
        stop = node.args[0 if len(node.args) == 1 else 1]
        step = text_of(node.args[2]) if len(node.args) == 3 else "1"
        yield "bound", stop, f"{text_of(stop)} - {step}", f"the last turn of `{text}` left out"
    elif name == "cdiv":
        yield "bound", node, f"({text} - 1)", f"`{text} - 1`"
    elif name == "to" and len(node.args) == 1 and not node.keywords:
        if not text.endswith(("element_ty)", "int64)")):
            yield "dtype", node, text_of(node.func.value), f"no conversion in `{text}`"
    elif name == "stride" and node.args:
        other = f"{ast.unparse(node.func)}({int(ast.unparse(node.args[0]) == '0')})"
        yield "stride", node, other, f"`{other}` for `{text}`"
    elif name in {"contiguous", "zero_"}:
        yield "fill", node, text_of(node.func.value), f"`{text}` without it"
    elif "zeros" in name and isinstance(node.func, ast.Attribute):
        yield "fill", node.func, ast.unparse(node.func).replace("zeros", "empty"), "not filled"


def in_others(node):
    """The same of arguments and of what stands around a call."""
    call = node.value if isinstance(node, ast.Expr) else None
    if called(call) == "store" or isinstance(getattr(call, "func", 0), (ast.Name, ast.Subscript)):
        yield "statement", node, "pass", f"`{ast.unparse(call.func)}` left out"
    if isinstance(node, ast.Subscript) and called(node.value) == "stride":
        text = ast.unparse(node)
        yield "stride", node, f"[*{text}][::-1]", f"`{text}` backwards"
    if isinstance(node, ast.keyword) and node.arg in {"dtype", "out_dtype"}:
        library, _, name = ast.unparse(node.value).rpartition(".")
        if name in NARROWER or isinstance(node.value, ast.Name):
            text = f"{library or 'tl'}.{NARROWER.get(name, 'float16')}"
            yield "dtype", node.value, text, f"{text} for {name}"
    args = node.args if isinstance(node, ast.Call) and called(node) not in COMMUTATIVE else []
    for i, pair in enumerate(itertools.pairwise(args)):
        first, second = map(ast.unparse, pair)
        if first != second and all(isinstance(x, (ast.Name, ast.Attribute)) for x in pair):
            exchanged = [*args[:i], *reversed(pair), *args[i + 2 :]]
            text = ast.unparse(ast.Call(node.func, exchanged, node.keywords))
            yield "swap", node, text, f"`{first}` and `{second}` exchanged"


def nodes(node):
    """What rules look at, from the outside to the inside."""
    if isinstance(node, ast.JoinedStr) or getattr(node, "arg", None) in HINTS:
        return
    yield node
    hidden = {"annotation", "args"} if called(node) in SHAPED else {"annotation"}
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and name not in hidden:
                yield from nodes(child)


def sites_of(file, source):
    """Every fault of the functions and methods of one file."""
    starts = [0, *itertools.accumulate(len(line) for line in source.encode().splitlines(True))]
    tree = ast.parse(source)
    parents = [("", tree)] + [(f"{c.name}.", c) for c in tree.body if isinstance(c, ast.ClassDef)]
    for prefix, function in ((prefix, node) for prefix, parent in parents for node in parent.body):
        if not isinstance(function, ast.FunctionDef):
            continue
        compiled = {ast.unparse(d) for d in function.decorator_list} & {"kernel", "triton.jit"}
        wanted = IN_BOTH | (IN_KERNELS if compiled else IN_LAUNCHERS)
        whole, count = ast.dump(function), defaultdict(itertools.count)
        for node in (node for part in function.body for node in nodes(part)):
            for rule, at, text, what in (*in_operators(node), *in_calls(node), *in_others(node)):
                if rule in wanted:
                    start = starts[at.lineno - 1] + at.col_offset
                    end = starts[at.end_lineno - 1] + at.end_col_offset
                    key = f"{file} {prefix}{function.name} {rule} {next(count[rule])}"
                    digest = hashlib.sha256(f"{key} {text} {whole}".encode()).hexdigest()[:12]
                    yield Site(file, rule, key, at.lineno, what, digest, start, end, text)
