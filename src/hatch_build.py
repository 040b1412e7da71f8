"""Build hook: a wheel carries conf/ inside the package; an editable install reads the checkout's own conf/."""

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ConfInWheel(BuildHookInterface):
    def initialize(self, version: str, build_data: dict) -> None:
        if version == "standard":  # an editable install would keep a copy that goes stale
            build_data["force_include"]["conf"] = "sweep/conf"
