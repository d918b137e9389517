"""MoeTrainer: transformers' Trainer with the losses, the checkpoints and the figures of this package.

An update is one accumulated batch: all micro-batches of all processes. Everything that is a mean over it is
computed as sums of parts, so that cutting it into micro-batches changes nothing but rounding.
"""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState
from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME

from moe_runtime.errors import RunError
from moe_runtime.hf.lora import save_expert_lora

from . import checkpoints
from .balance import RouterWatch, balance_loss, certainty, expert_counts, tokens_of, z_loss
from .data.rows import RowsOfProcess
from .data.samples import IGNORED
from .figures import Window, Yardstick, loads
from .freeze import parameter_groups
from .model import has_feed_forward_routers, save_whole
from .recipe import MoeSection, TrainRecipe
from .schedule import learning_rate_share
from .selection_bias import update_selection_bias
from .update import Update, listed, totals

SCHEDULER_NAME = "scheduler.pt"  # as Trainer has it
SHARDS_NAME = "state"  # model and optimizer of a run on several processes


class MoeTrainer(Trainer):
    """Trains a causal LM by a recipe.

    Args:
        recipe: of the run; `recipe.moe` None means its defaults.
        output: the run's folder; checkpoints go below it.
        about_data: what run.json of a checkpoint says of the data.
        yardstick: what speed is held against.
        parallel: `moe_runtime.train.parallel` if the model was prepared by it, otherwise None.
        others: Trainer's own arguments.
    """

    # of Trainer, which says no types
    optimizer: Any
    lr_scheduler: Any
    control: Any

    def __init__(
        self,
        *,
        recipe: TrainRecipe,
        output: Path,
        about_data: Any,
        yardstick: Yardstick,
        parallel: Any = None,
        **others: Any,
    ) -> None:
        self.parallel = parallel
        config = others["model"].config
        use_cache = getattr(config, "use_cache", True)
        super().__init__(**others)
        config.use_cache = use_cache  # Trainer would have the trained model generate without one
        self.recipe = recipe
        self.moe = recipe.moe or MoeSection()
        self.output = output
        self.about_data = about_data
        self.base = checkpoints.fingerprint(recipe.model)
        self.yardstick = yardstick
        self.model_accepts_loss_kwargs = (
            True  # the loss is a part of the batch's mean, not a mean to be divided
        )
        self.watch = RouterWatch(self.model) if has_feed_forward_routers(self.model) else None
        self.window = Window()
        self.update: Update | None = None
        self.grad_norm: Any = None
        self.seen: Tensor | None = None  # [tokens, sequences] that are not yet in `state`
        self.last_load_LE: Tensor | None = None
        self._saving: Path | None = None
        self.started = time.perf_counter()
        self.seconds_before = 0.0  # of training, in the calls that the checkpoint comes from
        self.remove_callback(PrinterCallback)
        self.add_callback(_AroundUpdates(self))

    # --- data ---

    def get_train_dataloader(self) -> DataLoader:
        if not isinstance(self.train_dataset, IterableDataset):
            return super().get_train_dataloader()
        # it shards itself over processes, which accelerate would do a second time
        size = self.args.per_device_train_batch_size
        return DataLoader(self.train_dataset, batch_size=size, collate_fn=self.data_collator)

    def _batches_to_evaluate(self, dataset: Any) -> DataLoader:
        rows = RowsOfProcess(dataset, self.args.process_index, self.args.world_size)
        return DataLoader(rows, batch_size=self.args.eval_batch_size, collate_fn=self.data_collator)

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | None]:
        """The micro-batches of an update, and how many labels count in it, in all processes."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        if not batches:
            return batches, None
        samples = [batch.pop("sample", None) for batch in batches]
        total = torch.stack([totals(batch) for batch in batches]).sum(0).to(device)
        self._sum_over_processes(total)
        self.update = Update(batches, samples, total)
        return batches, total[0]

    # --- loss ---

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        update = self.update
        assert update is not None
        is_whole = self.moe.balance_loss > 0 and self.moe.balance_over == "global_batch"
        if self.watch and is_whole and update.whole_count_LE is None:
            update.whole_count_LE = self._count_whole_batch(model, update)
        loss = super().training_step(model, inputs, num_items_in_batch)
        update.losses.append(loss)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """This micro-batch's part of the batch's loss: NLL + balance_loss · Σ balance + z_loss · Σ z."""
        update = self.update
        assert update is not None
        recording: AbstractContextManager[dict[int, Any]] = nullcontext({})
        if self.watch:
            recording = self.watch.recording()
        with recording as seen:
            outputs = model(**inputs, num_items_in_batch=num_items_in_batch, use_cache=False)
        lm_loss = outputs.loss
        self.window.add(loss=lm_loss)
        loss = lm_loss
        if self.watch:
            auxiliary = self._auxiliary_loss(inputs, self.watch.routed(seen), update)
            loss = loss + auxiliary.to(loss.dtype)
        # data parallel engines average gradients over processes, and the parts have to be summed
        loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _auxiliary_loss(self, inputs: Mapping[str, Any], routed: list[Any], update: Update) -> Tensor:
        tokens, moe = tokens_of(inputs), self.moe
        total = update.total[1:3]
        whole = update.whole_count_LE
        balance, z, counts = [], [], []
        for layer, of_layer in enumerate(routed):
            E = of_layer.score_TE.shape[1]
            count_E = None if whole is None else whole[layer]
            balance.append(balance_loss(of_layer, tokens, total, moe.balance_over, count_E))
            z.append(z_loss(of_layer, tokens, total))
            counts.append(expert_counts(of_layer.expert_TK, E, tokens, per_sequence=False)[0])
        balance_L, z_L, count_LE = torch.stack(balance), torch.stack(z), torch.stack(counts)
        certainty_L2 = torch.stack([certainty(of_layer, tokens) for of_layer in routed])
        self.window.add(balance_L=balance_L, z_L=z_L, count_LE=count_LE, certainty_L2=certainty_L2)
        update.count_LE = count_LE if update.count_LE is None else update.count_LE + count_LE
        loss = balance_L.new_zeros(())
        for factor, value_L in ((moe.balance_loss, balance_L), (moe.z_loss, z_L)):
            if factor:
                loss = loss + factor * value_L.sum()
        return loss

    @torch.no_grad()
    def _count_whole_batch(self, model: nn.Module, update: Update) -> Tensor:
        """Expert counts [layers, E] of all micro-batches and processes, by a forward pass without gradients.

        The random state is that of the training pass to come, so that dropout is the same.
        """
        assert self.watch is not None
        model.train()
        count_LE = None
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices), self.compute_loss_context_manager():
            for batch in update.batches:
                inputs = self._prepare_inputs({name: v for name, v in batch.items() if name != "labels"})
                with self.watch.recording() as seen:
                    model(**inputs, use_cache=False, logits_to_keep=1)
                tokens = tokens_of(inputs)
                counts = [
                    expert_counts(r.expert_TK, r.score_TE.shape[1], tokens, per_sequence=False)[0]
                    for r in self.watch.routed(seen)
                ]
                count_LE = torch.stack(counts) if count_LE is None else count_LE + torch.stack(counts)
        assert count_LE is not None
        self._sum_over_processes(count_LE)
        return count_LE

    # --- optimizer ---

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            groups = parameter_groups(self.model, self.recipe.train)
            if self.parallel is not None:
                groups = self.parallel.split_by_mesh(groups)
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        if self.lr_scheduler is None:

            def share(step: int) -> float:
                return learning_rate_share(step, num_training_steps, self.recipe.train)

            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, share)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self.parallel is not None:
            return self.parallel.clip_grad_norm(self.model, self.args.max_grad_norm)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if self.parallel is not None and grad_norm is None:
            grad_norm = self.parallel.clip_grad_norm(self.model, float("inf"))
        self.grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self.grad_norm

    def check_finite(self) -> None:
        """Stop before the weights are touched.

        Raises:
            RunError: a loss or the norm of the gradient is not finite.
        """
        update = self.update
        assert update is not None
        norm = torch.as_tensor(self.grad_norm, dtype=torch.float64, device=update.total.device)
        values = torch.stack([*(loss.double() for loss in update.losses), norm.reshape(()).double()])
        bad = (~torch.isfinite(values)).sum()
        self._sum_over_processes(bad)
        if not int(bad):
            return
        losses = [float(loss) for loss in update.losses]
        bad_here = [
            sample for sample, loss in zip(update.samples, losses, strict=False) if not math.isfinite(loss)
        ]
        found = self._of_all_processes((bad_here, update.samples, losses))
        names = [bad for bad, _, _ in found if bad] or [samples for _, samples, _ in found]
        shown = ", ".join(f"{loss:g}" for _, _, losses in found for loss in losses)
        good = checkpoints.newest(self.output)
        where = "there is no checkpoint yet" if good is None else f"the last good checkpoint is {good}"
        what = "the loss or its gradient is not finite"
        if not int(update.total[0]):
            what = "no label counts"
        raise RunError(
            f"{what} in step {self.state.global_step + 1}, in the samples {listed(names)} (losses "
            f"{shown}, gradient {norm.item():g}); {where}, and nothing was overwritten"
        )

    def after_update(self) -> None:
        """Count the update, and move the selection biases by its expert counts."""
        update, self.update = self.update, None
        assert update is not None
        self.window.steps += 1
        self.window.add(total=update.total)
        self.seen = update.total[1:3] if self.seen is None else self.seen + update.total[1:3]
        if self.moe.bias_update and self.watch and update.count_LE is not None:
            count_LE = update.count_LE.clone()  # the window may hold the same tensor
            self._sum_over_processes(count_LE)
            for layer, count_E in zip(self.watch.layers, count_LE, strict=True):
                update_selection_bias(layer.router, count_E, self.moe.bias_update)

    def _sum_over_processes(self, values: Tensor) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(values)

    # --- log and evaluation ---

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.window.steps:
            window = self.window
            for name in window.parts():
                self._sum_over_processes(getattr(window, name))
            logs |= window.figures(self.yardstick)
            if window.count_LE is not None:
                self.last_load_LE = loads(window.count_LE)
            self.window = Window()
            self._book()
            logs["tokens"] = self.state.num_input_tokens_seen
        super().log(logs, start_time)

    def _book(self) -> None:
        """Put what was seen into `state`, which checkpoints keep."""
        if self.seen is None:
            return
        tokens, sequences = self.seen.tolist()
        self.seen = None
        self.state.num_input_tokens_seen += tokens
        if self.is_world_process_zero():  # `store_flos` sums over processes
            self.current_flos += self.yardstick.flops(tokens, sequences)
        self.store_flos()

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # counted by formula in `_book`

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Nats per label of each evaluation set, over all its labels."""
        with self.window.paused():
            return self._nats_of_sets(eval_dataset, metric_key_prefix)

    def _nats_of_sets(self, eval_dataset: Any, metric_key_prefix: str) -> dict[str, float]:
        datasets = self.eval_dataset if eval_dataset is None else eval_dataset
        metrics = {}
        for name, dataset in (datasets or {}).items():
            sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
            self.model_wrapped.eval()
            for batch in self._batches_to_evaluate(dataset):
                batch.pop("sample", None)
                inputs = self._prepare_inputs(batch)
                labels = (inputs["labels"][..., 1:] != IGNORED).sum()
                with torch.no_grad(), self._autocast():
                    loss = self.model_wrapped(
                        **inputs, num_items_in_batch=labels.clamp(min=1), use_cache=False
                    ).loss
                sums += torch.stack([loss.double() * labels, labels.double()])
            self._sum_over_processes(sums)
            metrics[f"{metric_key_prefix}_{name}_loss"] = (sums[0] / sums[1].clamp(min=1)).item()
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # --- checkpoints ---

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._book()
        with self.window.paused():
            self._write_checkpoint(model, trial)

    def _write_checkpoint(self, model: nn.Module, trial: Any) -> None:
        def save(folder: Path) -> None:
            self._saving = folder.parent  # Trainer adds the same name to it
            try:
                super(MoeTrainer, self)._save_checkpoint(model, trial)
            finally:
                self._saving = None

        checkpoints.write(
            self.output,
            self.state.global_step,
            self.recipe.train.keep,
            {
                "recipe": self.recipe.to_dict(),
                "steps": self.state.max_steps,
                "rows": self.args.train_batch_size
                * self.args.gradient_accumulation_steps
                * self.args.world_size,
                "data": self.about_data,
                "base": self.base,
                "seconds": self.seconds(),
                "load": None if self.last_load_LE is None else self.last_load_LE.tolist(),
            },
            save,
            self._any_error,
            self.is_world_process_zero(),
        )

    def restore(self, checkpoint: Path) -> None:
        """Take over what a checkpoint knows of the run; `train` reads the rest of it."""
        values = checkpoints.read_run(checkpoint)
        self.seconds_before = values["seconds"]
        self.last_load_LE = (
            None if values["load"] is None else torch.tensor(values["load"], dtype=torch.float64)
        )
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        shards = checkpoint / SHARDS_NAME
        if shards.is_dir():
            from moe_runtime.distributed.checkpoint import load_model

            load_model(shards, self.model)

    def _any_error(self, error: str | None) -> str | None:
        """The error of one of the processes, once all have come here."""
        return next((error for error in self._of_all_processes(error) if error is not None), None)

    def _of_all_processes(self, value: Any) -> list[Any]:
        values = [value] * self.args.world_size
        if self.args.world_size > 1:
            torch.distributed.all_gather_object(values, value)
        return values

    def seconds(self) -> float:
        """Of training so far, over all calls that the run took."""
        return self.seconds_before + time.perf_counter() - self.started

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._saving or self.args.output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """A folder that `from_pretrained` loads; of a model with adapters these, of a sharded one nothing."""
        if not self.args.should_save or self.parallel is not None:
            return
        assert output_dir is not None
        if self.recipe.train.lora is not None:
            save_expert_lora(self.model, output_dir)
        else:
            save_whole(self.model, output_dir, self.moe)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing: the model was read from the checkpoint, in which experts have keys of their own."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.parallel is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        self.parallel.save_state(Path(output_dir) / SHARDS_NAME, self.model, self.optimizer)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._load_optimizer(Path(checkpoint))
            stored = torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True)
            self.lr_scheduler.load_state_dict(stored)
        # the checkpoint has the rate of its own schedule, which may have ended with it
        scheduler = self.lr_scheduler
        share = learning_rate_share(scheduler.last_epoch, self.state.max_steps, self.recipe.train)
        scheduler._last_lr = [rate * share for rate in scheduler.base_lrs]
        for group, rate in zip(self.optimizer.param_groups, scheduler._last_lr, strict=True):
            group["lr"] = rate

    def _load_optimizer(self, checkpoint: Path) -> None:
        """That of one process or of several; `restore` and `prepare_model` have read the model."""
        shards, whole = checkpoint / SHARDS_NAME, checkpoint / OPTIMIZER_NAME
        if shards.is_dir():
            from moe_runtime.distributed.checkpoint import load_optimizer

            load_optimizer(shards, self.model, self.optimizer)
            return
        if not whole.is_file():
            raise RunError(f"{checkpoint} must hold {SHARDS_NAME} or {OPTIMIZER_NAME}, and holds neither")
        stored = torch.load(whole, map_location="cpu", weights_only=True)
        if self.parallel is None:
            self.optimizer.load_state_dict(stored)
            return
        name_of = {parameter: name for name, parameter in self.model.named_parameters()}
        groups = parameter_groups(self.model, self.recipe.train)
        names = [name_of[parameter] for group in groups for parameter in group["params"]]
        self.parallel.load_whole_optimizer(stored, names, self.model, self.optimizer)

    # --- models that `parallel` has prepared ---

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if self.parallel is None:
            super()._move_model_to_device(model, device)

    def compute_loss_context_manager(self) -> Any:
        # accelerate puts it around the forward of a model that it prepares
        return super().compute_loss_context_manager() if self.parallel is None else self._autocast()

    def _autocast(self) -> torch.autocast:
        is_on = self.recipe.train.precision == "bfloat16"
        return torch.autocast(self.args.device.type, torch.bfloat16, enabled=is_on)


class _AroundUpdates(TrainerCallback):
    """Calls the trainer before and after the weights change, and has the last step logged."""

    def __init__(self, trainer: MoeTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.check_finite()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.after_update()
        if state.global_step >= state.max_steps:
            control.should_log = True
