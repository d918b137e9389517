"""Models shared by two gloo processes: in which layouts, and what each process saw of them.

`save_models` makes the models, `run` loads them in two processes. They fork after the imports, which take
longer than everything else.
"""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import torch
import transformers
from moe_families import tiny_family
from tiny_models import KINDS, tiny_model, tokens
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import moe_runtime
from moe_runtime.hf import MoeRuntimeForCausalLM

ROOT = Path(__file__).resolve().parent.parent
BALANCED = {"output_router_logits": True, "router_aux_loss_coef": 0.3}  # the loss has an auxiliary part
MODELS = {
    "olmoe": ("olmoe", BALANCED),
    "qwen3_moe": ("qwen3_moe", {}),
    "mixtral": ("mixtral", BALANCED),
    "gpt_oss": ("gpt_oss", {}),
    # every token chooses among the first half of the experts: the second process receives no row
    "lopsided": ("olmoe", {}),
}

# with fsdp_size each process has a sequence of its own, otherwise both have the same
EXPERTS_AND_DATA = {"ep_size": 2, "fsdp_size": 2}
EXPERTS_AND_TENSORS = {"ep_size": 2, "tp_size": 2}
ALL_REDUCE = EXPERTS_AND_TENSORS | {"ep_implementation": "all_reduce"}
TENSORS = {"tp_size": 2, "tp_plan": "auto"}
DATA = {"fsdp_size": 2}
EXPERTS = {"tp_size": 2, "enable_expert_parallel": True}  # transformers 5.17 has no ep_size
NEWEST_CASES = {
    **{f"{family}-experts-and-data": (family, EXPERTS_AND_DATA) for family in MODELS},
    # gpt_oss has no plan for its tensors
    **{
        f"{family}-experts-and-tensors": (family, EXPERTS_AND_TENSORS)
        for family in MODELS
        if family != "gpt_oss"
    },
    "olmoe-all-reduce": ("olmoe", ALL_REDUCE),
    "lopsided-all-reduce": ("lopsided", ALL_REDUCE),
    "olmoe-tensors": ("olmoe", TENSORS),
    "qwen3_moe-tensors": ("qwen3_moe", TENSORS),
    "olmoe-data": ("olmoe", DATA),
}
OLDEST_CASES = {
    **{f"{family}-experts": (family, EXPERTS) for family in MODELS},
    "olmoe-tensors": ("olmoe", TENSORS),
    "olmoe-data": ("olmoe", DATA),
}
STEP = 0.1  # of gradient descent, before a model is saved

OWN_KINDS = ("moe", "bam-shared-kv-top-k")
OWN_WAYS = ("DistributedDataParallel", "fully_shard", "distributed_config")
OWN = {"num_experts": 6, "router_aux_loss_coef": 0.3, "router_z_loss_coef": 0.05}


def save_models(folder):
    for name, (family, options) in MODELS.items():
        model = tiny_family(family, **options)
        if name == "lopsided":
            for layer in model.model.layers:
                weight_ED = layer.mlp.gate.weight.data
                # logits a, -a, b, -b, 0, 0, 0, 0: two of the first four are the largest
                weight_ED[1], weight_ED[3], weight_ED[4:] = -weight_ED[0], -weight_ED[2], 0.0
        model.save_pretrained(folder / name)


def batch():
    return tokens(2, 9, seed=1)


def share_of(rank, layout):
    """The sequences that a process works on."""
    return batch()[rank : rank + 1] if "fsdp_size" in layout else batch()


def run(models, folder, *first_on_path):
    """What the two processes saw of `models`, each a dict from case to results; they write to `folder`.

    `first_on_path` hides installed packages.
    """
    path = (*first_on_path, ROOT, ROOT / "kernels", ROOT / "tests")
    done = subprocess.run(
        [sys.executable, __file__, str(models), str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


# --- in the two processes ---


def work(rank, models, folder):
    torch.use_deterministic_algorithms(True, warn_only=True)  # uninitialised memory is NaN
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    seen = {"version": transformers.__version__}
    if seen["version"].startswith("5.17."):
        cases, own = OLDEST_CASES, {}
    else:
        cases, own = NEWEST_CASES, {f"{kind}-{way}": (kind, way) for kind in OWN_KINDS for way in OWN_WAYS}
    for name, (model, layout) in cases.items():
        seen[name] = results(models / model, layout, rank, folder / f"{name}-saved")
    for name, (kind, way) in own.items():
        seen[name] = own_results(folder, kind, way, rank)
    torch.save(seen, folder / f"rank{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def results(path, layout, rank, target):
    """Of a model of transformers' own, in its layout, on our experts; saved to `target` after a step."""
    from transformers.distributed import DistributedConfig

    ids_BL, calls = share_of(rank, layout), watch_experts()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path,
        distributed_config=DistributedConfig(**layout),
        experts_implementation="watched",
        dtype=torch.float32,
    )
    with torch.no_grad():
        seen = {"logits": whole(model(ids_BL).logits), "inference_calls": list(calls)}
    calls.clear()
    seen |= trained(model, ids_BL)
    seen["training_calls"] = list(calls)
    if "fsdp_size" not in layout:
        # transformers 5.17 computes the auxiliary loss in generate() too, and fails
        seen["generated"] = model.generate(
            ids_BL, max_new_tokens=4, do_sample=False, output_router_logits=False
        )
    moe_runtime.accelerate_model(model)
    model.zero_grad()
    seen["accelerated"] = trained(model, ids_BL)
    if layout == EXPERTS_AND_DATA:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= STEP * parameter.grad
        model.save_pretrained(target)
    return seen


def watch_experts():
    """Register "watched": "moe_runtime", with a list of (tokens, experts, choices elsewhere) per call."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    forward, calls = ALL_EXPERTS_FUNCTIONS["moe_runtime"], []

    def watched(self, hidden_states, top_k_index, top_k_weights):
        E = self.down_proj.shape[0]
        calls.append((hidden_states.shape[0], E, (top_k_index >= E).sum().item()))
        return forward(self, hidden_states, top_k_index, top_k_weights)

    ALL_EXPERTS_FUNCTIONS.register("watched", watched)
    return calls


def own_results(folder, kind, way, rank):
    """Of this project's own model; every process has a sequence of its own."""
    from transformers.distributed import DistributedConfig

    model = tiny_model(KINDS[kind], **OWN)
    if way == "DistributedDataParallel":
        model = DistributedDataParallel(model)
    elif way == "fully_shard":
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    else:
        path = folder / f"own-{kind}"
        if rank == 0:
            model.save_pretrained(path)
        distributed.barrier()
        model = MoeRuntimeForCausalLM.from_pretrained(path, distributed_config=DistributedConfig(**DATA))
    return trained(model, share_of(rank, DATA))


def trained(model, ids_BL):
    """Loss and gradients of one backward pass."""
    out = model.train()(ids_BL, labels=ids_BL, use_cache=False)
    out.loss.backward()
    grads = {name.removeprefix("module."): whole(p.grad) for name, p in model.named_parameters()}
    model.eval()
    return {"training_logits": whole(out.logits.detach()), "loss": out.loss.detach(), "grads": grads}


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


if __name__ == "__main__":
    torch.multiprocessing.start_processes(work, tuple(map(Path, sys.argv[1:])), nprocs=2, start_method="fork")
