"""Packages that a recipe asks for and that this project does not require."""

from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from moe_runtime.errors import RunError
from moe_runtime.optional import installed

from .recipe import TrainSection

TORCHAO = ("adamw_torch_4bit", "adamw_torch_8bit")
OF_TORCH = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")


def check_packages(section: TrainSection) -> None:
    """Say what is missing before anything is loaded.

    Raises:
        RunError: with the line that installs it; or `report_to` names what Trainer does not know.
    """
    if not installed("accelerate"):
        raise RunError(
            "training needs accelerate, which is not installed; run: pip install 'moe-runtime[train]'"
        )
    name = section.optimizer
    if name not in OF_TORCH:
        package = "torchao" if name in TORCHAO else "bitsandbytes"
        if not installed(package):
            raise RunError(
                f"train.optimizer {name!r} needs {package}, which is missing; run: pip install {package}"
            )
    available = get_available_reporting_integrations()
    for name in section.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(map(repr, sorted(INTEGRATION_TO_CALLBACK)))
            raise RunError(f"train.report_to must name some of {known}, got {name!r}")
        if name not in available:
            raise RunError(
                f"train.report_to {name!r} needs a package that is not installed; run: pip install {name}"
            )
