"""Who imports whom inside the package: floors, each of which stands on those below it."""

import ast
from pathlib import Path

import pytest

import segmoe_kernels

PACKAGE = Path(segmoe_kernels.__file__).parent

# Folders and modules of the package's root, from below. Each imports what stands on earlier lines,
# and inside its own folder; the package itself is "". A new one has to be written down here.
FLOORS = (
    {"routing", "flops", "activations", "autograd", "segments"},
    {"validation"},
    {"losses", "series", "options"},
    {"_triton"},
    {"pipeline"},
    {"reference"},
    {"stages"},
    {"functional"},
    {"layer"},
    {"models", "stats", "parallel", "testing"},
    {""},
    {"__main__"},
)
FLOOR_OF = {name: number for number, floor in enumerate(FLOORS) for name in floor}
# Modules in the root, so that a newcomer sees the whole of it at once.
MOST_IN_ROOT = 14
# Of a kernel, from its decorator's next line to its last, and of a device function.
MOST_LINES, MOST_PARAMETERS = 90, 25


def module_name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(tree):
    """Modules of the package that a syntax tree imports, and "triton" where it does."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # "from package import x" may name a module or a thing inside the package.
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [name for name in inside if name.partition(".")[2] in MODULES]
            found = modules or [node.module]
        else:
            continue
        for name in found:
            top, _, rest = name.partition(".")
            if top == "segmoe_kernels":
                yield rest
            elif top == "triton":
                yield "triton"


def jitted(tree):
    """Kernels and device functions of a syntax tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
            if decorators & {"kernel", "triton.jit"}:
                yield node


def folder_of(name):
    return name.partition(".")[0]


def imported(name):
    return set(imports(ast.parse(MODULES[name].read_text())))


def test_every_folder_has_a_floor():
    assert {folder_of(name) for name in MODULES} == set(FLOOR_OF)


def test_the_root_is_small():
    assert len([path for path in MODULES.values() if path.parent == PACKAGE]) <= MOST_IN_ROOT


@pytest.mark.parametrize("name", MODULES)
def test_module_imports_only_from_below(name):
    own = folder_of(name)
    found = {folder_of(other) for other in imported(name)} - {own}
    # Every module may ask whether triton is there, inside a function.
    triton = {"triton"} if own in {"stages", "_triton", "functional", "__main__"} else set()
    above = {other for other in found - triton if FLOOR_OF.get(other, 99) >= FLOOR_OF[own]}
    assert not above, f"{name} -> {sorted(above)}"


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("stages")])
def test_kernels_are_short(name):
    kernels = jitted(ast.parse(MODULES[name].read_text()))
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in kernels}
    assert not {name: lines for name, lines in lengths.items() if lines > MOST_LINES}


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith(("stages", "_triton"))])
def test_kernels_and_device_functions_have_few_parameters(name):
    functions = jitted(ast.parse(MODULES[name].read_text()))
    counts = {node.name: len(node.args.args) for node in functions}
    assert not {name: count for name, count in counts.items() if count > MOST_PARAMETERS}


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith(("stages", "_triton"))])
def test_kernels_take_no_number_of_the_batch_in_a_tuple(name):
    """Triton specialises all numbers there, so that each batch would compile a kernel anew."""
    pytest.importorskip("triton")
    from segmoe_kernels._triton.launch import OF_THE_BATCH

    functions = jitted(ast.parse(MODULES[name].read_text()))
    read = [n for f in functions for n in ast.walk(f) if isinstance(n, ast.Attribute)]
    assert not [ast.unparse(node) for node in read if node.attr in OF_THE_BATCH]


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith(("stages", "_triton"))])
def test_kernels_compare_no_tuple_with_none(name):
    """Triton 3.6 can't, where the tuple holds a None."""
    functions = jitted(ast.parse(MODULES[name].read_text()))
    compared = [n for f in functions for n in ast.walk(f) if isinstance(n, ast.Compare)]
    of_none = [n.left for n in compared if ast.unparse(n.comparators[0]) == "None"]
    names = {node.id for node in of_none if isinstance(node, ast.Name)}
    assert not {n for n in names if not n.endswith("ptr")} - {"first"}


def test_modules_have_no_cycle():
    done, path = set(), []

    def visit(name):
        assert name not in path, f"cycle: {[*path, name]}"
        if name in done:
            return
        path.append(name)
        for other in imported(name) & MODULES.keys() - {""}:
            visit(other)
        path.pop()
        done.add(name)

    for name in MODULES:
        visit(name)


@pytest.mark.parametrize(
    "name", [name for name in MODULES if not name.startswith(("stages", "_triton"))]
)
def test_module_is_importable_without_triton(name):
    """Stages and triton are imported inside functions only."""
    body = ast.parse(MODULES[name].read_text()).body
    top = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    found = set(imports(ast.Module(body=top, type_ignores=[])))
    assert not [other for other in found if other.startswith(("stages", "_triton", "triton"))]


# What makes a tensor on the default device, unless told where.
FACTORIES = {"arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn"}
FACTORIES |= {"randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros"}


@pytest.mark.parametrize("name", MODULES)
def test_tensors_are_made_on_a_named_device(name):
    """The default device may be another one than that of the layer."""
    calls = [n for n in ast.walk(ast.parse(MODULES[name].read_text())) if isinstance(n, ast.Call)]
    made = [n for n in calls if ast.unparse(n.func) in {f"torch.{f}" for f in FACTORIES}]
    unnamed = [n for n in made if not {"device", None} & {keyword.arg for keyword in n.keywords}]
    assert not [f"line {node.lineno}: {ast.unparse(node)}" for node in unnamed]
