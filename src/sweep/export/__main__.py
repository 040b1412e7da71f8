"""The door: one subcommand a line of `COMMANDS`, whose module is imported only when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import sys
from dataclasses import dataclass

from sweep import messages


@dataclass(frozen=True)
class Command:
    """A way out. Its module has `add_arguments(parser)`, which declares what is typed, and `run(arguments)`, which does it."""

    module: str
    help: str


COMMANDS: dict[str, Command] = {
    "gguf": Command("sweep.export.gguf_file", "a checkpoint as a file for llama.cpp, tried there before it counts"),
    "csv": Command("sweep.export.table", "the rows of results folders as one flat file"),
    "wandb": Command("sweep.export.trackers", "a run a cell in Weights & Biases, offline unless WANDB_API_KEY is set"),
    "mlflow": Command(
        "sweep.export.trackers", "a run a cell in MLflow, in ./mlflow.db unless MLFLOW_TRACKING_URI is set"
    ),
    "trackio": Command("sweep.export.trackers", "a run a cell in Trackio, on this machine"),
    "card": Command("sweep.export.model_card", "a row as evaluation results in the card of a saved checkpoint"),
}


def main(arguments: list[str] | None = None) -> None:
    """The command line. Raises RequestError for a wrong request."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m sweep.export", description="Take what sweep has made to other programs."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        own = commands.add_parser(name, help=command.help, description=command.help)
        if name in words[:1]:
            importlib.import_module(command.module).add_arguments(own)
    asked = parser.parse_args(words)
    importlib.import_module(COMMANDS[asked.command].module).run(asked)


if __name__ == "__main__":
    sys.exit(messages.guard(main))
