"""`SMTTrainer`: warm-up, selection and conversion, then the stock training loop of transformers' `Trainer`.

Everything SMT needs happens at the start of `_inner_training_loop`, on the bare model, before Trainer makes an
optimizer or wraps the model for several devices:

    train
        _inner_training_loop
            _convert                    targets become `SMTLinear`s, everything else is frozen (`sparse/convert.py`)
                _choose_blocks          the best blocks within the budget
                    Warmup.run          forward and backward on the first batches of the main loop (`warmup.py`)
                    BlockScores.select  ranks the blocks (`selection/`)
            Trainer._inner_training_loop
    save_model, merge_and_save          the delta, a plain checkpoint (`saving.py`)

The stock loop runs on the final parameters, as if the model had been given like this. Checkpoints hold the delta in
place of the model.

Private methods of Trainer that this folder relies on. Overridden: `_inner_training_loop`, `_save`,
`_save_optimizer_and_scheduler`, `_save_rng_state`, `_load_from_checkpoint`, `_load_best_model` and
`_push_from_checkpoint`. Called: `_get_output_dir` and `_set_signature_columns_if_needed`. Read or set:
`_train_batch_size` and `_signature_columns`. Of TRL's trainers: `_move_model_to_vllm` (`vllm_weights.py`) and
`_sync_weight` (`refusals.py`).
"""

from __future__ import annotations

import contextlib
import logging
import time
import weakref
from dataclasses import replace
from pathlib import Path

from accelerate.utils import broadcast_object_list, is_compiled_module
from tqdm.auto import tqdm
from transformers import Trainer

from smt_trainer.config import SMTConfig
from smt_trainer.delta.folder import refuse_full_model
from smt_trainer.errors import SMTError
from smt_trainer.model.activation_checkpointing import let_backward_stop_early
from smt_trainer.model.base import base_name
from smt_trainer.model.merged import is_merged
from smt_trainer.model.quantised import keep_differentiable
from smt_trainer.model.targets import count_parameters, frozen_names
from smt_trainer.scores import SCORERS
from smt_trainer.selection.block_scores import SCORES_FILE, BlockScores
from smt_trainer.selection.block_selection import SELECTION_FILE, BlockSelection
from smt_trainer.selection.candidates import Candidates, find_candidates
from smt_trainer.selection.given import given_selection
from smt_trainer.selection.tokens import new_token_grids, with_new_tokens
from smt_trainer.sparse.convert import convert_to_smt
from smt_trainer.sparse.listed_experts import arriving_together
from smt_trainer.sparse.state import get_state, is_smt_model
from smt_trainer.sparse.whole_tensors import WholeTensors, warn_of_others
from smt_trainer.training.callback import SMTCallback
from smt_trainer.training.distributed import bare_autocast, is_sharding, prepare_for_sharding
from smt_trainer.training.gradients import ExpectGradients
from smt_trainer.training.optimizers import refuse_bound_optimizer
from smt_trainer.training.quantised import admitting_quantised
from smt_trainer.training.reference import is_reference_given, match_reference
from smt_trainer.training.refusals import (
    refuse_misplaced,
    refuse_other_blocks,
    refuse_resized,
    refuse_unusable,
)
from smt_trainer.training.resuming import last_checkpoint, refuse_no_checkpoint, warn_of_missing_optimizer
from smt_trainer.training.saving import SavesDelta
from smt_trainer.training.sharded_kinds import refuse_partitioned_experts, refuse_sharded_tokens
from smt_trainer.training.tensor_parallel import admitting_checkpoints
from smt_trainer.training.trained_parts import trained_parts
from smt_trainer.training.vllm_weights import SyncsVLLM
from smt_trainer.training.warmup import Warmup
from smt_trainer.training.weight_readers import RefuseWeightReaders
from smt_trainer.training.write_back import ChangesWriteBack, DeepSpeedWriteBack

logger = logging.getLogger(__name__)


def uncompiled(model):
    """Return the plain model inside one that `torch.compile` returned, and any other model unchanged."""
    if not is_compiled_module(model):
        return model
    logger.warning(
        "The model was compiled before the blocks were chosen, so it is trained uncompiled. To compile it with its "
        "blocks, set TrainingArguments(torch_compile=True)."
    )
    return model._orig_mod


