"""lm-eval's tasks on hasten. The package is an extra ('tasks'), imported when it is asked for."""

import contextlib
import dataclasses
import difflib
import importlib.util
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hasten.base.errors import MissingExtraError, UserError, one_line
from hasten.measure.harness import Harness

SEED = 1234
"""What lm-eval itself begins numpy and its few-shot examples with."""


@dataclasses.dataclass(frozen=True, slots=True)
class TaskScore:
    """One metric of a task over ``samples`` examples: ``error`` is its standard error, None where lm-eval has none; ``filter`` is what
    was done to the outputs first; ``version`` is the task's own."""

    task: str
    version: str
    filter: str
    shots: int | None
    metric: str
    value: float
    error: float | None
    higher_is_better: bool | None
    samples: int


def run_tasks(harness: Harness, tasks: Sequence[str], *, limit: int | None = None, shots: int | None = None) -> list[TaskScore]:
    """Every metric of ``tasks``, which are names that lm-eval knows or YAML files; a file may name Python functions beside it, which are
    called. ``limit`` bounds the examples of each, ``shots`` says how many examples stand in each prompt, as the task says unless given.

    Raises MissingExtraError where lm-eval is not installed, UserError for a task that is not there or whose data cannot be had."""
    require_lm_eval()
    from lm_eval.evaluator import evaluate

    random.seed(0)
    np.random.seed(SEED)
    with contextlib.redirect_stdout(sys.stderr):  # it prints what it does
        loaded = _load(tasks)
        for task in loaded["tasks"].values():
            own = task.get_config("num_fewshot")
            if own is None or (shots is not None and own != 0):  # a task that says none means it
                task.set_config(key="num_fewshot", value=shots or 0)
            task.set_fewshot_seed(seed=SEED)
        found = evaluate(lm=as_lm(harness), task_dict=loaded, limit=limit, log_samples=False)
    return _scores(found)


def require_lm_eval() -> None:
    """Raise MissingExtraError where lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingExtraError("evaluating on tasks", "tasks")


def as_lm(harness: Harness) -> Any:
    """``harness`` as an ``lm_eval.api.model.LM``."""
    from lm_eval.api.model import LM

    class HastenLM(LM):
        """Requests of lm-eval, whose ``args`` are what `Harness` takes."""

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            return harness.loglikelihood([each.args for each in requests])

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            return harness.loglikelihood_rolling([each.args[0] for each in requests])

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            return harness.generate_until([each.args for each in requests])

    return HastenLM()


def _load(tasks: Sequence[str]) -> Any:
    """The tasks with their data. lm-eval's own are looked through only where one of them is named, for that takes seconds."""
    from lm_eval.tasks import TaskManager

    for each in tasks:
        if each.endswith((".yaml", ".yml")) and not Path(each).is_file():
            raise UserError(f"no file {each}; name a task of lm-eval, or a YAML file that describes one")
    files = [str(Path(each)) for each in tasks if Path(each).is_file()]
    manager = TaskManager(include_defaults=len(files) < len(tasks))
    for each in tasks:
        if each not in files and not Path(each).is_file() and each not in manager.all_tasks:
            near = difflib.get_close_matches(each, manager.all_tasks, 3)
            hint = f"; did you mean {', '.join(near)}?" if near else "; name a task of lm-eval, or a YAML file that describes one"
            raise UserError(f"no task {one_line(each)}{hint}")
    try:
        return manager.load(list(tasks))
    except Exception as error:  # of whatever reads YAML, data sets and the functions beside a task
        raise UserError(
            f"{', '.join(tasks)}: the task or its data cannot be had: {type(error).__name__}: {one_line(str(error), 400)}; "
            "with no network, take a task whose data lie in a local file, or in the cache"
        ) from None


def _scores(found: Any) -> list[TaskScore]:
    """lm-eval keeps a metric as 'acc,none' (metric and filter), its error as 'acc_stderr,none', 'N/A' where there is none."""
    scores = []
    for task, figures in {**found["results"], **found.get("groups", {})}.items():
        for key, value in figures.items():
            metric, comma, kept = key.partition(",")
            if not comma or metric.endswith("_stderr") or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            error = figures.get(f"{metric}_stderr,{kept}")
            scores.append(TaskScore(
                task, str(found["versions"].get(task)), kept, found["n-shot"].get(task), metric, float(value),
                float(error) if isinstance(error, int | float) else None,
                found["higher_is_better"].get(task, {}).get(metric), int(figures.get("sample_len", 0)),
            ))  # fmt: skip
    return scores
