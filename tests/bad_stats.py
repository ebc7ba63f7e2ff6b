"""Wrong calls of routing statistics, their plots and writers; rows as in `bad_calls`."""

import tempfile
from functools import partial
from pathlib import Path

from bad_calls import LAYER, ROUTING, T, V, caller, draw
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
    (ENTRY, T, "history | a sequence of entries | got dict"),
    ("steps", T, "history | a sequence of entries | got str"),
    ([ENTRY, None], T, "entries of RoutingCollector | NoneType"),
    ([{"step": 1}], T, "entries of RoutingCollector | got dict"),
    ([], V, "at least one entry | got none"),
    ([ENTRY, OTHER], V, "of one model | [1, 0] layers"),
]
ROWS = [
    (count_replicas, RuntimeError, "collect_routing_stats | torch.nn.DataParallel calls copies"),
    (collect(model=[LAYER]), T, "torch.nn.Module | got list"),
    (collect(model=nn.Sequential(nn.Linear(2, 2), SegMoE(4, 6, 0))), V,
     "a SegMoE with experts inside | Sequential"),
    (routings(model=None), T, "Module | NoneType"),
    (routings(model=nn.Linear(2, 2)), V, "a SegMoE with"),
    (collect_without_graph, RuntimeError, "no graph | use_reentrant=False"),
    (collect(every=0.5), T, "be an int | 0.5 (float)"),
    (collect(every=0), V, "at least 1, got 0"),
    (collect(all_reduce=1), T, "True or False"),
    (collect(group="some"), V, "None without all_reduce"),
    (load_state(lambda _: None), T, "state | a dict | NoneType"),
    (load_state(lambda _: {}), V, "the keys | 'sums' | got []"),
    (load_state(lambda state: {**state, "num_experts": [2]}), V,
     "layers with [3] experts | got [2]"),
    (load_state(lambda state: {**state, "totals": []}), V,
     "state['totals'] | tensors of shapes [(13,)] | got []"),
    (load_state(lambda state: {**state, "sums": state["sums"][0]}), T,
     "state['sums'] | be a list | Tensor"),
    *((plot(history=h), e, words) for plot in (load_plot, usage_plot) for h, e, words in HISTORIES),
    (load_plot(key="entropy"), V, "'prob_mass' | 'entropy'"),
    (usage_plot(keys=["load"]), V, "'entropy' | 'load'"),
    (usage_plot(keys="entropy"), T, "of names | got str"),
    (usage_plot(keys=()), V, "at least one name"),
    (timeline(routing=draw(4, 3)), T, "be a Routing | Tensor"),
    (timeline(segment_size=0), V, "at least 1"),
    (timeline(num_steps=5.0), T, "be an int"),
    (timeline(sequence=-1), V, "at least 0"),
    (timeline(sequence=2), V, "below 2 | got 2"),
    (partial(timeline(num_steps=9)), V, "routing | of 3 segments | 4 segments, 3 experts"),
    (timeline(routing=SegMoE(4, 6, 0, segment_size=3).forward_with_routing(draw(2, 5, 4))[1]), V,
     "4 segments, 0 experts"),
    (timeline(series=[0.0] * 5), T, "torch.Tensor | list"),
    (timeline(series=draw(6)), V, "(T=5, C) | (6,)"),
    (caller(CSVWriter)(path=3), T, "CSVWriter | be a path | got int"),
    (csv_on(b"a,b\n"), V, "path | begins with 'step,epoch,' | b'a,b"),
    (csv_row([ENTRY]), T, "CSVWriter.write | entry | a dict | got list"),
    (csv_row({"step": 1}), V, "entry of RoutingCollector | ['step']"),
    (csv_row(ENTRY, OTHER), V, "columns that the file has | ['moe/layer_0/entropy']"),
    (csv_row({**ENTRY, "layers": {0: {}, 1: {}}}, {**ENTRY, "global": {"cv_hard": 1}}), V,
     "columns that the file has | moe/global/cv_hard"),
    (caller(TensorBoardWriter)(log_dir=None), T, "be a path"),
    (scalars(None), T, "TensorBoardWriter.write | entry | a dict"),
    (flatten(entry=None), T, "flatten_stats | a dict"),
    (flatten(entry={}), V, "entry of RoutingCollector"),
]  # fmt: skip
