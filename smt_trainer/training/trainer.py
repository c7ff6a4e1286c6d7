"""`SMTTrainer`: warm-up, selection and rewriting, then the stock training loop of transformers' `Trainer`.

Everything SMT needs happens at the start of `_inner_training_loop`, on the bare model, before Trainer makes an
optimizer or wraps the model for several devices:

    warm-up     the first batches of the main loop, forward and backward only (`warmup.collect_scores`)
    selection   the best blocks within the budget (`selection.select_blocks`)
    rewriting   targets become `SMTLinear`s, all else is frozen (`convert.convert_to_smt`)

then the random state is restored and the stock loop runs on the final parameters, as if the model had come that way.
Checkpoints hold the delta in place of the model.

Private methods of Trainer that this file relies on: by overriding `_inner_training_loop`, `_save`,
`_save_optimizer_and_scheduler`, `_save_rng_state`, `_load_from_checkpoint`, `_load_best_model` and
`_push_from_checkpoint`; by calling `_get_output_dir`, and in `classes.py` `_set_signature_columns_if_needed`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import shutil
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from accelerate.utils.deepspeed import DeepSpeedSchedulerWrapper
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from smt_trainer.config import SMTConfig
from smt_trainer.delta.delta import CONFIG_FILE, DELTA_FILE, Delta, load_delta, put_delta
from smt_trainer.delta.model_card import delta_section
from smt_trainer.errors import SMTError
from smt_trainer.files import new_folder
from smt_trainer.model.names import plain_name
from smt_trainer.model.targets import count_parameters
from smt_trainer.scores import SCORERS, Scorer, make_scorer
from smt_trainer.scores.classes import class_column, collating_classes
from smt_trainer.scores.collect import (
    LossScale,
    collect_scores,
    counters_preserved,
    optimizer_step_batches,
    rng_preserved,
)
from smt_trainer.selection.block_scores import SCORES_FILE, BlockScores, resolve_selection
from smt_trainer.selection.block_selection import SELECTION_FILE, BlockSelection, base_name
from smt_trainer.selection.candidates import find_candidates
from smt_trainer.sparse.convert import (
    convert_to_smt,
    get_state,
    is_smt_model,
    plain_state_dict,
    trainable_parameters,
)
from smt_trainer.sparse.linear import smt_linears, write_back
from smt_trainer.training.callback import SMTCallback
from smt_trainer.training.checkpoints import last_checkpoint
from smt_trainer.training.distributed import (
    bare_autocast,
    bare_backward,
    has_weights,
    is_sharding,
    prepare_for_sharding,
    save_optimizer,
    warmup_model,
)
from smt_trainer.training.refusals import refuse_unusable

logger = logging.getLogger(__name__)


class SMTTrainerMixin:
    """Goes in front of `Trainer` or any subclass of it: `class MyTrainer(SMTTrainerMixin, Seq2SeqTrainer)`.

    Args:
        smt_config: what to tune and how to choose it; the paper's defaults if omitted.
        All other arguments are those of the trainer behind it.

    Raises:
        SMTError: `optimizers=` was given, the optimizer cannot work on blocks, the training data can be read only
            once, nothing matches `target_modules`, the blocks do not divide the weights, or the budget does not fit.
    """

    def __init__(self, *args, smt_config: SMTConfig | None = None, **kwargs) -> None:
        self.smt_config = smt_config or SMTConfig()
        self._warming_up = False
        self._saves_checkpoint = False
        self._was_interrupted = False
        super().__init__(*args, **kwargs)
        refuse_unusable(self)
        if self.model_init is None and not is_smt_model(self.model) and self._given_selection is None:
            find_candidates(self.model, self.smt_config)
        if not self._smt_callbacks:
            self.add_callback(SMTCallback())
        for callback in self._smt_callbacks:
            # A proxy, since a circle would keep the model alive until the next garbage collection.
            callback.trainer = weakref.proxy(self)

    # ---- before the stock loop ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As Trainer's. `resume_from_checkpoint=True` takes the last checkpoint that was written to its end; a run
        that broke off before its first, with its blocks chosen, starts anew on these, without another warm-up.

        Raises:
            SMTError: the checkpoint, or the selection in the output folder, was made under another `smt_config`.
            ValueError: True was given, and the output folder holds neither (Trainer's own).
        """
        self._was_interrupted = False
        if resume_from_checkpoint is True:
            checkpoint = last_checkpoint(Path(self.args.output_dir))
            self._was_interrupted = checkpoint is None and Path(self.args.output_dir, SELECTION_FILE).is_file()
            if checkpoint is not None or self._was_interrupted:
                resume_from_checkpoint = checkpoint
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def select(self) -> BlockSelection:
        """Choose the blocks as `train` does, and leave the model as it was. Selection and scores are written to the
        output folder; either can be another run's `SMTConfig.selection`. Only `train` tells the model to checkpoint its
        activations: do so before, where memory is short.

        Raises:
            SMTError: the model trains blocks already, or they cannot be chosen.
        """
        if is_smt_model(self.model):
            raise SMTError("this model trains blocks already; select on the plain model, as it was loaded.")
        was_training = self.model.training
        try:
            return self._choose_blocks(Path(self.args.output_dir))
        finally:
            self.model.train(was_training)

    def _inner_training_loop(self, batch_size=None, args=None, resume_from_checkpoint=None, trial=None, **kwargs):
        if args.auto_find_batch_size:
            self._train_batch_size = batch_size
        if not self._smt_callbacks:
            raise SMTError(
                "SMTCallback was removed from the trainer; without it forward would never see the trained blocks. "
                "Add it, or a subclass of it, again."
            )
        if not is_smt_model(self.model) and resume_from_checkpoint is not None:
            # Trainer loads a model that is sharded over ranks only after it is.
            self._load_from_checkpoint(resume_from_checkpoint)
        if not is_smt_model(self.model):
            convert_to_smt(self.model, self._choose_blocks(Path(self._get_output_dir(trial))))
        if is_sharding(self.accelerator):
            prepare_for_sharding(self.model, self.accelerator)
        self._let_backward_stop_early()
        logger.info("%s", self._trainable_line())
        return super()._inner_training_loop(batch_size, args, resume_from_checkpoint, trial, **kwargs)

    def _choose_blocks(self, folder: Path) -> BlockSelection:
        """The configured selection, or the one a warm-up leads to: the same on all ranks, kept in the output folder
        beside the scores of all blocks."""
        selection = self._given_selection
        if selection is None and self._was_interrupted:
            selection = BlockSelection.load(folder / SELECTION_FILE)
            self._refuse_other_config(selection.config, folder / SELECTION_FILE)
        if selection is None:
            grids, dependencies = find_candidates(self.model, self.smt_config)
            scores = BlockScores(
                grids,
                self._score_blocks(grids),
                count_parameters(self.model),
                self.smt_config,
                base_name(self.model),
                dependencies,
            )
            if self.args.should_save:
                # First, so that the warm-up is not lost where the budget turns out not to fit.
                scores.save(folder / SCORES_FILE)
            selection = broadcast_object_list([scores.select()])[0]
            if self.args.should_save:
                selection.save(folder / SELECTION_FILE)
        for callback in self._smt_callbacks:
            callback.on_selection(self.args, selection)
        return selection

    def _score_blocks(self, grids: dict) -> dict[str, Tensor]:
        """The scores of all blocks, from a warm-up if the configured score needs one."""
        if not SCORERS[self.smt_config.score].needs_warmup:
            return self._make_scorer(self.model, grids).scores()
        needs_backward = SCORERS[self.smt_config.score].needs_backward
        scale = LossScale() if needs_backward and self.accelerator.mixed_precision == "fp16" else None
        with warmup_model(self.model, self.accelerator) as model:
            scorer = self._make_scorer(model, grids)
            with self._warm_up(model, scorer, scale) as steps:
                return collect_scores(model, scorer, steps, scale)

    def _make_scorer(self, model: nn.Module, grids: dict) -> Scorer:
        modules = {plain_name(name): module for name, module in model.named_modules()}
        return make_scorer({name: modules[name] for name in grids}, grids, self.smt_config, self.args.seed)

    @contextlib.contextmanager
    def _warm_up(
        self, model: nn.Module, scorer: Scorer, scale: LossScale | None
    ) -> Iterator[Iterator[Callable[[], None]]]:
        """The warm-up's steps, in a context that leaves no trace in the random state or the trainer's counters."""
        self._warming_up = True
        for callback in self._smt_callbacks:
            callback.on_warmup_begin(self.args, self.smt_config.smt_warmup_steps)
        try:
            backward = bare_backward(self.accelerator, scale, scorer.needs_backward)
            with rng_preserved(), counters_preserved(self), backward:
                yield self._steps_of_warmup(model, scorer)
        finally:
            self._warming_up = False
            for callback in self._smt_callbacks:
                callback.on_warmup_end(self.args)

    def _steps_of_warmup(self, model: nn.Module, scorer: Scorer) -> Iterator[Callable[[], None]]:
        with collating_classes(self, class_column(self.smt_config)):
            loader = self.get_train_dataloader()
        batches = itertools.islice(optimizer_step_batches(self, loader), self.smt_config.smt_warmup_steps)
        for step, (micro_batches, num_items) in enumerate(batches):
            yield functools.partial(self._warmup_step, model, scorer, step, micro_batches, num_items)

    def _warmup_step(
        self, model: nn.Module, scorer: Scorer, step: int, micro_batches: list, num_items: Tensor | int | None
    ) -> None:
        self.current_gradient_accumulation_steps = len(micro_batches)
        loss = 0.0
        for inputs in micro_batches:
            scorer.begin_batch(inputs)
            loss += self.training_step(model, inputs, num_items)
        for callback in self._smt_callbacks:
            callback.on_warmup_step(self.args, step, float(loss))

    def _let_backward_stop_early(self) -> None:
        """Undo that Trainer asks for the gradient of the embeddings when it checkpoints activations: only the reentrant
        kind needs it, and without it backward stops at the lowest layer with blocks."""
        kwargs = dict(self.args.gradient_checkpointing_kwargs or {})
        for handled_by_transformers in ("every_n_layers", "offload"):
            kwargs.pop(handled_by_transformers, None)
        # transformers' default is the other kind, torch's, for kwargs that do not say, the reentrant one.
        reentrant = bool(kwargs) and kwargs.get("use_reentrant") is not False
        if self.args.gradient_checkpointing and not reentrant and hasattr(self.model, "disable_input_require_grads"):
            self.model.disable_input_require_grads()

    def compute_loss_context_manager(self):
        """In the warm-up, add the mixed precision that the model gets only when the main loop prepares it."""
        context = super().compute_loss_context_manager()
        if not self._warming_up:
            return context
        stack = contextlib.ExitStack()
        stack.enter_context(context)
        stack.enter_context(bare_autocast(self.accelerator))
        return stack

    @functools.cached_property
    def _given_selection(self) -> BlockSelection | None:
        """The configured selection, trained as this trainer's configuration says."""
        if self.smt_config.selection is None:
            return None
        plain = None if is_smt_model(self.model) else self.model
        selection = resolve_selection(self.smt_config.selection, self.smt_config, plain)
        trained_by = {name: getattr(self.smt_config, name) for name in SMTConfig.deciding("training")}
        return replace(selection, config=replace(selection.config, **trained_by))

    @property
    def _smt_callbacks(self) -> list[SMTCallback]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, SMTCallback)]

    # ---- checkpoints hold the delta ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the delta: in the dtype of the weights, or for a checkpoint in the master dtype."""
        if not is_smt_model(self.model):
            super().save_model(output_dir, _internal_call)
            return
        self._saves_checkpoint = _internal_call and self.is_in_train
        # Not through Trainer's save_model, which would gather the whole model when it is sharded.
        self._save(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not is_smt_model(self.model):
            super()._save(output_dir, state_dict)
            return
        if not (self.args.should_save or is_sharding(self.accelerator)):
            return
        delta, folder = Delta.of(self.model, master=self._saves_checkpoint), Path(output_dir or self.args.output_dir)
        if not self.args.should_save:
            return
        if self._saves_checkpoint:
            # Of an earlier writing: a checkpoint counts as whole when it has one.
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        delta.save(folder)
        tokenizer = self.processing_class
        if tokenizer is None:
            tokenizer = getattr(self.data_collator, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_sharding(self.accelerator):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_optimizer(self.accelerator, self.optimizer, self.model_wrapped, output_dir)
        if self.args.should_save and not isinstance(self.lr_scheduler, DeepSpeedSchedulerWrapper):
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The state of the trainer, which the first rank writes next, says that all ranks have written theirs.
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        # Not `model or ...`: a compiled model has no truth value.
        model = self.model if model is None else model
        delta = Delta.load(resume_from_checkpoint)
        self._refuse_other_config(delta.selection.config, resume_from_checkpoint)
        put_delta(model, delta, has_weights=has_weights(self.accelerator))

    def _refuse_other_config(self, saved: SMTConfig, where: str | Path) -> None:
        given = self._given_selection
        differences = (given.config if given else self.smt_config).differences(saved)
        if differences:
            raise SMTError(
                f"{where} was made under another smt_config (ours first: {'; '.join(differences)}). Resume with the "
                "same configuration, or start anew in another output_dir."
            )

    def _load_best_model(self) -> None:
        logger.info("Loading the best blocks from %s.", self.state.best_model_checkpoint)
        if self.is_deepspeed_enabled:
            super()._load_best_model()
            write_back(layer for _, layer in smt_linears(self.model))
        else:
            load_delta(self.model, self.state.best_model_checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The stock method uploads the output folder, after copying the files it knows from the checkpoint.
        if self.args.should_save and is_smt_model(self.model):
            for name in (DELTA_FILE, CONFIG_FILE):
                shutil.copyfile(Path(checkpoint_folder, name), Path(self.args.output_dir, name))
        super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(self, *args, **kwargs) -> None:
        """As Trainer's, with a section on base, selection and budget, and how to load the delta."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero() and is_smt_model(self.model):
            repository = self.hub_model_id or Path(self.args.output_dir).name
            with open(Path(self.args.output_dir, "README.md"), "a", encoding="utf-8") as card:
                card.write(delta_section(self.smt_selection, repository))

    def merge_and_save(self, output_dir: str | Path) -> None:
        """Write the trained model as a plain checkpoint for `from_pretrained`; training can go on afterwards.

        Args:
            output_dir: a new or empty folder; it appears whole or not at all.

        Raises:
            SMTError: the folder exists and is not empty, or nothing has been trained yet.
        """
        get_state(self.model)
        state = plain_state_dict(self.model, keep=self.args.should_save)
        if self.args.should_save:
            with new_folder(Path(output_dir)) as folder:
                self.model.save_pretrained(folder, state_dict=state)
                if self.processing_class is not None:
                    self.processing_class.save_pretrained(folder)
        self.accelerator.wait_for_everyone()

    # ---- what is trained ----

    @property
    def smt_selection(self) -> BlockSelection:
        """The blocks that the model trains. Raises `SMTError` before they are chosen."""
        return get_state(self.model).selection

    def print_trainable_parameters(self) -> None:
        """Write to standard output how much is trained, and which blocks."""
        tqdm.write(f"{self._trainable_line()}; {self.smt_selection.summary()}")

    def _trainable_line(self) -> str:
        selection, trained = self.smt_selection, trainable_parameters(self.model)
        return (
            f"trainable parameters: {trained:,} of {selection.num_parameters:,} "
            f"({trained / selection.num_parameters:.3%} of the model)"
        )


class SMTTrainer(SMTTrainerMixin, Trainer):
    """transformers' `Trainer` with Sparse Matrix Tuning: the one change to a training script.

    Takes the arguments of `Trainer` and `smt_config`. `train()` runs the gradient warm-up, chooses the blocks, rewrites
    the model and trains it; `save_model` writes a small delta; `merge_and_save` a plain checkpoint.
    """
