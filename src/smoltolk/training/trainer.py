"""The training run of a recipe: stages, steps, validation, checkpoints, metrics."""

import json
import shutil
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import AutoTokenizer

from smoltolk.data.dataset import TASKS, Batch, BatchSource, TaskMixture
from smoltolk.data.store import Store, lock
from smoltolk.data.text import tokenizer_fingerprint
from smoltolk.model.configuration_smoltolk import SmolTolkConfig
from smoltolk.model.modeling_smoltolk import SmolTolkForCausalLM
from smoltolk.speech.kinds import load_speech_tokenizer, load_vocoder
from smoltolk.training.checkpoints import Checkpointer, RunState, list_checkpoints, load_checkpoint, load_state
from smoltolk.training.config import Recipe, StageSettings, changed_settings
from smoltolk.training.distillation import Lesson, StepLessons, Teacher
from smoltolk.training.distributed import join_ranks, reshard, set_gradient_sync, shard, whole
from smoltolk.training.loader import load_batches
from smoltolk.training.lora import add_lora, lora_size, merged, use_lora
from smoltolk.training.optim import make_optimizer, training_flops, trapezoid
from smoltolk.training.stopping import StopRequests, TrainingStopped, stop_requests
from smoltolk.training.validation import finite, validate
from smoltolk.training.watching import METRICS_FILE, Report, peak_flops, read_metrics, speed, watch

MODEL_FOLDER = "model"
VALIDATION_SEED = 0


