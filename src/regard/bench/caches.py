"""Caches that keep less, in a model that answers questions: what each policy still gets right, at what size and speed.

Every cell is a policy at a budget, asked one task at one length; the full cache, transformers' own, comes first.

The last `held_back` tokens of a prompt, at least one, come after the prompt was read and the cache cut: attention of
a prompt sees all of it, and would hand the first token of an answer to any policy.
"""

import inspect
import json
import math
import re
import statistics
import time
import traceback as tracebacks
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regard.bench.machine import check_device
from regard.bench.process import Stop
from regard.cache import Evicting
from regard.cache.evict import Asked, Scores
from regard.checks import refuse, short, whole
from regard.files import write_atomically
from regard.prompts import asking
from regard.spec import single

Budget = int | float
FULL = "full"
RANDOM = "random"
"""A control, no mechanism: it drops keys by chance."""
TASKS = ("needle", "absence", "variables", "common_words", "frequent_words")
KEPT = "caches.json"


class CachesError(ValueError):
    """A comparison that cannot be made; the message is one line."""


def budgets(text: str) -> tuple[Budget, ...]:
    """Read '10%,0.25,512': shares of the tokens, or numbers of keys."""
    return tuple(_budget(part.strip()) for part in text.split(","))


def _budget(text: str) -> Budget:
    if re.fullmatch(r"\d+", text):
        return int(text)
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)(%?)", text)
    if not match:
        raise CachesError(f"caches: budget cannot be read (got {short(repr(text))}); expected such as 25%, 0.25 or 512")
    return float(match[1]) / (100 if match[2] else 1)


def shown(budget: Budget | None) -> str:
    """0.25 -> '25%', 512 -> '512'."""
    return "" if budget is None else f"{100 * budget:g}%" if isinstance(budget, float) else str(budget)


@dataclass(frozen=True)
class Caches:
    """What to compare, and where to keep it."""

    model: str
    """A causal language model of transformers: a folder or a name."""
    budget: tuple[Budget, ...] = (0.1, 0.25, 0.5)
    """What a head may keep: 25% of the tokens, or 512 keys."""
    policies: tuple[str, ...] = ()
    """Names, with options in brackets: 'snapkv(window=8)'; none = all policies, and 'random' for a control."""
    tasks: tuple[str, ...] = TASKS
    """Kinds of questions, with options in brackets: 'needle(keys=4)'."""
    lengths: tuple[int, ...] = (256,)
    """Tokens of prompt and answer: 1k..4k doubles, 500,1k lists."""
    samples: int = 20
    """Questions of each task at each length."""
    batch: int = 8
    """Questions that are asked at once."""
    held_back: int = 1
    """Tokens of a prompt that come after the cache was cut; as many as the question has hide it from policies."""
    seed: int = 0
    """Of the questions."""
    device: str = "cpu"
    """'cpu', 'cuda' or 'cuda:N'."""
    out: Path = Path("runs/caches")
    """Folder of caches.json and report.html."""

    def __post_init__(self) -> None:
        if not self.policies:
            object.__setattr__(self, "policies", (*cards(), RANDOM))
        try:
            whole("caches", samples=self.samples, batch=self.batch, held_back=self.held_back)
            whole("caches", 0, seed=self.seed)
            for name in ("budget", "policies", "tasks", "lengths"):
                given = getattr(self, name)
                if not given or len(set(given)) < len(given):
                    refuse("caches", name, "are missing or come twice", given, "different ones")
            for length in self.lengths:
                whole("caches", lengths=length)
            for task in self.tasks:
                asking.make(task)
            for name in self.policies:
                for budget in self.budget:
                    policy(name, budget)
        except (ValueError, TypeError) as error:
            raise error if isinstance(error, CachesError) else CachesError(str(error)) from error


