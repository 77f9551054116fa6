"""L48: rows, which say what a mechanism is when it is built through `create`, and how they are measured and compared.

A row holds what was given (as people write it on a command line), the causality, the starting values and the outputs:

    {"row": "window(window=4)", "causal": true, "start": [...], "eval": [p, rms], "train": p}

`p` is a fixed random projection of the output, once its root mean square is 1; for both, noise is added to all
parameters first, so that zero starts hide nothing. "start" names tensors with their shape, mean and root mean square;
beyond a card's first row, only tensors that are new, or of another shape. The first row has the defaults, too.
"""

import functools
import inspect
import itertools
import json
import math
import typing
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import regard
from regard import index
from regard.bench.auxiliary import auxiliary_losses
from regard.laws.protocols import attend
from regard.laws.subject import of, perturb, tokens
from regard.models.mixer import Part, Spec, parse

FOLDER = Path(__file__).parent / "rows"
Row = dict[str, Any]

SIZES = ({}, {"dim": 64, "num_heads": 16})
"""Sizes at which the defaults are tried, beyond the common small one."""
DIGITS = 6
WITHIN = 1e-5
REFUSALS = (ValueError, TypeError, RuntimeError, IndexError)


# --- measuring ----------------------------------------------------------------------------------------------


def measure(spec: Spec, causal: bool) -> Row:
    """The row of one way to build a card; where something is refused, the error's name stands for the numbers."""
    plain = of(spec.name)
    options = {"dim": plain.dim, "num_heads": plain.heads, **spec.options}
    torch.manual_seed(0)
    row: Row = {"row": str(spec), "causal": causal}
    try:
        module = regard.create(spec.name, causal=causal, **options)
    except REFUSALS as error:
        return row | {"start": [], "eval": type(error).__name__}
    if regard.card(spec.name).protocol == "CachePolicy":
        return row | {"start": []} | streamed(module)
    if not isinstance(module, nn.Module):
        return row | {"start": [f"{key} {value!r}" for key, value in sorted(vars(module).items())]}
    row["start"] = [f"{key} {_shape(t)} {_words(moments(t))}" for key, t in module.state_dict().items()]
    perturb(module)
    module.double()
    try:
        return row | outputs(module, *arguments(spec.name, module, options))
    except REFUSALS as error:
        return row | {"eval": type(error).__name__}


@torch.no_grad()
def outputs(module: Any, given: Mapping[str, Any], spare: Mapping[str, Any]) -> Row:
    """Two numbers in eval and one in training, where a call may change buffers, and so what the next gives."""
    module.eval()
    torch.manual_seed(1)
    plain = flat(module(**given, **spare))
    module.train()
    torch.manual_seed(1)
    trained = [projection(flat(module(**given))) for _ in range(2 if list(module.buffers()) else 1)]
    if auxiliary := regard.card(module.name).auxiliary:
        if hasattr(module, auxiliary):
            trained.append(float(getattr(module, auxiliary)(**given, **spare)) * module.auxiliary_weight)
        else:  # a part's own, which only its calls within the layer tell
            with auxiliary_losses(module) as losses:
                module(**given, **spare)
                trained.append(float(sum(losses())))
    return {"eval": numbers(projection(plain), moments(plain)[1]), "train": numbers(sum(trained))[0]}


