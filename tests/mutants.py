"""Faults that `mutate` plants in the kernels and their launches, one at a time.

An entry names a function, the fault, the text that is replaced, which occurs in that function once
(or ``nth`` says which one, from 0), the text in its place, and what goes wrong.
"""

from typing import NamedTuple


class Mutant(NamedTuple):
    """One fault.

    Attributes:
        file: in the package.
        function: where the text is; ``Class.method`` for a method.
        name: unique.
        old: text.
        new: text in its place.
        what: goes wrong.
        tests: arguments of pytest; those that should notice, and quickly.
        nth: which occurrence of old, from 0; None where there is one.
        equivalent: why nothing that can be seen changes; then the mutant doesn't count.
    """

    file: str
    function: str
    name: str
    old: str
    new: str
    what: str
    tests: tuple[str, ...]
    nth: int | None = None
    equivalent: str = ""


_NAMES = (
    "activations", "route", "permute", "experts", "grouped_gemm", "routed", "combine", "shared",
    "partials",
)  # fmt: skip
ALL_KERNEL_TESTS = (*(f"tests/test_{name}.py" for name in _NAMES), "-k", "not instructions")

ACTIVATIONS = ("tests/test_activations.py", "-k", "not instructions")
ROUTE = ("tests/test_route.py",)
PERMUTE = ("tests/test_permute.py",)
COMBINE = ("tests/test_combine.py",)
EXPERTS = ("tests/test_experts.py",)
FUSED = ("tests/test_experts.py", "-k", "unrouted or not (segment or wide or 260 or program)")
WIDE = ("tests/test_experts.py", "-k", "segment or wide or 260")
GEMM = ("tests/test_grouped_gemm.py",)
ROUTED = ("tests/test_routed.py",)
PARTIALS = ("tests/test_partials.py",)
SUMS = ("tests/test_partials.py", "tests/test_experts.py", "-k", "sums or splits or float64")
SHARED = ("tests/test_shared.py",)
LAYER_STRIDES = ("tests/test_triton_layer.py", "-k", "strides or program_order")
SHARED_DROPOUT = ("tests/test_shared.py", "tests/test_triton_layer.py", "-k", "dropout or drop")
ROUTED_DROPOUT = ("tests/test_routed.py", "tests/test_triton_layer.py", "-k", "dropout")
MIDDLE = ("tests/test_experts.py", "-k", "132")
ZEROS = ("tests/test_experts.py", "-k", "zeros")
DROPOUT = ("tests/test_experts.py", "tests/test_routed.py", "-k", "dropout")


def _in(file: str, tests: tuple[str, ...], *entries: tuple) -> list[Mutant]:
    """Make mutants of one file from (function, fault, old, new, what[, changes])."""
    made = []
    for function, fault, old, new, what, *changes in entries:
        options = {"tests": tests, **(changes[0] if changes else {})}
        made.append(Mutant(file, function, f"{function}: {fault}", old, new, what, **options))
    return made


_ACTIVATIONS = _in(
    "_triton/activations.py",
    ACTIVATIONS,
    ("_divide", "upside down", "return x / y", "return y / x", "the reciprocal comes out"),
    (
        "_normal_cdf", "short coefficient", "0.06284377723932266", "0.0628",
        "a coefficient has three digits",
    ),
    (
        "_normal_cdf", "no absolute value", "tl.abs(x) * 0.849", "x * 0.849",
        "negative x leave the fit",
    ),
    (
        "_normal_cdf", "wrong side", "tl.where(x < 0, 0.0, 1.0)", "tl.where(x < 0, 1.0, 0.0)",
        "the two tails are exchanged",
    ),
    (
        "_gelu_tanh_exponent", "short coefficient", "-0.1029432395800235", "-0.1029",
        "a coefficient has four digits",
    ),
    (
        "_activate_fast", "exp for exp2", "-1.4426950408889634 * x", "-1.0 * x",
        "silu takes a power of 2 for one of e",
    ),
    ("_activate_fast", "gelu without x", "return x * cdf", "return cdf", "gelu is the bare cdf"),
    (
        "_activate_with_grad_fast", "silu slope", "tl.fma(value, 1.0 - gate, gate)",
        "tl.fma(value, gate, gate)", "silu's slope has gate for 1 - gate",
    ),
    (
        "_activate_with_grad_fast", "gelu slope", "tl.fma(x * 0.3989422804014327, bell, cdf)",
        "cdf", "gelu's slope lacks the density",
    ),
    (
        "_activate_with_grad_fast", "tanh slope", "0.21406444881780073", "0.07135481627260024",
        "the cubic term is not differentiated",
    ),
    (
        "activate", "relu drops NaN", "tl.where(x < 0, 0.0, x)", "tl.maximum(x, 0.0)",
        "a NaN becomes 0",
    ),
    (
        "activate", "tanh square", "0.044715 * x * x * x", "0.044715 * x * x",
        "a square for the cube",
    ),
    ("activate", "short constant", "0.7071067811865476", "0.70710678", "float64 has 8 digits"),
    (
        "activate", "fast for all", "elif FAST:", "elif x.dtype == tl.float32:", "fast in float32",
        {"equivalent": "In float32 the fast forms keep to the same bounds; their use is a choice."},
    ),
    (
        "activate_with_grad", "relu at 0", "tl.where(x > 0, 1.0, 0.0)",
        "tl.where(x >= 0, 1.0, 0.0)", "relu's slope at 0 is 1, PyTorch's is 0",
    ),
    (
        "activate_with_grad", "tanh slope", "0.134145 * x * x", "0.044715 * x * x",
        "the cubic term is not differentiated",
    ),
    (
        "activate_with_grad", "silu slope", "gate + x * gate * (1.0 - gate)\n",
        "gate + x * (1.0 - gate)\n", "silu's slope lacks a gate",
    ),
    (
        "activate_with_grad", "gelu slope", "cdf + x * 0.3989", "cdf + 0.3989",
        "gelu's slope lacks x",
    ),
    (
        "read_option", "float32 again", "return value.to(tl.int64).to(tl.float64, bitcast=True)",
        "return value.to(tl.int64).to(tl.float64, bitcast=True).to(tl.float32).to(tl.float64)",
        "options of float64 have 7 digits",
    ),
    (
        "dropout_scale", "half of the row", "(rows.to(tl.int64) >> 32)",
        "(rows.to(tl.int64) >> 63)", "rows 2**32 apart share numbers",
    ),
    ("dropout_scale", "width", "zeros + width", "zeros", "rows of every width share numbers"),
    (
        "dropout_scale", "missing scale", "1.0 / (1.0 - p), 0.0)", "1.0, 0.0)",
        "what is kept is not scaled up",
    ),
    (
        "dropout_scale", "strict threshold", "bits >= threshold", "bits > threshold",
        "drops one more step of 65536",
    ),
    (
        "dropout_scale", "no upper limit", "tl.minimum((p * 65536.0 + 0.5).to(tl.uint32), 65535)",
        "(p * 65536.0 + 0.5).to(tl.uint32)", "the threshold of p near 1 wraps around to 0",
    ),
    (
        "dropout_scale", "run of columns", "first // 32 * 4 + tl.arange",
        "first // 64 * 4 + tl.arange", "runs of 32 columns share numbers",
    ),
    (
        "dropout_scale", "second half of a run", "word += first % 32 // 8", "word += 0",
        "tiles of 16 columns repeat each other",
    ),
    (
        "dropout_scale", "pairs of columns", "cols % 8 // 2", "cols % 8 // 4",
        "columns that start anywhere have other numbers, some twice",
    ),
    ("dropout_scale", "one round", "n_rounds=7", "n_rounds=1", "the generator hardly mixes"),
)  # fmt: skip

