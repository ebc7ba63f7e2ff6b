"""Programs around the layer that test_in_processes.py starts in processes of their own.

``processes``: a parent whose forked, spawned and data-loading children run the layer. Prints JSON:
backend -> who -> digests of outputs and gradients.

``train``: the forecaster's example, which stops where it is told to, makes a file to say so and
waits for a signal.
"""

import argparse
import hashlib
import importlib
import json
import multiprocessing
import signal
import sys
import time
from pathlib import Path

import torch
from layers import STATES, D, make_layer, train_once
from torch.utils.data import DataLoader, Dataset

from segmoe_kernels.testing import make_inputs

LAYERS = ("default", "segment")
# A child that hangs is an answer too; nobody waits for it longer than this.
SECONDS = 90


def digest(backend):
    """Hash all results of a training step of some layers."""
    torch.set_num_threads(1)
    found = hashlib.sha256()
    for name in LAYERS:
        torch.manual_seed(3)
        layer = make_layer(**STATES[name][0], aux_loss_weight=0.1, dropout=0.2, backend=backend)
        x, dy, _ = make_inputs(2, 12, D)
        for tensor in (*train_once(layer, x, dy).values(), layer.aux_loss):
            found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


class Digests(Dataset):
    """A dataset that needs the layer for each of its elements, such as one of learned features."""

    def __init__(self, backend):
        self.backend = backend

    def __len__(self):
        return 2

    def __getitem__(self, _index):
        return digest(self.backend)


def run_children(backends):
    """Run the same step here and, after that, in every kind of child."""
    found = {backend: {"parent": [digest(backend)]} for backend in backends}
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            for backend in backends:
                found[backend][method] = [pool.apply_async(digest, [backend]).get(SECONDS)]
    for backend in backends:
        loader = DataLoader(
            Digests(backend),
            batch_size=None,
            num_workers=2,
            multiprocessing_context="fork",
            timeout=SECONDS,
        )
        found[backend]["loader"] = list(loader)
    return found


def train(stop, flag, arguments):
    """Run the example until it stops; returns its exit status if it doesn't end by the signal."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    training = importlib.import_module("examples.forecaster.training")
    script = importlib.import_module("examples.train_forecaster")
    signal.alarm(SECONDS)  # nobody is left behind, whatever becomes of the test
    # A shell starts what runs in its background with this signal ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def wait():
        flag.touch()
        while True:  # signal.pause() would sleep on after a signal just before it
            time.sleep(0.05)

    step, save = training.Trainer._step, torch.save
    taken, saved = [], []

    def stopping_step(trainer, ids):
        taken.append(1)
        loss = step(trainer, ids)
        if stop == "step" and len(taken) == trainer.steps_per_epoch + 2:
            wait()
        return loss

    def stopping_save(state, stream):
        saved.append(1)
        if stop == "save" and len(saved) == 2:
            save(state["model"], stream)  # a part of the checkpoint
            stream.flush()
            wait()
        save(state, stream)

    training.Trainer._step, torch.save = stopping_step, stopping_save
    return script.main(arguments)


def main():
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("processes").add_argument("backends", nargs="+")
    trainer = commands.add_parser("train")
    trainer.add_argument("stop", choices=("step", "save"))
    trainer.add_argument("flag", type=Path)
    args, rest = parser.parse_known_args()
    if args.command == "train":
        return train(args.stop, args.flag, rest)
    json.dump(run_children(args.backends), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
