"""Wrong calls of routing statistics, their plots and writers; rows as in `bad_calls`."""

import tempfile
from pathlib import Path

from bad_calls import LAYER, ROUTING, caller, draw
from torch import nn
from torch.utils.checkpoint import checkpoint

from segmoe_kernels import SegMoE, collect_routing_stats, collect_routings
from segmoe_kernels.stats.collector import RoutingCollector
from segmoe_kernels.stats.plots import plot_expert_load, plot_expert_usage, plot_segment_timeline
from segmoe_kernels.stats.writers import CSVWriter, TensorBoardWriter, flatten_stats

ENTRY = {"step": 1, "epoch": 0, "global": {"entropy": 0.5}, "layers": {0: {"entropy": 0.5}}}
OTHER = {**ENTRY, "layers": {}}

routings = caller(collect_routings, model=LAYER)
collect = caller(collect_routing_stats, model=LAYER)
flatten = caller(flatten_stats)
load_plot = caller(plot_expert_load, history=[ENTRY])
usage_plot = caller(plot_expert_usage, history=[ENTRY])
# S=4: two sequences of two segments.
timeline = caller(plot_segment_timeline, routing=ROUTING, segment_size=3, num_steps=5)


def load_state(change):
    def call():
        with collect_routing_stats(LAYER) as stats:
            stats.load_state_dict(change(stats.state_dict()))

    call.wrong = RoutingCollector.load_state_dict, {"state"}
    return call


def count_replicas():
    layer = SegMoE(4, 6, 3)
    with collect_routing_stats(layer):
        layer._replicate_for_data_parallel()(draw(2, 5, 4))


def collect_without_graph():
    layer = SegMoE(4, 6, 3)
    with collect_routings(layer):
        checkpoint(layer, draw(2, 5, 4).requires_grad_(), use_reentrant=True)


def csv_row(*entries):
    def call():
        with tempfile.TemporaryDirectory() as folder, CSVWriter(Path(folder, "x.csv")) as writer:
            for entry in entries:
                writer.write(entry)

    call.wrong = CSVWriter.write, {"entry"}
    return call


def scalars(entry):
    def call():
        with tempfile.TemporaryDirectory() as folder, TensorBoardWriter(folder) as writer:
            writer.write(entry)

    call.wrong = TensorBoardWriter.write, {"entry"}
    return call


def csv_on(content):
    def call():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "x.csv")
            path.write_bytes(content)
            CSVWriter(path)

    return call


