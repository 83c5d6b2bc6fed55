"""The curriculum and the loop that runs it."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import distributed
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from llava.utils import fast_autocast, processor_name

from .data import Batch, Encoder, easy_batches, held_out_batch, picture_batch, word_batch
from .evaluate import evaluate, logits_of, summary
from .model import Learner, answer_loss, patch_loss
from .tokenizer import build_tokenizer

PATCH_LOSS_WEIGHT = 0.3
NAMING_WEIGHTS = {"pointing": 0.2, "reading": 0.6}  # of the losses on what a question names
AVERAGING = 0.98  # of the averaged weights, what stays at every step


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum.

    `kind` is `tower` (patch labels only), `language` (scenes in words), `align` (pictures, only the projector
    learns) or `joint` (everything learns). The learning rate warms up, stays, and falls linearly to zero over
    the share `decay` of the steps.
    """

    kind: str
    steps: int
    size: int
    rate: float
    decay: float = 0.6
    easy: float = 0.1


CURRICULA: dict[str, tuple[Stage, ...]] = {
    "full": (
        Stage("tower", 320, 64, 3e-3),
        Stage("language", 240, 32, 2.5e-3, decay=0.4),
        Stage("align", 40, 32, 3e-3, decay=0.3),
        Stage("joint", 2600, 16, 2e-3, decay=0.8),
    ),
    "scratch": (
        Stage("tower", 320, 64, 3e-3),
        Stage("joint", 2600, 16, 2e-3, decay=0.8),
    ),
    "smoke": (Stage("tower", 40, 16, 3e-3, easy=1.0), Stage("joint", 60, 8, 3e-3, easy=1.0)),
}


