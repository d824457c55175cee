"""Executes a notebook headless, keeps the executed copy, and prints its last cell's output."""

import pathlib
import sys

import nbclient
import nbformat

OUT = pathlib.Path("build/notebooks")


def main(path: pathlib.Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    OUT.mkdir(parents=True, exist_ok=True)
    copy = OUT / path.name
    nbformat.write(notebook, copy)
    last = [cell for cell in notebook.cells if cell.cell_type == "code"][-1]
    for output in last.outputs:
        if output.output_type == "stream" and output.name == "stdout":
            print(output.text, end="")
    print(f"executed copy: {copy}")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        main(pathlib.Path(name))
