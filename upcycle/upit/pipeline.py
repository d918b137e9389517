"""All stages of UpIT from one recipe, each resumable: prepare, expand, route, assemble, post_train.

The work folder has a folder per stage with `settings.json`, what its result depends on, and `result.json`,
written last: a stage that has one is done. A stage begun with other settings is refused, never mixed.
"""

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast, get_args

from upcycle import names
from upcycle.checkpoint import Checkpoint, read_json
from upcycle.errors import UpcycleError
from upcycle.plan import TORCH_DTYPE, UpcyclePlan, make_plan_for
from upcycle.provenance import RECORD_NAME
from upcycle.recipe import Dtype
from upcycle.run import lock_folder
from upcycle.sources import open_source
from upcycle.stored import stored_rows
from upcycle.upit.data import Data, draw_seed_set
from upcycle.upit.expand import expand, read_origins
from upcycle.upit.expert import open_expert
from upcycle.upit.feed_forward import dense_config, feed_forward_tensors
from upcycle.upit.files import fingerprint, write_json
from upcycle.upit.recipe import UpitRecipe
from upcycle.upit.record import Recording, check_base, open_recording, select
from upcycle.upit.similarity import similarity_matrix

Stage = Literal["prepare", "expand", "route", "assemble", "post_train"]
STAGES: tuple[Stage, ...] = get_args(Stage)

_SETTINGS_NAME, _RESULT_NAME = "settings.json", "result.json"

# Keys of the recipe that a stage's result depends on, besides those of the stages before it.
_KEYS: dict[Stage, tuple[str, ...]] = {
    "prepare": ("base", "paradigm", "max_length", "batch_size", "warmup", "compute", "seed", "prepare"),
    "expand": ("checkpoints", "experts", "expand"),
    "route": ("route", "non_expert"),
    "assemble": ("experts_per_token", "gate", "lora_experts", "target", "dtype", "max_shard_size"),
    "post_train": ("post_train",),
}


