"""Tables of README and docs/performance.md from the newest results, a GPU's before a CPU's."""

import json
from pathlib import Path

from benchmarks.plots import draw
from benchmarks.sections import SECTIONS, bars_section, compiled_section, notes, readme_table

BEGIN = "<!-- measured: written by `python -m benchmarks report` -->"
END = "<!-- end of measured -->"


def newest_results(folder: Path, device: str = "") -> dict[str, Path]:
    """Suite -> its newest file, `<device>/<date>_<commit>_<suite>.json`, by the time inside.

    A GPU's, however old, comes before a CPU's. With `device`, only of a GPU that has this word in its name.
    """
    newest: dict[str, tuple[bool, str, Path]] = {}
    for path in folder.glob("*/*.json"):
        if path.parent.name == "aot":  # compiled, not measured
            continue
        suite = path.stem.split("_", 2)[2]
        machine = json.loads(path.read_text(encoding="utf-8"))["machine"]
        on_gpu = machine["kind"] == "gpu"
        if device and not (on_gpu and device in machine["device"].split()):
            continue
        newest[suite] = max(newest.get(suite, (False, "", path)), (on_gpu, machine["time"], path))
    return {suite: path for suite, (*_, path) in sorted(newest.items())}


def newest_compiled(folder: Path) -> Path | None:
    """The newest result file of `python -m benchmarks aot`, by the time inside."""
    times = {
        path: json.loads(path.read_text(encoding="utf-8"))["machine"]["time"]
        for path in folder.glob("aot/*.json")
    }
    return max(times, key=lambda path: times[path], default=None)


def write_pages(root: Path) -> list[Path]:
    """Rewrite both pages and the plots; returns their paths."""
    pages = render_pages(root)
    for path, text in pages.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return list(pages)


def render_pages(root: Path) -> dict[Path, str]:
    """What both pages must say, and the plots show, by the committed results."""
    files = newest_results(root / "benchmarks" / "results")
    readme = root / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    sections = {suite: json.loads(path.read_text(encoding="utf-8")) for suite, path in files.items()}
    pictures: dict[str, list[str]] = {}
    plots: dict[Path, str] = {}
    for name, (suite, shows, picture) in draw(sections).items():
        pictures.setdefault(suite, []).append(f"![{shows}](plots/{name})")
        plots[root / "docs" / "plots" / name] = picture
    shown = "\n\n".join(readme_table(sections["demo"], files["demo"], root)) if "demo" in files else ""
    pages = {readme: f"{before}{BEGIN}\n{shown}\n{END}{after}"}
    parts = [
        "# Performance",
        "Written by `python -m benchmarks report` from the files under `benchmarks/results/`.",
    ]
    if not any(content["machine"]["kind"] == "gpu" for content in sections.values()):
        parts.append("Everything here is CPU time. Nothing has been measured on a GPU yet.")
    parts += bars_section(newest_results(root / "benchmarks" / "results", "H100"), root)
    for suite in sorted(sections, key=list(SECTIONS).index):
        content = sections[suite]
        parts += SECTIONS[suite](content, files[suite], root)
        parts += [*pictures.get(suite, ()), *notes(suite)]
    compiled = newest_compiled(root / "benchmarks" / "results")
    if compiled is not None:
        parts += compiled_section(json.loads(compiled.read_text(encoding="utf-8")), compiled, root)
    pages[root / "docs" / "performance.md"] = "\n\n".join(parts) + "\n"
    return pages | plots
