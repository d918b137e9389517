"""Where a result is kept: one file for each suite, device, day and commit."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_runtime.machine import device_folder

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Result:
    """A result file as it was read."""

    path: Path
    content: dict[str, Any]

    @property
    def machine(self) -> dict[str, Any]:
        return self.content["machine"]

    @property
    def suite(self) -> str:
        return self.path.stem.split("_", 2)[2]

    @property
    def on_gpu(self) -> bool:
        return self.machine["kind"] == "gpu"

    @property
    def device(self) -> str:
        """What a reader calls the machine: "NVIDIA H100 80GB HBM3", "AMD EPYC, 2 cores"."""
        name = self.machine["device"]
        return name if self.on_gpu else f"{name}, {self.machine['cores']} cores"

    @property
    def when(self) -> tuple[str, Path]:
        """Larger for a newer file; never the same for two."""
        return self.machine["time"], self.path


def read_results(folder: Path) -> list[Result]:
    """Every measured result, `<device>/<date>_<commit>_<suite>.json`, oldest first; not what was compiled."""
    paths = (path for path in folder.glob("*/*.json") if path.parent.name != "aot")
    results = [Result(path, json.loads(path.read_text(encoding="utf-8"))) for path in paths]
    return sorted(results, key=lambda result: result.when)


def write_result(output: Path, content: dict[str, Any]) -> Path:
    """Write the content below a folder, by its `suite` and `machine`; returns the file, which it prints."""
    machine = content["machine"]
    name = f"{machine['time'][:10]}_{(machine['commit'] or 'nocommit')[:7]}_{content['suite']}.json"
    path = output / device_folder(machine) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")
    return path
