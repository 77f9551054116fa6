"""What a mechanism claims is asked of it in the very model that is trained: a run that breaks a law is refused."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from regard import catalog
from regard.bench.faults import Refused
from regard.laws import probe
from regard.laws.agreement import Broken
from regard.models.mixer import Mechanism, Spec, Stack, build, parse, protocol
from regard.tasks import Task

EXAMPLES = 3
LAWS = {
    "L4": ("the future changes nothing", probe.future_changes_nothing),
    "L10": ("other sequences of the batch change nothing", probe.batch_rows_do_not_meet),
    "L28": ("the same inputs give the same outputs", probe.calls_are_alike),
}
PLAIN = "softmax"


def refuse_what_breaks_laws(model: Any, task: Task, mechanism: Mechanism, device: torch.device, when: str) -> list[str]:
    """Probe every mixer of the model with examples of the task. Returns what is excepted; raises Refused."""
    specs = by_mixer(model, mechanism)
    for call in calls(model, task, device):
        spec = specs[call.module]
        for id, (statement, look) in LAWS.items():
            if id == "L4" and not causal(task, spec):
                continue
            try:
                look(call, modes(id, exceptions(spec)))
            except Broken as broken:
                place = probe.where(call.module)
                raise Refused(f"{id}: {statement}: {when}, {broken} ({place})") from broken
    return [
        f"{spec}: {said(law, why)}" if isinstance(mechanism, Stack) else said(law, why)
        for spec in mechanism.kinds
        for law, why in exceptions(spec).items()
    ]


def by_mixer(model: Any, mechanism: Mechanism) -> dict[nn.Module, Spec]:
    """What each mixer of the model was built as."""
    return dict(zip(model.mixers, mechanism.layers(len(model.mixers))))


def modes(id: str, excepted: Mapping[str, str]) -> list[str]:
    """In which it is asked for: a card may be excepted from a law altogether, or from its side in training."""
    asked = [] if id in excepted else list(probe.MODES)
    return [mode for mode in asked if not any(law.startswith(f"{id} ") and law.endswith(mode) for law in excepted)]


def said(law: str, why: str) -> str:
    id, _, side = law.partition(" ")
    return f"{id} ({LAWS[id][0]}) is not asked for{' in training' if side else ''}: {why}"


def another(model: Any, task: Task, mechanism: Mechanism, device: torch.device) -> str:
    """What the mechanism is at this size, if it is plain softmax, in its layers or some of them; else ''."""
    asked = {str(s): s for s in mechanism.kinds if s.name != PLAIN and protocol(s) == "TokenMixer"}
    if not asked:
        return ""
    specs = by_mixer(model, mechanism)
    for call in calls(model, task, device):
        if (spec := specs[call.module]) in asked.values() and not _is_plain(call, causal(task, spec)):
            del asked[str(spec)]
    within = f" in {mechanism}" if isinstance(mechanism, Stack) else ""
    return "; ".join(f"{s}{within} is {PLAIN} at {task.tokens} tokens{options(s)}" for s in asked.values())


def _is_plain(call: probe.Call, causal: bool) -> bool:
    """Whether the mixer computes what softmax does with its weights."""
    heads = getattr(call.module, "num_heads", None)
    if not isinstance(heads, int):
        return False
    with probe.seeded():
        plain = build(parse(PLAIN), call.given[0].shape[-1], heads, causal=causal)
    return probe.computes(call, plain)


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