_LAUNCH = _in(
    "_triton/launch.py",
    ("tests/test_resolve_backend.py", "-k", "bfloat16"),
    (
        "_multiply", "another sum", "tl.load(b_ptr + offs))", "tl.load(b_ptr + offs)) + 1.0",
        "bfloat16 is refused where it is right",
    ),
)  # fmt: skip

_FFN = _in(
    "_triton/ffn.py",
    FUSED,
    ("load_matrix", "row mask", "(rows < num_rows)", "(rows >= 0)", "reads rows behind a matrix"),
    ("load_matrix", "column mask", "(cols < num_cols)", "(cols >= 0)", "reads behind a row"),
    (
        "load_matrix", "next expert", "e * matrix.stride_e", "(e + 1) * matrix.stride_e",
        "the next expert's matrix",
    ),
    (
        "load_matrix", "wrong stride", "[:, None] * matrix.stride_row", "[:, None] * num_cols",
        "takes rows for dense",
    ),
    (
        "load_chunk", "gate", "load_matrix(experts.gate,", "load_matrix(experts.up,",
        "the gate's weight is never read",
    ),
    ("load_bias", "expert", "ptr + e * num_cols", "ptr + e", "another place's bias"),
    ("load_bias", "mask", "mask=cols < num_cols", "mask=cols >= 0", "reads behind the bias"),
    ("load_bias", "first expert", "ptr + e * num_cols", "ptr", "everyone has expert 0's bias"),
    (
        "hidden_rows", "gate and up exchanged", "activate(opened, ACTIVATION, FAST) * hidden",
        "activate(hidden, ACTIVATION, FAST) * opened", "the activation is on the wrong product",
    ),
    (
        "hidden_rows", "gate's bias", "opened += chunk.gate_bias", "opened += chunk.up_bias",
        "the gate has the other bias",
    ),
    (
        "hidden_rows", "dropout of the next row", "row_ids, offs_f, F", "row_ids + 1, offs_f, F",
        "forward drops what backward keeps", {"tests": DROPOUT},
    ),
    (
        "ffn_rows", "bias twice", "is not None and not WIDE", "is not None",
        "wide dtypes add the bias twice",
    ),
    (
        "ffn_rows", "bias of no expert", "mask=(offs_d < D) & (f_end > 0)", "mask=offs_d < D",
        "reads a bias behind the last expert", {"nth": 1},
    ),
    (
        "ffn_rows", "no sum over chunks", "tl.trans(down), out, input", "tl.trans(down), input",
        "the last chunk of hidden columns is all",
    ),
    ("ffn_rows", "same chunk", "f0 + tl.arange", "tl.arange", "all chunks read the first columns"),
    (
        "hidden_with_grads", "gated slope", "slope = slope * pre", "slope = slope + 0.0",
        "the gate's gradient lacks the other product",
    ),
    (
        "hidden_with_grads", "dropout of up", "opened = opened * scale", "opened = opened + 0.0",
        "the gradient of up ignores dropout", {"tests": DROPOUT},
    ),
    (
        "hidden_with_grads", "dropout of hidden", "hidden = hidden * scale",
        "hidden = hidden + 0.0", "the gradient of down ignores dropout", {"tests": DROPOUT},
    ),
    (
        "hidden_with_grads", "dropout of another row", "row_ids, offs_f, F",
        "row_ids + 1, offs_f, F", "backward drops what forward kept", {"tests": DROPOUT},
    ),
    (
        "hidden_with_grads", "exchanged", "dhidden * opened, dhidden * slope",
        "dhidden * slope, dhidden * opened", "the gradients of up and gate are exchanged",
    ),
)  # fmt: skip

_ARGUMENTS = _in(
    "_triton/arguments.py",
    FUSED,
    (
        "rows_of", "dense", "None, None, x.stride(0)", "None, None, x.shape[1]",
        "takes rows for dense", {"tests": GEMM},
    ),
    (
        "experts_of", "gate", "matrix_of(gate)",
        "None if gate is None else Matrix(gate, *up.stride()[:2])",
        "the gate is read with the strides of up",
    ),
)  # fmt: skip

_PARTIALS = _in(
    "_triton/partials.py",
    SUMS,
    (
        "new_partials", "too few slots", "num_splits + num_experts - 1 if", "num_splits if",
        "shares are stored behind the slots", {"tests": PARTIALS},
    ),
    (
        "reduce_partials", "grid", "triton.cdiv(partials.shape[1], 512)",
        "partials.shape[1] // 512", "the last block of elements is never added up",
    ),
    (
        "store_sum", "dropped store", "mask=mask)", "mask=mask & (offs > 0))",
        "one element is missing",
    ),
    (
        "store_gradients", "expert of down", "gradients.down + e * F * D", "gradients.down + e * F",
        "whole sums go to another expert",
    ),
    (
        "store_gradients", "second part", "slot_ptr += F * D", "slot_ptr += F",
        "parts of a share overlap", {"nth": 0},
    ),
    (
        "store_gradients", "bias of down", "slot_ptr + F, offs_d", "slot_ptr + D, offs_d",
        "parts of a share overlap",
    ),
    (
        "store_gradients", "bias of the gate", "slot_ptr + F + D, offs_f", "slot_ptr + F, offs_f",
        "parts of a share overlap", {"tests": SUMS},
    ),
    (
        "store_gradients", "wrong bias", "e * F, offs_f, sums.gate_bias",
        "e * F, offs_f, sums.up_bias",
        "the gate's bias has the other gradient", {"tests": FUSED},
    ),
    (
        "reduce_partials_kernel", "slot off by one", "(splits + me)", "(splits + me + 1)",
        "adds up the next slots",
    ),
    (
        "reduce_partials_kernel", "start of an expert", "tl.where(experts < me, tiles, 0)",
        "tl.where(experts <= me, tiles, 0)", "an expert seems to have no tiles",
    ),
    (
        "reduce_partials_kernel", "first split", "num_splits // some - 1, 0)",
        "num_splits // some + 1, 0)", "skips an expert's first split",
    ),
    (
        "reduce_partials_kernel", "last split", "num_splits // some + 2, num_splits)",
        "num_splits // some, num_splits)", "skips an expert's last split",
    ),
    (
        "reduce_partials_kernel", "no sum", "acc += tl.sum", "acc = tl.sum",
        "the last splits are all",
    ),
    (
        "reduce_partials_kernel", "overwrites whole sums",
        "tl.sum(whole.to(tl.int32), 0) == 0", "tl.sum(whole.to(tl.int32), 0) >= 0",
        "what one split has stored is replaced by 0",
    ),
    ("reduce_partials_kernel", "part", "offs -= n1", "offs -= n0", "the third part is misplaced"),
    ("_store_part", "expert", "expert * n + offs", "expert + offs", "experts overlap"),
    ("_store_part", "mask", "(offs < n)", "(offs <= n)", "writes the next expert's first element"),
)  # fmt: skip