@torch.no_grad()
def streamed(policy: Any) -> Row:
    """Of a cache policy in the first of two layers: what queries get for a prompt and the tokens that follow it."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, heads, 16, 4, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    policy, found = policy.at_layer(0, 2), []
    state = policy.init_state(2, 2, 4)
    for at in (slice(0, 8), *(slice(t, t + 1) for t in range(8, 16))):
        kept, state = policy.update(state, k[:, :, at], v[:, :, at], q[:, :, at])
        found.append(attend(q[:, :, at][:, :, -1:], kept))
    out = flat(found)
    return {"eval": numbers(projection(out), moments(out)[1])}


def arguments(name: str, module: Any, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `forward` is called with: the inputs of the laws, in the widths and axes that the options ask for.

    Apart from them, those that `forward` could do without: in training it does what the options then say.
    """
    taken = inspect.signature(module.forward).parameters
    sized = replace(of(name), dim=options["dim"], heads=options["num_heads"])
    given = dict(zip(taken, sized.inputs(), strict=False))
    maps = regard.card(name).protocol == "FeatureMixer"
    if maps and options.get("axes"):
        given = {key: t.reshape(*t.shape[:2], *_sides(t[0, 0].numel(), options["axes"])) for key, t in given.items()}
    spare = {k: given.pop(k) for k in list(given) if taken[k].default is not inspect.Parameter.empty}
    for option, width in options.items():
        stem, is_width, _ = option.partition("_dim")
        if not is_width or width is None or stem == "head":
            continue
        for key in taken:  # as context_dim is that of `context`, and edge_dim that of `edge_features`
            if (key.startswith(stem) or stem.startswith(key)) and key.rpartition("_")[2] != "index":
                like = given.get(key, tokens(2, 7))
                lead = (
                    given["edge_index"].shape[1:] if stem == "edge" else like[:, 0].shape if maps else like.shape[:-1]
                )
                drawn = tokens(1, math.prod(lead), dim=width, seed=6).view(*lead, width)
                given[key] = drawn.movedim(-1, 1) if maps else drawn
                spare.pop(key, None)
                break
    return given, spare


