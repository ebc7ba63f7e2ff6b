"""What the studies run: every run's data, model and training, by name.

A study compares variants of one small model. All of them are sized for two CPU cores; what was
reduced against the official recipe stands in `REDUCED`. With ``scale="full"`` the same studies have
the official sizes, epochs and learning rate, for a GPU; loss, dropout and the shared expert's width
stay those of the example.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

from examples.forecaster.data import PLANTED
from examples.forecaster.model import ForecasterConfig
from examples.forecaster.stress_series import STRESS
from examples.forecaster.training import TrainOptions, planted_settings

HORIZONS = (96, 192, 336, 720)
SEEDS = (0, 1, 2)
REDUCED = (
    "Against the official small recipe, official value in brackets: width 16 (128), expert width "
    "32 (256), 2 heads (4), segments of 5, 5, 4, 4 patches (3, 5, 5, 5), shared expert a patch "
    "wide (a segment), LayerNorm (RMSNorm), no stochastic depth (up to 0.3), no router dropout "
    "(0.1 to 0.2), one head over all patches for the next 32 steps (a head for each patch, whose "
    "target is the window shifted by 32), windows relative to their last value (RevIN), Huber "
    "loss with delta 1 (2), learning rate 1e-3 down to 1e-5 (3.2e-4 to 1.2e-5), weight decay 0.01"
    " (0.1), at most 8 epochs of about 14,000 sequences (20 of all windows) in batches of about "
    "224 sequences (900 to 5,400), validation on every 4th window or fewer, test windows of the "
    "long series thinned out as given. Look-back 512, patches of 8 and the 32-step roll-out are "
    "the official ones."
)
REDUCED_FURTHER = (
    f"{REDUCED} With many variants the runs are shorter still: 2 layers, 4 epochs, half of the "
    "test windows."
)


PLANTED_TEXT = (
    "Width 16, expert width 32, 2 layers, 12 epochs of all windows of 5,600 blocks, of which one "
    "of the last is mostly the best: errors would go on falling. Look-back of 8 blocks, horizon "
    "of 2; windows begin where a block does. `dense, wide` has as many parameters as the experts."
)


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much of a data set a run sees on a small machine.

    Attributes:
        train_fraction: of the train windows in an epoch: about 14,000 sequences.
        val_stride: validation on every val_stride-th window.
        test_stride: likewise for the score.
        batch_size: windows, each with all its channels: about 224 sequences, where that is more
            than one window.
    """

    train_fraction: float
    val_stride: int
    test_stride: int
    batch_size: int = 32


# Windows times channels differ by a factor of fifty between the data sets.
BUDGETS = {
    "ETTh1": Budget(0.25, 4, 1),
    "ETTh2": Budget(0.25, 4, 1),
    "ETTm1": Budget(0.06, 16, 8),
    "ETTm2": Budget(0.06, 16, 8),
    "Weather": Budget(0.018, 24, 24, 11),
    "exchange_rate": Budget(0.35, 2, 1),
    "multiscale": Budget(0.6, 2, 2),
    **dict.fromkeys(STRESS, Budget(0.7, 2, 1)),
    "ECL": Budget(0.0025, 96, 96, 1),
    "Traffic": Budget(0.0015, 96, 96, 1),
}
DATA = ("ETTh1", "ETTh2", "ETTm1", "ETTm2", "Weather", "exchange_rate")
# Files with no direct address: their runs are left out where they are not there.
IF_PRESENT = ("ECL", "Traffic")
FULL_BATCH = {"Weather": 256, "ECL": 14, "Traffic": 4}


@dataclasses.dataclass(frozen=True)
class Run:
    """One row of a study.

    Attributes:
        data: data set.
        variant: what differs, as the tables call it.
        config: of the model; its horizon is one call of the roll-out.
        options: of the training.
        horizons: scored on the test windows.
    """

    data: str
    variant: str
    config: ForecasterConfig
    options: TrainOptions
    horizons: tuple[int, ...] = HORIZONS

    @property
    def name(self) -> str:
        """File name of the result, without its ending."""
        return f"{self.data}_{self.variant}_s{self.options.seed}".replace(" ", "-")


def base(data: str, scale: str, seed: int, device: str) -> tuple[ForecasterConfig, TrainOptions]:
    """Model and training that the variants of a study share."""
    if scale == "full":
        config = ForecasterConfig(
            horizon=32,
            d_model=128,
            d_ff=256,
            num_heads=4,
            segment_sizes=(3, 5, 5, 5),
            router_dropout=0.2,
        )
        options = TrainOptions(
            epochs=20,
            batch_size=FULL_BATCH.get(data, 128),
            learning_rate=3.2e-4,
            weight_decay=0.1,
            train_fraction=1.0,
            seed=seed,
            device=device,
        )
        return config, options
    config = ForecasterConfig(horizon=32)
    budget = dataclasses.asdict(BUDGETS[data])
    return config, TrainOptions(patience=3, seed=seed, device=device, **budget)