_ROUTER = _in(
    "_triton/router.py",
    ROUTE,
    (
        "step_range", "first step", "tl.where(real, p, SEGMENT_SIZE - 1)", "tl.where(real, p, 0)",
        "padding counts as the first step",
    ),
    (
        "step_range", "last step", "tl.where(real, p, 0)", "tl.where(mask_s, p, 0)",
        "padding counts as the last step",
    ),
    ("step_range", "count", "count += real.to", "count += mask_s.to", "padding counts in the mean"),
    (
        "load_steps", "wrong stride", "sequence.to(tl.int64) * stride_x_b",
        "sequence.to(tl.int64) * length * stride_x_t",
        "takes sequences for dense",
    ),
    (
        "load_steps", "row mask", "mask=real[:, None] &", "mask=mask_s[:, None] &",
        "reads padding and steps behind the sequence",
    ),
    ("load_steps", "column mask", "(offs_d < D)", "(offs_d >= 0)", "reads columns behind the step"),
    ("pool", "NaN", " | (x != x)", "", "max drops a NaN"),
    (
        "pool", "padded mean", "tl.maximum(count, 1)", "tl.maximum(count, SEGMENT_SIZE)",
        "the mean is over padding too",
    ),
    ("pool", "start of max", 'float("-inf") if', "0.0 if", "a negative maximum becomes 0"),
    (
        "pool", "first", "(first == p)", "(first >= p)", "first is a sum",
        {"equivalent": "Steps before the first real one are padding, which is loaded as 0."},
    ),
    ("pool", "empty max", "(count > 0)", "(count >= 0)", "the maximum of nothing is infinite"),
    (
        "score_segments", "own segment", "own_step - SEGMENT_SIZE", "own_step",
        "a causal router sees its own segment",
    ),
    (
        "score_segments", "before the first", "mask_s & (index > 0)", "mask_s",
        "reads the segment before the first one",
    ),
    (
        "score_segments", "start for one sequence", "(index == 0)", "(segment == 0)",
        "later sequences have no start",
    ),
    (
        "score_segments", "start of a step", "router_start_ptr + p * D", "router_start_ptr",
        "every step has the first one's start",
    ),
    (
        "score_segments", "unrouted", "mask_s & (own_count > 0)", "mask_s",
        "segments without a real step are routed",
    ),
    (
        "score_segments", "no sum over chunks", "tl.trans(w), logits,", "tl.trans(w),",
        "the last columns are all",
    ),
    (
        "score_segments", "wrong stride", "experts[:, None] * stride_w_e",
        "experts[:, None] * (D * SEGMENT_SIZE)", "takes the weight for dense",
    ),
    (
        "score_segments", "expert mask", "mask=mask_e[:, None] &", "mask=(experts >= 0)[:, None] &",
        "reads experts behind the last one",
    ),
    (
        "choose_experts", "temperature", "_softmax(logits / temperature", "_softmax(logits",
        "no temperature",
    ),
    (
        "choose_experts", "dropout of the next segment", "segment, experts", "segment + 1, experts",
        "forward drops what backward keeps",
    ),
    (
        "choose_experts", "unrouted", "tl.where(routed[:, None], probs, 0.0)", "probs",
        "a segment without an expert has probabilities",
    ),
    (
        "choose_experts", "NaN", "tl.where(probs != probs, float(\"inf\"), probs)", "probs",
        "a NaN is never chosen",
    ),
    (
        "choose_experts", "ties",
        "tl.min(tl.where(key == best[:, None], experts[None, :], EXPERTS), 1)",
        "tl.max(tl.where(key == best[:, None], experts[None, :], -1), 1)",
        "the highest expert wins a tie",
    ),
    (
        "choose_experts", "chosen twice", "tl.where(hit, -2.0, key)", "tl.where(hit, 0.0, key)",
        "an expert whose probability is 0 can be chosen twice",
    ),
    ("choose_experts", "padding", ", -1.0)", ", 2.0)", "columns behind the last expert are chosen"),
    (
        "choose_experts", "sum of all", "tl.sum(tl.where(rank < TOP_K, probs, 0.0), 1)",
        "tl.sum(probs, 1)",
        "weights are divided by what was not chosen too",
    ),
    (
        "choose_experts", "clamp", "total < 1e-6, 1e-6, total", "total < 0.0, 1e-6, total",
        "0 is divided by 0 where dropout took all",
    ),
    ("choose_experts", "no division", "if RENORMALIZE:", "if False:", "weights don't add up to 1"),
    (
        "_softmax", "no shift", "tl.exp(logits - tl.max(logits, 1)[:, None])", "tl.exp(logits)",
        "large logits overflow",
    ),
    ("_softmax", "padding", 'float("-inf"))', "0.0)", "columns behind the last expert are added"),
    (
        "differentiate_choice", "temperature", "inner[:, None]) / temperature", "inner[:, None])",
        "the gradient lacks the temperature",
    ),
    (
        "differentiate_choice", "mean", "(dweights - mean[:, None])", "dweights",
        "the renormalisation is taken for a constant",
    ),
    (
        "differentiate_choice", "dropout", "dweights, 0.0)) * scale", "dweights, 0.0))",
        "what was dropped has a gradient",
    ),
    (
        "differentiate_choice", "clamp", "tl.where(total < 1e-6, 0.0, mean)", "mean",
        "the constant divisor is differentiated",
    ),
    (
        "differentiate_choice", "softmax", "(dprobs - inner[:, None])", "dprobs",
        "the softmax is not centred",
    ),
)  # fmt: skip