@dataclass(frozen=True)
class Cell:
    """One policy at one budget, asked one task at one length."""

    policy: str
    budget: Budget | None
    task: str
    length: int
    status: str = "done"
    """'done', 'failed', or 'left out' where the full cache gets nothing right."""
    values: dict[str, float] = field(default_factory=dict)
    """accuracy, error (the standard error of that mean), bytes (of a question's cache, after the answer), share (of
    the full cache's bytes), tokens_per_second (of decoding), prefill (seconds for a question)."""
    by_depth: dict[str, float] = field(default_factory=dict)
    reason: str = ""
    traceback: str = ""

    @property
    def key(self) -> tuple[str, str, str, int]:
        return self.policy, shown(self.budget), self.task, self.length


class Random(Evicting):
    """Keeps keys by chance, the newest apart: what a policy must beat."""

    def __init__(self, *, budget: Budget) -> None:
        super().__init__(budget=budget)
        self.draw = torch.Generator().manual_seed(0)

    def judge(self, asked: Asked) -> tuple[Scores, None]:
        return torch.rand(asked.positions.shape, generator=self.draw).to(asked.k.device), None


def cards() -> list[str]:
    """All policies of the catalogue."""
    from regard.index import entries

    return [entry["name"] for entry in entries("cache") if entry["protocol"] == "CachePolicy"]


def policy(name: str, budget: Budget) -> Any:
    """The policy at that budget. Raises ValueError where it is none."""
    import regard

    if name == RANDOM:
        return Random(budget=budget)
    plain = single(name, "policy").name
    if plain not in cards():
        from regard.index import unknown

        raise CachesError(unknown("policy", plain, [*cards(), RANDOM], who="caches"))
    return regard.create(name, budget=budget)


class Timed(nn.Module):
    """A model that reads a prompt, then its last tokens, then answers; it notes time and bytes of each call."""

    def __init__(self, model: Any, held_back: int) -> None:
        super().__init__()
        self.model, self.held_back, self.training = model, held_back, model.training
        self.prefill: list[float] = []
        self.rate: list[float] = []
        self.bytes: list[float] = []
        self._warm = False

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
        if not self._warm:  # what is built at a first call is no time of a policy's
            self._warm = True
            self._generate(input_ids[:1], attention_mask[:1], **options)
        out, read, said, held = self._generate(input_ids, attention_mask, **options)
        B = len(input_ids)
        self.prefill.append(read / B)
        self.rate.append(B * (out.shape[1] - input_ids.shape[1]) / said)
        self.bytes += [held / B] * B
        return out

    def _generate(self, ids: Tensor, mask: Tensor, **options: Any) -> tuple[Tensor, float, float, int]:
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        cut = max(1, ids.shape[1] - self.held_back)
        at = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, :cut]
        takes = inspect.signature(self.model.forward).parameters
        last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        start = _now(ids)
        self.model(
            input_ids=ids[:, :cut],
            attention_mask=mask[:, :cut],
            position_ids=at,
            past_key_values=cache,
            use_cache=True,
            **last,
        )
        middle = _now(ids)
        out: Tensor = self.model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **options)
        return out, middle - start, _now(ids) - middle, nbytes(cache)


def _now(z: Tensor) -> float:
    if z.is_cuda:
        torch.cuda.synchronize(z.device)
    return time.perf_counter()


def nbytes(cache: Any) -> int:
    """Bytes of all that a cache of transformers, or what a policy put into it, holds."""
    total = 0
    for layer in cache.layers:
        held = getattr(layer, "nbytes", None)
        if held is None:
            held = sum(z.nbytes for z in (layer.keys, layer.values) if z is not None)
        total += held
    return total


def load(config: Caches) -> tuple[Any, Any]:
    """The model and its tokenizer; no code that comes with them is run."""
    check_device("caches", config.device)
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise ImportError('caches needs transformers: pip install "regard[transformers]"') from error
    from regard.integrations.folder import config_of, fetched, look, pretrained, tokenizer

    path = Path(config.model)
    if not path.is_dir() and (path.is_absolute() or config.model.startswith((".", "~"))):
        raise CachesError(f"caches: model does not exist (got {short(config.model)}); expected a folder, or a name")
    found = look(path if path.is_dir() else fetched(config.model))
    model = pretrained(AutoModelForCausalLM, found, config_of(found))
    return model.eval().to(config.device), tokenizer(found)


