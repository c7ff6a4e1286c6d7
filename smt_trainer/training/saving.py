"""Save and load the delta where Trainer saves and loads the model; and `merge_and_save`."""

from __future__ import annotations

import functools
import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from accelerate.utils.deepspeed import DeepSpeedSchedulerWrapper
from transformers import PreTrainedModel
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from smt_trainer.config import SMTConfig
from smt_trainer.delta.delta import Delta, architecture_of
from smt_trainer.delta.folder import DELTA_FILE, LAYERS, MANIFEST_FILE, NO_WEIGHTS, refuse_full_model, whole_model_in
from smt_trainer.delta.load import load_delta
from smt_trainer.delta.model_card import delta_card
from smt_trainer.delta.put import put_delta
from smt_trainer.delta.training_settings import LABELS
from smt_trainer.errors import SMTError
from smt_trainer.files import check_new, new_folder, write_atomically, write_text
from smt_trainer.merging.dequantise import save_dequantised
from smt_trainer.model.checkpoint import CONFIG_FILE, WEIGHTS_KEY
from smt_trainer.model.heads import has_head
from smt_trainer.selection.block_selection import BlockSelection
from smt_trainer.sparse.block_module import block_modules
from smt_trainer.sparse.convert import check_onto_for_merge
from smt_trainer.sparse.plain import plain_state_dict
from smt_trainer.sparse.state import get_state, is_smt_model
from smt_trainer.sparse.write_back import write_back
from smt_trainer.training.distributed import has_weights, is_sharding, save_optimizer
from smt_trainer.training.tensor_parallel import saving_gathered

if TYPE_CHECKING:
    # To a type checker, the mixin is a subclass of the trainer that it goes in front of.
    from transformers import Trainer
else:
    Trainer = object

logger = logging.getLogger(__name__)


class SavesDelta(Trainer):
    """The part of `SMTTrainerMixin` that writes and reads deltas where Trainer writes and reads models."""

    model: PreTrainedModel  # pyrefly: ignore[bad-override-mutable-attribute]  # Trainer's may be None at first
    smt_config: SMTConfig
    _given_selection: BlockSelection | None
    _saves_checkpoint: bool

    @property
    def _output_folder(self) -> Path:
        # pyrefly: ignore[bad-argument-type]  # TrainingArguments has replaced None
        return Path(self.args.output_dir)

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
        delta = Delta.of(self.model, master=self._saves_checkpoint)
        if not self.args.should_save:
            return
        folder = Path(output_dir) if output_dir else self._output_folder
        refuse_full_model(folder)
        if self._saves_checkpoint:
            # An earlier run may have left this file, which marks a checkpoint as complete.
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        delta.save(folder)
        self._save_configs(folder)
        self._save_tokenizer(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _save_tokenizer(self, folder: Path) -> None:
        """Write the trainer's tokenizer or processor, or the collator's, as Trainer does."""
        tokenizer = self.processing_class
        if tokenizer is None:
            tokenizer = getattr(self.data_collator, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    def _save_configs(self, folder: Path) -> None:
        """Write the configurations of the model; config.json says that the folder holds a delta and no weights."""
        config = getattr(self.model, "config", None)
        if config is not None and hasattr(config, "to_json_string"):
            values = json.loads(config.to_json_string(use_diff=True)) | {WEIGHTS_KEY: NO_WEIGHTS}
            if isinstance(self.model, PreTrainedModel):
                values["architectures"] = [architecture_of(self.model)]
            # Of the class's default, too: the base may have others.
            everything = json.loads(config.to_json_string(use_diff=False))
            kept = [LAYERS, *(LABELS if has_head(self.model) else ())]
            values |= {key: everything[key] for key in kept if everything.get(key) is not None}
            write_text(folder / CONFIG_FILE, json.dumps(values, indent=2, sort_keys=True))
        generation = getattr(self.model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_sharding(self.accelerator):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_optimizer(self.accelerator, self.optimizer, self.model_wrapped, output_dir)
        if self.args.should_save and not isinstance(self.lr_scheduler, DeepSpeedSchedulerWrapper | None):
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The first rank writes trainer_state.json next, which marks that all ranks have written their files.
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
                "same configuration, or start again in another output_dir."
            )

    def _load_best_model(self) -> None:
        checkpoint = str(self.state.best_model_checkpoint)
        # A subclass may save whole models.
        is_whole = whole_model_in(Path(checkpoint)) is not None
        if self.is_deepspeed_enabled or is_whole:
            super()._load_best_model()
            write_back(linear for _, linear in block_modules(self.model))
        else:
            logger.info("Loading the best blocks from %s.", checkpoint)
            load_delta(self.model, checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The stock method uploads the output folder, after copying the files it knows from the checkpoint.
        if self.args.should_save and is_smt_model(self.model):
            for name in (DELTA_FILE, MANIFEST_FILE):
                copy = functools.partial(shutil.copyfile, Path(checkpoint_folder, name))
                write_atomically(self._output_folder / name, copy)
        super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(self, *args, **kwargs) -> None:
        """Write Trainer's model card, with a section on base, selection and budget, and how to load the delta."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero() and is_smt_model(self.model):
            repository = self.hub_model_id or self._output_folder.name
            card = self._output_folder / "README.md"
            state, architecture = get_state(self.model), architecture_of(self.model)
            text = card.read_text(encoding="utf-8")
            text = delta_card(text, state.selection, architecture, self._output_folder, repository, state.quantization)
            write_text(card, text)

    def merge_and_save(self, output_dir: str | Path, *, onto: str | None = None) -> None:
        """Write the trained model as a plain checkpoint for `from_pretrained`; training can go on afterwards.

        Args:
            output_dir: a new or empty folder; it appears whole or not at all.
            onto: "dequantized" for a quantised model, whose weights are written dense (see `delta/onto.py`). Required
                where blocks lie in them.

        Raises:
            SMTError: the folder exists and is not empty, nothing has been trained yet, `onto` is missing for blocks in
                quantised weights or given for a plain model, or the model has no `save_pretrained`.
        """
        check_onto_for_merge(self.model, onto)
        if not hasattr(self.model, "save_pretrained"):
            raise SMTError(
                f"a {type(self.model).__name__} has no save_pretrained. Call merge_and_unload(trainer.model), and save "
                "the plain model by yourself."
            )
        self._check_new(Path(output_dir))
        state = plain_state_dict(self.model, keep=self.args.should_save) if onto is None else {}
        # FSDP2 leaves the compiled model in place of the model.
        model: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if self.args.should_save:
            with new_folder(Path(output_dir)) as folder, saving_gathered(model):
                if onto is not None:
                    save_dequantised(self.model, folder)
                elif isinstance(model, PreTrainedModel):
                    model.save_pretrained(folder, state_dict=state)
                else:
                    # A model of another library saves its parts by itself, plain and up to date.
                    model.save_pretrained(folder)
                self._save_tokenizer(folder)
        self.accelerator.wait_for_everyone()

    def _check_new(self, output: Path) -> None:
        """Raise `SMTError` on all ranks, before the weights are gathered, if the folder is not new or empty."""
        refusal = None
        if self.args.should_save:
            try:
                check_new(output)
            except SMTError as error:
                refusal = error
        if (refusal := broadcast_object_list([refusal])[0]) is not None:
            raise refusal