_SEQUENCES = _in(
    "_triton/sequences.py",
    FUSED,
    (
        "find_group", "end of a group", "ends <= pid", "ends < pid",
        "tiles belong to the group before",
    ),
    (
        "find_group", "negative ids", "mask=groups <= num_experts", "mask=groups < num_experts",
        "slots without an expert have no tiles",
    ),
    (
        "find_group", "round down", "* ROWS_PER_SLOT + BLOCK_M - 1) // BLOCK_M",
        "* ROWS_PER_SLOT) // BLOCK_M", "partial tiles are left out",
    ),
    (
        "find_group", "tile of a group", "(pid - first_tile) * BLOCK_M", "pid * BLOCK_M",
        "later experts start too late",
    ),
    (
        "find_group", "rows of a slot", "hi, 0), 0) * ROWS_PER_SLOT", "hi, 0), 0)",
        "groups end early",
    ),
    (
        "expert_tiles", "round down", "* ROWS_PER_SLOT + BLOCK_M - 1) // BLOCK_M",
        "* ROWS_PER_SLOT) // BLOCK_M", "partial tiles are left out",
    ),
    (
        "expert_tiles", "rows of a slot", "(hi - lo) * ROWS_PER_SLOT", "(hi - lo)",
        "experts seem to have fewer rows", {"tests": EXPERTS},
    ),
    (
        "expert_tiles", "mask", "mask = experts < num_experts", "mask = experts <= num_experts",
        "reads an offset behind the last one", {"tests": SUMS},
    ),
    (
        "split_starts", "never at experts", "num_splits <= num_experts", "num_splits <= 0",
        "even experts are shared", {"tests": PARTIALS},
    ),
    (
        "split_starts", "farther", "4 * tl.abs", "1 * tl.abs", "splits differ too much in length",
        {"tests": PARTIALS},
    ),
    (
        "split_starts", "remainder", " + splits * (total % num_splits) // num_splits", "",
        "the last split takes all tiles that don't divide evenly", {"tests": PARTIALS},
    ),
    (
        "find_split", "empty", "both == 1", "both == 0", "splits end where they start",
        {"tests": SUMS},
    ),
    (
        "find_split", "last expert", "experts + 1, 0)", "experts, 0)",
        "a split leaves out its last expert", {"tests": SUMS},
    ),
    (
        "find_split", "tiles before", "experts < first_expert", "experts <= first_expert",
        "tiles are counted from the wrong expert", {"tests": SUMS},
    ),
    (
        "find_steps", "choices", "segment = slot // LAYOUT.top_k", "segment = slot",
        "a slot is not a segment",
    ),
    (
        "find_steps", "segment's width", "* LAYOUT.segment_size + rows",
        "* LAYOUT.rows_per_slot + rows",
        "whole segments lie too close", {"tests": WIDE},
    ),
    (
        "find_steps", "first step only", " + rows % LAYOUT.rows_per_slot", "",
        "every row is a first step",
    ),
    (
        "find_steps", "choice", "slot % LAYOUT.top_k", "slot % 1",
        "every choice goes to the first one's place",
    ),
    (
        "real_steps", "tail", "step < length", "step <= length",
        "the step behind a sequence counts as real", {"tests": ROUTE + FUSED},
    ),
    (
        "real_steps", "mask of another sequence", "sequence * length + step", "step",
        "every sequence has the first one's mask",
    ),
    ("real_steps", "no mask", "if padding_mask_ptr is not None:", "if False:", "padding is real"),
    (
        "load_rows", "wrong stride", "sequence.to(tl.int64) * x.stride_b",
        "sequence.to(tl.int64) * length * x.stride_t", "takes sequences for dense",
    ),
    (
        "load_rows", "choice", "choice.to(tl.int64) * x.stride_k + ", "",
        "every choice reads the first's", {"tests": EXPERTS},
    ),
    (
        "load_rows", "tail of a segment", "(steps < length)", "(steps <= length)",
        "reads behind a sequence", {"tests": WIDE},
    ),
    (
        "load_rows", "dense steps", "(cols // D).to(tl.int64) * x.stride_t + cols % D",
        "cols", "takes steps for dense", {"tests": WIDE},
    ),
    (
        "load_rows", "padding in a segment", "real &= tl.load", "tl.load", "padding is read",
        {"tests": WIDE},
    ),
    (
        "store_segments", "tail",
        "inside = (mask_m[:, None] & (cols < width)[None, :]) & (steps < length)",
        "inside = mask_m[:, None] & (cols < width)[None, :]", "writes into the next sequence",
        {"tests": WIDE},
    ),
    (
        "store_segments", "padding", "value = tl.where(tl.load(", "tl.where(tl.load(",
        "masked steps are not 0", {"tests": WIDE},
    ),
    (
        "store_segments", "choice", "choice.to(tl.int64) * stride_k + ", "",
        "every choice goes to the first one's place", {"tests": WIDE},
    ),
    ("place_steps", "padding", "tl.where(real, row, -1 - row)", "row", "masked steps are not 0"),
    ("place_steps", "tail", "mask_m & (step < length)", "mask_m", "writes into the next sequence"),
    (
        "place_steps", "choice", "(choice * num_sequences + sequence)", "(choice + sequence)",
        "choices overlap",
    ),
    ("store_steps", "row 0", "(place >= 0)", "(place > 0)", "the first step becomes 0"),
    ("store_steps", "masked row", "-1 - place, place", "-place, place", "zeros go to the next row"),
    (
        "store_steps", "32 bits", "row.to(tl.int64) * D", "row * D", "addresses overflow",
        {"tests": ("tests/test_addresses.py", "-k", "no_kernel")},
    ),
)  # fmt: skip

_ROUTE = _in(
    "stages/route/kernels.py",
    ROUTE,
    (
        "route_fwd_kernel", "negative ids", "ids = tl.where(routed[:, None], experts[None, :], -1)",
        "ids = tl.where(routed[:, None], experts[None, :], 0)", "unrouted segments have an expert",
    ),
    (
        "route_fwd_kernel", "unrouted slots", "tl.int32), 0) * TOP_K", "tl.int32), 0)",
        "one slot is counted for an unrouted segment",
    ),
    (
        "route_fwd_kernel", "no sum over chunks", "counts += tl.sum", "counts = tl.sum",
        "the last segments are all that is counted",
    ),
    (
        "route_fwd_kernel", "counts unrouted", "(selected & routed[:, None])", "selected",
        "unrouted segments are counted for an expert",
    ),
    (
        "route_fwd_kernel", "tail", "selected & mask_s[:, None]", "selected",
        "writes choices behind the last segment",
    ),
    (
        "route_fwd_kernel", "row of the histogram", "pid.to(tl.int64) * (num_experts + 1)",
        "pid.to(tl.int64) * num_experts",
        "rows of the histogram overlap",
    ),
    (
        "route_fwd_kernel", "dropped store",
        "tl.store(probs_ptr + first * num_experts + offs, probs, mask=mask_se)", "pass",
        "probabilities are not written",
    ),
    (
        "dlogits_kernel", "logits' own gradient", "dlogits += tl.load(dlogits_in_ptr",
        "tl.load(dlogits_in_ptr", "a gradient of the logits is dropped",
    ),
    (
        "dlogits_kernel", "unrouted", "tl.where(routed[:, None], dlogits, 0.0)", "dlogits",
        "a constant has a gradient",
    ),
    (
        "dlogits_kernel", "shares", "slot * SEGMENT_SIZE + p", "slot * SEGMENT_SIZE",
        "the first step's share is taken for all", {"tests": ROUTED},
    ),
    (
        "dlogits_kernel", "choice", "slot = segment * TOP_K + k", "slot = segment * TOP_K",
        "every choice has the first one's gradient",
    ),
    (
        "dlogits_kernel", "last choice only", "selected |= hit", "selected = hit",
        "the last choice is all",
    ),
    (
        "dlogits_kernel", "tail", "tl.store(dlogits_ptr + offs, dlogits, mask=mask_se)",
        "tl.store(dlogits_ptr + offs, dlogits, mask=mask_e[None, :])",
        "writes behind the last segment",
    ),
    (
        "route_bwd_kernel", "last segment", "(index + 1 < segments_per_sequence)",
        "(index < segments_per_sequence)", "the next sequence's logits reach this one",
    ),
    (
        "route_bwd_kernel", "own segment", "source = segment + 1", "source = segment",
        "a causal router's gradient goes to its own segment",
    ),
    (
        "route_bwd_kernel", "no sum over blocks", "x.to(ACC), dweight, input", "x.to(ACC), input",
        "the last block is all",
    ),
    (
        "route_bwd_kernel", "no sum over pooled blocks", "pooled, dweight, input", "pooled, input",
        "the last block is all",
    ),
    (
        "route_bwd_kernel", "all maxima", "open_max & (hit == 0)", "open_max",
        "equal maxima share a gradient twice",
    ),
    (
        "route_bwd_kernel", "NaN", " | ((value != value) & (pooled != pooled))", "",
        "a NaN maximum has no gradient",
    ),
    (
        "route_bwd_kernel", "mean of padding", "tl.maximum(count, 1)",
        "tl.maximum(count, SEGMENT_SIZE)", "the mean's gradient is divided by padding too",
    ),
    (
        "route_bwd_kernel", "split", "split.to(tl.int64) * num_experts + experts", "experts",
        "splits overwrite each other",
    ),
    (
        "route_bwd_kernel", "same blocks", "split * blocks_per_split + block", "block",
        "every split has the first blocks",
    ),
    (
        "_store_dx", "choices", "ptrs += stride_dslots_k", "ptrs += 0",
        "the first choice is added twice", {"tests": ROUTED},
    ),
    (
        "_store_dx", "padding", "dx = tl.where(real[:, None], dx, 0.0)", "dx += 0.0",
        "padding has a gradient",
    ),
    ("_store_dx", "tail", "(mask_s & (step < length))", "mask_s", "writes into the next sequence"),
    ("sum_splits_kernel", "no sum", "acc += tl.sum", "acc = tl.sum", "the last splits are all"),
    (
        "sum_splits_kernel", "same splits", "start + tl.arange(0, SPLITS)", "tl.arange(0, SPLITS)",
        "the first splits are added again",
    ),
    (
        "sum_splits_kernel", "tail", "mask=offs < size)", "mask=offs >= 0)",
        "writes behind the result",
    ),
    (
        "sum_splits_kernel", "one less", "splits < num_splits", "splits < num_splits - 1",
        "the last split is left out",
    ),
)  # fmt: skip

