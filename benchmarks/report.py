"""Tables of README and docs/performance.md from each device's newest results, a GPU's before a CPU's."""

import json
from pathlib import Path

from benchmarks.bars import SUITES
from benchmarks.plots import draw
from benchmarks.result_file import Result, read_results
from benchmarks.sections import FOR_GPUS, SECTIONS, bars_section, compiled_section, notes, readme_table
from moe_runtime.machine import device_folder

BEGIN = "<!-- measured: written by `python -m benchmarks report` -->"
END = "<!-- end of measured -->"


def newest_results(folder: Path) -> dict[str, list[Result]]:
    """Suite -> the newest result of each device, by the time inside: GPUs before CPUs, then by name."""
    newest = {(result.suite, result.device): result for result in read_results(folder)}
    found: dict[str, list[Result]] = {}
    order = sorted(newest.values(), key=lambda one: (one.suite, not one.on_gpu, one.device))
    for result in order:
        found.setdefault(result.suite, []).append(result)
    return found


def one_device(results: list[Result]) -> Result:
    """For README's one table: the newest of a GPU, or of a CPU where there is no GPU's."""
    return max(results, key=lambda result: (result.on_gpu, result.when))


def one_h100(results: dict[str, list[Result]]) -> dict[str, Result]:
    """Suite -> result of the same H100: that of which most of the bars' suites are there, then the newest."""
    measured: dict[str, dict[str, Result]] = {}
    for suite in SUITES:
        for result in results.get(suite, ()):
            if result.on_gpu and "H100" in result.machine["device"].split():
                measured.setdefault(result.device, {})[suite] = result
    return max(
        measured.values(),
        key=lambda found: (len(found), max(one.when for one in found.values())),
        default={},
    )


def newest_compiled(folder: Path) -> Path | None:
    """The newest result file of `python -m benchmarks aot`, by the time inside."""
    times = {
        path: json.loads(path.read_text(encoding="utf-8"))["machine"]["time"]
        for path in folder.glob("aot/*.json")
    }
    return max(times, key=lambda path: times[path], default=None)


def write_pages(root: Path) -> list[Path]:
    """Rewrite both pages and the plots, without those of earlier results; returns their paths."""
    pages = render_pages(root)
    for path in stale_plots(root, pages):
        path.unlink()
    for path, text in pages.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return list(pages)


def stale_plots(root: Path, pages: dict[Path, str]) -> list[Path]:
    return [path for path in sorted((root / "docs" / "plots").glob("*.svg")) if path not in pages]


def render_pages(root: Path) -> dict[Path, str]:
    """What both pages must say, and the plots show, by the committed results."""
    results = newest_results(root / "benchmarks" / "results")
    compiled = newest_compiled(root / "benchmarks" / "results")
    readme = root / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    shown = ""
    if "demo" in results:
        demo = one_device(results["demo"])
        shown = "\n\n".join(readme_table(demo.content, demo.path, root))
    pages = {readme: f"{before}{BEGIN}\n{shown}\n{END}{after}"}
    parts = [
        "# Performance",
        "Written by `python -m benchmarks report` from the files under `benchmarks/results/`.",
    ]
    if not any(result.on_gpu for found in results.values() for result in found):
        parts.append("Everything here is CPU time. Nothing has been measured on a GPU yet.")
    parts += bars_section(one_h100(results), root)
    for suite in sorted(results, key=list(SECTIONS).index):
        plots = [draw_plots(result, alone=len(results[suite]) == 1) for result in results[suite]]
        pictures = [[f"![{shows}](plots/{name})" for name, (shows, _) in drawn.items()] for drawn in plots]
        parts += suite_section(suite, results[suite], pictures, root)
        for drawn in plots:
            pages |= {root / "docs" / "plots" / name: picture for name, (_, picture) in drawn.items()}
    if compiled is not None:
        parts += compiled_section(json.loads(compiled.read_text(encoding="utf-8")), compiled, root)
    return pages | {root / "docs" / "performance.md": "\n\n".join(parts) + "\n"}


def suite_section(suite: str, results: list[Result], pictures: list[list[str]], root: Path) -> list[str]:
    """A suite's section: of one device, or of several, each below its name; notes once.

    Args:
        suite: its name.
        results: one of each device, in the order of the page.
        pictures: those of each result.
        root: the repository, to which paths are relative.
    """
    bodies = [SECTIONS[suite](result.content, result.path, root) for result in results]
    if suite in FOR_GPUS and not any(result.on_gpu for result in results):
        for body in bodies:
            body[1] += " Not yet measured on a GPU."
    if len(results) == 1:
        return [*bodies[0], *pictures[0], *notes(suite)]
    # the title, and the explanation unless it holds what was measured
    shared = 2 if all(body[1] == bodies[0][1] for body in bodies) else 1
    parts = bodies[0][:shared]
    for result, body, shown in zip(results, bodies, pictures, strict=True):
        parts += [f"### {result.device}", *body[shared:], *shown]
    below = notes(suite)
    # a heading of its own: the notes are not the last device's
    return [*parts, *(["### How to read it"] if below and not below[0].startswith("#") else []), *below]


def draw_plots(result: Result, alone: bool) -> dict[str, tuple[str, str]]:
    """File name -> what it shows, the picture; the device is in the name unless the suite has but one."""
    drawn = draw({result.suite: result.content}).items()
    device = "" if alone else f"_{device_folder(result.machine)}"
    return {
        f"{name.removesuffix('.svg')}{device}.svg": (shows, picture) for name, (_, shows, picture) in drawn
    }
