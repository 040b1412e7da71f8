"""Hydra finds sweepers in this namespace only. Composes every cell, has sweep plan them, and hands them to a launcher.

A launcher of Hydra's (`hydra/launcher=joblib`, `submitit_slurm`, `ray`) receives all cells at once, after the dense
baselines; without one they run here, one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf, open_dict

ConfigStore.instance().store(
    group="hydra/sweeper",
    name="sweep",
    node={"_target_": "hydra_plugins.sweep_sweeper.SweepSweeper", "max_batch_size": None, "params": None},
    provider="sweep",
)


class SweepSweeper(BasicSweeper):
    def sweep(self, arguments: list[str]) -> Any:
        import sys

        from sweep import plan, runner  # here, because Hydra imports every plugin for every Hydra application

        assert self.hydra_context is not None and self.launcher is not None and self.config is not None
        grid = self._grid([*self._parse_config(), *arguments])
        prepared = [(plan.prepare(self._compose(overrides)), overrides) for overrides in grid]
        options = prepared[0][0][1].of_sweep()
        made = plan.make([(cell, overrides) for (cell, _), overrides in prepared], options)

        def launch(steps: list[plan.Step]) -> None:
            for job in self.launcher.launch([list(step.overrides) for step in steps], initial_job_idx=0):
                _ = job.return_value  # raises what the job raised

        together = not isinstance(self.launcher, BasicLauncher)
        if code := runner.run_plan(made, options, launch, together=together):
            sys.exit(code)

    def _grid(self, arguments: list[str]) -> list[list[str]]:
        """The command line words of every cell. Refuses a grid larger than max_cells before any of it is composed."""
        from sweep.config import RequestError

        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = parser.parse_overrides(arguments)
        size = math.prod(len(list(o.sweep_string_iterator())) for o in overrides if o.is_discrete_sweep())
        limit = OmegaConf.select(self.config, "max_cells")
        if isinstance(limit, int) and size > limit:
            raise RequestError(
                f"the grid has {size} cells, more than max_cells={limit}: add max_cells={size} to run it"
            )
        (grid,) = self.split_arguments(overrides, max_batch_size=None)
        return grid

    def _compose(self, overrides: Sequence[str]) -> dict[str, Any]:
        composed = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(composed):
            del composed["hydra"]
        container = OmegaConf.to_container(composed, resolve=True)
        assert isinstance(container, dict)
        return {str(key): value for key, value in container.items()}