_ROUTE_HOST = [
    *_in(
        "stages/route/backward.py",
        ROUTE,
        (
            "input_gradients", "no reduction", "sum_splits(partials, dweight)",
            "dweight.copy_(partials[0])", "the first split is all",
        ),
        (
            "input_gradients", "start vector", " + first[:, None] * router_start.to(first.dtype)",
            "", "the weight's gradient lacks the first segments",
        ),
        (
            "input_gradients", "segments of a sequence", "num_segments // x.shape[0]",
            "num_segments", "all segments seem to be of one sequence",
        ),
        (
            "logits_gradient", "strides", "None if dprobs is None else dprobs.contiguous()",
            "dprobs", "a gradient is taken for dense",
        ),
        (
            "logits_gradient", "grid", "triton.cdiv(num_segments, block_s)",
            "num_segments // block_s", "the last segments have no program",
        ),
    ),
    *_in(
        "stages/route/__init__.py",
        ROUTE,
        (
            "_route_fwd", "grid", "(triton.cdiv(num_segments, SEGMENTS_PER_BLOCK),)",
            "(max(1, num_segments // SEGMENTS_PER_BLOCK),)", "the last segments have no program",
        ),
        (
            "_route_fwd", "nothing", "if num_segments == 0:", "if num_segments < 0:",
            "an empty batch divides by 0",
        ),
        (
            "_route_bwd", "nothing", "if logits.shape[0] == 0:", "if logits.shape[0] < 0:",
            "an empty batch has no zeros for gradients",
        ),
        (
            "route_and_pass", "seed", "torch.randint(2**62, (1,)", "torch.full((1,), 7",
            "every call drops the same",
        ),
        (
            "_Route.backward", "no gradient of the router", "dslots.sum(0)", "dslots[0]",
            "the choices' gradients are not added", {"tests": ("tests/test_triton_layer.py",)},
        ),
    ),
]  # fmt: skip

_PERMUTE = _in(
    "stages/permute.py",
    PERMUTE,
    (
        "_group_of", "negative ids", "(ids < 0) | ", "",
        "slots without an expert are not counted and placed anywhere",
    ),
    (
        "_group_of", "ids beyond the last expert", " | (ids > num_experts)", "",
        "their slots are not counted and placed anywhere",
    ),
    (
        "_permute_count_kernel", "next group", "group[:, None]", "group[:, None] + 1",
        "slots are counted for the next expert",
    ),
    (
        "_permute_count_kernel", "no sum over chunks", "counts += tl.sum", "counts = tl.sum",
        "the last chunk is all",
    ),
    ("_permute_count_kernel", "mask", " & mask[:, None]", "", "slots behind the block are counted"),
    (
        "_permute_count_kernel", "next block", "(inner < SLOTS_PER_BLOCK) & ", "",
        "the next block's slots are counted twice",
    ),
    (
        "_permute_scan_kernel", "inclusive blocks", "tl.cumsum(counts, 0) - counts",
        "tl.cumsum(counts, 0)", "blocks start where they end",
    ),
    (
        "_permute_scan_kernel", "sums of the first run", "sums_ptr + run * (", "sums_ptr + 0 * (",
        "the other runs have no sums",
    ),
    (
        "_permute_scan_kernel", "tail", "(blocks < num_blocks)", "(blocks >= 0)",
        "reads histograms behind the last one", {"nth": 0},
    ),
    (
        "_permute_place_kernel", "own run", "(runs < pid // ", "(runs <= pid // ",
        "a run starts where it ends",
    ),
    (
        "_permute_place_kernel", "inclusive groups", "tl.cumsum(totals, 0) - totals",
        "tl.cumsum(totals, 0)", "groups start where they end",
    ),
    (
        "_permute_place_kernel", "no carry", "running += tl.sum(mine, 0)", "running += 0",
        "chunks overwrite each other",
    ),
    (
        "_permute_place_kernel", "inclusive", "tl.cumsum(mine, 0) - mine", "tl.cumsum(mine, 0)",
        "every slot is one place late",
    ),
    (
        "_permute_place_kernel", "next block", "(inner < SLOTS_PER_BLOCK) & ", "",
        "the next block's slots are placed here too",
        {"equivalent": "They are placed where the next program places them; it costs stores."},
    ),
    (
        "_permute_place_kernel", "histograms behind",
        "mask=(runs < num_runs)[:, None] & mask_g[None, :]", "mask=mask_g[None, :]",
        "reads histograms behind the last one",
    ),
    (
        "_permute_place_kernel", "all write", "mask=mask_g & first", "mask=mask_g",
        "every program writes the offsets",
        {"equivalent": "All programs have the same offsets; it costs stores."},
    ),
    ("_permute", "nothing", "output.zero_()", "pass", "the offsets of no slot are not written"),
    (
        "_permute", "choices", "SEGMENTS_PER_BLOCK * top_k", "SEGMENTS_PER_BLOCK",
        "blocks cover one choice's slots",
    ),
    ("_permute", "strides", "topk_ids.contiguous()", "topk_ids", "ids are taken for dense"),
)  # fmt: skip

