"""Run a chapter and store its outputs, or tidy its metadata: `python book/notebook.py execute|tidy FILE…`.

Runs in the notebook's own folder with a fresh kernel, and writes the file only if every cell succeeded, atomically.
"""

import os
import sys
import time
from datetime import datetime
from pathlib import Path

import nbformat

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Keep only metadata that is the same on every machine."""
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    for cell in notebook.cells:
        cell.metadata = {key: value for key, value in cell.metadata.items() if key == "tags"}
        if "outputs" in cell:  # warnings and bars go to the reader's screen, not into the book
            cell["outputs"] = _merged(
                [output for output in cell["outputs"] if output.get("name") != "stderr"]
            )
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
            if "metadata" in output:
                output["metadata"] = {}


def _merged(outputs: list) -> list:
    """Join what a kernel printed in several pieces: where it is cut depends on the machine's mood."""
    merged: list = []
    for output in outputs:
        if merged and output.output_type == merged[-1].output_type == "stream":
            merged[-1].text += output.text
        else:
            merged.append(output)
    return merged


def slowest(notebook: nbformat.NotebookNode, n: int = 5) -> str:
    """The n cells that took longest, as "[index] seconds"."""
    seconds = []
    for index, cell in enumerate(notebook.cells):
        times = cell.metadata.get("execution", {})
        start, end = times.get("iopub.execute_input"), times.get("shell.execute_reply")
        if start and end:
            seconds.append(
                ((datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds(), index)
            )
    return ", ".join(f"[{index}] {took:.0f} s" for took, index in sorted(seconds, reverse=True)[:n])


def execute(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Run every cell in order; raise at the first error."""
    from nbclient import NotebookClient

    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": folder}}).execute()


def main(argv: list[str]) -> int:
    if len(argv) < 2 or argv[0] not in ("execute", "tidy"):
        print(__doc__)
        return 2
    for name in argv[1:]:
        path, start = Path(name), time.monotonic()
        notebook = nbformat.read(path, as_version=4)
        if argv[0] == "execute":
            execute(notebook, path.parent)
            print(f"{path}: {time.monotonic() - start:.0f} s; slowest cells {slowest(notebook)}")
        tidy(notebook)
        text = nbformat.writes(notebook) + "\n"
        if text != path.read_text(encoding="utf-8"):
            partial = path.with_suffix(".tmp")
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
