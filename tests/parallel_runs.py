"""Models trained by this project's own parallelism, in gloo processes that fork after the imports.

`run` starts the worlds it is asked for, one after the other: "one" and "four" read a checkpoint of "two",
"two-again" one of "one". Each process writes what it saw.
"""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import torch
import transformers
from moe_families import tiny_family
from tiny_models import BAM_SHARED_KV_TOP_K, DENSE, MOE, tiny_model, tokens
from torch import distributed

import moe_runtime
from moe_runtime.distributed.checkpoint import (
    load_checkpoint,
    load_whole_optimizer,
    save_checkpoint,
    whole_state_dict,
)
from moe_runtime.distributed.dispatch import exchange_counts, to_experts, to_tokens
from moe_runtime.distributed.gradients import clip_grad_norm, split_by_mesh
from moe_runtime.distributed.mesh import make_layout
from moe_runtime.distributed.recipe import ParallelRecipe
from moe_runtime.distributed.shard import parallelize
from moe_runtime.errors import RunError
from moe_runtime.hf.lora import add_expert_lora
from moe_runtime.train.parallel import prepare

ROOT = Path(__file__).resolve().parent.parent
STEPS, HALF_WAY = 20, 10
ROWS = 4  # of a step, whatever the number of processes
MAX_NORM = 0.1  # below the norms of the first steps
RECIPES = {
    "fsdp": ParallelRecipe(data="fsdp"),
    "ddp": ParallelRecipe(data="ddp"),
    "experts": ParallelRecipe(data="ddp", experts=2),
    "experts-and-fsdp": ParallelRecipe(data="fsdp", experts=2),
}
AUXILIARY = {
    "num_experts": 6,
    "router_aux_loss_coef": 0.1,
    "router_z_loss_coef": 0.01,
    "router_balance_over": "sequence",
}
DROPOUT = {"expert_dropout": 0.2}
MODELS = {
    "own": lambda **changes: tiny_model(MOE, **AUXILIARY, **changes),
    "attention": lambda: tiny_model(BAM_SHARED_KV_TOP_K, **AUXILIARY),
    "lopsided": lambda: lopsided(),
    "adapted": lambda: adapted(),
}
BOTH = "experts-and-fsdp"
TRAINED = [
    *(("own", recipe) for recipe in RECIPES),
    *((model, BOTH) for model in ("attention", "lopsided", "adapted")),
]
FAMILIES = ("mixtral", "gpt_oss")
E = 4  # of the exchanges below
# expert of each row, sorted, by process
EXCHANGES = {
    "mixed": ((0, 0, 1, 2, 3, 3, 3), (0, 2, 2)),
    "all-to-the-first": ((0, 1, 1), (0, 0, 0, 1)),
    "no-token-in-the-second": ((0, 1, 2, 3), ()),
    "no-token-at-all": ((), ()),
}
DTYPES = (torch.float32, torch.bfloat16)


def family(name):
    moe_runtime.register()
    return tiny_family(name, "moe_runtime")


def lopsided():
    """All tokens choose among the first three of six experts: the second process receives no row."""
    model = tiny_model(MOE, **AUXILIARY)
    for layer in model.model.layers:
        weight_ED = layer.mlp.router.weight.requires_grad_(False)
        # logits a, -a, 0, 0, 0, 0: the larger of the first two, and the first of equal ones
        weight_ED[1], weight_ED[2:] = -weight_ED[0], 0.0
    return model


def adapted():
    """Only the adapters of experts are trained, and none of them is zero."""
    model = tiny_model(MOE, **AUXILIARY)
    add_expert_lora(model, 2, 4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def rows(step, rank=0, world_size=1):
    """The sequences of a step that a process works on; losses are means over sequences of one length."""
    return tokens(ROWS, 9, seed=100 + step).chunk(world_size)[rank]


def train(model, optimizer, clip, steps, rank=0, world_size=1):
    """Mean losses over all rows, and norms of gradients."""
    losses, norms = [], []
    for step in steps:
        optimizer.zero_grad()
        loss = backward(model, rows(step, rank, world_size))
        norms.append(clip(model).item())
        optimizer.step()
        if world_size > 1:
            distributed.all_reduce(loss)
        losses.append(loss.item() / world_size)
    return losses, norms


def backward(model, ids_BL):
    loss = model(ids_BL, labels=ids_BL, use_cache=False).loss
    loss.backward()
    return loss.detach()


def make_optimizer(groups):
    return torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1)


