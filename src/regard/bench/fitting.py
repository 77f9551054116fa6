"""Which mechanisms a task can be done with, and why not with the others."""

import re
import warnings

import torch

from regard import catalog
from regard.bench.match import Match, matched, sizes
from regard.models.mixer import Mechanism, Stack
from regard.tasks import Size, Task

__all__ = ["sizes", "why_not"]


def why_not(task: Task, mechanism: Mechanism, size: Size, match: Match = "params") -> list[str]:
    """Why this mechanism cannot do the task at this size; [] if it can.

    Cards are asked first; then the model is built and run on one example. The caller's own code is only built:
    what it does when run is a result.
    """
    lacking = [
        f"{name}: {reason}" if isinstance(mechanism, Stack) else reason
        for name in mechanism.names
        if ":" not in name
        for reason in task.fits(catalog.card(name))
    ]
    if lacking:
        return list(dict.fromkeys(lacking))
    try:
        mechanism.layers(size.depth)
        if mechanism.own:
            return []
        with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            task.model(mechanism, matched(task, mechanism, size, match)).eval()(*task.example())
    except Exception as error:  # whatever it says is the answer
        said = " ".join(str(error).split())
        if missing := re.search(r"missing \d+ required positional arguments?: (.*)", said):
            return [f"needs inputs that {task.name} has not: {missing[1]}"]
        return [said if isinstance(error, ValueError) and said else f"{type(error).__name__}: {said}"]
    return []
