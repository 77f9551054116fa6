"""The small language model of models/small: a Llama of three layers on bytes that copies, recalls and knows some text.

    python tools/small_model.py train        writes models/small anew; the folder's README says how long that took
    python tools/small_model.py check        what it can do, and what each of its heads does

Caches, audits and reports of heads show nothing on random weights. This model is small enough to stand in the
repository (under 2 MB), and does what they look for: it continues strings that come again (induction), and names the
value of a key that stood far back (retrieval).
"""

import argparse
import math
import time
from pathlib import Path

import torch
from jaxtyping import Int
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy

import regard
from regard.tasks import text

HOME = Path(__file__).resolve().parents[1] / "models" / "small"
LENGTH, BOS, IGNORED = 256, 256, -100
LETTERS = torch.tensor([*range(ord("a"), ord("z") + 1)])
PRINTABLE = torch.tensor([*range(ord("!"), ord("~") + 1)])
STAGES = ((0.3, 64), (0.6, 128), (1.0, LENGTH))
"""Up to which share of the steps rows are so long. Short ones first: what they need is found much sooner."""
SHARES = (4, 3, 2)
"""Rows of copies, of recall and of text in a batch, at the full length; of shorter ones as many as have its tokens."""


def copies(rows: int, draw: torch.Generator, length: int = LENGTH) -> tuple[Int[Tensor, "N T"], Int[Tensor, "N T"]]:
    """A string of printable bytes, a line break, and both again until the row is full. Labels: all but the first time.

    <s> s1 s2 ... sn \\n s1 s2 ... sn \\n s1 ...           n from 4 to half the row
    """
    tokens = torch.full((rows, length), BOS)
    labels = torch.full((rows, length), IGNORED)
    for row in range(rows):
        n = int(torch.randint(4, length // 2, (1,), generator=draw))
        among = PRINTABLE[
            torch.randperm(len(PRINTABLE), generator=draw)[: int(torch.randint(8, 95, (1,), generator=draw))]
        ]
        string = among[torch.randint(len(among), (n,), generator=draw)]
        once = torch.cat((string, torch.tensor([ord("\n")])))
        tokens[row, 1:] = once.repeat(math.ceil(length / len(once)))[: length - 1]
        labels[row, 1 + len(once) :] = tokens[row, 1 + len(once) :]
    return tokens, labels


def recalls(
    rows: int, draw: torch.Generator, length: int = LENGTH, pairs: int | None = None
) -> tuple[Int[Tensor, "N T"], Int[Tensor, "N T"]]:
    """Lines `ab=xy`, keys and values of two letters, then some of these again. Labels: the values that come again.

    `pairs` of them are said first, by default a number drawn for each row, up to half of what it holds.
    """
    lines = (length - 1) // 6
    tokens = torch.full((rows, length), BOS)
    labels = torch.full((rows, length), IGNORED)
    for row in range(rows):
        n = pairs or int(torch.randint(1, lines // 2 + 1, (1,), generator=draw))
        keys = torch.randperm(26 * 26, generator=draw)[:n]
        values = torch.randint(26 * 26, (n,), generator=draw)
        order = torch.cat((torch.arange(n), torch.randint(n, (lines - n,), generator=draw)))
        k, v = keys[order], values[order]
        line = torch.stack(
            (LETTERS[k // 26], LETTERS[k % 26], torch.full_like(k, ord("=")), LETTERS[v // 26], LETTERS[v % 26]), 1
        )
        line = torch.cat((line, torch.full((lines, 1), ord("\n"))), 1)
        tokens[row, 1 : 1 + line.numel()] = line.flatten()
        asked = line.clone().fill_(IGNORED)
        asked[n:, 3:5] = line[n:, 3:5]
        labels[row, 1 : 1 + line.numel()] = asked.flatten()
    return tokens, labels


def passages(windows: Int[Tensor, "N T+1"]) -> tuple[Int[Tensor, "N T"], Int[Tensor, "N T"]]:
    """Text behind the mark of the beginning. Labels: all of it."""
    tokens = torch.cat((torch.full((len(windows), 1), BOS), windows[:, :-2]), 1)
    return tokens, tokens.masked_fill(tokens == BOS, IGNORED)


def fresh(seed: int) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=257,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=BOS,
            eos_token_id=BOS,
            pad_token_id=BOS,
            initializer_range=0.05,
        )
    )


def tokenizer():
    """Bytes: the id of each is the byte itself, and 256 marks the beginning."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    made = Tokenizer(models.BPE({**{c: b for b, c in bytes_to_unicode().items()}, "<s>": BOS}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="<s>", pad_token="<s>", clean_up_tokenization_spaces=False
    )


def train(steps: int, rate: float, seed: int, out: Path) -> None:
    torch.set_num_threads(1)  # twice as fast as two, at this size
    draw, model = torch.Generator().manual_seed(seed), fresh(seed)
    source = text.load(length=LENGTH)
    windows = {length: source.batches(SHARES[2] * LENGTH // length, length, seed) for _, length in STAGES}
    # Matrices alone decay, as is usual.
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.05)
    begun = time.perf_counter()
    for step in track(range(1, steps + 1), "training"):
        length = next(length for share, length in STAGES if step <= share * steps)
        rows = [share * LENGTH // length for share in SHARES]
        parts = (copies(rows[0], draw, length), recalls(rows[1], draw, length), passages(next(windows[length])))
        logits = model(input_ids=torch.cat([tokens for tokens, _ in parts])).logits.split(rows)
        losses = [
            cross_entropy(guess[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
            for guess, (_, labels) in zip(logits, parts)
        ]
        torch.stack(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            said = " ".join(f"{name} {loss.item():.3f}" for name, loss in zip(("copies", "recall", "text"), losses))
            print(f"{step:>6} {said} {time.perf_counter() - begun:.0f} s", flush=True)
        if step % 500 == 0:
            model.save_pretrained(out)
    tokenizer().save_pretrained(out)


def skills(model: torch.nn.Module, rows: int = 64, seed: int = 1) -> dict[str, float]:
    """Shares of right guesses on strings and pairs that were not trained on, and bits a byte of held-out text."""
    draw = torch.Generator().manual_seed(seed)
    half = (LENGTH - 1) // 2
    string = PRINTABLE[torch.randint(len(PRINTABLE), (rows, half), generator=draw)]
    twice = torch.cat((torch.full((rows, 1), BOS), string, string), 1)
    found = {"induction": _right(model, twice, twice.clone().index_fill_(1, torch.arange(half + 2), IGNORED))}
    found["copies"] = _right(model, *copies(rows, draw))
    for pairs in (2, 8, 16):
        found[f"recall of {pairs}"] = _right(model, *recalls(rows, draw, pairs=pairs))
    tokens, labels = passages(text.load(length=LENGTH).heldout_windows(LENGTH, rows * LENGTH))
    with torch.no_grad():
        found["bits a byte of text"] = model(input_ids=tokens, labels=labels).loss.item() / math.log(2)
    return found


@torch.no_grad()
def _right(model: torch.nn.Module, tokens: Tensor, labels: Tensor) -> float:
    guess, want = model(tokens).logits[:, :-1].argmax(-1), labels[:, 1:]
    return (guess == want)[want != IGNORED].double().mean().item()


def heads(model: torch.nn.Module, rows: int = 16, seed: int = 2) -> dict[str, Tensor]:
    """On strings of every printable byte that come twice, for each layer and head: the weight on the token before, on
    what followed the present one the first time (induction), and on the present one's first place (duplicate). (L, H)
    """
    draw = torch.Generator().manual_seed(seed)
    half = len(PRINTABLE)
    string = PRINTABLE[torch.stack([torch.randperm(half, generator=draw) for _ in range(rows)])]
    tokens = torch.cat((torch.full((rows, 1), BOS), string, string), 1)
    maps = torch.stack([weights.mean(0) for weights in regard.trace(model, tokens).maps()])
    return {
        name: maps.diagonal(back, -2, -1)[..., -half + 1 :].mean(-1)
        for name, back in (("previous", -1), ("induction", 1 - half), ("duplicate", -half))
    }


def check(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True).eval()
    console, found = Console(highlight=False), heads(model)
    for name, value in skills(model).items():
        console.print(f"{name:<20} {value:.3f}")
    table = Table("layer", "head", *found)
    for layer, head in torch.cartesian_prod(*map(torch.arange, found["previous"].shape)).tolist():
        table.add_row(str(layer), str(head), *(f"{share[layer, head]:.2f}" for share in found.values()))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "check"))
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HOME)
    asked = parser.parse_args()
    if asked.what == "train":
        train(asked.steps, asked.rate, asked.seed, asked.out)
    check(asked.out)


if __name__ == "__main__":
    main()
