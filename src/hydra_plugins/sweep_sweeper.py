"""Hydra finds sweepers in this namespace only. Composes every cell, has sweep plan them, and runs what is to be done.

Without a launcher cells run in children of this process. A launcher of Hydra's (`hydra/launcher=joblib`,
`submitit_slurm`, `ray`) receives all cells at once, after the dense baselines. Written as Hydra's own example of a
sweeper is, with what Hydra offers to plugins.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

ConfigStore.instance().store(
    group="hydra/sweeper",
    name="sweep",
    node={
        "_target_": "hydra_plugins.sweep_sweeper.SweepSweeper",
        "max_batch_size": None,
        "params": None,
        "grids": None,
    },
    provider="sweep",
)

Words = Mapping[str, Any]  # a key of the configuration and its values, as they are typed

LAUNCHER_LOGS = ".sweep"  # here, when the results are on object storage, launchers keep their files


class SweepSweeper(Sweeper):
    """A sweeper over the product of the values given, or over several such products one after the other.

    params  key to values, as in Hydra's own sweeper; a value on the command line replaces that of the same key
    grids   a list of such mappings: each with `params` and the command line makes a grid, and the sweep is all of them
    """

    hydra_context: HydraContext  # these, as of every sweeper, are there from `setup` on
    config: DictConfig
    launcher: Launcher

    def __init__(
        self, max_batch_size: int | None = None, params: Words | None = None, grids: Sequence[Words] | None = None
    ) -> None:
        self.params, self.grids = params or {}, grids or [{}]  # a batch is of no use: cells are planned all at once

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        if "://" in str(config.get("results")):  # launchers make their folder on a disk
            with open_dict(config):
                config.hydra.sweep.dir = LAUNCHER_LOGS
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        import sys

        from sweep import launchers, machine, plan, runner  # here, because every Hydra application imports this file

        launcher = OmegaConf.to_container(self.config.hydra.launcher, resolve=True)
        assert isinstance(launcher, dict)
        placement = machine.placement({str(key): value for key, value in launcher.items()})
        grid = self._grid(arguments)
        prepared = [(plan.prepare(self._compose(overrides), placement), overrides) for overrides in grid]
        options = plan.same_options(options for (_, options), _ in prepared).of_sweep()
        made = plan.make([(cell, overrides) for (cell, _), overrides in prepared], options)

        def launch(steps: list[plan.Step]) -> list[Any]:
            with launchers.not_waiting_for_the_dead():
                jobs = self.launcher.launch([step.words() for step in steps], initial_job_idx=0)
            return [launchers.result(job) for job in jobs]

        here = self.config.hydra.runtime.choices["hydra/launcher"] == "basic"
        if code := runner.run_plan(made, options, None if here else launch):
            sys.exit(code)

    def _grid(self, arguments: list[str]) -> list[list[str]]:
        """The command line words of every cell. Refuses grids larger than max_cells before any of them is composed."""
        from sweep import command_line
        from sweep.settings import RequestError

        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        parts = []
        for own in self.grids:
            asked = [f"{key}={'null' if value is None else value}" for key, value in {**self.params, **own}.items()]
            overrides = parser.parse_overrides([*command_line.under_present_names(asked), *arguments])
            parts.append(list({o.get_key_element(): o for o in overrides}.values()))  # of equal keys the last counts
        size = sum(math.prod(_count(o) for o in part if o.is_sweep_override()) for part in parts)
        limit = OmegaConf.select(self.config, "max_cells")
        if isinstance(limit, int) and size > limit:
            raise RequestError(
                f"the grid has {size} cells, more than max_cells={limit}: add max_cells={size} to run it"
            )
        return [list(words) for part in parts for words in itertools.product(*map(_words, part))]

    def _compose(self, overrides: Sequence[str]) -> dict[str, Any]:
        composed = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(composed):
            del composed["hydra"]
        container = OmegaConf.to_container(composed, resolve=True)
        assert isinstance(container, dict)
        return {str(key): value for key, value in container.items()}


def _words(override: Override) -> list[str]:
    """KEY=VALUE for each value that a key is given."""
    key = override.get_key_element()
    if not override.is_sweep_override():
        return [f"{key}={override.get_value_element_as_str()}"]
    return [f"{key}={value}" for value in override.sweep_string_iterator()]


def _count(override: Override) -> int:
    """How many values a swept key has. Raises RequestError when it has none, or no end of them."""
    from sweep.settings import RequestError

    if not override.is_discrete_sweep():
        raise RequestError(
            f"{override.input_line} has no list of values: give {override.key_or_group}=a,b,c, "
            f"choice(a,b,c), range(start,stop,step) or, for a group, glob(pattern)"
        )
    values = override.value()
    if isinstance(values, RangeSweep):  # counted, not listed: there may be billions
        start, stop, step = (values.start or 0, values.stop, values.step)
        size = math.ceil((stop - start) / step) if stop is not None and step else 0
    else:
        size = len(list(override.sweep_string_iterator()))
    if size < 1:
        raise RequestError(f"{override.input_line} matches nothing: no value is left to sweep over")
    return size
