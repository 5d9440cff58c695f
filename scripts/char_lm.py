"""A character language model on Tiny Shakespeare: a small GPT, and an LSTM beside it.

Both are trained for the same number of steps on the same batches, measured on the whole last tenth
of the text, and made to write. Training may be stopped at any time: the same command with
``--resume`` goes on from the last checkpoint and ends with the same numbers. Run it with
``uv run scripts/char_lm.py``; ``--help`` lists the flags.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from einops import rearrange
from rich.console import Console
from rich.table import Table
from tensordict import TensorDict
from torch import Tensor

import funcnets
from funcnets import Model, models, optim, random, training, tree
from funcnets.generation import generate

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


class Text(NamedTuple):
    """A text as numbers: the first nine tenths and the last."""

    characters: list[str]
    train: Tensor
    validation: Tensor

    def encode(self, text: str) -> Tensor:
        """The numbers of the characters; an unknown one is a ValueError."""
        unknown = sorted(set(text) - set(self.characters))
        if unknown:
            raise ValueError(f"prompt: expected characters of the text, got {''.join(unknown)!r}")
        return torch.tensor([self.characters.index(character) for character in text])

    def decode(self, tokens: Tensor) -> str:
        """The characters of the numbers."""
        return "".join(self.characters[token] for token in tokens.tolist())


def read_text(path: Path | None, output: Path) -> Text:
    """The text of a file; by default Tiny Shakespeare, which is downloaded once."""
    if path is None:
        path = output / "tinyshakespeare.txt"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL, str(path))
    text = path.read_text(encoding="utf-8")
    characters = sorted(set(text))
    place = {character: i for i, character in enumerate(characters)}
    tokens = torch.tensor([place[character] for character in text])
    first = int(0.9 * len(tokens))
    return Text(characters, tokens[:first], tokens[first:])


def with_neighbours(model: Model, taps: Sequence[str], back: int = 3) -> Model:
    """A GPT that is told at once what attention would have to find out: which places come before.

    The embedding gets a vector of its own for each pair of a character and the one before it. What
    flows at the taps gets learned shares of the three places before it: token shift, as in RWKV
    (Peng et al. 2023). Both begin at zero, and are added from outside, by the taps.
    """
    size, width = model.config.vocabulary, model.config.width
    names = [tap.replace(".", "_") for tap in taps]

    def init(key: random.Key) -> TensorDict:
        shares = TensorDict({name: torch.zeros(back, width) for name in names})
        pairs = torch.zeros(size**2, width)
        return TensorDict({"gpt": model.init(key), "pairs": pairs, "shift": shares})

    def shift(shares: Tensor, x: Tensor) -> Tensor:
        time = x.shape[-2]
        before = (F.pad(x, (0, 0, i + 1, 0))[..., :time, :] for i in range(back))
        return x + sum(share * past for share, past in zip(shares, before, strict=True))

    def apply(params: TensorDict, tokens: Tensor) -> Tensor:
        before = F.pad(tokens, (1, 0))[..., :-1]
        pairs = F.embedding(size * before + tokens, params["pairs"])
        shares = {tap: params["shift", name] for tap, name in zip(taps, names, strict=True)}
        replaced: dict[str, Callable[[Tensor], Tensor]]
        replaced = {tap: partial(shift, share) for tap, share in shares.items()}
        replaced["embedding"] = lambda x: shift(shares["embedding"], x + pairs)
        outputs, _ = model.apply(params["gpt"], tokens, taps=replaced)
        return outputs

    return Model(init, apply)


def make_gpt(characters: int, flags: argparse.Namespace) -> tuple[Model, optim.Optimizer]:
    """The GPT, and Muon for its matrices, Adam for the rest."""
    model = models.gpt(
        characters,
        flags.context,
        width=flags.width,
        depth=flags.depth,
        heads=flags.heads,
        positions="rotary",
        rotary_base=200.0,
        norm="rms",
        activation="squared_relu",
        normalize=True,
        bias=False,
        tied=False,
        zero_init=True,
    )

    def hidden(path: tuple[str, ...], leaf: Tensor) -> bool:
        return path[:2] == ("gpt", "layers") and leaf.ndim == 2

    # The embedding, and what all layers but the last give.
    shifted = ["embedding", *(f"layers.{i}" for i in range(flags.depth - 1))]
    return with_neighbours(model, shifted), optim.by_path(
        {hidden: optim.muon(rate(0.03, flags.steps), weight_decay=0.0)},
        default=optim.adam(rate(8e-3, flags.steps), betas=(0.9, 0.95)),
    )


def make_lstm(characters: int, flags: argparse.Namespace) -> tuple[Model, optim.Optimizer]:
    """An LSTM of about as many parameters, and AdamW."""
    model = models.recurrent(
        flags.width,
        characters,
        hidden_size=2 * flags.width,
        num_layers=2,
        cell="lstm",
        output="each",
        num_embeddings=characters,
        orthogonal=True,
        forget_bias=1.0,
    )
    adamw = optim.adamw(rate(5e-3, flags.steps), weight_decay=0.01)
    return model, optim.chain(optim.clip_by_global_norm(1.0), adamw)


NETWORKS = {"gpt": make_gpt, "lstm": make_lstm}


def rate(peak: float, steps: int) -> optim.schedules.Schedule:
    """A linear warm-up, then a straight line to zero."""
    first = min(100, steps // 2)
    return optim.schedules.warmup(optim.schedules.polynomial(peak, steps - first), first)


def starts(key: random.Key, length: int, context: int, count: int) -> Tensor:
    """Where the windows of training begin, [count]: epoch by epoch all of the text, in new orders.

    Each epoch cuts the text at other places.
    """
    whole = (length - 1) // context - 1
    if whole < 1:
        raise ValueError(f"text: expected at least {2 * context + 1} characters, got {length}")

    def epoch(key: random.Key) -> Tensor:
        order_key, offset_key = random.split(key)
        return context * random.permutation(order_key, whole) + random.randint(
            offset_key, (), 0, context
        )

    return torch.cat([epoch(random.fold_in(key, i)) for i in range(-(-count // whole))])[:count]


def loss(params: TensorDict, model: Model, text: Tensor) -> Tensor:
    """The mean cross-entropy, in nats, of each character of [batch, time] from those before it."""
    logits = model.apply(params, text[:, :-1])
    return F.cross_entropy(rearrange(logits, "b t c -> (b t) c"), text[:, 1:].flatten())


def evaluate(params: TensorDict, model: Model, tokens: Tensor, context: int) -> float:
    """`loss` over all whole windows of a text, one after the other."""
    text = tokens.unfold(0, context + 1, context)
    with torch.no_grad():
        parts = [loss(params, model, part).item() * len(part) for part in text.split(256)]
    return math.fsum(parts) / len(text)


def train(
    name: str, text: Text, flags: argparse.Namespace, key: random.Key
) -> tuple[Model, TensorDict, list[dict[str, Any]]]:
    """The model, its parameters, and the history: also ``losses``, of each step since the last."""
    model, optimizer = NETWORKS[name](len(text.characters), flags)
    init_key, data_key = random.split(key)
    places = starts(data_key, len(text.train), flags.context, flags.steps * flags.batch)
    windows = text.train.unfold(0, flags.context + 1, 1)

    def objective(params: TensorDict, batch: Tensor, key: random.Key) -> tuple[Tensor, Any, Any]:
        return loss(params, model, batch), {}, TensorDict({})

    step = training.make_step(None, objective, optimizer, nonfinite=None)
    state = step.init(model.init(init_key), data_key)
    checkpoints = training.Checkpoints(flags.output / f"{name}_checkpoints", keep=1)
    flags_told = ("steps", "batch", "context", "width", "depth", "heads", "seed")
    told = {flag: getattr(flags, flag) for flag in flags_told}
    if flags.resume and checkpoints.steps():
        held = checkpoints.restore(state)[1]["history"][-1]["flags"]
        if held != told:
            raise ValueError(f"{checkpoints.folder}: expected a checkpoint of {told}, got {held}")

    losses: list[Tensor] = []

    def counted(state: training.State, batch: Tensor) -> tuple[training.State, dict[str, Tensor]]:
        state, metrics = step(state, batch)
        losses.append(metrics["loss"])
        return state, metrics

    def note(state: training.State, record: dict[str, Any]) -> None:
        record |= {"losses": torch.stack(losses).tolist(), "flags": told}
        losses.clear()

    state, history = training.fit(
        counted,
        state,
        training.Epoch(windows, places.split(flags.batch)),
        steps=flags.steps,
        every=flags.every,
        evaluate=lambda state: {
            "loss": evaluate(training.parameters(state), model, text.validation, flags.context)
        },
        checkpoints=checkpoints,
        resume=flags.resume,
        callbacks=[note],
    )
    return model, training.parameters(state), history


def write(params: TensorDict, model: Model, text: Text, flags: argparse.Namespace) -> str:
    """A text that the network continues from the prompt."""
    prompt = text.encode(flags.prompt)[None]
    with torch.no_grad():
        generated = generate(
            random.key(flags.seed),
            partial(model.apply, params),
            prompt,
            flags.characters,
            window=flags.context,
            temperature=flags.temperature,
        )
    return text.decode(generated.tokens[0])


def draw(path: Path, histories: dict[str, list[dict[str, Any]]]) -> None:
    """The loss in training, smoothed, and in validation."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for i, (name, history) in enumerate(histories.items()):
        losses = torch.tensor([loss for record in history for loss in record["losses"]])
        width = max(1, len(losses) // 40)
        smooth = F.avg_pool1d(losses[None], width, 1)[0]
        steps = torch.arange(len(smooth)) + width
        axes.plot(steps, smooth, color=f"C{i}", lw=1, label=f"{name}, training")
        at = [record["step"] for record in history]
        found = [record["evaluation"]["loss"] for record in history]
        axes.plot(at, found, "o--", color=f"C{i}", label=f"{name}, validation")
    axes.set(xlabel="step", ylabel="nats per character", ylim=(None, 2.6))
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Trains, measures, writes and draws."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--data", type=Path, help="a text file; by default Tiny Shakespeare")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--context", type=int, default=64, help="characters seen at once")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4, help="of the GPT")
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--every", type=int, default=500, help="steps between checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--prompt", default="ROMEO:\n", help="what the networks continue")
    parser.add_argument("--characters", type=int, default=400, help="to be written")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/char_lm"))
    flags = parser.parse_args()
    console = Console()
    text = read_text(flags.data, flags.output)
    flags.output.mkdir(parents=True, exist_ok=True)

    table = Table(title=f"loss on the last tenth after {flags.steps} steps")
    for column in ("", "parameters", "nats per character", "bits", "seconds", "characters / s"):
        table.add_column(column, justify="left" if not column else "right")
    histories, texts = {}, {}
    for name in flags.networks:
        model, params, histories[name] = train(name, text, flags, random.key(flags.seed))
        texts[name] = write(params, model, text, flags)
        funcnets.save(flags.output / f"{name}.safetensors", params, model)
        last = histories[name][-1]
        found, seconds = last["evaluation"]["loss"], last["seconds"]
        seen = flags.steps * flags.batch * flags.context
        count = tree.count(params)
        table.add_row(
            name,
            f"{count:,}",
            f"{found:.4f}",
            f"{found / math.log(2):.3f}",
            f"{seconds:.0f}",
            f"{seen / seconds:,.0f}",
        )
    console.print(table)
    for name, written in texts.items():
        console.rule(name)
        console.print(written, markup=False, highlight=False)
    draw(flags.output / "losses.png", histories)


if __name__ == "__main__":
    main()