_COMBINE = _in(
    "stages/combine.py",
    COMBINE,
    (
        "_combine_fwd_kernel", "choices", "ptrs += stride_out_k", "ptrs += 0",
        "the first choice is added again",
    ),
    (
        "_combine_fwd_kernel", "rows of the shared path", "row = sequence * shared_rows + step",
        "row = rows", "the cropped rows are not skipped",
    ),
    (
        "_combine_fwd_kernel", "gate of a step", "row // STEPS_PER_GATE", "row",
        "every step has a gate",
    ),
    ("_combine_fwd_kernel", "sign", "tl.exp(-logit)", "tl.exp(logit)", "the gate is 1 - gate"),
    ("_combine_fwd_kernel", "padding", "real &= tl.load", "tl.load", "padding has a shared output"),
    (
        "_combine_fwd_kernel", "wrong stride", "sequence * stride_out_b",
        "sequence * length * stride_out_t", "takes sequences for dense",
    ),
    (
        "_combine_bwd_kernel", "tail", "(step < length)", "(step <= length)",
        "reads behind a sequence",
    ),
    ("_combine_bwd_kernel", "sigmoid", " * (1.0 - opened)", "", "the sigmoid's slope is cut"),
    (
        "_combine_bwd_kernel", "no sum", "dot += tl.sum", "dot = tl.sum",
        "the last columns of the last step are all",
    ),
    (
        "_combine_bwd_kernel", "rows behind", "mask=mask_g[:, None] & mask_d)",
        "mask=real[:, None] & mask_d)", "rows behind the sequence are not written",
    ),
    ("launch_combine", "grid", " * triton.cdiv(d_model, block_d)", "", "columns have no program"),
    ("_combine_bwd", "strides", "if dy.stride(-1) != 1:", "if False:", "dy is taken for dense"),
)  # fmt: skip

_EXPERTS = _in(
    "stages/experts/kernels.py",
    FUSED,
    (
        "expert_ffn_fwd_kernel", "missing weight", "out * weights[:, None]", "out",
        "outputs are not weighted",
    ),
    (
        "expert_ffn_fwd_kernel", "weight twice", "out * weights[:, None]",
        "out * weights[:, None] * weights[:, None]", "outputs are weighted twice",
    ),
    (
        "expert_ffn_fwd_kernel", "no expert", "f_end = tl.where(expert < num_experts, F, 0)",
        "f_end = F", "reads weights behind the last expert",
    ),
    (
        "expert_ffn_fwd_kernel", "tail mask", "mask_m = rows < row_end", "mask_m = rows <= row_end",
        "a tile has the next expert's first row",
    ),
    (
        "expert_ffn_fwd_kernel", "dropout of a segment",
        "slot * SEGMENT_SIZE + rows % SEGMENT_SIZE", "slot * SEGMENT_SIZE",
        "steps of a segment drop the same", {"tests": DROPOUT},
    ),
    (
        "expert_ffn_dx_kernel", "no sum over chunks", "dweight += tl.sum(tl.fma(dhidden",
        "dweight = tl.sum(tl.fma(dhidden", "the last chunk is all, the bias is lost",
    ),
    (
        "expert_ffn_dx_kernel", "place of a share", "drow_weights_ptr + row_ids",
        "drow_weights_ptr + rows", "a routing weight's gradient is in sorted order",
    ),
    (
        "expert_ffn_dx_kernel", "weight twice", "dpre = (dpre * weights[:, None])",
        "dpre = (dpre * weights[:, None] * weights[:, None])", "dx is weighted twice",
    ),
    (
        "expert_ffn_dx_kernel", "gate", "dx = tl.dot(dgate, chunk.gate, dx,",
        "tl.dot(dgate, chunk.gate, dx,",
        "dx lacks the gate's share",
    ),
    (
        "expert_ffn_dx_kernel", "kept layer", "(hidden * weights[:, None]).to(x.dtype)",
        "hidden.to(x.dtype)", "down's gradient is not weighted", {"tests": MIDDLE},
    ),
    (
        "expert_ffn_dx_kernel", "kept columns", "row_offs[:, None] + offs_f[None, :]",
        "row_offs[:, None] + (offs_f - f0)[None, :]", "later chunks go over the first",
        {"tests": MIDDLE},
    ),
    (
        "expert_ffn_dx_kernel", "bias", "dweight += tl.sum(tl.fma(dy.to(ACC), bias",
        "tl.sum(tl.fma(dy.to(ACC), bias", "a routing weight's gradient lacks the bias",
    ),
    (
        "expert_ffn_dw_kernel", "missing weight",
        "hidden = (hidden * weights[:, None]).to(x.dtype)", "hidden = hidden.to(x.dtype)",
        "down's gradient is not weighted",
    ),
    (
        "expert_ffn_dw_kernel", "no sum over tiles", "dpre.to(x.dtype), dup, input",
        "dpre.to(x.dtype), input", "the last tile is all",
    ),
    (
        "expert_ffn_dw_kernel", "tile of an expert", "(tile - before) * BLOCK_M", "tile * BLOCK_M",
        "later experts start too late",
    ),
    ("expert_ffn_dw_kernel", "slot", "(split + expert)", "split", "experts share a slot"),
    (
        "expert_ffn_dw_kernel", "whole", "(before + tiles <= last)", "(before + tiles <= last + 1)",
        "a share goes where a whole sum belongs", {"tests": SUMS},
    ),
    (
        "expert_ffn_dw_kernel", "chunk", "offs_f = first_f + tl.arange", "offs_f = tl.arange",
        "all chunks have the first columns",
    ),
    (
        "expert_ffn_dw_kernel", "bias of down",
        "ddown_bias += tl.sum(dy.to(ACC) * weights[:, None], 0)",
        "ddown_bias += tl.sum(dy.to(ACC), 0)", "down's bias gradient is not weighted", {"nth": 0},
    ),
    (
        "expert_ffn_dw_kernel", "bias of down in 16 bits",
        "ddown_bias += tl.sum(dy.to(ACC) * weights[:, None], 0)",
        "ddown_bias += tl.sum(dy.to(ACC), 0)", "down's bias gradient is not weighted", {"nth": 1},
    ),
)  # fmt: skip