HISTORIES = [
    ("type", ENTRY, TypeError, ["history", "a sequence of entries", "got dict"]),
    ("text", "steps", TypeError, ["history", "a sequence of entries", "got str"]),
    ("entries", [ENTRY, None], TypeError, ["entries of RoutingCollector", "NoneType"]),
    ("keys", [{"step": 1}], TypeError, ["entries of RoutingCollector", "got dict"]),
    ("empty", [], ValueError, ["at least one entry", "got none"]),
    ("models", [ENTRY, OTHER], ValueError, ["of one model", "[1, 0] layers"]),
]
ROWS = [
    (
        "collect_replicas",
        count_replicas,
        RuntimeError,
        ["collect_routing_stats", "torch.nn.DataParallel calls copies"],
    ),
    ("stats_model", collect(model=[LAYER]), TypeError, ["model", "torch.nn.Module", "got list"]),
    (
        "stats_no_layer",
        collect(model=nn.Sequential(nn.Linear(2, 2), SegMoE(4, 6, 0))),
        ValueError,
        ["model", "a SegMoE with experts inside", "Sequential"],
    ),
    ("routings_model", routings(model=None), TypeError, ["model", "Module", "NoneType"]),
    ("routings_no_layer", routings(model=nn.Linear(2, 2)), ValueError, ["a SegMoE with"]),
    ("routings_no_graph", collect_without_graph, RuntimeError, ["no graph", "use_reentrant=False"]),
    ("stats_every_float", collect(every=0.5), TypeError, ["every", "be an int", "0.5 (float)"]),
    ("stats_every_0", collect(every=0), ValueError, ["every", "at least 1, got 0"]),
    ("stats_all_reduce", collect(all_reduce=1), TypeError, ["all_reduce", "True or False"]),
    ("stats_group", collect(group="some"), ValueError, ["group", "None without all_reduce"]),
    ("stats_load_type", load_state(lambda _: None), TypeError, ["state", "a dict", "NoneType"]),
    ("stats_load_keys", load_state(lambda _: {}), ValueError, ["the keys", "'sums'", "got []"]),
    (
        "stats_load_experts",
        load_state(lambda state: {**state, "num_experts": [2]}),
        ValueError,
        ["layers with [3] experts", "got [2]"],
    ),
    (
        "stats_load_totals",
        load_state(lambda state: {**state, "totals": []}),
        ValueError,
        ["state['totals']", "tensors of shapes [(13,)]", "got []"],
    ),
    (
        "stats_load_sums",
        load_state(lambda state: {**state, "sums": state["sums"][0]}),
        TypeError,
        ["state['sums']", "be a list", "Tensor"],
    ),
    *((f"load_plot_{n}", load_plot(history=h), e, words) for n, h, e, words in HISTORIES),
    *((f"usage_plot_{n}", usage_plot(history=h), e, words) for n, h, e, words in HISTORIES),
    ("load_plot_key", load_plot(key="entropy"), ValueError, ["key", "'prob_mass'", "'entropy'"]),
    ("usage_plot_key", usage_plot(keys=["load"]), ValueError, ["keys", "'entropy'", "'load'"]),
    ("usage_plot_one_key", usage_plot(keys="entropy"), TypeError, ["keys", "of names", "got str"]),
    ("usage_plot_none", usage_plot(keys=()), ValueError, ["keys", "at least one name"]),
    ("timeline_routing", timeline(routing=draw(4, 3)), TypeError, ["be a Routing", "Tensor"]),
    ("timeline_size", timeline(segment_size=0), ValueError, ["segment_size", "at least 1"]),
    ("timeline_steps", timeline(num_steps=5.0), TypeError, ["num_steps", "be an int"]),
    ("timeline_negative", timeline(sequence=-1), ValueError, ["sequence", "at least 0"]),
    ("timeline_sequence", timeline(sequence=2), ValueError, ["sequence", "below 2", "got 2"]),
    (
        "timeline_fit",
        timeline(num_steps=9),
        ValueError,
        ["routing", "sequences of 3 segments", "4 segments, 3 experts"],
    ),
    (
        "timeline_dense",
        timeline(routing=SegMoE(4, 6, 0, segment_size=3).forward_with_routing(draw(2, 5, 4))[1]),
        ValueError,
        ["routing", "4 segments, 0 experts"],
    ),
    ("timeline_list", timeline(series=[0.0] * 5), TypeError, ["series", "torch.Tensor", "list"]),
    ("timeline_series", timeline(series=draw(6)), ValueError, ["series", "(T=5, C)", "(6,)"]),
    (
        "csv_path",
        caller(CSVWriter)(path=3),
        TypeError,
        ["CSVWriter", "path", "be a path", "got int"],
    ),
    ("csv_other", csv_on(b"a,b\n"), ValueError, ["path", "begins with 'step,epoch,'", "b'a,b"]),
    ("csv_type", csv_row([ENTRY]), TypeError, ["CSVWriter.write", "entry", "a dict", "got list"]),
    ("csv_keys", csv_row({"step": 1}), ValueError, ["entry of RoutingCollector", "['step']"]),
    (
        "csv_columns",
        csv_row(ENTRY, OTHER),
        ValueError,
        ["columns that the file has", "['moe/layer_0/entropy']"],
    ),
    (
        "csv_order",
        csv_row({**ENTRY, "layers": {0: {}, 1: {}}}, {**ENTRY, "global": {"cv_hard": 1}}),
        ValueError,
        ["columns that the file has", "moe/global/cv_hard"],
    ),
    (
        "tensorboard_path",
        caller(TensorBoardWriter)(log_dir=None),
        TypeError,
        ["log_dir", "be a path"],
    ),
    ("tensorboard_type", scalars(None), TypeError, ["TensorBoardWriter.write", "entry", "a dict"]),
    ("flatten_type", flatten(entry=None), TypeError, ["flatten_stats", "entry", "a dict"]),
    ("flatten_keys", flatten(entry={}), ValueError, ["entry of RoutingCollector"]),
]