def groups_of(model):
    """Two learning rates, as the trainer has."""
    router = [p for name, p in model.named_parameters() if "router" in name or ".gate." in name]
    rest = [p for name, p in model.named_parameters() if "router" not in name and ".gate." not in name]
    return [{"params": router, "lr": 3e-3}, {"params": rest}]


def make_scheduler(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))


def run(folder, worlds, *first_on_path):
    """What each process of each world saw; `first_on_path` hides installed packages."""
    path = (*first_on_path, ROOT, ROOT / "kernels", ROOT / "tests")
    done = subprocess.run(
        [sys.executable, __file__, str(folder), *worlds],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return {
        world: [torch.load(folder / f"{world}-rank{rank}.pt") for rank in range(WORLDS[world][0])]
        for world in worlds
    }


# --- in the processes ---


def work(rank, world, folder):
    size, see = WORLDS[world]
    torch.use_deterministic_algorithms(True, warn_only=True)  # uninitialised memory is NaN
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/{world}-meeting",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    torch.save(see(folder, rank), folder / f"{world}-rank{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def of_two(folder, rank):
    seen = {(name, dtype): exchanged(name, dtype, rank) for name in EXCHANGES for dtype in DTYPES}
    for model, recipe in TRAINED:
        steps = STEPS if (model, recipe) == ("own", BOTH) else 5
        seen[f"{model}-{recipe}"] = trained(MODELS[model](), RECIPES[recipe], rank, 2, steps)
    recipe = RECIPES[BOTH]
    seen["refused"] = {
        "indivisible": refused(tiny_model(MOE), recipe),
        "dense": refused(tiny_model(DENSE), recipe),
    }
    with torch.autocast("cpu", torch.bfloat16):
        seen["autocast"] = trained(MODELS["own"](), recipe, rank, 2, steps=3)
    seen["summed-later"] = summed_later(rank)
    seen["factored"] = refused_optimizer(recipe, folder / "factored")
    seen["factored-whole"] = refused_whole_optimizer(recipe)
    if rank == 0:  # of a run that was killed while it saved
        (folder / ".of-two.incomplete" / "old").mkdir(parents=True)
    seen["straight"] = saved_half_way(MODELS["own"](), recipe, rank, 2, folder / "of-two")
    seen["dropout"] = saved_half_way(MODELS["own"](**DROPOUT), recipe, rank, 2, folder / "dropout")
    return seen


def of_one(folder, rank):
    model = MODELS["own"]()
    recipe = ParallelRecipe(data="fsdp")
    seen = {"resumed": resumed(model, recipe, rank, 1, folder / "of-two")}
    seen["straight"] = saved_half_way(MODELS["own"](), recipe, rank, 1, folder / "of-one")
    return seen


def of_two_again(folder, rank):
    recipe = RECIPES[BOTH]
    return {
        "resumed": resumed(MODELS["own"](), recipe, rank, 2, folder / "of-one"),
        "dropout": resumed(MODELS["own"](**DROPOUT), recipe, rank, 2, folder / "dropout"),
    }


def of_four(folder, rank):
    """Two processes hold the same experts, of which there are three, which do not divide; and two of ten."""
    seen = {
        f"{recipe}-{experts}": trained(
            tiny_model(MOE, **AUXILIARY | {"num_experts": experts}), RECIPES[recipe], rank, 4, steps=3
        )
        for recipe in ("experts", BOTH)
        for experts in (6, 8)
    }
    model, optimizer = prepared(MODELS["own"](), RECIPES[BOTH])
    scheduler = make_scheduler(optimizer)
    step = load_checkpoint(folder / "of-two", model, optimizer, scheduler)
    save_checkpoint(folder / "of-four", model, optimizer, scheduler, step)
    return seen


def of_families(folder, rank):
    seen = {name: trained(family(name), RECIPES[BOTH], rank, 2, steps=5) for name in FAMILIES}
    return seen | {"version": transformers.__version__}


WORLDS = {
    "two": (2, of_two),
    "one": (1, of_one),
    "two-again": (2, of_two_again),
    "four": (4, of_four),
    "families": (2, of_families),
}


def exchanged(name, dtype, rank):
    """Rows through experts that multiply by 1, 2, 3 and 4, and the gradient of the rows."""
    group = distributed.group.WORLD
    expert_N = torch.tensor(EXCHANGES[name][rank], dtype=torch.int64)
    count_E = torch.bincount(expert_N, minlength=E).int()
    x_ND = exchange_rows(name, rank).to(dtype).requires_grad_()
    route = exchange_counts(count_E, group)
    x_RD = to_experts(x_ND, route, group)
    factor_R = (rank * E // 2 + route.expert_R + 1).to(dtype)
    y_ND = to_tokens(x_RD * factor_R[:, None], route, group)
    y_ND.backward(torch.ones_like(y_ND))
    return {"rows": y_ND.detach(), "grad": x_ND.grad, "received": len(x_RD), "sent": route.sent}


def exchange_rows(name, rank):
    count = len(EXCHANGES[name][rank])
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(rank)) if count else torch.ones(0, 3)


def prepared(model, recipe):
    parallelize(model.train(), make_layout(recipe))
    return model, make_optimizer(split_by_mesh(groups_of(model)))


def clipped(model):
    return clip_grad_norm(model, MAX_NORM)


def refused(model, recipe):
    try:
        parallelize(model, make_layout(recipe))
    except RunError as error:
        return str(error)


def summed_later(rank):
    """Gradients of two micro-batches, of which the first keeps its own in the process."""
    model = prepare(MODELS["own"]().train(), RECIPES["experts"])
    first, second = rows(0, rank, 2).split(1)
    with model.no_sync():
        backward(model, first)
    kept = all(parameter.grad is None for parameter in model.parameters())
    backward(model, second)
    return {"kept": kept, "grads": whole_gradients(model)}


def refused_optimizer(recipe, target):
    model = MODELS["own"]()
    parallelize(model, make_layout(recipe))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    parameter = model.lm_head.weight
    optimizer.state[parameter]["exp_avg_sq_row"] = torch.zeros(len(parameter))
    try:
        save_checkpoint(target, model, optimizer, make_scheduler(optimizer), 1)
    except RunError as error:
        return str(error)


def refused_whole_optimizer(recipe):
    """Of one process, which kept a number per row of the first parameter."""
    model = MODELS["own"]()
    names = [name for name, _ in model.named_parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    stored = optimizer.state_dict() | {"state": {0: {"exp_avg_sq_row": torch.zeros(3)}}}
    parallelize(model, make_layout(recipe))
    try:
        load_whole_optimizer(stored, names, model, torch.optim.SGD(model.parameters(), lr=1.0))
    except RunError as error:
        return str(error)


def trained(model, recipe, rank, size, steps=STEPS):
    """Gradients of the first step, then losses and norms of a whole run, and what a process holds."""
    model, optimizer = prepared(model, recipe)
    backward(model, rows(0, rank, size))
    grads = whole_gradients(model)
    losses, norms = train(model, optimizer, clipped, range(steps), rank, size)
    held = sum(p.to_local().numel() for p in model.parameters())
    return {"grads": grads, "losses": losses, "norms": norms, "held": held}


def whole_gradients(model):
    """In the place of the parameters, so that they are put together as those are."""
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        grads = whole_state_dict(model)
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])
    return grads


def saved_half_way(model, recipe, rank, size, target):
    """A whole run that leaves a checkpoint half way, and its weights there."""
    torch.manual_seed(7 + rank)
    model, optimizer = prepared(model, recipe)
    scheduler = make_scheduler(optimizer)
    losses = scheduled(model, optimizer, scheduler, range(HALF_WAY), rank, size)
    save_checkpoint(target, model, optimizer, scheduler, HALF_WAY)
    weights = whole_state_dict(model)
    losses += scheduled(model, optimizer, scheduler, range(HALF_WAY, STEPS), rank, size)
    return {"losses": losses, "weights": weights}


def resumed(model, recipe, rank, size, source):
    """The second half, of a model whose weights are others until they are read."""
    torch.manual_seed(70 + rank)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model, optimizer = prepared(model, recipe)
    scheduler = make_scheduler(optimizer)
    step = load_checkpoint(source, model, optimizer, scheduler)
    weights = whole_state_dict(model)
    losses = scheduled(model, optimizer, scheduler, range(step, STEPS), rank, size)
    return {"losses": losses, "weights": weights}


def scheduled(model, optimizer, scheduler, steps, rank, size):
    losses = []
    for step in steps:
        losses += train(model, optimizer, clipped, [step], rank, size)[0]
        scheduler.step()
    return losses


if __name__ == "__main__":
    for world in sys.argv[2:]:
        size, _ = WORLDS[world]
        torch.multiprocessing.start_processes(
            work, (world, Path(sys.argv[1])), nprocs=size, start_method="fork"
        )