class SMTTrainerMixin(SavesDelta, SyncsVLLM):
    """Goes in front of `Trainer` or any subclass of it: `class MyTrainer(SMTTrainerMixin, Seq2SeqTrainer)`.

    Args:
        args, kwargs: those of the trainer behind it.
        smt_config: what to tune and how to choose it; if omitted, the defaults of `SMTConfig`, or for a model that
            trains blocks already the configuration that chose them.

    Attributes:
        is_in_warmup: whether the gradient warm-up runs now. It calls `training_step` and `compute_loss` as training
            does in its first step: `state` is that of step 0, `lr_scheduler` that of a dummy optimizer, and `log` is
            silent.

    Raises:
        SMTError: `optimizers=` was given, the optimizer cannot work on blocks, the training data can be read only
            once, nothing matches `target_modules`, the blocks do not divide the weights, the budget does not fit, or
            the model trains other blocks already. A subclass with a Trainer in front of this class is refused as well.
    """

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        refuse_misplaced(cls, SMTTrainerMixin)

    def __init__(self, *args, smt_config: SMTConfig | None = None, **kwargs) -> None:
        if not isinstance(smt_config, SMTConfig | None):
            raise SMTError(f"smt_config must be an SMTConfig, got {smt_config!r}. Make one: SMTConfig(budget=0.0084).")
        self.smt_config = smt_config or SMTConfig()
        self.is_in_warmup = False
        self._saves_checkpoint = False
        self._was_interrupted = False
        self._report: dict[str, float] = {}
        self._candidates_cache: tuple[weakref.ref, SMTConfig, tuple, Candidates] | None = None
        self._selection_cache: tuple[SMTConfig, BlockSelection | None] | None = None
        if args:
            args = (uncompiled(args[0]), *args[1:])
        if "model" in kwargs:
            kwargs["model"] = uncompiled(kwargs["model"])
        model = args[0] if args else kwargs.get("model")
        with admitting_quantised(self, model), admitting_checkpoints(model, (*args, *kwargs.values())):
            super().__init__(*args, **kwargs)
        for part in (self.model, getattr(self, "ref_model", None)):
            if part is not None:
                keep_differentiable(part)
        if smt_config is None and is_smt_model(self.model):
            self.smt_config = get_state(self.model).selection.config
        refuse_unusable(self)
        self._follow_vllm()
        refuse_full_model(self._output_folder)
        if is_smt_model(self.model):
            refuse_other_blocks(self.model, self.smt_config, self._given_selection)
        elif self.model_init is None and self._given_selection is None:
            # Targets that cannot be found are refused now; training finds them in the cache.
            self._find_candidates()
        if not is_reference_given(self, args, kwargs):
            match_reference(self)
        self._add_own_callbacks()

    def _add_own_callbacks(self) -> None:
        self._gradients, self._readers, self._changes = ExpectGradients(), RefuseWeightReaders(), ChangesWriteBack(self)
        self.add_callback(self._gradients)
        if self.is_deepspeed_enabled:
            self.add_callback(DeepSpeedWriteBack())
        else:
            self.add_callback(self._readers)
            self.add_callback(self._changes)
        if not self.smt_callbacks:
            self.add_callback(SMTCallback())

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """Train as Trainer does. `resume_from_checkpoint=True` takes the last complete checkpoint.

        A run interrupted before its first checkpoint restarts with the blocks already chosen, without another warm-up.

        Raises:
            SMTError: the checkpoint, or the selection in the output folder, was made under another `smt_config`; or
                the given folder holds a delta but is no checkpoint.
            ValueError: True was given, and the output folder holds neither (raised by Trainer).
        """
        self._was_interrupted = False
        if resume_from_checkpoint is True:
            checkpoint = last_checkpoint(self._output_folder)
            self._was_interrupted = checkpoint is None and (self._output_folder / SELECTION_FILE).is_file()
            if checkpoint is not None or self._was_interrupted:
                resume_from_checkpoint = checkpoint
        elif resume_from_checkpoint:
            refuse_no_checkpoint(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def select(self) -> BlockSelection:
        """Choose the blocks as `train` does, and leave the model as it was.

        A warm-up writes selection and scores to the output folder; either file, or the returned selection, can be
        another run's `SMTConfig.selection`. `train` chooses again unless `smt_config.selection` is set. Only `train`
        enables gradient checkpointing: where memory is short, call `model.gradient_checkpointing_enable()` before.

        Raises:
            SMTError: the model trains blocks already, or they cannot be chosen.
        """
        if is_smt_model(self.model):
            raise SMTError("this model trains blocks already; select on the plain model, as it was loaded.")
        was_training = self.model.training
        try:
            return self._choose_blocks(self._output_folder)
        finally:
            self.model.train(was_training)

    def _inner_training_loop(
        self, batch_size=None, args=None, resume_from_checkpoint=None, trial=None, *rest, **kwargs
    ):
        if self.args.auto_find_batch_size and batch_size is not None:
            self._train_batch_size = batch_size
        self._convert(resume_from_checkpoint, Path(self._get_output_dir(trial)))
        sharding = is_sharding(self.accelerator)
        if sharding:
            prepare_for_sharding(self.model, self.accelerator)
        let_backward_stop_early(self.model, self.args)
        logger.info("%s", trained_parts(self.model))
        try:
            with arriving_together(self.model) if sharding else contextlib.nullcontext():
                return super()._inner_training_loop(batch_size, args, resume_from_checkpoint, trial, *rest, **kwargs)
        finally:
            self._gradients.detach()
            self._readers.forget()
            self._changes.forget()

    def _convert(self, checkpoint: str | None, folder: Path) -> None:
        """Make the model one that trains its blocks: those of a checkpoint, if any, or those that are chosen now."""
        if checkpoint is not None:
            if not is_smt_model(self.model):
                # For a model that is sharded over ranks, Trainer loads the checkpoint only after sharding: too late.
                self._load_from_checkpoint(checkpoint)
            if not self.is_deepspeed_enabled:
                warn_of_missing_optimizer(checkpoint)
        refuse_bound_optimizer(self)
        # Again: `save_model` before training writes a whole model.
        refuse_full_model(self._output_folder)
        if is_smt_model(self.model):
            refuse_other_blocks(self.model, self.smt_config, self._given_selection)
            refuse_resized(self.model)
            warn_of_others(self.model, WholeTensors.of(self.model))
        else:
            convert_to_smt(self.model, self._choose_blocks(folder))
            self._expect_gradients()
        refuse_partitioned_experts(self.accelerator, self.model, self.smt_selection.grids)

    def _choose_blocks(self, folder: Path) -> BlockSelection:
        """Return the configured selection, or the result of a warm-up: the same on all ranks.

        A warm-up's selection and scores of all blocks are saved in the output folder.
        """
        self._report = {}
        if is_merged(self.model):
            logger.warning(
                "A delta was merged into this model, and the new blocks build on it: their delta will not fit any "
                "existing checkpoint. Save the merged model first, with save_pretrained, and train that. To go on with "
                "the blocks of that delta instead, load it with from_delta(..., merge=False)."
            )
        if (selection := self._given_selection) is not None:
            if frozen := frozen_names(self.model, selection.block_indices):
                logger.warning("The selection has blocks in %d frozen linears, such as `%s`.", len(frozen), frozen[0])
        elif self._was_interrupted:
            selection = self._read_selection(folder / SELECTION_FILE)
        else:
            selection = self._choose_by_warmup(folder)
        self._report |= {"smt_blocks": selection.num_blocks, "smt_fraction_of_model": selection.fraction_of_model}
        for callback in self.smt_callbacks:
            callback.on_selection(self.args, selection)
        return selection

    def _choose_by_warmup(self, folder: Path) -> BlockSelection:
        candidates = self._find_candidates()
        warmup, began = Warmup(self, candidates.grids), time.monotonic()
        module_scores = warmup.run()
        if warmup.losses:
            self._report |= {
                "smt_warmup_steps": len(warmup.losses),
                "smt_warmup_loss": sum(warmup.losses) / len(warmup.losses),
                "smt_warmup_runtime": round(time.monotonic() - began, 4),
            }
        scores = BlockScores.of_candidates(candidates, module_scores, self.smt_config, base_name(self.model))
        if self.args.should_save:
            # First, so that the warm-up is not lost if the budget turns out not to fit.
            scores.save(folder / SCORES_FILE)
        selection = with_new_tokens(self.model, broadcast_object_list([scores.select()])[0])
        if self.args.should_save:
            selection.save(folder / SELECTION_FILE)
        return selection

    def _read_selection(self, path: Path) -> BlockSelection:
        """Return the blocks that an interrupted run chose."""
        selection, base = BlockSelection.load(path), base_name(self.model)
        self._refuse_other_config(selection.config, path)
        if selection.base_model != base:
            logger.warning(
                "The blocks of %s were chosen in %s; this model is %s. Unless both are copies of the same model, start "
                "again in another output_dir.",
                path,
                selection.base_model,
                base,
            )
        return replace(selection, base_model=base)

    def _find_candidates(self) -> Candidates:
        """Return the candidates of the model, cached so that the search and its warnings run once."""
        flags = tuple(parameter.requires_grad for parameter in self.model.parameters())
        if self._candidates_cache is not None:
            model, config, found_flags, candidates = self._candidates_cache
            unchanged = (config, found_flags) == (self.smt_config, flags)
            unchanged = unchanged and candidates.num_parameters == count_parameters(self.model)
            if model() is self.model and unchanged:
                return candidates
        candidates = find_candidates(self.model, self.smt_config)
        refuse_partitioned_experts(self.accelerator, self.model, candidates.grids)
        refuse_sharded_tokens(self.accelerator, new_token_grids(self.model, self.smt_config, candidates.grids))
        self._candidates_cache = weakref.ref(self.model), replace(self.smt_config), flags, candidates
        return candidates

    @property
    def _given_selection(self) -> BlockSelection | None:  # pyrefly: ignore[bad-override]  # it is no plain attribute
        """The configured selection, with those fields of this trainer's configuration that decide the training."""
        if self._selection_cache is None or self._selection_cache[0] != self.smt_config:
            selection = given_selection(self.smt_config, None if is_smt_model(self.model) else self.model)
            self._selection_cache = replace(self.smt_config), selection
        return self._selection_cache[1]

    def _expect_gradients(self) -> None:
        """Watch the first step, unless a warm-up has seen the gradients or DeepSpeed removes them from `.grad`."""
        scorer = SCORERS[self.smt_config.score]
        ran_warmup = self._given_selection is None and not self._was_interrupted and scorer.needs_warmup
        if not (ran_warmup and scorer.needs_backward) and not self.is_deepspeed_enabled:
            self._gradients.arm(calls_are_known=ran_warmup)

    def call_model_init(self, trial=None):
        """As Trainer's, but return a plain model where `model_init` compiles it."""
        return uncompiled(super().call_model_init(trial))

    def training_step(self, *args, **kwargs):
        """Run forward and backward as Trainer does, with whatever others have changed in the blocks; in the first step,
        watch who reads the weights that hold blocks."""
        self._changes.catch_up()
        with self._readers.watching():
            return super().training_step(*args, **kwargs)

    def compute_loss_context_manager(self):
        """In the warm-up, add the mixed precision that the model gets only when the main loop prepares it."""
        context = super().compute_loss_context_manager()
        if not self.is_in_warmup:
            return context
        stack = contextlib.ExitStack()
        stack.enter_context(context)
        stack.enter_context(bare_autocast(self.accelerator))
        return stack

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Log as Trainer does, with the results of the warm-up along with the first loss; do nothing in the warm-up."""
        if self.is_in_warmup:
            return
        # If no loss is logged, they go into the summary at the end.
        if "loss" in logs or "train_runtime" in logs:
            logs.update(self._report)
            self._report = {}
        super().log(logs, *args, **kwargs)

    @property
    def smt_selection(self) -> BlockSelection:
        """The blocks that the model trains. Raises `SMTError` before they are chosen."""
        return get_state(self.model).selection

    @property
    def smt_callbacks(self) -> list[SMTCallback]:
        """The callbacks that receive the events of SMT."""
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, SMTCallback)]

    def print_trainable_parameters(self) -> None:
        """Print how much is trained, and which blocks."""
        tqdm.write(trained_parts(self.model))


class SMTTrainer(SMTTrainerMixin, Trainer):
    """transformers' `Trainer` with Sparse Matrix Tuning: the one change to a training script.

    Takes the arguments of `Trainer` and `smt_config`. `train()` runs the gradient warm-up, chooses the blocks, rewrites
    the model and trains it; `save_model` writes a small delta; `merge_and_save` a plain checkpoint.

    The learning rate acts on the weights themselves: AdamW moves each by about the rate a step. So the right rate grows
    with their size: compare it with their root mean square, `weight.float().square().mean().sqrt()`, which is far
    smaller in wide models. For the one model tuned here (recipes/studies/results) the best rate of blocks of q, k and v
    was 1.6 % of it, of blocks with small inputs of all linears 15 %. Begin at 1e-4 (the authors' code: 1e-5 for 7B
    parameters), go up in threes, and keep what an evaluation on held-out data likes best. A rate ten times too large
    lowers the training loss even further, and can leave a model with one answer to everything.
    """
