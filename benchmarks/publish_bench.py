"""Put what `concept-ablation bench` found into the repository: results, plots, and tables between markers.

    python benchmarks/publish_bench.py outputs/bench

writes results/bench.json, results/bench/*.png, results/bench/jobs.jsonl (every measurement that results.json is made
of, as it was made), all tables into benchmarks/README.md, and goals, claims and the main table into README.md. What
stands between the markers is replaced; a file without them gets a section at its end.

    python benchmarks/publish_bench.py outputs/bench --restore

puts the published measurements into that folder, so that `concept-ablation bench` goes on from them there. It takes
those that were made of the same model, judges, tasks and settings, and makes the others.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

import marked

from concept_ablation.core.bench.store import Store
from concept_ablation.core.bench.tables import conclusions, evaluations, is_default, main_judge, markdown, provenance
from concept_ablation.core.errors import AblationError
from concept_ablation.core.files import replacing, write_json, write_text

ROOT = Path(__file__).resolve().parents[1]

MARKERS = "<!-- bench: made by benchmarks/publish_bench.py -->", "<!-- /bench -->"
JOBS = "jobs.jsonl"
README_PLOTS = ("tasks", "objectives", "subsets", "memorized")


def section(results: dict[str, Any], plots: list[Path], base: Path) -> str:
    """Everything: for benchmarks/README.md."""
    pictures = "\n\n".join(picture(plot, base) for plot in plots)
    tables = markdown(results, level=3).rstrip()
    return f"{tables}\n\n### Plots\n\n{pictures}" if plots else tables


def summary(results: dict[str, Any], plots: list[Path], base: Path) -> str:
    """Goals, what was decided of the claims, and the default method's table: for README.md."""
    rows = [row for row in results["tasks"] if is_default(results, row)]
    claims = [claim for claim in results["claims"] if claim["verdict"] != "not measured"]
    parts = [conclusions(results["goals"]), *([conclusions(claims)] if claims else [])]
    if rows:
        parts.append(evaluations(rows, main_judge(results)))
    parts += [picture(plot, base) for plot in plots if plot.stem in README_PLOTS]
    return "\n\n".join([*parts, f"*{provenance(results)}*"])


def picture(plot: Path, base: Path) -> str:
    """A Markdown image with a path from the file in `base`."""
    return f"![{plot.stem}]({Path(os.path.relpath(plot, base)).as_posix()})"


def publish(output: Path, root: Path = ROOT) -> None:
    """Copy the results of the benchmark in `output` into the repository at `root`.

    Raises:
        AblationError: results.json is of an older version, or a measurement that it is made of has gone.
    """
    folder = root / "benchmarks" / "results"
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    jobs = _jobs(output, results)
    drawn = sorted((output / "plots").glob("*.png"))
    plots = [folder / "bench" / plot.name for plot in drawn]
    # all text is made before anything is written: results of another version would leave half of each
    texts = [
        (path, make(results, plots, path.parent), heading)
        for path, make, heading in (
            (root / "benchmarks" / "README.md", section, "## The paper's experiments"),
            (root / "README.md", summary, "## Benchmark"),
        )
    ]
    write_json(folder / "bench.json", results)
    for outdated in (folder / "bench").glob("*.png"):
        outdated.unlink()
    for plot, path in zip(drawn, plots, strict=True):
        with replacing(path) as temporary:
            shutil.copyfile(plot, temporary)
    write_text(folder / "bench" / JOBS, "".join(f"{json.dumps(job, ensure_ascii=False)}\n" for job in jobs))
    for path, text, heading in texts:
        marked.put(path, MARKERS, text, heading)


def _jobs(output: Path, results: dict[str, Any]) -> list[dict[str, Any]]:
    """The measurements that results.json is made of; others in the folder may be of settings that were given up."""
    found = [Store(output).result(key) for key in results.get("keys", ())]
    if not found or None in found:
        raise AblationError(
            f"{output / 'results.json'} does not name its measurements, or some have gone: write it again with "
            "`concept-ablation bench --report` and the options that it was made with."
        )
    return found


def restore(output: Path, root: Path = ROOT) -> int:
    """Put the measurements that the repository holds into a benchmark's folder, which keeps those of its own that have
    the same key; how many it did not have.
    """
    store, added = Store(output), 0
    published = root / "benchmarks" / "results" / "bench" / JOBS
    for line in published.read_text(encoding="utf-8").splitlines():
        job = json.loads(line)
        if not store.has_result(job["key"]):
            store.finish(job["key"], job)
            added += 1
    return added


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the --output folder of the benchmark")
    parser.add_argument("--restore", action="store_true", help="put what was published into that folder instead")
    options = parser.parse_args()
    if options.restore:
        print(f"{restore(options.output)} measurements were put into {options.output}.")
    else:
        publish(options.output)


if __name__ == "__main__":
    main()
