"""The state of a run: in memory, and as one checkpoint file that is whole or absent."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from ..families import family_of
from ..files import is_dropping, is_part, replacing

CHECKPOINT = "checkpoint.safetensors"
FINISHED = "indexers.safetensors"


class TrainState:
    """Modules in training, their optimizer, and the best of each layer so far.

    Args:
        modules (dict): Layer number to the module that is trained beside it, in
          float32.
        config: The run: a :class:`TrainConfig` or :class:`RetentionConfig`.
        score_type: What the held-out scores of a layer are: a named tuple with a
          ``loss``.
    """

    def __init__(self, modules: dict[int, Any], config: Any, score_type: type):
        self.step = 0
        self.tokens = 0
        self.modules = modules
        self.score_type = score_type
        self.optimizer = optim.AdamW(
            learning_rate=config.learning_rate,
            betas=[0.9, 0.99],
            weight_decay=config.weight_decay,
            bias_correction=True,
        )
        self.optimizer.init(self.parameters())
        self.best = {layer: module.parameters() for layer, module in modules.items()}
        self.best_steps: dict[int, Any] = dict.fromkeys(modules, 0)
        self.best_scores: dict[int, Any] = {}
        mx.eval(self.best)

    def parameters(self) -> dict:
        """Return the parameters of all modules."""
        return {"layers": [module.parameters() for module in self.modules.values()]}

    def apply_gradients(self, gradients: list[dict], learning_rate: float):
        """Take one optimizer step with the gradients of all layers."""
        self.optimizer.learning_rate = learning_rate
        updated = self.optimizer.apply_gradients({"layers": gradients}, self.parameters())
        self._update(updated["layers"])
        mx.eval(updated, self.optimizer.state)

    def keep_best(self, scores: dict[int, Any]):
        """Remember the weights of every layer whose held-out loss is its lowest."""
        for layer, score in scores.items():
            best = self.best_scores.get(layer)
            if best is None or score.loss < best.loss:
                self.best_scores[layer] = score
                self.best_steps[layer] = self.step
                self.best[layer] = self.modules[layer].parameters()

    def best_modules(self) -> dict[int, Any]:
        """Return the modules with each layer's best weights."""
        self._update(list(self.best.values()))
        return self.modules

    def save(self, out: Path, identity: dict):
        """Write the checkpoint: the old one or the new one is there, never half of one."""
        arrays = {
            "modules": self.parameters(),
            "optimizer": self.optimizer.state,
            "best": list(self.best.values()),
        }
        meta = {
            "identity": identity,
            "step": self.step,
            "tokens": self.tokens,
            "best_steps": self.best_steps,
            "best_scores": self.best_scores,
        }
        out.mkdir(parents=True, exist_ok=True)
        flat = tree_flatten(arrays, destination={})
        with replacing(out / CHECKPOINT) as part:
            mx.save_safetensors(str(part), flat, {"run": json.dumps(meta)})

    def load(self, out: Path, identity: dict):
        """Take up the checkpoint in ``out``.

        Raises:
            ValueError: If it is damaged, or of a run with another identity.
        """
        file = out / CHECKPOINT
        try:
            loaded: Any = mx.load(str(file), return_metadata=True)  # of its forms, a pair
            arrays, meta = loaded
            meta = json.loads(meta["run"])
            mx.eval(arrays)  # loading is lazy: a short file shows only here
        except (RuntimeError, KeyError, ValueError) as error:
            raise ValueError(f"[train] {file} is not a checkpoint of this program ({error}).") from None
        there = meta["identity"]
        # What only one of them has differs too: a run of indexers alone and one of both.
        for name in {**identity, **there}:
            if there.get(name) != identity.get(name):
                raise ValueError(
                    f"[train] {out} holds a run with another {name}: "
                    f"{_difference(there.get(name), identity.get(name))}. Choose another "
                    f"folder, or resume with what that run began with."
                )
        tree = tree_unflatten(list(arrays.items()))
        self.optimizer.state = tree["optimizer"]
        self._update(tree["modules"]["layers"])
        self.best = dict(zip(self.modules, tree["best"]))
        self.step, self.tokens = meta["step"], meta["tokens"]
        self.best_steps = {int(k): v for k, v in meta["best_steps"].items()}
        self.best_scores = {int(k): self.score_type(*v) for k, v in meta["best_scores"].items()}

    def _update(self, parameters: list[dict]):
        for module, tree in zip(self.modules.values(), parameters):
            module.update(tree)


def run_identity(model: Any, data_hash: str, config: Any) -> dict:
    """Return what must be equal for a run to be the same run."""
    layers = family_of(model).layers(model)
    ends = {i: layers[i].module.k_proj for i in (min(layers), max(layers))}
    return {
        "model": hash_parameters(ends),
        "data": data_hash[:16],
        "config": dataclasses.asdict(config),
    }


def hash_parameters(modules: Mapping[int, nn.Module]) -> str:
    """Return a hash of all parameters, as 16 hex digits."""
    digest = hashlib.sha256()
    for layer, module in modules.items():
        for name, weight in sorted(tree_flatten(module.parameters())):
            digest.update(f"{layer}.{name}".encode())
            digest.update(bytes(memoryview(weight.view(mx.uint8))))
    return digest.hexdigest()[:16]


def check_out(out: Path, resume: bool):
    """Raise a ValueError if a run in ``out`` would overwrite something."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"[train] 'out' must be a folder but {out} is a file.")
    there = sorted(p.name for p in out.iterdir()) if out.is_dir() else []
    found = [name for name in there if not (is_part(name) or is_dropping(name))]
    if CHECKPOINT in found:
        if not resume:
            raise ValueError(f"[train] {out} holds an unfinished run. Go on with 'resume', or choose another folder.")
    elif FINISHED in found:
        raise ValueError(f"[train] {out} holds finished indexers. Choose another folder.")
    elif found:
        raise ValueError(f"[train] {out} must be a new or empty folder but it holds {found[0]}. Choose another.")


def _difference(old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        name = next(k for k in {**old, **new} if old.get(k) != new.get(k))
        return f"{name} is {old.get(name)} there and {new.get(name)} here"
    old, new = ("set" if isinstance(x, dict) else x for x in (old, new))
    return f"{old} there and {new} here"
