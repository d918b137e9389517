"""Where a result is kept: one file for each suite, device, day and commit."""

import json
from pathlib import Path
from typing import Any

from moe_runtime.machine import device_folder

RESULTS = Path(__file__).resolve().parent / "results"


def write_result(output: Path, content: dict[str, Any]) -> Path:
    """Write the content below a folder, by its `suite` and `machine`; returns the file, which it prints."""
    machine = content["machine"]
    name = f"{machine['time'][:10]}_{(machine['commit'] or 'nocommit')[:7]}_{content['suite']}.json"
    path = output / device_folder(machine) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")
    return path