_EXPERTS_HOST = [
    *_in(
        "stages/experts/launch.py",
        FUSED,
        (
            "launch_dw", "reduction's rows", "call.rows_per_slot, tile.block_m",
            "1, tile.block_m", "the reduction counts other tiles than the kernel",
        ),
        (
            "launch_dw", "order", "(dup, ddown, dgate, dup_bias, ddown_bias, dgate_bias)",
            "(dup, ddown, dgate, dup_bias, dgate_bias, ddown_bias)", "biases are exchanged",
        ),
        (
            "launch_dx", "strides of dy", "rows_of(dy)", "call.x_rows._replace(ptr=dy)",
            "dy is read with the strides of x",
        ),
        (
            "new_kept", "gate", "torch.empty_like(dpre) if", "dpre if",
            "the gate's gradient goes over up's", {"tests": MIDDLE},
        ),
        (
            "column_tiles", "one row", "triton.cdiv(call.d_ff, _dhidden_tile(call).block_n)", "1",
            "shares of later column tiles have no room", {"tests": WIDE},
        ),
        (
            "weight_gradients", "weights of the bias", "row_weights=call.topk_weights",
            "row_weights=None", "down's bias gradient is not weighted", {"tests": WIDE},
        ),
    ),
    *_in(
        "stages/experts/__init__.py",
        FUSED,
        (
            "_expert_ffn_bwd", "nothing", "if call.num_rows == 0 or x.numel() == 0:", "if False:",
            "an empty batch has no zeros for gradients",
            {"equivalent": "Of no rows the kernels make zeros, too; it costs launches."},
        ),
        (
            "_expert_ffn_bwd", "no sum of shares", "torch.sum(shares, dim=0, out=drow_weights)",
            "drow_weights.copy_(shares[0])", "the first columns' share is all", {"tests": WIDE},
        ),
        (
            "_ExpertFFN.setup_context", "zeros", "set_materialize_grads(False)",
            "set_materialize_grads(True)", "zeros as large as the kept layers are filled",
            {"tests": ZEROS},
        ),
        (
            "expert_ffn", "seed", "torch.randint(2**62, (1,)", "torch.full((1,), 7",
            "every call drops the same", {"tests": DROPOUT},
        ),
    ),
]  # fmt: skip

_GEMM = _in(
    "stages/grouped_gemm/kernels.py",
    GEMM,
    (
        "_load_operand", "wrong stride", "rows.to(tl.int64) * x.stride_t",
        "rows.to(tl.int64) * width", "takes rows for dense",
    ),
    (
        "_load_operand", "row mask", "mask = mask_m[:, None] &", "mask = (rows >= 0)[:, None] &",
        "reads rows of others",
    ),
    ("_load_operand", "column mask", "(cols < width)", "(cols >= 0)", "reads behind a row"),
    (
        "_load_factor", "expert's stride", "expert * factor.stride_e", "expert * N * K",
        "takes experts for dense",
    ),
    ("_load_factor", "depth mask", "(offs_k < K)", "(offs_k >= 0)", "reads behind a row"),
    ("_load_factor", "column mask", "(offs_n < N)", "(offs_n >= 0)", "reads behind a matrix"),
    (
        "_load_factor", "column's stride", "[None, :] * factor.stride_n", "[None, :] * K",
        "takes rows for dense",
    ),
    (
        "_swizzled_tile", "last group", "tl.minimum(row_tiles - first, GROUP_M)", "GROUP_M",
        "tiles of the last group are left out",
    ),
    (
        "_swizzled_tile", "group", "first + inside % height", "inside % height",
        "later groups are left out",
    ),
    (
        "grouped_gemm_kernel", "bias of no expert", "mask_b = mask_n & (k_end > 0)",
        "mask_b = mask_n", "rows without an expert have a bias",
    ),
    (
        "grouped_gemm_kernel", "no sum over depth", "acc = tl.dot(a, b, acc, input",
        "acc = tl.dot(a, b, input", "the last columns are all", {"nth": 0},
    ),
    (
        "grouped_gemm_kernel", "second product", "acc = tl.dot(a, b, acc, input",
        "acc = tl.dot(a, b, input", "the gate's product is all", {"nth": 1, "tests": WIDE},
    ),
    (
        "grouped_gemm_kernel", "gate and up exchanged", "activate(acc2, ACTIVATION, FAST) * acc",
        "activate(acc, ACTIVATION, FAST) * acc2", "the activation is on the wrong product",
        {"tests": WIDE},
    ),
    (
        "grouped_gemm_kernel", "kept gate", "acc2.to(y.ptr.dtype.element_ty)",
        "acc.to(y.ptr.dtype.element_ty)", "up's product is kept as the gate's", {"tests": WIDE},
    ),
    (
        "grouped_gemm_kernel", "missing weight", "acc *= tl.load(row_weights_ptr",
        "tl.load(row_weights_ptr", "outputs are not weighted", {"tests": WIDE},
    ),
    (
        "grouped_gemm_kernel", "choices", "y.stride_k // (length * D)", "1", "choices overlap",
        {"tests": WIDE},
    ),
    (
        "grouped_gemm_kernel", "dropout of another row",
        "row_ids = slot * ROWS_PER_SLOT + rows % ROWS_PER_SLOT", "row_ids = rows",
        "forward drops by sorted row, backward by slot", {"tests": DROPOUT},
    ),
    (
        "grouped_gemm_kernel", "no expert", "k_end = tl.where(expert < num_experts, K, 0)",
        "k_end = K", "reads weights behind the last expert",
    ),
    (
        "grouped_gemm_dhidden_kernel", "bias once", "mask=mask_k & (column_tile == 0)",
        "mask=mask_k", "every column tile adds the bias to a routing weight's gradient",
        {"tests": WIDE},
    ),
    (
        "grouped_gemm_dhidden_kernel", "row of a share",
        "column_tile.to(tl.int64) * num_slots * ROWS_PER_SLOT + ", "",
        "column tiles overwrite each other's shares", {"tests": WIDE},
    ),
    (
        "grouped_gemm_dhidden_kernel", "missing weight", "hidden = (hidden * weights)",
        "hidden = (hidden + 0.0)", "down's gradient is not weighted", {"tests": WIDE},
    ),
    (
        "grouped_gemm_dhidden_kernel", "weight twice", "dpre = dhidden * scale * slope * weights",
        "dpre = dhidden * scale * slope * weights * weights", "gradients are weighted twice",
        {"tests": WIDE},
    ),
    (
        "grouped_gemm_dhidden_kernel", "slope of the gate",
        "dhidden * scale * pre * slope * weights", "dhidden * scale * pre * weights",
        "the gate's slope is missing", {"tests": WIDE},
    ),
    (
        "grouped_gemm_dhidden_kernel", "place of a share", "* ROWS_PER_SLOT + row_ids",
        "* ROWS_PER_SLOT + rows", "a routing weight's gradient is in sorted order", {"tests": WIDE},
    ),
    (
        "grouped_gemm_dw_kernel", "no sum over tiles", "tl.trans(a), b, dw, input",
        "tl.trans(a), b, input", "the last tile is all",
    ),
    (
        "grouped_gemm_dw_kernel", "tail mask", "mask_m = rows < hi", "mask_m = rows <= hi",
        "an expert has the next one's first row",
    ),
    (
        "grouped_gemm_dw_kernel", "bias's weight", "a = tl.fma(a, weights.to(ACC)[:, None], 0.0)",
        "a = a + 0.0", "the bias gradient is not weighted", {"tests": WIDE},
    ),
    (
        "grouped_gemm_dw_kernel", "expert without rows", "if WHOLE or start < stop:",
        "if start < stop:", "its gradient is not written",
    ),
    ("grouped_gemm_dw_kernel", "slot", "(split + expert)", "split", "experts share a slot"),
    (
        "grouped_gemm_dw_kernel", "bias in a slot", "store_sum(out + N * K,", "store_sum(out,",
        "the bias overwrites the weight's share",
    ),
    (
        "grouped_gemm_dw_kernel", "columns", "offs_k = k_tile * BLOCK_K + tl.arange",
        "offs_k = tl.arange", "all tiles have the first columns",
    ),
)  # fmt: skip

