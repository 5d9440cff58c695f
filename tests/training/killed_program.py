"""Trains small networks in processes that are killed; run by test_kill.py.

Reads lines ``network folder seconds`` from its input, forks a process that trains that network with
checkpoints in that folder, kills it with SIGKILL after so many seconds (0: never), and prints
``killed`` or ``finished``; at the beginning ``ready``. One process imports torch for all of them.
"""

import os
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.nn.functional as F

from funcnets import models, optim, random, training

STEPS, EVERY = 30, 3


def mlp():
    model = models.mlp(6, 3, (16, 16), dropout=0.3)
    x = random.normal(random.key(0), (50, 6))
    data = x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    optimizer = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-2))
    step = training.make_step(
        model, F.cross_entropy, optimizer, accumulate=2, average=training.ema(0.9)
    )
    return model, step, training.minibatches(data, 8)


def cnn():
    model = models.cnn(in_channels=1, num_classes=3, widths=(4, 8))
    x = random.normal(random.key(0), (50, 1, 8, 8))
    data = x, random.randint(random.key(1), (50,), 0, 3)
    optimizer = optim.sgd(optim.schedules.cosine(0.1, STEPS), momentum=0.9)
    step = training.make_step(
        model, F.cross_entropy, optimizer, precision="bfloat16", average=training.swa(10)
    )
    return model, step, training.minibatches(data, 16, drop_last=True)


def gpt():
    model = models.gpt(11, 12, width=16, depth=1, heads=2, dropout=0.1)
    text = random.randint(random.key(0), (40, 13), 0, 11)
    data = text[:, :-1], text[:, 1:]

    def loss(logits, targets):
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    step = training.make_step(model, loss, optim.adam(1e-2), nonfinite="restore", good_every=4)
    return model, step, training.minibatches(data, 8)


def train(network, folder):
    model, step, batches = {"mlp": mlp, "cnn": cnn, "gpt": gpt}[network]()
    state = step.init(model.init(random.key(1)), random.key(2))

    def evaluate(state):  # over the first epoch's batches, in their order
        held = batches(random.key(5))
        scores = training.evaluate(
            model.apply,
            training.parameters(state),
            held,
            {"loss": lambda outputs, y: F.cross_entropy(outputs.flatten(0, -2), y.flatten())},
        )
        return scores

    checkpoints = training.Checkpoints(folder / "checkpoints", keep=2, best="loss")
    state, history = training.fit(
        step,
        state,
        batches,
        steps=STEPS,
        every=EVERY,
        evaluate=evaluate,
        early_stopping=training.EarlyStopping(patience=STEPS),
        checkpoints=checkpoints,
        resume=True,
        callbacks=[training.JsonLines(folder / "log.jsonl")],
    )
    for record in history:
        record["seconds"] = 0.0
    training.save_checkpoint(folder / "final.safetensors", state, {"history": history})


def main():
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        network, folder, seconds = line.split()
        child = os.fork()
        if not child:
            try:
                train(network, Path(folder))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        killed = False
        if float(seconds):
            time.sleep(float(seconds))
            killed = os.waitpid(child, os.WNOHANG) == (0, 0)
            if killed:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
        else:
            _, status = os.waitpid(child, 0)
            if status:
                print("failed", flush=True)
                continue
        print("killed" if killed else "finished", flush=True)


if __name__ == "__main__":
    main()