def run(
    config: Caches,
    *,
    on_cell: Callable[[Cell], None] = lambda cell: None,
    stop: Stop | None = None,
    loaded: tuple[Any, Any] | None = None,
) -> list[Cell]:
    """Ask all cells, and keep them in caches.json after each one; those kept by the same settings are not asked again.

    A cell that fails says why, and the others go on. Where the full cache gets nothing right, no policy is asked.
    """
    kept = _kept(config)
    with stop or Stop() as watching:
        model, tokenizer = loaded or load(config)
        config.out.mkdir(parents=True, exist_ok=True)
        found: list[Cell] = []
        full: dict[tuple[str, int], Cell] = {}
        for cell in cells(config):
            if watching.number:
                return found
            place = cell.task, cell.length
            if (done := kept.get(cell.key)) is not None and done.status == "done":
                cell = done
            elif cell.policy != FULL and full[place].values.get("accuracy") == 0:
                cell = replace(cell, status="left out", reason="the full cache gets nothing right")
            else:
                cell = _measured(cell, config, model, tokenizer, full.get(place))
            if cell.policy == FULL:
                full[place] = cell
            found.append(cell)
            kept[cell.key] = cell
            save(config, list(kept.values()))
            on_cell(cell)
    return found


def cells(config: Caches) -> Iterator[Cell]:
    """All that is asked, in order: the full cache first at each task and length."""
    for task in config.tasks:
        for length in config.lengths:
            yield Cell(FULL, None, task, length)
            for budget in config.budget:
                for name in config.policies:
                    yield Cell(name, budget, task, length)


def _measured(cell: Cell, config: Caches, model: Any, tokenizer: Any, full: Cell | None) -> Cell:
    import regard

    timed = Timed(model, config.held_back)
    try:
        own = cell.budget is None
        kept: Any = nullcontext() if own else policy(cell.policy, cell.budget or 0)
        with kept if own else regard.swap(model, cache=kept, check=False):
            samples, seed, batch = config.samples, config.seed, config.batch
            scores = asking.score(
                timed, tokenizer, cell.task, length=cell.length, samples=samples, seed=seed, batch=batch
            )
    except Exception as error:  # whatever a policy, a model or a task comes upon is this cell's alone
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        return replace(cell, status="failed", reason=reason, traceback=tracebacks.format_exc())
    marks = [row.mark for row in scores.rows]
    held = statistics.fmean(timed.bytes)
    values = {
        "accuracy": scores.mean,
        "error": statistics.stdev(marks) / math.sqrt(len(marks)) if len(marks) > 1 else 0.0,
        "bytes": held,
        "tokens_per_second": statistics.median(timed.rate),
        "prefill": statistics.median(timed.prefill),
    }
    whole_ = held if full is None else full.values.get("bytes")
    if whole_:
        values["share"] = held / whole_
    return replace(cell, values=values, by_depth=scores.by_depth())


def _settings(config: Caches) -> dict[str, Any]:
    """What all cells of a file have in common."""
    model = str(Path(config.model).resolve()) if Path(config.model).is_dir() else config.model
    return {"model": model} | {n: getattr(config, n) for n in ("samples", "batch", "held_back", "seed", "device")}


def _kept(config: Caches) -> dict[tuple[str, str, str, int], Cell]:
    """What an earlier run left in the folder. Raises CachesError where that was asked otherwise."""
    path = config.out / KEPT
    if not path.exists():
        return {}
    try:
        said: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        settings, found = said["settings"], [Cell(**cell) for cell in said["cells"]]
    except (ValueError, TypeError, KeyError) as error:
        raise CachesError(f"{path}: it cannot be read; give another --out, or remove it") from error
    if other := [name for name, value in _settings(config).items() if settings.get(name) != value]:
        raise CachesError(f"{path}: it was made with another {', '.join(other)}; give another --out, or remove it")
    return {cell.key: cell for cell in found}


def save(config: Caches, found: Sequence[Cell]) -> None:
    """caches.json: the settings and every cell so far."""
    record = {"settings": _settings(config), "cells": [asdict(cell) for cell in found]}
    write_atomically(config.out / KEPT, json.dumps(record, indent=1) + "\n")
