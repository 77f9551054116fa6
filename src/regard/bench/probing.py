"""What a mechanism claims is asked of it in the very model that is trained: a run that breaks a law is refused."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from regard import catalog
from regard.bench.faults import Refused
from regard.laws import probe
from regard.laws.agreement import Broken
from regard.models.mixer import Spec, build, parse, protocol
from regard.tasks import Task

EXAMPLES = 3
LAWS = {
    "L4": ("the future changes nothing", probe.future_changes_nothing),
    "L10": ("other sequences of the batch change nothing", probe.batch_rows_do_not_meet),
    "L28": ("the same inputs give the same outputs", probe.calls_are_alike),
}
PLAIN = "softmax"


def refuse_what_breaks_laws(model: Any, task: Task, mechanism: Spec, device: torch.device, when: str) -> list[str]:
    """Probe every mixer of the model with examples of the task. Returns what is excepted; raises Refused."""
    excepted = exceptions(mechanism)
    for call in calls(model, task, device):
        for id, (statement, look) in LAWS.items():
            if id == "L4" and not causal(task, mechanism):
                continue
            try:
                look(call, modes(id, excepted))
            except Broken as broken:
                place = probe.where(call.module)
                raise Refused(f"{id}: {statement}: {when}, {broken} ({place})") from broken
    return [said(law, why) for law, why in excepted.items()]


def modes(id: str, excepted: Mapping[str, str]) -> list[str]:
    """In which it is asked for: a card may be excepted from a law altogether, or from its side in training."""
    asked = [] if id in excepted else list(probe.MODES)
    return [mode for mode in asked if not any(law.startswith(f"{id} ") and law.endswith(mode) for law in excepted)]


def said(law: str, why: str) -> str:
    id, _, side = law.partition(" ")
    return f"{id} ({LAWS[id][0]}) is not asked for{' in training' if side else ''}: {why}"


def another(model: Any, task: Task, mechanism: Spec, device: torch.device) -> str:
    """What the mechanism is at this size, if it is plain softmax; else ''."""
    if mechanism.name == PLAIN or protocol(mechanism) != "TokenMixer":
        return ""
    for call in calls(model, task, device):
        heads = getattr(call.module, "num_heads", None)
        if not isinstance(heads, int):
            return ""
        dim = call.given[0].shape[-1]
        with probe.seeded():
            plain = build(parse(PLAIN), dim, heads, causal=causal(task, mechanism))
        if not probe.computes(call, plain):
            return ""
    return f"{mechanism} is {PLAIN} at {task.tokens} tokens{options(mechanism)}"


def options(mechanism: Spec) -> str:
    """The sizes that make it so, as far as the card names some."""
    own = {} if mechanism.own or len(mechanism.parts) > 1 else catalog.card(mechanism.name).options
    sizes = {name: value for name, value in own.items() if type(value) is int and name not in mechanism.options}
    return ": " + ", ".join(f"{name} = {value}" for name, value in sizes.items()) if sizes else ""


def calls(model: Any, task: Task, device: torch.device) -> list[probe.Call]:
    """What the mixers are called with on some examples, as long as those that are trained on."""
    from regard.bench.train import on

    training = model.training
    batch = on(device, next(iter(task.batches(EXAMPLES, 0))))
    try:
        return probe.recorded(list(mixers(model)), lambda: task.loss(model.eval(), batch))
    finally:
        model.train(training)


def mixers(model: Any) -> Iterator[nn.Module]:
    return (mixer for mixer in model.mixers if isinstance(mixer, nn.Module))


def causal(task: Task, mechanism: Spec) -> bool:
    """Whether the task builds it causal."""
    return "causal" in task.takes.get(protocol(mechanism), ())


def exceptions(mechanism: Spec) -> dict[str, str]:
    """Law id, or id and name of its side in training -> why one of its cards is excepted."""
    if mechanism.own:
        return {}
    cards = [catalog.card(name) for name in mechanism.names]
    every = [item for card in cards for item in card.exceptions.items()]
    return {law: why for law, why in every if law in LAWS or (law.endswith("_training") and law.split()[0] in LAWS)}