class Trainer:
    """Runs a recipe, from its last checkpoint if there is one.

    Under `torchrun` every rank makes one and runs it: weights are spread over the ranks, each takes its share of a
    step's rows, and the losses are those of one process alone.

    Args:
        recipe: what to run.
        progress: whether to show a progress bar.
        on_step: called with the metrics of every step.

    Raises:
        ValueError: backbone, stores and recipe do not fit together, or the output folder holds a run of
            another recipe, or the rows of a step cannot be shared evenly among the ranks.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        progress: bool = True,
        on_step: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.recipe = recipe
        self.on_step = on_step
        self.progress = progress
        self.output = Path(recipe.output)
        if recipe.num_threads is not None:
            torch.set_num_threads(recipe.num_threads)
        self.ranks = join_ranks(recipe.device)
        self._check_shares()
        self._stores: dict[str, Store] = {}
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(recipe.model.backbone)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"backbone {recipe.model.backbone} cannot be read ({str(error).splitlines()[0]}): give a folder "
                "with a text LM and its tokenizer, or the name of one that can be downloaded"
            ) from error
        self.model = self._make_model()
        self._lora_size = lora_size(self.model)
        self._check_companions()
        shard(self.model, self.ranks)
        self._teacher = self._make_teacher()
        self._checkpointer = Checkpointer(self.output / "checkpoints", self.ranks, recipe.checkpoint.keep_last)
        self._sources = [self._source(stage) for stage in recipe.stages]
        self._validation = dict(self._validation_batches())

    def run(self) -> Path:
        """Trains to the end and returns the folder of the trained model.

        Raises:
            TrainingStopped: Ctrl-C or SIGTERM; a checkpoint was saved first.
            FloatingPointError: too many steps had a loss or gradient that was not finite.
            OSError: a checkpoint or the metrics could not be written, or a process that draws batches died; of several
                ranks all stop, with the last checkpoint intact.
            ValueError: a file of a store is gone or was changed; a checkpoint was saved first.
        """
        is_alone = lock(self.output) if self.ranks.is_main else nullcontext()
        with is_alone, stop_requests() as stop, closing(self._checkpointer):
            folder = self._run(stop)
        self.ranks.leave()
        return folder

    def _run(self, stop: StopRequests) -> Path:
        state, optimizer = self._start()
        with self._watch(state) as report, closing(self._batches(state.step)) as batches:
            if not state.step:  # text alone is not touched by the new speech parts: this is the backbone's own loss
                state.backbone_text_loss = self._validate(state).get("validation_text_loss")
                state.validation_rows = self.recipe.validation.rows
            while state.step < self.recipe.num_steps:
                index, step_of_stage = self.recipe.stage_at(state.step)
                stage = self.recipe.stages[index]
                if step_of_stage == 0:
                    optimizer = self._begin_stage(index)
                started, tokens, flops = time.perf_counter(), state.tokens, state.flops
                batch = self._draw(batches, state, optimizer)
                metrics = self._step(state, batch, optimizer, index, step_of_stage)
                metrics["seconds"] = time.perf_counter() - started
                metrics |= self._speed(state.tokens - tokens, state.flops - flops, metrics["seconds"])
                state.seconds += metrics["seconds"]
                is_stage_end = step_of_stage == stage.steps - 1
                if is_stage_end or state.step % self.recipe.validation.every_steps == 0:
                    metrics |= self._validate(state)
                fault = None
                try:
                    report(metrics)
                except OSError as error:
                    fault = self._unwritten(self.output / METRICS_FILE, error)
                if self.on_step is not None:
                    self.on_step(metrics)
                # A signal need not reach all ranks in the same step, nor need all find that they cannot write.
                stops, faults = self.ranks.sum(stop.is_requested, fault is not None or self._checkpointer.has_failed)
                if faults:
                    self._checkpointer.wait()
                    self._raise_together(fault)  # unsaved: the step's line is lost, so the step is to be done again
                if is_stage_end or stops or state.step % self.recipe.checkpoint.every_steps == 0:
                    self._checkpointer.save(state, self.model, optimizer)
                if stops and state.step < self.recipe.num_steps:
                    self._checkpointer.wait()
                    raise TrainingStopped(
                        f"stopped after step {state.step} of {self.recipe.num_steps}, saved in {self.output}: "
                        "run the same command to go on"
                    )
        self._checkpointer.wait()
        return self._export(state)

    def _draw(self, batches: Iterator[Batch], state: RunState, optimizer: torch.optim.Optimizer) -> Batch:
        """The next batch; if a rank cannot have it, all save and stop."""
        batch = fault = None
        try:
            batch = next(batches)
        except (OSError, ValueError) as error:
            fault = error
        [faults] = self.ranks.sum(fault is not None)
        if faults and state.step:
            self._checkpointer.save(state, self.model, optimizer)
            self._checkpointer.wait()
        if faults:
            self._raise_together(fault)
        assert batch is not None
        return batch

    def _raise_together(self, fault: Exception | None) -> NoReturn:
        """Stops all ranks for the fault of some of them."""
        found = self.ranks.gather(fault and str(fault))
        if fault is not None:
            raise fault
        raise OSError("; ".join(f"rank {rank} has stopped: {message}" for rank, message in enumerate(found) if message))

    def _unwritten(self, path: Path, error: Exception) -> OSError:
        return OSError(
            f"{path} could not be written ({error}): checkpoints are intact; make room and run the same command to "
            "go on"
        )

    # ---- making things from the recipe

    def _store(self, path: str) -> Store:
        if path not in self._stores:
            self._stores[path] = Store(path)
        return self._stores[path]

    def _make_model(self) -> SmolTolkForCausalLM:
        """New speech parts around the backbone, sized by the stores; made from the recipe's seed."""
        data = self.recipe.data
        speech_stores = [self._store(share.store) for task in TASKS if task != "text" for share in data.stores(task)]
        cards = [store.metadata.speech_tokenizer for store in speech_stores]
        card = next((card for card in cards if card is not None), None)
        if card is None:
            raise ValueError("data names no store with speech: give one under interleaved, speech, …")
        settings = self.recipe.model.model_dump(exclude={"backbone"})
        torch.manual_seed(self.recipe.seed)
        model = SmolTolkForCausalLM.from_backbone(
            self.recipe.model.backbone,
            num_units=card["num_units"],
            speech_tokenizer=card,
            text_tokenizer_fingerprint=tokenizer_fingerprint(self.tokenizer),
            **settings,
        )
        if self.recipe.lora is not None:  # drawn last: all else is as without
            add_lora(model, self.recipe.lora)
        kernel = self.recipe.attn_implementation
        try:
            model.set_attn_implementation(kernel)
        except (ImportError, ValueError) as error:  # transformers' own words know nothing of recipes
            reason = str(error).splitlines()[0].rstrip(".")
            raise ValueError(f"attn_implementation is {kernel!r}, which cannot be used: {reason}; sdpa can") from error
        if self.recipe.gradient_checkpointing:
            # Renamed in transformers 5.2x; the old name warns there.
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable()
        if self.recipe.compile:
            model.compile_layers()
        return model

    def _make_teacher(self) -> Teacher | None:
        if all(stage.distillation is None for stage in self.recipe.stages):
            return None
        dtype = torch.bfloat16 if self.recipe.precision == "bf16" else torch.float32
        return Teacher(self.recipe.model.backbone, dtype, self.ranks)

    def _check_shares(self) -> None:
        for number, stage in enumerate(self.recipe.stages, start=1):
            together = self.ranks.size * stage.rows_per_micro_batch
            if stage.rows_per_step % together:
                raise ValueError(
                    f"stage {number}: rows_per_step {stage.rows_per_step} is not a multiple of {together} "
                    f"({self.ranks.size} ranks of rows_per_micro_batch {stage.rows_per_micro_batch}): change one"
                )

    def _check_companions(self) -> None:
        """What is kept with the model must be there and fit it, before hours are spent."""
        recipe, card = self.recipe, self.model.config.speech_tokenizer
        if recipe.speech_tokenizer is not None:
            found = load_speech_tokenizer(recipe.speech_tokenizer).fingerprint
            if found != card["fingerprint"]:
                raise ValueError(
                    f"speech_tokenizer {recipe.speech_tokenizer} has the fingerprint {found}, but the stores hold "
                    f"units of {card['fingerprint']}: give the tokenizer that made them"
                )
        if recipe.vocoder is not None:
            vocoder = load_vocoder(recipe.vocoder)
            if vocoder.tokenizer_fingerprint != card["fingerprint"]:
                raise ValueError(
                    f"vocoder {recipe.vocoder} decodes units of {vocoder.tokenizer_fingerprint}, but the stores hold "
                    f"units of {card['fingerprint']}: give the vocoder of their tokenizer"
                )

    def _source(self, stage: StageSettings, mixture: TaskMixture | None = None, split: str = "train") -> BatchSource:
        data, config = self.recipe.data, self.model.config
        return BatchSource(
            {task: [(self._store(share.store), share.weight) for share in data.stores(task)] for task in TASKS},
            mixture=mixture or stage.mixture.tasks,
            ids=self.model.ids,
            row_tokens=stage.row_tokens,
            policy=data.policy.make(),
            split=split,
            max_positions=config.max_position_embeddings,
            predict_switch=config.predict_switch,
            with_transcripts=stage.distillation is not None and split == "train",
            speech_fingerprint=config.speech_tokenizer["fingerprint"],
            text_fingerprint=config.text_tokenizer_fingerprint,
        )

    def _validation_batches(self) -> Iterator[tuple[str, Batch]]:
        """One fixed batch per task that has stores, with rows as long as the last stage's."""
        if not self.recipe.validation.rows:
            return
        for task in TASKS:
            if self.recipe.data.stores(task):
                source = self._source(
                    self.recipe.stages[-1], TaskMixture(**{t: float(t == task) for t in TASKS}), "validation"
                )
                yield task, source.batch(VALIDATION_SEED, 0, rows=self.recipe.validation.rows)

    def _batches(self, first_step: int) -> Generator[Batch, None, None]:
        """The batches of all steps from the first one on."""
        workers = self.recipe.loader_workers
        if workers is None:
            workers = 0 if self.ranks.device.type == "cpu" else 4
        return load_batches(self.recipe, self._sources, self.ranks, first_step, workers)

    # ---- start, save, end

    def _start(self) -> tuple[RunState, torch.optim.Optimizer]:
        """The state and optimizer to go on from: the last checkpoint's, or new ones."""
        self._checkpointer.remove_leftovers()
        checkpoints = list_checkpoints(self._checkpointer.folder)
        last = self.ranks.share(checkpoints[-1] if checkpoints else None)
        state = RunState(0, self.recipe.fingerprint, self.recipe.decisive) if last is None else load_state(last)
        if last is None and (self.output / MODEL_FOLDER).exists():  # another's, or of a run without its checkpoints
            raise ValueError(
                f"output {self.output} holds a {MODEL_FOLDER}, but no checkpoint to go on from, so it would be written "
                "over: give another output, or move it away"
            )
        if state.recipe_fingerprint != self.recipe.fingerprint:
            changed = "; ".join(changed_settings(state.recipe, self.recipe.decisive))
            raise ValueError(
                f"output {self.output} holds a run of another recipe ({changed}): give another output, undo the "
                "change, or remove the folder"
            )
        index, step_of_stage = self.recipe.stage_at(min(state.step, self.recipe.num_steps - 1))
        optimizer = self._begin_stage(index)
        if last is not None:
            load_checkpoint(last, self.model, optimizer, with_moments=step_of_stage > 0)
        return state, optimizer

    def _begin_stage(self, index: int) -> torch.optim.Optimizer:
        """Frees what a stage trains, freezes the rest, and makes its optimizer."""
        use_lora(self.model, is_on=self.recipe.uses_lora(index))
        return make_optimizer(self.model, self.recipe.stages[index])

    def _export(self, state: RunState) -> Path:
        """The trained model with its tokenizers and vocoder in one folder, replaced as a whole."""
        final = self.output / MODEL_FOLDER
        record = {
            "recipe": self.recipe.model_dump(mode="json"),
            "tokens": state.tokens,
            "flops": state.flops,
            "seconds": state.seconds,
            "skipped_steps": state.skipped_steps,
            "validation_losses": self._validation_losses(),
        }
        weights = get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        fault = None
        if self.ranks.is_main:
            try:
                self._write_model(final, weights, record)
            except (OSError, SafetensorError) as error:
                fault = self._unwritten(final, error)
        [faults] = self.ranks.sum(fault is not None)  # the others wait until the folder is there
        if faults:
            self._raise_together(fault)
        return final

    def _write_model(self, final: Path, weights: dict[str, Any], record: dict[str, Any]) -> None:
        aside, before = (final.with_name(f".{final.name}.{kind}") for kind in ("tmp", "old"))
        for leftover in (aside, before):  # of a run that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            tied = self.model.all_tied_weights_keys  # gathered weights don't share memory
            plain = merged(self.model, {n: w for n, w in weights.items() if n not in tied})
            self.model.save_pretrained(aside, state_dict=plain)
            self.tokenizer.save_pretrained(aside)
            for name in ("speech_tokenizer", "vocoder"):
                if source := getattr(self.recipe, name):
                    shutil.copytree(source, aside / name)
            (aside / "training.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
            if final.exists():
                final.rename(before)
            aside.rename(final)
        finally:
            for leftover in (aside, before):
                shutil.rmtree(leftover, ignore_errors=True)

    def _validation_losses(self) -> list[dict[str, float | None]]:
        """Loss of each task at the end of each stage, as the metrics have it."""
        path = self.output / METRICS_FILE
        ends = {line["stage"]: line for line in read_metrics(path)} if path.exists() else {}
        return [{task: line.get(f"validation_{task}_loss") for task in self._validation} for line in ends.values()]

    # ---- one step

    def _step(
        self, state: RunState, batch: Batch, optimizer: torch.optim.Optimizer, index: int, step_of_stage: int
    ) -> dict[str, Any]:
        """One optimizer step; advances the state and returns the step's metrics."""
        stage = self.recipe.stages[index]
        torch.manual_seed(self.recipe.seed + state.step + (self.ranks.rank << 40))  # dropout, where a backbone has it
        num_speech_tokens = int((batch.input_ids >= self.model.ids.speech_offset).sum())
        num_text, num_speech, num_speech_tokens = map(
            int, self.ranks.sum(*self.model.count_labels(batch.input_ids, batch.labels), num_speech_tokens)
        )
        num_labels = max(1, num_text + num_speech)
        lessons = None
        if stage.distillation is not None and self._teacher is not None:
            lessons = StepLessons(self._teacher, stage.distillation, batch, self.model.ids, self.ranks)
        self.model.train()
        found: list[torch.Tensor] = []  # losses of each micro-batch
        counts: list[tuple[int, int]] = []
        for start in range(0, len(batch), stage.rows_per_micro_batch):
            part = batch.select(slice(start, start + stage.rows_per_micro_batch))
            set_gradient_sync(self.model, is_on=start + stage.rows_per_micro_batch == len(batch))
            output = self._forward(part, num_labels, lessons.lesson(part) if lessons else None)
            (self.ranks.size * output.loss).backward()  # ranks average their gradients
            found.append(torch.stack([output.loss, output.text_loss, output.speech_loss]).detach())
            counts.append(self.model.count_labels(part.input_ids, part.labels))
        loss_sum, text_sum, speech_sum = self.ranks.sum(*summed(found, counts))
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        part_norms = gradient_norms(optimizer)
        grad_norm = whole(torch.nn.utils.clip_grad_norm_(trained, stage.clip_norm)).item()
        share = trapezoid(step_of_stage, stage)
        for group in optimizer.param_groups:
            group["lr"] = share * group["peak_lr"]
        is_finite = torch.tensor([loss_sum, grad_norm]).isfinite().all().item()
        if is_finite:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        state.step += 1
        num_tokens = stage.rows_per_step * stage.row_tokens
        state.tokens += num_tokens
        state.flops += training_flops(
            self.model.config,  # type: ignore[arg-type]
            num_tokens=num_tokens,
            num_speech_tokens=num_speech_tokens,
            num_text_labels=num_text,
            num_speech_labels=num_speech,
            row_tokens=stage.row_tokens,
            is_backbone_trained=stage.train == "everything",
            lora_size=self._lora_size if self.recipe.uses_lora(index) else 0,
            is_lora_trained=stage.train == "lora",
        )
        if lessons is not None:
            state.flops += lessons.flops(
                self.model.config,  # type: ignore[arg-type]
                is_backbone_trained=stage.train == "everything",
            )
        if not is_finite:
            self._count_skipped(state, self._sources[index], batch)
        return {
            "step": state.step,
            "stage": index + 1,
            "loss": finite(loss_sum),
            "text_loss": finite(text_sum / num_text) if num_text else None,
            "speech_loss": finite(speech_sum / num_speech) if num_speech else None,
            "text_labels": num_text,
            "speech_labels": num_speech,
            "learning_rate": share * stage.learning_rate,
            "grad_norm": finite(grad_norm),
            **{f"distilled_{name}": finite(term) for name, term in (lessons.terms() if lessons else {}).items()},
            **{f"{part}_grad_norm": finite(norm) for part, norm in part_norms.items()},
            "skipped_steps": state.skipped_steps,
            "tokens": state.tokens,
            "flops": state.flops,
        }

    def _forward(self, batch: Batch, num_labels: int | None = None, lesson: Lesson | None = None) -> Any:
        is_bf16 = self.recipe.precision == "bf16"
        with torch.autocast(self.ranks.device.type, torch.bfloat16) if is_bf16 else nullcontext():
            # Rows are full: without a mask attention runs its causal path.
            return self.model(
                batch.input_ids.to(self.ranks.device, non_blocking=True),
                labels=batch.labels.to(self.ranks.device, non_blocking=True),
                num_items_in_batch=num_labels,
                more_loss=lesson,
            )

    def _count_skipped(self, state: RunState, source: BatchSource, batch: Batch) -> None:
        """Counts a step that was not finite, on all ranks alike; too many stop them."""
        state.skipped_steps += 1
        if state.skipped_steps > self.recipe.max_skipped_steps:
            found = self.ranks.gather((self._samples_not_finite(source, batch), source.sample_ids(batch)))
            guilty = {sample for rows, _ in found for row in rows for sample in row}
            samples = guilty or {sample for _, rows in found for row in rows for sample in row}
            where = "rows whose loss was not finite" if guilty else "batch, whose gradient was not finite,"
            raise FloatingPointError(
                f"{state.skipped_steps} steps had a loss or gradient that was not finite, more than "
                f"max_skipped_steps {self.recipe.max_skipped_steps}; at step {state.step} the {where} held the "
                f"utterances {', '.join(sorted(samples)[:20])}: look at them, raise max_skipped_steps to go on, or "
                "begin anew with a lower learning rate"
            )

    @torch.no_grad()
    def _samples_not_finite(self, source: BatchSource, batch: Batch) -> list[list[str]]:
        """Names of the utterances in the rows of a batch that alone have a loss that is not finite."""
        rows = [batch.select(slice(row, row + 1)) for row in range(len(batch))]
        losses = [self._forward(row).loss.item() for row in rows]  # sharded ranks gather weights together: as many each
        reshard(self.model)
        return [source.sample_ids(row)[0] for row, loss in zip(rows, losses, strict=True) if finite(loss) is None]

    def _validate(self, state: RunState) -> dict[str, Any]:
        """Losses on each task's fixed batch, what the selector looks at, and what the text LM forgot."""
        rows = self.recipe.stages[-1].rows_per_micro_batch
        metrics = validate(self.model, self._validation, self._forward, self.ranks, rows)
        loss = metrics.get("validation_text_loss")
        is_same_set = state.validation_rows in (None, self.recipe.validation.rows)
        if state.backbone_text_loss is not None and loss is not None and is_same_set:
            metrics["text_forgetting"] = loss - state.backbone_text_loss
        return metrics

    # ---- watching

    def _speed(self, tokens: int, flops: int, seconds: float) -> dict[str, float]:
        peak = peak_flops(self.recipe, self.ranks.device)
        return speed(tokens=tokens, flops=flops, seconds=seconds, peak=peak and self.ranks.size * peak)

    def _watch(self, state: RunState) -> AbstractContextManager[Report]:
        if not self.ranks.is_main:
            return nullcontext(lambda metrics: None)
        config: SmolTolkConfig = self.model.config  # type: ignore[assignment]
        return watch(self.recipe, config, state.step, lora_size=self._lora_size, has_bar=self.progress)


def summed(losses: list[torch.Tensor], counts: list[tuple[int, int]]) -> list[float]:
    """Sums over micro-batches: of the loss, and of the cross-entropies of text and of speech.

    They are read here, once a step: whenever they are read, an accelerator has to come to rest.

    Args:
        losses: of each micro-batch its loss, and the means over text and speech labels, (3,).
        counts: numbers of these labels; a mean over none is left out.
    """
    sums = [0.0, 0.0, 0.0]
    for values, (num_text, num_speech) in zip(torch.stack(losses).tolist(), counts, strict=True):
        for i, (value, count) in enumerate(zip(values, (1, num_text, num_speech), strict=True)):
            sums[i] += value * count if count else 0.0
    return sums


def gradient_norms(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Norm of the gradient of each part that is trained, "speech" and "text"."""
    gradients: dict[str, list[torch.Tensor]] = {}
    for group in optimizer.param_groups:
        gradients.setdefault(group["part"], []).extend(p.grad for p in group["params"] if p.grad is not None)
    return {part: whole(torch.nn.utils.get_total_norm(some)).item() for part, some in gradients.items()}
