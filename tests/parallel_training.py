"""`run_training` in processes with torchrun's environment, which fork after the imports.

`run` trains in one process and in two, by each recipe; then it goes on from half way with two and with one.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_runs import a_recipe, save_data, save_model

from moe_runtime.errors import RunError
from moe_runtime.train.run import run_training
from moe_runtime.train.trainer import MoeTrainer

ROOT = Path(__file__).resolve().parent.parent
STEPS, HALF_WAY = 20, 10
ROWS = 4  # of a step, over all processes
LAYOUTS = {
    "experts": {"data": "ddp", "experts": 2},
    "fsdp": {"data": "fsdp"},
    "experts-and-fsdp": {"data": "fsdp", "experts": 2},
}
GOES_ON = "experts-and-fsdp"
OPTIONS = {"num_experts": 6, "router_selection_bias": True}
ROWS_OF_EPOCH, EVAL_ROWS = 22, 5  # of 2 micro-batches a step the last has one; rows for 2 and for 3 processes


def run(folder):
    """Train in `folder`; every run has a folder of its own there."""
    done = subprocess.run(
        [sys.executable, __file__, str(folder)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "tests"))),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stderr


def recipe(folder, name, processes, checkpointed, **parallel):
    return a_recipe(
        folder / "model",
        folder / "data.jsonl",
        folder / name,
        train={
            "steps": STEPS,
            "batch_size": ROWS // 2 // processes,
            "accumulate": 2,
            "learning_rate": 1e-3,
            "router_learning_rate": 3e-3,
            "warmup_steps": 3,
            "max_grad_norm": 0.5,
            "gradient_checkpointing": checkpointed,  # no bit changes, and the experts are asked again
            "save_every": HALF_WAY,
        },
        moe={"balance_loss": 0.1, "balance_over": "global_batch", "z_loss": 0.01, "bias_update": 1e-2},
        parallel=parallel or None,
    )


def short_recipe(folder, name, processes, **train):
    """An epoch in bfloat16, whose last step has fewer rows."""
    layout = {"data": "ddp"} if processes > 1 else None
    return a_recipe(
        folder / "model",
        folder / "short.jsonl",
        folder / name,
        data={"eval": [f"five={folder / 'eval.jsonl'}"]},
        train={
            "steps": None,
            "epochs": 1,
            "batch_size": ROWS // 2 // processes,
            "precision": "bfloat16",
            "learning_rate": 1e-9,  # the losses are those of the first weights
        }
        | train,
        parallel=layout,
    )


def processes(size, work, *arguments):
    """`work` in processes as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(
        in_process, (size, port, work, arguments), nprocs=size, start_method="fork"
    )


def in_one_process(work, *arguments):
    """`work` in a process without torchrun's environment."""
    torch.multiprocessing.start_processes(lambda rank: work(*arguments), nprocs=1, start_method="fork")


def in_process(rank, size, port, work, arguments):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    work(*arguments)


def short_runs(folder):
    """In each of two processes: a run that ends, and two that the second process ends."""
    run_training(short_recipe(folder, "short-two", 2))
    seen = {}

    def with_nan(trainer, *arguments, **options):
        loss = compute_loss(trainer, *arguments, **options)
        if trainer.state.global_step == 1 and trainer.args.process_index == 1 and not trainer.update.losses:
            seen["samples"] = trainer.update.samples[0]
            return loss + float("nan")  # with a gradient that is finite
        return loss

    def full_disk(trainer, output_dir):
        if trainer.args.process_index == 1:
            raise OSError("no space left")

    compute_loss = MoeTrainer.compute_loss
    changes = {"not-finite": ("compute_loss", with_nan), "not-saved": ("_save_rng_state", full_disk)}
    for name, change in changes.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MoeTrainer, *change)
            try:
                run_training(short_recipe(folder, name, 2, save_every=2))
            except RunError as error:
                seen[name] = str(error)
    (folder / f"seen-{os.environ['RANK']}.json").write_text(json.dumps(seen))


def as_it_was(folder, run, name, step):
    """A copy of the run as it was when it had saved that step."""
    shutil.copytree(folder / run, folder / name)
    for path in (folder / name).iterdir():
        if path.name != "checkpoints":
            path.unlink() if path.is_file() else shutil.rmtree(path)
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(folder / name / "checkpoints" / f"checkpoint-{later}", ignore_errors=True)


def main(folder):
    save_model("ours", folder / "model", **OPTIONS)
    save_data(folder / "data.jsonl")
    save_data(folder / "short.jsonl", ROWS_OF_EPOCH)
    save_data(folder / "eval.jsonl", EVAL_ROWS)
    in_one_process(run_training, recipe(folder, "one", 1, False))
    for name, layout in LAYOUTS.items():
        processes(2, run_training, recipe(folder, name, 2, True, **layout))
    for run, name, step, size, layout in (
        (GOES_ON, "two-again", HALF_WAY, 2, LAYOUTS[GOES_ON]),
        (GOES_ON, "two-at-the-end", STEPS, 2, LAYOUTS[GOES_ON]),
        ("one", "two-from-one", HALF_WAY, 2, LAYOUTS[GOES_ON]),
    ):
        as_it_was(folder, run, name, step)
        processes(size, run_training, recipe(folder, name, size, run != "one", **layout), True)
    for name in ("one-again", "one-at-the-end"):
        as_it_was(folder, GOES_ON, name, HALF_WAY if name == "one-again" else STEPS)
        in_one_process(run_training, recipe(folder, name, 1, True), True)
    in_one_process(run_training, short_recipe(folder, "short-one", 1))
    processes(2, short_runs, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
