"""Trainings that are killed at random moments, again and again, end with the bits of one that was not.

`python tests/kill_training.py FOLDER KIND KILLS` says how it went. Every run is a
process forked after the imports, which take longer than everything else.
"""

import gc
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from training_runs import a_recipe, save_data, save_model

from moe_runtime.hf.loading import load_causal_lm
from moe_runtime.train.run import run_training

STEPS = 16


def recipe(folder, kind, output):
    moe = {"balance_over": "global_batch", "z_loss": 0.01}
    if kind == "ours":
        moe |= {"expert_dropout": 0.2, "bias_update": 1e-3}
    return a_recipe(
        folder / "model",
        folder / "data.jsonl",
        folder / output,
        train={"steps": STEPS, "save_every": 2, "optimizer": "adamw_torch", "warmup_steps": 3},
        moe=moe,
        data={"packing": True},
    )


def fork(work):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def wait(child, seconds):
    """The exit status, or None if it still runs after that time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def train_with_kills(of_run, kills, longest, check):
    """Runs that are killed within `longest` seconds, `kills` times; `check` looks at every one that ends."""
    draw, done, after_checkpoint = random.Random(0), 0, 0
    while True:
        child = fork(lambda: run_training(of_run, resume=True))
        status = wait(child, draw.uniform(0.0, longest) if done < kills else 60.0)
        if status is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            done += 1
            after_checkpoint += any(Path(of_run.output, "checkpoints").glob("checkpoint-*"))
            continue
        assert status == 0, f"a run ended with {status}"
        check()
        if done >= kills:
            return after_checkpoint
        shutil.rmtree(of_run.output)


def main(folder, kind, kills):
    torch.set_num_threads(1)
    gc.freeze()  # every run collects garbage, and would look at all that was imported
    save_model(kind, folder / "model")
    save_data(folder / "data.jsonl")
    straight, killed = recipe(folder, kind, "straight"), recipe(folder, kind, "killed")
    started = time.monotonic()
    assert wait(fork(lambda: run_training(straight)), 60.0) == 0
    seconds = time.monotonic() - started

    def check():
        expected, actual = (load_causal_lm(run.output).state_dict() for run in (straight, killed))
        different = [name for name, value in expected.items() if not torch.equal(actual[name], value)]
        assert not different, different

    after_checkpoint = train_with_kills(killed, kills, seconds, check)
    print(f"{kind}: {kills} kills, {after_checkpoint} of them after a checkpoint, and no bit differs")
    return 0 if after_checkpoint else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