def baselines(scale: str, device: str) -> Iterator[Run]:
    """Dense, token-wise and segment-wise on every data set, seed by seed.

    The experts, the router's kind and the shared expert (one step wide) are the same; the dense
    FFN is as wide as the experts that serve a patch, so active FLOPs agree.
    """
    for seed in SEEDS:
        for data in (*DATA, *IF_PRESENT):
            for kind in ("dense", "token", "segment"):
                config, options = base(data, scale, seed, device)
                yield Run(data, kind, dataclasses.replace(config, ffn=kind), options)


def short(data: str, scale: str, seed: int, device: str) -> tuple[ForecasterConfig, TrainOptions]:
    """Model and training of the studies that have many variants."""
    config, options = base(data, scale, seed, device)
    if scale == "full":
        return config, options
    config = dataclasses.replace(config, num_layers=2, segment_sizes=(5, 4))
    stride = 2 * options.test_stride
    return config, dataclasses.replace(options, epochs=4, test_stride=stride)


# Name of the variant and what it changes. A number stands for the segment size of all layers, a
# list for those from the first layer to the last, spread over as many as there are.
SIZES: dict[str, dict[str, object]] = {f"P={size}": {"segment_sizes": size} for size in range(1, 9)}
ABLATED = ("ETTh1", "Weather", "multiscale")
ABLATIONS: dict[str, dict[str, object]] = {
    "default": {},
    **SIZES,
    "fine to coarse": {"segment_sizes": (2, 4, 6, 8)},
    "coarse to fine": {"segment_sizes": (8, 6, 4, 2)},
    "experts segment-wide": {"expert_scope": "segment"},
    "experts projected": {"expert_scope": "projected"},
    "pooling mean": {"pooling": "mean"},
    "pooling max": {"pooling": "max"},
    "pooling first": {"pooling": "first"},
    "pooling last": {"pooling": "last"},
    "shared segment-wide": {"shared_expert": "segment"},
    "no shared expert": {"shared_expert": None},
    "renormalised": {"renormalize": "on"},
}


def change(config: ForecasterConfig, changes: Mapping[str, object]) -> ForecasterConfig:
    """Apply the changes of a variant to a model of any depth."""
    changes = dict(changes)
    sizes, layers = changes.get("segment_sizes"), config.num_layers
    if isinstance(sizes, int):
        changes["segment_sizes"] = (sizes,) * layers
    elif isinstance(sizes, tuple):
        # The first and the last stay what they are.
        places = (round(i * (len(sizes) - 1) / max(1, layers - 1)) for i in range(layers))
        changes["segment_sizes"] = tuple(sizes[place] for place in places)
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def changed(
    data_sets: Iterable[str],
    variants: Mapping[str, Mapping[str, object]],
    horizon: int,
    scale: str,
    device: str,
) -> Iterator[Run]:
    """Every variant on every data set, seed by seed."""
    for seed in SEEDS:
        for data in data_sets:
            for variant, changes in variants.items():
                config, options = short(data, scale, seed, device)
                yield Run(data, variant, change(config, changes), options, horizons=(horizon,))


def ablations(scale: str, device: str) -> Iterator[Run]:
    """One change at a time, on two real series and on one whose scales are known."""
    return changed(ABLATED, ABLATIONS, 96, scale, device)


def sizes(scale: str, device: str) -> Iterator[Run]:
    """Uniform segment sizes on the data sets that the ablations leave out."""
    others = [data for data in DATA if data not in ABLATED]
    return changed(others, SIZES, 96, scale, device)


STRESSED: dict[str, dict[str, object]] = {
    "dense": {"ffn": "dense"},
    "token": {"ffn": "token"},
    "P=2": {"segment_sizes": 2},
    "P=5": {"segment_sizes": 5},
    "P=8": {"segment_sizes": 8},
    # 59 patches, a prime: no segment size but 1 divides it.
    "P=5 of 59": {"segment_sizes": 5, "look_back": 472},
    "P=8 of 59": {"segment_sizes": 8, "look_back": 472},
    "dense of 59": {"ffn": "dense", "look_back": 472},
}


def failures(scale: str, device: str) -> Iterator[Run]:
    """Series that break what segment routing relies on, forecast without a roll-out."""
    return changed(STRESS, STRESSED, 32, scale, device)


# Blocks of the planted series, and seeds of series and training.
PLANTED_SEEDS = range(5)
PLANTED_KINDS: dict[str, dict[str, object]] = {
    "dense": {"ffn": "dense"},
    # As many parameters as the experts have.
    "dense, wide": {"ffn": "dense", "d_ff": 80},
    "token": {"ffn": "token"},
    **{f"P={size}": {"segment_sizes": size} for size in range(2, 9)},
}


def planted(scale: str, device: str) -> Iterator[Run]:
    """Series that were made for segments of one size; ``scale`` makes no difference."""
    del scale
    for seed in PLANTED_SEEDS:
        for data, block in PLANTED.items():
            config, options = planted_settings(block, seed, device)
            for variant, changes in PLANTED_KINDS.items():
                yield Run(data, variant, change(config, changes), options, (config.horizon,))


STUDIES = {
    "planted": planted,
    "baselines": baselines,
    "ablations": ablations,
    "sizes": sizes,
    "failures": failures,
}
