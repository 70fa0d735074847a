"""What a training run shows while it goes on, and says of its scores."""

from __future__ import annotations

from typing import Any

from ..train import BothScore, LayerScore, RetentionScore, TrainProgress
from .runs import RunDisplay

_Scores = dict[int, Any]  # of LayerScore, RetentionScore or BothScore
# Seconds over which the speed is estimated: a step of a large model takes a minute.
_SPEED_PERIOD = 3600


class Display(RunDisplay):
    """Show a bar with loss and speed, and a line for each evaluation."""

    def __init__(self) -> None:
        first = "reading the data, first evaluation"
        super().__init__("Training", first, "step", speed_estimate_period=_SPEED_PERIOD)
        self._first: TrainProgress | None = None

    def __call__(self, now: TrainProgress) -> None:
        if self._first is None:
            self._first = now
            self.begin()
        loss = "" if now.loss is None else f"loss {now.loss:.4f}{self._speed(now)}"
        self.show(now.step, now.steps, loss)
        if now.held_out:
            line = f"step {now.step:,}: held out {describe(now.held_out)}{self._speed(now)}"
            self._bar.console.print(line, soft_wrap=True, highlight=False)
        self.stop_if_asked(now.step, now.steps)

    def _speed(self, now: TrainProgress) -> str:
        """Tell the tokens a second of this process, evaluations and all."""
        first = self._first or now
        tokens, seconds = now.tokens - first.tokens, now.seconds - first.seconds
        return f", {tokens / seconds:,.0f} tokens/s" if tokens and seconds > 0 else ""


def describe(scores: _Scores) -> str:
    """Return the mean scores of the layers as one line."""
    first = next(iter(scores.values()))
    if isinstance(first, BothScore):
        parts = (
            {layer: score.indexer for layer, score in scores.items()},
            {layer: score.head for layer, score in scores.items()},
        )
        return "; heads: ".join(map(describe, parts))
    means = [sum(s) / len(scores) for s in zip(*scores.values())]
    if isinstance(first, RetentionScore):
        return "loss {:.4f}, rank agreement at 1/16 {:.3f}, at 1/8 {:.3f}".format(*means)
    text = "loss {:.4f}, recall@K {:.3f}, mass@K {:.3f}, {:.3f} of the teacher's own top-k"
    return text.format(*means[:3], _mean_share(scores))


def worst_layer(scores: _Scores) -> str | None:
    """Return a line about the indexer whose selection misses most, if there are any."""
    if isinstance(next(iter(scores.values())), RetentionScore):
        return None
    share, layer = min((_share(score), layer) for layer, score in scores.items())
    return f"Worst layer: {layer}, mass@K {share:.3f} of the teacher's own top-k"


def _share(score: LayerScore | BothScore) -> float:
    return score.mass / score.best_mass


def _mean_share(scores: _Scores) -> float:
    return sum(map(_share, scores.values())) / len(scores)