class Run:
    """A training run in a folder: checkpoint, log and held-out accuracy as it goes."""

    def __init__(
        self,
        folder: Path,
        stages: tuple[Stage, ...],
        seed: int = 0,
        device: torch.device | None = None,
        fast: bool = False,
    ) -> None:
        self.folder, self.stages, self.seed, self.device = folder, stages, seed, device or torch.device("cpu")
        folder.mkdir(parents=True, exist_ok=True)
        self.rank, self.workers = 0, 1
        if distributed.is_initialized():
            self.rank, self.workers = distributed.get_rank(), distributed.get_world_size()
        torch.manual_seed(seed)
        self.tokenizer = build_tokenizer()
        self.encoder = Encoder(self.tokenizer)
        self.learner = Learner(len(self.tokenizer)).to(self.device)
        self.before = torch.tensor(self.encoder.before, device=self.device)
        self.averaged = self._average_of()
        if fast:
            self.learner.compile()
            self.averaged.module.compile()
        self.stage = self.step = 0
        self.seconds = 0.0
        self.began = time.monotonic()
        self.resumed = self._resume()

    def _average_of(self) -> AveragedModel:
        """The weights averaged over the last steps: what is measured and exported, at any learning rate."""
        return AveragedModel(self.learner, multi_avg_fn=get_ema_multi_avg_fn(AVERAGING)).requires_grad_(False)

    # --- what is written down ---

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def log(self, **entry: object) -> None:
        """One JSON line to `log.jsonl`, and the same for people to the screen."""
        if self.rank:
            return
        entry = {"seconds": round(self.elapsed), **entry}
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")
        print("  ".join(f"{key} {value}" for key, value in entry.items()), flush=True)

    @property
    def elapsed(self) -> float:
        """Seconds spent on this run, those before an interruption included."""
        return self.seconds + time.monotonic() - self.began

    def save(self, optimizers: list[torch.optim.Optimizer]) -> None:
        """Write the checkpoint beside the old one, then replace it."""
        if self.rank:
            return
        state = {
            "weights": self.learner.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "stage": self.stage,
            "step": self.step,
            "seconds": self.elapsed,
        }
        beside = self._checkpoint.with_suffix(".new")
        torch.save(state, beside)
        os.replace(beside, self._checkpoint)

    def _resume(self) -> list[dict] | None:
        if not self._checkpoint.exists():
            return None
        state = torch.load(self._checkpoint, map_location=self.device, weights_only=True)
        self.learner.load_state_dict(state["weights"])
        self.averaged.load_state_dict(state["averaged"])
        self.stage, self.step, self.seconds = state["stage"], state["step"], state["seconds"]
        return state["optimizers"] if self.step else None

    # --- training ---

    def run(self, every: float = 120.0) -> None:
        """Go through the stages from where the checkpoint is; evaluate and save every so many seconds."""
        while self.stage < len(self.stages):
            self._run_stage(self.stages[self.stage], every)
            self.stage, self.step = self.stage + 1, 0
            self.save([])

    def _batch(self, stage: Stage) -> Batch:
        rng = random.Random(f"training/{self.seed}/{self.stage}/{self.step}/{self.rank}")
        size = stage.size // self.workers
        if stage.kind == "language":
            return word_batch(self.encoder, rng, size)
        return picture_batch(self.encoder, rng, size, stage.easy, ask=stage.kind != "tower")

    def _optimizers(self, stage: Stage) -> list[torch.optim.Optimizer]:
        llava = self.learner.llava
        learning = {
            "tower": [*llava.get_vision_tower().parameters(), *self.learner.heads.parameters()],
            "language": [
                *llava.model.layers.parameters(),
                *llava.model.norm.parameters(),
                *llava.model.embed_tokens.parameters(),
                *llava.lm_head.parameters(),
                *self.learner.readers.parameters(),
            ],
            "align": list(llava.model.mm_projector.parameters()),
            "joint": list(self.learner.parameters()),
        }[stage.kind]
        chosen = {id(parameter) for parameter in learning}
        hidden, other = [], []
        for name, parameter in self.learner.named_parameters():
            parameter.requires_grad_(id(parameter) in chosen)
            if id(parameter) in chosen:
                matrix = parameter.ndim == 2 and ".layers." in name
                (hidden if matrix else other).append(parameter)
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(other, lr=stage.rate * 0.5, betas=(0.9, 0.98), weight_decay=0.01)
        ]
        if hidden:
            optimizers.append(
                torch.optim.Muon(hidden, lr=stage.rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
            )
        return optimizers

    def _share(self, stage: Stage) -> float:
        warm = min(1.0, (self.step + 1) / 40)
        return min(warm, max(0.0, (stage.steps - self.step) / (stage.decay * stage.steps)))

    def _loss(self, stage: Stage, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        with fast_autocast(self.device):
            if stage.kind == "tower":
                loss = patch_loss(self.learner.patch_logits(self.learner.features(batch.pixels)), batch.labels)
                return loss, {"patch": loss.detach()}
            logits, patches, naming = logits_of(self.learner, self.before, batch)
        loss = answer_loss(logits, batch.targets)
        parts = {"answer": loss.detach()}
        if patches is not None and stage.kind == "joint":
            labels = patch_loss(patches, batch.labels)
            parts["patch"] = labels.detach()
            loss = loss + PATCH_LOSS_WEIGHT * labels
        for name, value in naming.items():
            parts[name] = value.detach()
            loss = loss + NAMING_WEIGHTS[name] * value
        return loss, parts

    def _average(self, gradients: list[torch.Tensor]) -> None:
        if self.workers == 1:
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(flat)
        sizes = [gradient.numel() for gradient in gradients]
        for gradient, mean in zip(gradients, (flat / self.workers).split(sizes), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def _run_stage(self, stage: Stage, every: float) -> None:
        hardware = {"workers": self.workers, "threads": torch.get_num_threads(), "machine": machine()}
        self.log(stage=self.stage, **asdict(stage), **hardware, torch=torch.__version__)
        optimizers = self._optimizers(stage)
        if self.resumed:
            for optimizer, state in zip(optimizers, self.resumed, strict=True):
                optimizer.load_state_dict(state)
        self.resumed = None
        rates = [group["lr"] for group in (optimizer.param_groups[0] for optimizer in optimizers)]
        rates = [stage.rate * 0.5, stage.rate][: len(rates)]
        seen: dict[str, list[torch.Tensor]] = {}
        spoken = time.monotonic()
        while self.step < stage.steps:
            batch = self._batch(stage).to(self.device)
            share = self._share(stage)
            for optimizer, rate in zip(optimizers, rates, strict=True):
                optimizer.param_groups[0]["lr"] = rate * share
            loss, parts = self._loss(stage, batch)
            loss.backward()
            learned = [parameter for parameter in self.learner.parameters() if parameter.grad is not None]
            self._average([parameter.grad for parameter in learned])
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            self.averaged.update_parameters(self.learner)
            self.step += 1
            for name, value in parts.items():
                seen.setdefault(name, []).append(value)
            if self.step % 20 == 0:
                means = {name: round(torch.stack(values).mean().item(), 4) for name, values in seen.items()}
                self.log(kind=stage.kind, step=self.step, pictures=self.step * stage.size, **means)
                seen = {}
            if time.monotonic() - spoken > every or self.step == stage.steps:
                self.save(optimizers)
                if stage.kind in ("align", "joint") and self.rank == 0:
                    self.report(4)
                spoken = time.monotonic()

    def report(self, batches: int, measure: Callable[..., dict[str, tuple[int, int]]] = evaluate) -> dict:
        """Held-out accuracy so far, to the log: `batches` × 32 rendered pictures and part of easy-VQA's test."""
        drawn = (held_out_batch(self.encoder, 32 * k, 32) for k in range(batches))
        learner = self.averaged.module
        results = measure(learner, self.before, drawn)
        easy = easy_batches(self.encoder, "test", 32, limit=32 * batches)
        results |= measure(learner, self.before, easy)
        self.log(step=self.step, accuracy=summary(results))
        return results


def machine() -> str:
    """The processor's name and its cores, or the GPU's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{processor_name()}, {os.cpu_count()} cores"


def effort(log: Path) -> tuple[int, int]:
    """Pictures (and scenes in words) that a run's log says were seen, and its minutes."""
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    seen: dict[str, int] = {}
    for entry in entries:
        if "pictures" in entry:
            seen[entry["kind"]] = max(seen.get(entry["kind"], 0), entry["pictures"])
    return sum(seen.values()), round(max(entry["seconds"] for entry in entries) / 60)
