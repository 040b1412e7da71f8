"""The command line: Hydra composes, sweep checks and runs. The only place, with the sweeper, that sees a DictConfig."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imports take long, and are to be interrupted without a traceback: each is made where it is used
    from omegaconf import DictConfig


def compose(cfg: DictConfig) -> dict[str, Any]:
    """The composed configuration as plain containers, without Hydra's own part."""
    from omegaconf import OmegaConf

    container = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items() if key != "hydra"}


def task(cfg: DictConfig) -> Any:
    """One cell: within a sweep, run it and return its outcome; alone, run it with its baseline and exit."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    from sweep import command_line, messages, plan, runner

    words = OmegaConf.to_container(HydraConfig.get().overrides.task)  # as they were typed
    assert isinstance(words, list)
    if HydraConfig.get().mode == RunMode.MULTIRUN:  # a job of a launcher: the sweeper has planned
        step, options = plan.received(compose(cfg), words)
        runner.check_node(step.cell, options)
        return runner.run_one(step.cell, options.of_sweep(), step.overrides, beside_others=True)

    def run() -> int:
        cell, options = plan.prepare(compose(cfg))
        return runner.run_plan(plan.make([(cell, words)], options), options)

    sys.exit(messages.guard(run, command_line.explain))  # an exception left to Hydra would be announced as a failed job


def conf_folder() -> Path:
    """conf/: inside the package in a wheel, beside src/ in a checkout."""
    packaged = Path(__file__).parent / "conf"
    return packaged if packaged.is_dir() else Path(__file__).resolve().parents[2] / "conf"


def main() -> None:
    """Entry point of `python -m sweep` and of the console script. Exits 1 when a cell failed, 2 for a wrong request."""
    try:
        from sweep import command_line, messages
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(messages.guard(_main, command_line.explain))


def _main() -> Any:
    import hydra

    from sweep import command_line

    sys.argv[1:] = command_line.under_present_names(sys.argv[1:])
    return hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")(task)()


if __name__ == "__main__":
    main()