def _sides(size: int, axes: int) -> list[int]:
    """Sides of a map with that many places."""
    side = 4 if size % 4**axes == 0 else 2
    return [side] * (axes - 1) + [size // side ** (axes - 1)]


def flat(out: Any) -> Tensor:
    """All numbers of an output."""
    return out.flatten().double() if isinstance(out, Tensor) else torch.cat([flat(part) for part in out])


def projection(out: Tensor) -> float:
    """One number that every entry changes."""
    direction = torch.randn(len(out), generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return float(out @ direction) / max(len(out), 1) ** 0.5


def moments(t: Tensor) -> tuple[float, float]:
    """Mean and root mean square."""
    t = t.double() if t.numel() else torch.zeros(1).double()
    return float(t.mean()), float(t.square().mean()) ** 0.5


def numbers(*values: float) -> list[float]:
    """As many digits as rows have."""
    return [float(f"{value:.{DIGITS - 1}e}") + 0.0 for value in values]


def _words(values: tuple[float, float]) -> str:
    mean, rms = values
    return " ".join(f"{value:g}" for value in numbers(0.0 if abs(mean) < 1e-9 * rms else mean, rms))


def _shape(t: Tensor) -> str:
    return "x".join(map(str, t.shape)) or "scalar"


# --- which rows a card has ----------------------------------------------------------------------------------


def rows(name: str) -> list[Row]:
    """All rows of a card, measured anew; other values of its options are looked for."""
    return shorten(name, [measured(spec, causal) for causal in of(name).causalities for spec in specs(name)])


def shorten(name: str, measured: list[Row]) -> list[Row]:
    """Rows without what the card's first row says already."""
    if not measured:
        return []
    first, *rest = measured
    known = {tensor.rsplit(" ", 2)[0] for tensor in first["start"]}
    others = [row | {"start": [t for t in row["start"] if t.rsplit(" ", 2)[0] not in known]} for row in rest]
    return [{**first, "defaults": defaults(name)}, *others]


def defaults(name: str) -> str:
    """The options' defaults, and what is fixed."""
    card = regard.card(name)
    open_ = {k: "required" if v is inspect.Parameter.empty else index.literal(v) for k, v in card.options.items()}
    return ", ".join(f"{key}={value!r}" for key, value in (open_ | dict(card.preset)).items())


def specs(name: str) -> list[Spec]:
    """The defaults, the example, what all mechanisms may be asked for, and other values of each option."""
    card = regard.card(name)
    example = Spec((Part(name, dict(card.example)),))
    required = {key: card.example[key] for key, v in card.options.items() if v is inspect.Parameter.empty}
    plain = [Spec((Part(name, {**required, **size}),)) for size in SIZES]
    found = [next((s for s in plain if whole(s)), plain[0]), example]
    asked = {"dropout": 0.4} if "dropout" in card.supports else {}
    if "gqa" in card.supports and "num_kv_heads" not in card.example:
        asked["num_kv_heads"] = 2
    if card.takes("head_dim") and whole(changed(example, head_dim=8)):
        asked["head_dim"] = 8
    found += [changed(example, **{key: value}) for key, value in asked.items()]
    for option in card.options:
        tried = card.tries.get(option)
        beside = [changed(example, **dict(tried))] if isinstance(tried, Mapping) else []
        found += other_values(card, option, [*beside, example, *plain[:1], *around(card, example, option)])
    return list({str(spec): spec for spec in found}.values())


def around(card: regard.Card, base: Spec, but: str) -> Iterator[Spec]:
    """The base with one other option changed: some options matter only beside another."""
    for option, default in card.options.items():
        now = base.options.get(option, default)
        for value in choices(card, option) or guesses(card, option, now)[:2]:
            if value != now and option != but:
                yield changed(base, **{option: value})


def other_values(card: regard.Card, option: str, bases: list[Spec]) -> list[Spec]:
    """Pairs of ways to build the card that differ in the option alone: for every choice, else for one other value.

    Where no pair shows a difference there is none, which the test then says.
    """
    pairs = [(base, changed(base, **{option: value})) for base in bases for value in values(card, option, base)]
    if wanted := choices(card, option):
        chosen = [[pair for pair in pairs if pair[1].options[option] == value] for value in wanted]
        return [spec for some in chosen for spec in _first(some, same=how(card, option))]
    return _first(pairs, same=how(card, option))


def _first(pairs: list[tuple[Spec, Spec]], *, same: bool = False) -> list[Spec]:
    """The first pair that shows a difference in outputs, or else in what is built; a choice that none allows, alone."""
    for test in (whole,) if same else (shows, builds):
        for base, spec in pairs:
            if test(spec) if same else test(base, spec):
                return [base, spec]
    return [spec for _, spec in pairs[:1] if not (same or whole(spec))]


def values(card: regard.Card, option: str, base: Spec) -> list[Any]:
    """Values to try in the option's place."""
    now = base.options.get(option, card.options[option])
    return [v for v in choices(card, option) if v != now] or guesses(card, option, now)


def how(card: regard.Card, option: str) -> bool:
    """Whether the option says how something is computed or kept, and not what: it changes no number of a row."""
    return card.tries.get(option) is ... or card.options[option] == "auto"


def shows(base: Spec, spec: Spec) -> bool:
    """Whether the second can be run for some causality, and the first can't or gives clearly other numbers."""
    pairs = [(measured(base, causal), measured(spec, causal)) for causal in of(base.name).causalities]
    return any(isinstance(after.get("eval"), list) and differ(before, after) for before, after in pairs)


def builds(base: Spec, spec: Spec) -> bool:
    """Whether the second is built with other tensors than the first."""
    pairs = [(measured(base, causal), measured(spec, causal)) for causal in of(base.name).causalities]
    return any(after["start"] and differ(before, after) for before, after in pairs)


@functools.cache
def _measured(text: str, causal: bool) -> Row:
    return measure(parse(text), causal)


def measured(spec: Spec, causal: bool) -> Row:
    """The same, measured once: the search asks again and again."""
    return _measured(str(spec), causal)


def whole(spec: Spec) -> bool:
    return all(isinstance(measured(spec, causal).get("eval"), list) for causal in of(spec.name).causalities)


def changed(spec: Spec, **options: Any) -> Spec:
    return Spec((Part(spec.name, {**spec.options, **options}),))


def choices(card: regard.Card, option: str) -> list[Any]:
    """What a `Literal` allows."""
    assert card.made is not None
    annotation = card.made.signature.parameters[option].annotation
    return [v for a in (annotation, *typing.get_args(annotation)) if typing.get_origin(a) is Literal
            for v in typing.get_args(a)]  # fmt: skip


def guesses(card: regard.Card, option: str, now: Any) -> list[Any]:
    """Values other than `now`, likely ones first."""
    assert card.made is not None
    kinds = str(card.made.signature.parameters[option].annotation)
    tried = card.tries.get(option, ...)
    found: list[Any] = [] if tried is ... or isinstance(tried, Mapping) else [tried]
    if isinstance(now, bool):
        found.append(not now)
    elif isinstance(now, int):
        found += [now + 1, now - 1, now + 2, 2 * now, now // 2, 3, 2, 1, 0]
    elif isinstance(now, float):
        found += [now / 2, 2 * now, now + 0.25, 0.9, 0.5, 4.0]
    elif isinstance(now, tuple) and not any(isinstance(n, str) for n in now):
        found += [tuple(n + by for n in now) for by in (1, -1)]
    elif "float" in kinds:
        found += [0.5, 2.0]
    elif "int" in kinds:
        found += [8, 5, 6, 12, 3, 2, 1, 24, 48]
    elif now == "auto":
        found.append("eager")
    return [value for value in found if value != now or type(value) is not type(now)]


# --- comparing ----------------------------------------------------------------------------------------------


def differences(got: Row, want: Row) -> list[str]:
    """What the measured row says otherwise than the committed one, each 'what: old -> new'."""
    found = []
    old, new = ({t.rsplit(" ", 2)[0]: t.rsplit(" ", 2)[1:] for t in row["start"]} for row in (want, got))
    for key in [*old, *(new.keys() - old.keys())]:
        if key not in old or key not in new or not _near(*(list(map(float, x[key])) for x in (new, old))):
            found.append(f"{key}: {' '.join(old.get(key, ['none']))} -> {' '.join(new.get(key, ['none']))}")
    for key in ("eval", "train", "defaults"):
        if not _same(got.get(key), want.get(key), want):
            found.append(f"{key}: {want.get(key)} -> {got.get(key)}")
    return found


def differ(one: Row, other: Row) -> bool:
    """Whether two rows say clearly different things, more than noise could."""
    shapes = [[tensor.rsplit(" ", 2)[0] for tensor in row["start"]] for row in (one, other)]
    numbers = (not _same(one.get(key), other.get(key), other, 10 * WITHIN) for key in ("eval", "train"))
    return shapes[0] != shapes[1] or any(numbers)


def _same(got: Any, want: Any, row: Row, within: float = WITHIN) -> bool:
    if isinstance(want, list) and isinstance(got, list):
        return _near(got, want, within)
    if isinstance(want, float) and isinstance(got, float):
        return abs(got - want) <= within * max(abs(want), row["eval"][1])
    return bool(got == want)


def _near(got: list[float], want: list[float], within: float = WITHIN) -> bool:
    """(a number, its size): within the size's fifth digit."""
    return all(abs(g - w) <= within * max(abs(w), want[1]) for g, w in zip(got, want, strict=True))


def idle(name: str, rows: list[Row]) -> list[str]:
    """Options of which no two rows that differ in them alone give different numbers; or choices without a row."""
    card = regard.card(name)
    first = rows[0] | {"start": []}  # the others say only what is new against it
    named = [({**card.options, **parse(row["row"]).options}, row) for row in (first, *rows[1:])]

    def pairs(option: str) -> Iterator[bool]:
        for (one, before), (other, after) in itertools.combinations(named, 2):
            same_but = before["causal"] == after["causal"] and one.keys() == other.keys()
            if same_but and [key for key in one if one[key] != other[key]] == [option]:
                yield differ(before, after)

    found = [o for o in card.options if any(pairs(o)) == how(card, o)]
    given = {option: [one.get(option) for one, _ in named] for option in card.options}
    return found + [f"{o}={v!r}" for o, seen in given.items() for v in choices(card, o) if v not in seen]


# --- the files ----------------------------------------------------------------------------------------------


def file(name: str) -> Path:
    return FOLDER / f"{regard.card(name).family}.json"


def read(path: Path) -> dict[str, list[Row]]:
    """Card -> its rows."""
    found: dict[str, list[Row]] = {}
    for row in json.loads(path.read_text(encoding="utf-8")) if path.exists() else ():
        found.setdefault(parse(row["row"]).name, []).append(row)
    return found


def line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False)


def write(path: Path, cards: Mapping[str, list[Row]]) -> None:
    """A line a row, sorted by card; the defaults first."""
    lines = [line(row) for _, own in sorted(cards.items()) for row in own]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