@dataclass
class Run:
    """One recipe's stages. `tell` is called with a line whenever something was done."""

    recipe: UpitRecipe
    tell: Callable[[str], None] = lambda line: None
    folder: Path = field(init=False)

    def __post_init__(self) -> None:
        self.folder = Path(self.recipe.work).expanduser()

    # --- what stages read ---

    @cached_property
    def base(self) -> Checkpoint:
        return open_source(self.recipe.base)

    @cached_property
    def data(self) -> Data:
        from upcycle.upit.models import load_samples

        return load_samples(self.recipe)

    def recording(self) -> Recording:
        recording = open_recording(self.recipe.checkpoints or self.folder / "prepare")
        check_base(recording, self.base)
        if (recording.kind == "lora") != (self.recipe.paradigm == "lora"):
            raise UpcycleError(
                f"the checkpoints in {recording.folder} are of kind {recording.kind!r}, which paradigm "
                f"{self.recipe.paradigm!r} does not take"
            )
        if not recording.checkpoints:
            raise UpcycleError(f"{recording.folder} holds no checkpoint yet; train on, or record more often")
        return recording

    def chosen(self) -> list[str]:
        """Folders of the checkpoints that become experts."""
        recording = self.recording()
        chosen = select(recording, self.recipe.experts)
        return [str(recording.folder / checkpoint.folder) for checkpoint in chosen]

    @property
    def experts(self) -> tuple[str, ...]:
        """Folders of the experts: those that routing has trained on, else those of the expansion."""
        settings = self.recipe.route
        if settings.init == "trained" and not settings.freeze_experts:
            from upcycle.upit.route import expert_folder

            return tuple(str(expert_folder(self.folder / "route", n)) for n in range(self.recipe.experts))
        return tuple(origin.folder for origin in read_origins(self.folder / "expand"))

    @property
    def rest(self) -> str:
        """Folder of everything that is no feed-forward."""
        recording = self.recording()
        if self.recipe.non_expert == "base" or recording.rest is None:
            return self.recipe.base
        return str(recording.folder / recording.rest)

    @cached_property
    def dtype(self) -> Dtype:
        """Of the output."""
        name = stored_rows(self.base, dense_config(self.base))[names.EMBEDDING].tensor
        return self.recipe.dtype or cast(Dtype, TORCH_DTYPE[self.base.tensors[name].dtype])

    @property
    def assembled_dtype(self) -> Dtype:
        """What is trained starts unrounded: in bfloat16 most of a delta would be lost."""
        return "float32" if self.recipe.post_train.epochs else self.dtype

    # --- running ---

    def stages(self) -> tuple[Stage, ...]:
        """Those that this recipe has."""
        skipped = {"prepare"} if self.recipe.checkpoints else set()
        if self.recipe.route.init == "normal":
            skipped.add("route")
        return tuple(stage for stage in STAGES if stage not in skipped)

    def run(self, only: Stage | None = None) -> dict[str, Any]:
        """Run what is not done yet, and return the result of every stage that is done.

        Args:
            only: one stage; those before it must be done.

        Raises:
            UpcycleError: with one sentence; what is finished stays for the next run.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        release = lock_folder(self.folder, self.folder)
        try:
            return self._run_stages(only)
        finally:
            release()

    def _run_stages(self, only: Stage | None) -> dict[str, Any]:
        self.check()
        stages = self.stages()
        if only is not None and only not in stages:
            raise UpcycleError(f"this recipe has no stage {only!r}; its stages are {', '.join(stages)}")
        for stage in stages:
            if self.is_done(stage):
                self.tell(f"{stage}: done before")
            elif only in (None, stage):
                self._run(stage)
            else:
                raise UpcycleError(f"stage {only!r} needs the result of {stage!r}; run that first")
            if stage == only:
                break
        return self.results()

    def results(self) -> dict[str, Any]:
        return {
            stage: read_json(self.folder / stage / _RESULT_NAME)
            for stage in self.stages()
            if self.is_done(stage)
        }

    def is_done(self, stage: Stage) -> bool:
        return (self.folder / stage / _RESULT_NAME).is_file()

    def check(self) -> None:
        """Refuse what cannot work, before anything is trained: base, data, settings of an earlier run."""
        dense = self.assembly_plan().dense
        if self.recipe.max_length > dense.max_position_embeddings:
            raise UpcycleError(
                f"max_length must be at most the base's max_position_embeddings "
                f"({dense.max_position_embeddings}), got {self.recipe.max_length}"
            )
        largest = max(int(sample.ids_L.max()) for sample in self.data.samples)
        if largest >= dense.vocab_size:
            raise UpcycleError(
                f"the base's tokenizer must make tokens below its vocab_size ({dense.vocab_size}), "
                f"got {largest}"
            )
        self._check_device()
        if self.recipe.checkpoints:
            self.recording()
        if self.recipe.route.init == "trained":
            draw_seed_set(
                len(self.data.samples),
                self.recipe.route.seed_fraction,
                self.recipe.seed,
                self.recipe.experts,
                self.recipe.route.min_per_expert,
            )
        for stage in self.stages():
            path = self.folder / stage / _SETTINGS_NAME
            if path.is_file():
                self._check_settings(stage, read_json(path))
        self._check_output()

    def _check_output(self) -> None:
        """Where there is one it must be this run's, and where the run is finished there must be one."""
        output, folder = Path(self.recipe.output).expanduser(), self.folder / "post_train"
        ours, theirs = folder / RECORD_NAME, output / RECORD_NAME
        if output.exists():
            # a run may have been stopped after it wrote the output and before it said so
            if not (ours.is_file() and theirs.is_file() and ours.read_bytes() == theirs.read_bytes()):
                raise UpcycleError(
                    f"{output} exists already and is not this run's; choose another output or remove it"
                )
        elif self.is_done("post_train"):
            raise UpcycleError(
                f"post_train is done, but its output is not at {output}; move it there, or remove {folder} "
                "to train again"
            )

    def _check_device(self) -> None:
        import torch

        kind = self.recipe.device.split(":")[0]
        if kind not in ("cpu", "cuda"):
            raise UpcycleError(f"device must be cpu or cuda, got {self.recipe.device!r}")
        if kind == "cuda" and not torch.cuda.is_available():
            raise UpcycleError(f"device must be cpu where there is no CUDA GPU, got {self.recipe.device!r}")

    def assembly_plan(self) -> UpcyclePlan:
        """The plan of the assembly with the base in the experts' place: what can be checked beforehand."""
        base = self.recipe.base
        return make_plan_for(self.recipe.assembly(self.recipe.output, [base] * self.recipe.experts, base, ""))

    def plan(self) -> dict[str, Any]:
        """What `run` would do, as plain values; nothing is trained or written."""
        self.check()
        assembled = self.assembly_plan()
        samples = len(self.data.samples)
        steps = -(-samples // self.recipe.batch_size)
        epochs = {
            "prepare": self.recipe.prepare.epochs,
            "route": self.recipe.route.epochs,
            "post_train": self.recipe.post_train.epochs,
        }
        return {
            "samples": samples,
            "samples_left_out": self.data.left_out,
            "tokens": self.data.num_tokens,
            "steps_per_epoch": steps,
            "seed_samples": round(samples * self.recipe.route.seed_fraction),
            "parameters": assembled.num_parameters,
            "bytes": assembled.num_bytes,
            "stages": [
                {"stage": stage, "done": self.is_done(stage), "epochs": epochs.get(stage)}
                for stage in self.stages()
            ],
        }

    def _check_settings(self, stage: Stage, before: dict[str, Any]) -> None:
        now = self._settings(stage)
        for key in sorted(now.keys() | before.keys()):
            if before.get(key) != now.get(key):
                raise UpcycleError(
                    f"{self.folder / stage} was made with {key} {before.get(key)!r}, but now it is "
                    f"{now.get(key)!r}; remove the folders of {stage} and all later stages, or choose "
                    "another 'work'"
                )

    def _settings(self, stage: Stage) -> dict[str, Any]:
        values = self.recipe.to_dict()
        settings: dict[str, Any] = {
            "data": [*map(list, self.data.hashes)],
            "base.sha256": fingerprint(self.base),
        }
        for earlier in STAGES[: STAGES.index(stage) + 1]:
            for key in _KEYS[earlier]:
                if isinstance(values[key], dict):
                    settings |= {f"{key}.{name}": value for name, value in values[key].items()}
                else:
                    settings[key] = values[key]
        if self.recipe.checkpoints:  # what is in a recording of an earlier stage follows from its settings
            read = map(open_source, (*self.chosen(), self.rest))
            settings["recording.sha256"] = fingerprint(*read)
        if STAGES.index(stage) >= STAGES.index("assemble"):
            settings["dtype"], settings["assembled_dtype"] = self.dtype, self.assembled_dtype
        return settings

    def _run(self, stage: Stage) -> None:
        folder = self.folder / stage
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / _SETTINGS_NAME, self._settings(stage))
        self.tell(f"{stage}: running")
        result = getattr(self, f"_{stage}")(folder)
        write_json(folder / _RESULT_NAME, result)
        self.tell(f"{stage}: done")

    def _at_point(self, step: int, epoch: float, loss: float) -> None:
        self.tell(f"  epoch {epoch:g}, step {step}: loss {loss:.4f}")

    # --- the stages ---

    def _prepare(self, folder: Path) -> dict[str, Any]:
        from upcycle.upit.prepare import prepare

        recording = prepare(self.recipe, self.data.samples, folder, self._at_point)
        return {
            "samples": len(self.data.samples),
            "samples_left_out": self.data.left_out,
            "tokens": self.data.num_tokens,
            "checkpoints": [asdict(checkpoint) for checkpoint in recording.checkpoints],
        }

    def _expand(self, folder: Path) -> dict[str, Any]:
        origins = expand(self.chosen(), self.recipe.experts, folder, self.recipe.expand, self.recipe.seed)
        experts = [open_expert(origin.folder) for origin in origins]
        layers = feed_forward_tensors(self.base)
        return {
            "experts": [asdict(origin) for origin in origins],
            "cosine": similarity_matrix(experts, layers, "cosine"),
        }

    def _route(self, folder: Path) -> dict[str, Any]:
        from upcycle.upit.models import load_dense
        from upcycle.upit.route import route

        model = load_dense(self.rest, self.recipe.device)
        paths = [origin.folder for origin in read_origins(self.folder / "expand")]
        return route(self.recipe, paths, model, self.data.samples, folder, self.tell)

    def _assemble(self, folder: Path) -> dict[str, Any]:
        from upcycle.upit.assemble import assemble

        trained = self.recipe.route.init == "trained"
        routers = self.folder / "route" / "routers.safetensors" if trained else None
        output = folder / "model"
        if output.exists():
            shutil.rmtree(output)
        return assemble(self.recipe, self.experts, self.rest, routers, output, self.assembled_dtype)

    def _post_train(self, folder: Path) -> dict[str, Any]:
        from upcycle.upit.post_train import post_train

        assembled = self.folder / "assemble" / "model"
        samples = self.data.samples
        output = Path(self.recipe.output).expanduser()
        self._check_output()  # again: nothing shall be trained that has no place
        if output.exists():
            return read_json(output / RECORD_NAME)["post_training"]
        return post_train(self.recipe, assembled, self.experts, samples, folder, self.dtype, self._at_point)


def run_upit(
    recipe: UpitRecipe, *, only: Stage | None = None, tell: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Run UpIT, or one stage of it, going on where an earlier run stopped.

    Args:
        recipe: see `UpitRecipe`.
        only: one stage; those before it must be done.
        tell: called with a line whenever something was done.

    Returns:
        The result of every stage that is done, as plain values.

    Raises:
        UpcycleError: with one sentence; what is finished stays for the next run.
    """
    return Run(recipe, tell).run(only)