_GEMM_HOST = _in(
    "stages/grouped_gemm/__init__.py",
    GEMM,
    (
        "gemm_grid", "grid", "triton.cdiv(num_rows, tile.block_m) + num_experts",
        "triton.cdiv(num_rows, tile.block_m) + 1", "partial tiles have no program",
    ),
    (
        "weight_gradient", "no reduction", "reduce_partials(partials,",
        "(lambda *_: None)(partials,", "shares are not added up",
    ),
    (
        "weight_gradient", "splits of whole experts", "splits = num_experts", "splits = 1",
        "later experts have no program",
    ),
    (
        "_grouped_gemm_dw", "nothing", "bias.zero_()", "bias.numel()",
        "the gradient of no row is not 0",
    ),
)  # fmt: skip

_SHARED = _in(
    "stages/shared/kernels.py",
    SHARED,
    (
        "shared_rows_kernel", "end of a sequence", "tl.minimum(length - step, SEGMENT_SIZE) * D",
        "SEGMENT_SIZE * D", "reads into the next sequence",
    ),
    (
        "shared_rows_kernel", "step", "(rows % segments_per_sequence) * SEGMENT_SIZE",
        "(rows % segments_per_sequence)", "segments overlap",
    ),
    (
        "shared_rows_kernel", "rows behind", "tl.where(mask_m, tl.minimum",
        "tl.where(rows >= 0, tl.minimum", "reads behind the last segment",
    ),
    (
        "shared_rows_kernel", "no mask", "if padding_mask_ptr is not None:", "if False:",
        "padding is real",
    ),
    (
        "shared_rows_kernel", "flags", "(cols // D)[None, :]", "(cols // (D + 1))[None, :]",
        "flags of the wrong steps",
    ),
    ("shared_rows_kernel", "dense steps", "(stride_x_t - D)", "(D - D)", "takes steps for dense"),
    (
        "shared_rows_kernel", "no sum over columns", "along += tl.sum", "along = tl.sum",
        "the last columns are all",
    ),
    (
        "shared_rows_kernel", "tail", "mask=mask_m[:, None] & (cols < W)[None, :])", "mask=real)",
        "missing steps are not 0",
    ),
    (
        "shared_activate_kernel", "gate and up exchanged",
        "activate(gate_pre, ACTIVATION, FAST) * pre", "activate(pre, ACTIVATION, FAST) * gate_pre",
        "the activation is on the wrong product",
    ),
    (
        "shared_activate_kernel", "bias", "pre += tl.load(up_bias_ptr", "tl.load(up_bias_ptr",
        "no bias", {"nth": 0},
    ),
    (
        "shared_activate_kernel", "dropout of the next row", "long_rows, cols, H",
        "long_rows + 1, cols, H", "forward drops what backward keeps",
    ),
    (
        "shared_activate_kernel", "column tile", "first_n = (pid % column_tiles) * BLOCK_N",
        "first_n = 0", "all tiles have the first columns",
    ),
    (
        "shared_activate_bwd_kernel", "no sum over columns", "dopened += tl.sum",
        "dopened = tl.sum",
        "the last columns are all, the bias is lost",
    ),
    (
        "shared_activate_bwd_kernel", "slope", "dpre = dhidden * scale * slope",
        "dpre = dhidden * scale * active", "the value for the slope",
    ),
    (
        "shared_activate_bwd_kernel", "opened gate", "hidden *= opened[:, None]", "hidden *= 1.0",
        "down's gradient lacks the gate",
    ),
    (
        "shared_activate_bwd_kernel", "dropout", "hidden = active * scale", "hidden = active + 0.0",
        "down's gradient ignores dropout",
    ),
    (
        "shared_activate_bwd_kernel", "dropout of the next row", "long_rows, cols, H",
        "long_rows + 1, cols, H", "backward drops what forward kept",
    ),
    (
        "shared_activate_bwd_kernel", "bias of the gate", "tl.store(out + H, ", "tl.store(out, ",
        "the gate's bias gradient overwrites the other one",
    ),
    (
        "shared_activate_bwd_kernel", "row of the bias", "pid.to(tl.int64) * (gates * H)",
        "pid.to(tl.int64) * H", "row tiles overwrite each other's sums",
    ),
    (
        "shared_activate_bwd_kernel", "sigmoid", " * (1.0 - opened)", "",
        "the sigmoid's slope is cut",
    ),
    (
        "shared_activate_bwd_kernel", "gate's bias", "gate_pre += bias.to(ACC)[None, :]",
        "bias += 0", "backward has another gate than forward",
    ),
    (
        "shared_dx_kernel", "row", "step // SEGMENT_SIZE", "step // (SEGMENT_SIZE + 1)",
        "steps of other rows",
    ),
    (
        "shared_dx_kernel", "gate's share", "drows + dlogit[:, None] * vector", "drows",
        "dx lacks the gate's share",
    ),
    ("shared_dx_kernel", "padding", "real &= tl.load", "tl.load", "padding has a gradient"),
    (
        "shared_dx_kernel", "dropped store", "mask=inside[:, None] & mask_d)", "mask=mask)",
        "masked steps are not 0",
    ),
    (
        "shared_reduce_kernel", "tail", "(slots < num_partials)", "(slots >= 0)",
        "reads slots behind the last one",
    ),
    ("shared_reduce_kernel", "no sum", "acc += tl.load", "acc = tl.load", "the last slots are all"),
    (
        "shared_reduce_kernel", "part", "gate_bias_ptr + offs - H", "gate_bias_ptr + offs",
        "the gate's part is misplaced",
    ),
)  # fmt: skip

_SHARED_HOST = [
    *_in(
        "stages/shared/launch.py",
        SHARED,
        (
            "SharedCall.are_rows", "masked rows", " and self.padding_mask is None", "",
            "padding is read as x has it",
        ),
        (
            "SharedCall.are_rows", "dense", "whole and x.is_contiguous()", "whole",
            "x is taken for dense",
        ),
        (
            "backward", "gate of the bias", "torch.sigmoid(logits)", "torch.ones_like(logits)",
            "down's bias gradient lacks the gate",
        ),
        (
            "backward", "grid", "triton.cdiv(dbias.shape[1], 32)", "dbias.shape[1] // 32",
            "the last columns are never added up",
        ),
    ),
    *_in(
        "stages/shared/__init__.py",
        SHARED,
        (
            "shared_combine", "seed", "torch.randint(2**62, (1,)", "torch.full((1,), 7",
            "every call drops the same", {"tests": SHARED_DROPOUT},
        ),
        (
            "_shared_bwd", "nothing", "if call.x.numel() == 0:", "if False:",
            "an empty batch has no zeros for gradients",
            {"equivalent": "Of no rows the products make zeros, too; it costs launches."},
        ),
    ),
]  # fmt: skip

MUTANTS: list[Mutant] = [
    *_ACTIVATIONS, *_LAUNCH, *_ARGUMENTS, *_FFN, *_PARTIALS, *_ROUTER, *_SEQUENCES, *_ROUTE,
    *_ROUTE_HOST, *_PERMUTE, *_COMBINE, *_EXPERTS,
    *_EXPERTS_HOST, *_GEMM, *_GEMM_HOST, *_SHARED, *_SHARED_HOST,
]  # fmt: skip
