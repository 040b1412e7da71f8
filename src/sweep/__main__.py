"""The command line: Hydra composes, sweep checks and runs. The only place, with the sweeper, that sees a DictConfig."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from sweep import messages
from sweep.config import RequestError


def compose(cfg: DictConfig) -> dict[str, Any]:
    """The composed configuration as plain containers, without Hydra's own part."""
    container = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items() if key != "hydra"}


def task(cfg: DictConfig) -> Any:
    """One cell: within a sweep, run it and return its outcome; alone, run it with its baseline and exit."""
    from sweep import plan, runner  # here, because they take longer to import than --help may take

    overrides = list(HydraConfig.get().overrides.task)
    try:
        if HydraConfig.get().mode == RunMode.MULTIRUN:  # a job of a launcher: the sweeper has planned
            step, options = plan.received(compose(cfg), overrides)
            return runner.run_one(step.cell, options.of_sweep(), step.overrides, beside_others=True)
        cell, options = plan.prepare(compose(cfg))
        sys.exit(runner.run_plan(plan.make([(cell, overrides)], options), options))
    except RequestError as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise  # to the sweeper, wherever it waits for this job
        sys.exit(messages.complain(error))  # left to Hydra, it would be announced as a failed job


def conf_folder() -> Path:
    """conf/: inside the package in a wheel, beside src/ in a checkout."""
    packaged = Path(__file__).parent / "conf"
    return packaged if packaged.is_dir() else Path(__file__).resolve().parents[2] / "conf"


def main() -> None:
    """Entry point of `python -m sweep` and of the console script. Exits 1 when a cell failed, 2 for a wrong request."""
    sys.exit(messages.guard(hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")(task)))


if __name__ == "__main__":
    main()
