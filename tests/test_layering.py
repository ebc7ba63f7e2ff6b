"""Who imports whom inside the package: the arrows written down here, and no other."""

import ast
from pathlib import Path

import pytest

import segmoe_kernels

PACKAGE = Path(segmoe_kernels.__file__).parent

# The package itself is "", subpackages have dots. A new file or arrow has to be written down here.
ARROWS = {
    "": {"convert", "dialects", "layer", "losses", "parallel", "routing", "stats", "swap"},
    "__main__": {"", "_triton.tiles", "advise", "functional", "layer", "series", "testing"},
    "adapters": {"layer", "validation"},
    "advise": {"series", "validation"},
    "called": {"composed_ffn", "functional", "modules", "routing", "validation"},
    "composed_ffn": {"routing"},
    "convert": {"layer", "modules", "validation"},
    "dense_ffn": set(),
    "exported": {"composed_ffn", "routing"},
    "dialects": {"validation"},
    "dtensor": {"routing", "validation"},
    "flops": set(),
    "functional": {"flops", "reference", "routing", "stages", "validation"},
    "grouped_ffn": {"composed_ffn", "flops", "routing", "validation"},
    "huggingface": {"dense_ffn", "functional", "routing", "validation"},
    "layer": {
        "called",
        "composed_ffn",
        "dtensor",
        "functional",
        "losses",
        "modules",
        "reference",
        "routing",
        "validation",
    },
    "losses": {"routing", "validation"},
    "modules": {"composed_ffn", "routing", "validation"},
    "reference": {"composed_ffn", "exported", "grouped_ffn", "routing"},
    "places": {"dense_ffn", "layer", "validation"},
    "probe": {"adapters", "dense_ffn", "layer", "validation"},
    "parallel": {
        "composed_ffn",
        "functional",
        "layer",
        "modules",
        "reference",
        "routing",
        "validation",
    },
    "routing": set(),
    "series": {"time_stamps", "validation"},
    "stats": {"layer", "routing", "validation"},
    "stats_plots": {"routing", "validation"},
    "stats_writers": {"validation"},
    "swap": {"adapters", "convert", "dense_ffn", "layer", "places", "probe", "validation"},
    "testing": {"functional", "layer", "reference", "routing"},
    "time_stamps": set(),
    "validation": {"routing"},
    "stages": {
        f"stages.{name}"
        for name in ("combine", "experts", "grouped_gemm", "permute", "plans", "route", "shared")
    },
    "stages.block": {
        "stages.block_kernels",
        "stages.experts",
        "stages.experts_launch",
        "stages.permute",
        "stages.route",
    },
    "stages.block_kernels": set(),
    "stages.combine": set(),
    "stages.experts": {"stages.experts_launch"},
    "stages.experts_fused": set(),
    "stages.experts_launch": {
        "stages.experts_fused",
        "stages.grouped_gemm",
        "stages.grouped_gemm_kernels",
    },
    "stages.grouped_gemm": {"composed_ffn", "stages.grouped_gemm_kernels"},
    "stages.grouped_gemm_kernels": set(),
    "stages.permute": set(),
    "stages.plans": {"stages.block", "stages.experts", "stages.permute", "stages.route"},
    "stages.route": {"stages.route_gradients", "stages.route_kernels"},
    "stages.route_gradients": {"stages.route_kernels"},
    "stages.route_kernels": set(),
    "stages.shared": {"stages.shared_launch"},
    "stages.shared_kernels": set(),
    "stages.shared_launch": {"stages.combine", "stages.shared_kernels"},
    "_triton": set(),
    "_triton.activations": set(),
    "_triton.ffn": set(),
    "_triton.launch": {"flops"},
    "_triton.partials": set(),
    "_triton.plans": {"validation"},
    "_triton.router": set(),
    "_triton.sequences": set(),
    "_triton.tile_table": {"validation"},
    "_triton.tiles": set(),
    "_triton.tuned": set(),
}
FOR_STAGES = {"routing", "validation"} | {name for name in ARROWS if name.startswith("_triton")}
FOR_TRITON = {name for name in ARROWS if name.startswith("_triton.")}


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


def allowed(name):
    if name.startswith("_triton"):
        return ARROWS[name] | FOR_TRITON | {"triton"}
    if name.startswith("stages."):
        return ARROWS[name] | FOR_STAGES | {"triton"}
    # Every module may ask whether triton is there, inside a function.
    return ARROWS[name] | ({"triton"} if name in {"functional", "__main__"} else set())


def test_every_module_is_in_the_table():
    assert set(MODULES) == set(ARROWS)


@pytest.mark.parametrize("name", MODULES)
def test_module_imports_only_along_the_arrows(name):
    found = set(imports(ast.parse(MODULES[name].read_text())))
    assert found <= allowed(name), f"{name} -> {sorted(found - allowed(name))}"


def test_arrows_are_used():
    for name, path in MODULES.items():
        unused = ARROWS[name] - set(imports(ast.parse(path.read_text())))
        assert not unused, f"{name} no longer imports {sorted(unused)}"


def test_arrows_have_no_cycle():
    done, path = set(), []

    def visit(name):
        assert name not in path, f"cycle: {[*path, name]}"
        if name in done:
            return
        path.append(name)
        for other in ARROWS[name] - {""}:
            visit(other)
        path.pop()
        done.add(name)

    for name in ARROWS:
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


def test_imports_are_found():
    tree = ast.parse(
        "import triton.language as tl\n"
        "from segmoe_kernels import reference, stages\n"
        "def f():\n    from segmoe_kernels.stages.route import route\n"
        "from segmoe_kernels import SegMoE\n"
    )
    assert set(imports(tree)) == {"triton", "reference", "stages", "stages.route", ""}
