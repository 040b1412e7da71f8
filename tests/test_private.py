"""What is used of other libraries beyond what they offer: that it stands in its files alone, and is still as it was found.

A test that fails here after an upgrade names what has changed, and the file to look at.
"""

from __future__ import annotations

import ast
import multiprocessing
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import GATED, tiny_model
from sweep import command_line, launchers, machine
from sweep.config import Benchmarks
from sweep.measuring import catalogue, lm_eval_private
from sweep.models import anatomy, transformers_private
from test_identity import write_task
from test_text import data_set

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
OURS = {"sweep", "hydra_plugins", "__future__"}
DOCUMENTED = {"os._exit"}
FILES = {  # where the insides of which library may be used
    "src/sweep/measuring/lm_eval_private.py": "lm_eval, datasets, tqdm",
    "src/sweep/forkserver.py": "multiprocessing, joblib",
    "src/sweep/launchers.py": "submitit",
    "src/sweep/measuring/engine.py": "torch",
    "src/sweep/models/transformers_private.py": "transformers",
    "src/sweep/models/watching.py": "torch",
}


def is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def insides(tree: ast.Module, own: set[str]) -> Iterator[str]:
    """What a module imports of another library's insides, reaches for there, or replaces.

    own  private names that are defined in this package
    """
    modules: set[str] = set()  # names by which other libraries are known in this module
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = {alias.name: (alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found = {f"{node.module}.{alias.name}": alias.asname or alias.name for alias in node.names}
        else:
            continue
        for name, known_as in found.items():
            if name.partition(".")[0] not in OURS:
                modules.add(known_as)
                if is_private(name) or "_internal" in name:
                    yield name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            reached = ast.unparse(node)
            if (node.attr not in own or reached.startswith("super()")) and reached not in DOCUMENTED:
                yield reached
        for target in node.targets if isinstance(node, ast.Assign) else []:
            for one in target.elts if isinstance(target, ast.Tuple) else [target]:
                if isinstance(one, ast.Attribute) and ast.unparse(one).partition(".")[0] in modules:
                    yield f"{ast.unparse(one)} = …"


def test_the_insides_of_other_libraries_are_used_in_few_files() -> None:
    trees = {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in SOURCES}
    own = set()
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                own.add(node.attr)
    found = {path: [*insides(tree, own)] for path, tree in trees.items()}
    astray = {path: used for path, used in found.items() if used and path not in FILES}
    assert not astray, f"used beyond what a library offers, outside of the files for that: {astray}"
    assert all(found.get(path, True) for path in FILES), "a file for the insides of another library holds none any more"


def test_what_is_used_beyond_what_is_offered_is_seen() -> None:
    code = """
import math, numpy as np
from a.b import _c
from hydra._internal.x import Y
np.z = np._q
_own = math.pi
self._mine = other._theirs
super()._mine()
"""
    seen = ["a.b._c", "hydra._internal.x.Y", "np.z = …", "np._q", "other._theirs", "super()._mine"]
    assert [*insides(ast.parse(code), {"_mine"})] == seen


# lm-eval: sweep/measuring/lm_eval_private.py


def test_lm_eval_reads_its_tasks_as_it_did(tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    write_task(tmp_path)
    (tmp_path / "more.yaml").write_text("include: mine.yaml\ntask: more\ntag: [both]\n")
    (tmp_path / "group.yaml").write_text("group: all\ntask: [mine, more]\n")
    files = [*lm_eval_private.yaml_files(tmp_path)]
    assert [path.name for path in files] == ["group.yaml", "mine.yaml", "more.yaml"], "lm_eval.tasks._index.TaskIndex"
    more = lm_eval_private.read_yaml(tmp_path / "more.yaml")
    functions = [value for value in more.values() if "helpers." in str(value)]
    assert "include" not in more and functions and all(isinstance(value, str) for value in functions), (
        "lm_eval.tasks._yaml_loader.load_yaml"
    )
    declared: lm_eval_private.Known = {}
    for path in files:
        declared |= lm_eval_private.declared(lm_eval_private.read_yaml(path), path)
    index = TaskManager(include_path=str(tmp_path), include_defaults=False).task_index
    assert {name: (known["kind"], known["tags"]) for name, known in declared.items()} == {
        name: (entry.kind.name, sorted(entry.tags)) for name, entry in index.items()
    }, "lm_eval.tasks._index: TaskIndex.process_cfg, Entry, Kind"
    assert declared["more"] == {"kind": "TASK", "path": str(tmp_path / "more.yaml"), "tags": ["both"]}
    assert declared["both"] == {"kind": "TAG", "path": None, "tags": ["more"]}
    assert declared["all"]["kind"] == "GROUP"
    (tmp_path / "none").mkdir()
    manager = lm_eval_private.manager(tmp_path / "none", declared)
    loaded = manager.load(["all"])
    assert set(loaded["tasks"]) == {"mine", "more"}, "lm_eval.tasks.TaskManager: task_index, load"


def test_lm_evals_tasks_and_groups_say_what_is_asked_of_them(tmp_path: Path) -> None:
    write_task(tmp_path)
    (tmp_path / "group.yaml").write_text("group: all\ntask: [mine]\naggregate_metric_list: [{metric: acc}]\n")
    loaded = catalogue.load(Benchmarks(("all",), include_path=str(tmp_path)))
    task, group = loaded["tasks"]["mine"], loaded["groups"]["all"]
    assert hasattr(task.fewshot_cfg, "split"), "catalogue._check_examples"
    assert task.prompt is None and list(task.eval_docs) and task.OUTPUT_TYPE == "multiple_choice", (
        "task_identity.of_task"
    )
    assert group.child_names == ["mine"] and len(group.aggregate_metric_list) == 1, "task_identity.of_group"


def test_lm_eval_is_silent_and_alone(capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.api import metrics, task

    def pool(*_: Any, **__: Any) -> None:
        raise AssertionError("lm-eval starts processes: lm_eval.api.metrics.bootstrap_stderr")

    monkeypatch.setattr(multiprocessing, "Pool", pool)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    before = task.tqdm
    with lm_eval_private.alone_and_silent():
        metrics.bootstrap_stderr(metrics.mean, [0.0, 1.0], iters=10)
        assert [*task.tqdm([1, 2], total=2)] == [1, 2] and task.tqdm is not before
    said = capfd.readouterr()
    assert not said.out and not said.err, "lm_eval.api.metrics prints or draws by another way"
    assert task.tqdm is before
    metrics.bootstrap_stderr(metrics.mean, [0.0, 1.0], iters=10)
    assert "bootstrapping" in capfd.readouterr().out, "lm-eval is silent by itself: alone_and_silent can go"


def test_what_lm_eval_cannot_hold_is_infinite() -> None:
    from lm_eval.api import metrics

    with lm_eval_private.overflow_is_infinite():
        assert metrics.perplexity([-1e9]) == float("inf"), "lm_eval.api.metrics.perplexity"
        assert metrics.mean_stderr([1e200, -1e200]) == float("inf"), "lm_eval.api.metrics.sample_stddev"
        assert metrics.mean_stderr([float("inf"), 0.0]) == float("inf"), "lm_eval.api.metrics.sample_stddev"
    with pytest.raises(OverflowError):  # else lm-eval does so by itself: overflow_is_infinite can go
        metrics.perplexity([-1e9])


def test_tasks_find_their_data_in_a_folder_and_all_is_as_it_was(
    tmp_path: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    data_set(tmp_path / "data", "org/name", "test.jsonl", "text", ["a", "b"])
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "stored.yaml").write_text(
        "task: stored\ndataset_path: org/name\ntest_split: test\noutput_type: loglikelihood_rolling\n"
        "doc_to_text: ''\ndoc_to_target: '{{text}}'\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SWEEP_CACHE", "cache")  # relative to where the command was given
    monkeypatch.setattr(lm_eval_private, "installed", dict)  # of lm-eval's own 14,000 files none is read
    before = Path.cwd(), datasets.config.HF_DATASETS_CACHE, datasets.are_progress_bars_disabled()
    settings = Benchmarks(("stored",), include_path="tasks")
    (task,) = catalogue.load(settings, "data")["tasks"].values()
    assert [document["text"] for document in task.eval_docs] == ["a", "b"], "lm_eval_private.data_found_in"
    assert (Path.cwd(), datasets.config.HF_DATASETS_CACHE, datasets.are_progress_bars_disabled()) == before
    assert list((tmp_path / "cache" / "datasets").iterdir()), "datasets.config.HF_DATASETS_CACHE"
    assert not (tmp_path / "data" / "cache").exists()


# multiprocessing and joblib: sweep/forkserver.py


CHILD = """
import os, signal, sys
from multiprocessing import forkserver as server
from sweep import forkserver

def pipe_and_signal(answer):
    pipe, before = server._forkserver._forkserver_alive_fd, os.listdir("/proc/self/fd")
    forkserver.end_with_the_parent()
    after, blocked = os.listdir("/proc/self/fd"), signal.pthread_sigmask(signal.SIG_BLOCK, [])
    answer.send((str(pipe) in before, str(pipe) in after, signal.SIGINT in blocked))

if __name__ == "__main__":
    context = forkserver.started([])
    answers, answer = context.Pipe(duplex=False)
    child = context.Process(target=pipe_and_signal, args=(answer,))
    child.start()
    print(*answers.recv())
    child.join()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_child_of_the_server_gives_up_its_pipe_and_blocks_the_interrupt(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(CHILD)
    said = subprocess.run([sys.executable, tmp_path / "main.py"], capture_output=True, text=True, timeout=120)
    assert said.returncode == 0, (
        f"multiprocessing.forkserver has other names than sweep.forkserver asks for: {said.stderr}"
    )
    held, holds, blocks = said.stdout.split()
    assert (held, holds) == ("True", "False"), "sweep.forkserver.end_with_the_parent: the pipe is another one"
    assert blocks == "True", "sweep.forkserver.started: Ctrl-C reaches the children"


def test_a_worker_of_joblib_has_a_start_method_of_its_own() -> None:
    from joblib import Parallel, delayed

    asked = "__import__('multiprocessing').get_start_method(allow_none=True)"
    assert Parallel(n_jobs=2, backend="loky")([delayed(eval)(asked)]) == ["loky"], "sweep.forkserver.started"


# submitit, and the configuration of Hydra's launchers: sweep/launchers.py, sweep/machine.py


def test_submitit_asks_for_jobs_as_it_did() -> None:
    pytest.importorskip("submitit", reason="pip install 'sweep-pruning[slurm]'")
    from submitit.core.core import InfoWatcher
    from submitit.slurm.slurm import SlurmJob

    results, watcher = SlurmJob.results, SlurmJob.watcher
    held = {"_registered", "_finished", "_num_calls", "_last_status_check", "_info_dict"}
    assert held <= vars(InfoWatcher(delay_s=1)).keys(), "submitit.core.core.InfoWatcher"
    asked = {"_make_command", "read_info", "update", "get_state", "get_info", "is_done", "register_job"}
    assert asked <= {*dir(InfoWatcher)}, "submitit.core.core.InfoWatcher"
    with launchers.not_waiting_for_the_dead():
        ours: Any = SlurmJob.watcher
        assert SlurmJob.results is not results and type(ours).__mro__[1] is InfoWatcher
        ours._registered.add("7_0")
        assert "--jobs=7" in ours._make_command()
        assert ours.read_info("7_0|RUNNING\n") == {"7_0": {"State": "RUNNING"}}
    assert SlurmJob.results is results and SlurmJob.watcher is watcher


@pytest.mark.parametrize(
    ("launcher", "plugin", "words", "placed"),
    [
        ("joblib", "hydra_joblib_launcher", ["hydra.launcher.n_jobs=3"], machine.Placement(workers=3)),
        (
            "submitit_slurm",
            "hydra_submitit_launcher",
            ["hydra.launcher.cpus_per_task=4", "hydra.launcher.gpus_per_node=1"],
            machine.Placement(threads=4, elsewhere=True, has_gpu=True),
        ),
        ("submitit_local", "hydra_submitit_launcher", ["hydra.launcher.cpus_per_task=4"], machine.Placement(threads=4)),
        (
            "ray",
            "hydra_ray_launcher",
            ["+hydra.launcher.ray.remote.num_cpus=2"],
            machine.Placement(threads=2, elsewhere=True),
        ),
    ],
)
def test_launchers_are_told_by_their_configuration(
    launcher: str, plugin: str, words: list[str], placed: machine.Placement
) -> None:
    pytest.importorskip(f"hydra_plugins.{plugin}", reason="the launcher's package is not installed")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        composed = compose("config", [f"hydra/launcher={launcher}", *words], return_hydra_config=True)
    assert machine.placement(composed.hydra.launcher) == placed, "sweep.machine.placement"


# Hydra and OmegaConf: sweep/command_line.py


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a key", ["+method=weight", "sparsty=1"]),
        ("a group without a choice", ["method=weight"]),
        ("several values", ["+method=weight", "sparsity=0.1,0.2"]),
        ("no option of a group", ["+method=wieght"]),
        ("no name of an option", ["+method=weight", "benchmarks=null"]),
    ],
)
def test_hydra_says_what_is_wrong_in_the_words_that_are_read(name: str, words: list[str]) -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"), pytest.raises(Exception) as caught:
        compose("config", words)
    said = "\n".join(str(error) for error in command_line._chain(caught.value))
    assert re.search(command_line.SAID[name], said), f"sweep.command_line.SAID[{name!r}]: it is now\n{said}"
    assert command_line.explain(caught.value), "sweep.command_line.explain: Hydra raises it by another way"


def test_all_that_is_read_of_hydras_words_is_tried() -> None:
    marks = test_hydra_says_what_is_wrong_in_the_words_that_are_read.pytestmark  # type: ignore[attr-defined]
    assert {name for name, _ in marks[0].args[1]} == set(command_line.SAID)


def test_hydra_names_the_launcher_that_is_chosen() -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        composed = compose("config", ["+method=weight"], return_hydra_config=True)
    assert composed.hydra.runtime.choices["hydra/launcher"] == "basic", "hydra_plugins.sweep_sweeper"


# transformers: sweep/models/transformers_private.py

EXPERTS = {
    "mixtral": {"num_local_experts": 3},
    "qwen3_moe": {"num_experts": 3, "moe_intermediate_size": 8},
    "gpt_oss": {"num_local_experts": 3},  # transposed, gate and up alternate, with biases
}


def experts_of(family: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """The experts of the first block, and their matrices by name."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **GATED, **EXPERTS[family], num_experts_per_tok=2, pad_token_id=0)
    block = anatomy.blocks(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())[0]
    found = {path: module for path, module in block.named_modules() if anatomy.fused(module)}
    ((path, module),) = found.items()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module, {name.removeprefix(f"{path}."): m for name, m in anatomy.matrices(block).items() if path in name}


def test_the_kernel_of_attention_is_the_one_that_was_set() -> None:
    model = tiny_model("llama")
    for kernel in ("eager", "sdpa"):
        model.set_attn_implementation(kernel)
        assert transformers_private.attention_kernel(model.config) == kernel, "config._attn_implementation"


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@torch.no_grad()
def test_an_expert_gives_what_its_matrices_give(family: str) -> None:
    module, matrices = experts_of(family)
    assert transformers_private.tells_neurons(module), "attributes of experts: _apply_gate, gate_up_proj, down_proj"
    x = torch.randn(5, 16)
    for expert in range(3):
        gate, up, down = (matrices[f"{expert}.{name}"] for name in ("gate_proj", "up_proj", "down_proj"))
        neurons = nn.functional.silu(x @ gate.t()) * (x @ up.t())
        torch.testing.assert_close(transformers_private.expert_neurons(module, expert, x), neurons)
        chosen, share = torch.full((5, 1), expert), torch.ones(5, 1)
        torch.testing.assert_close(
            module(x, chosen, share), neurons @ down.t(), msg="experts.forward(x, chosen, share)"
        )


@torch.no_grad()
def test_experts_that_are_held_otherwise_are_told() -> None:
    module, matrices = experts_of("gpt_oss")
    assert module.is_transposed and module.has_bias and not module.is_concatenated, "use_experts_implementation"
    assert not transformers_private.tells_neurons(module)
    assert matrices["1.gate_up_proj"].shape == (48, 16) and matrices["1.down_proj"].shape == (16, 24)
    assert matrices["1.gate_up_proj"].data_ptr() == module.gate_up_proj[1].data_ptr(), "matrices are views"


def test_what_a_quantised_file_leaves_is_forgotten(tmp_path: Any) -> None:
    from transformers.quantizers.base import HfQuantizer

    class Quantiser(HfQuantizer):
        def is_serializable(self) -> bool:
            return False

        def is_trainable(self) -> bool:
            return False

    model = tiny_model("llama")
    model.config.quantization_config = {"quant_method": "none"}
    model.hf_quantizer = Quantiser(type("Config", (), {"quant_method": "none"})())
    with pytest.raises(ValueError, match="quantized"):
        model.save_pretrained(tmp_path)
    transformers_private.forget_quantiser(model)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in AutoConfig.from_pretrained(tmp_path).to_dict()
