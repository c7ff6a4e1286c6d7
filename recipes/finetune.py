"""Fine-tune a language model on a task with Sparse Matrix Tuning, and measure it before and after.

An ordinary Trainer script: evaluate, train with `SMTTrainer`, evaluate, save the delta, merge it, check the merged
checkpoint, report. `python -m recipes.finetune --profile recipes/commonsense/default.args` runs the short profile of
the commonsense task. Any field of `RecipeArguments`, `Decoding`, `SMTConfig` and `TrainingArguments` can follow as a
flag. `accelerate launch -m` and `torchrun -m` also run it.
"""

import logging
import statistics
import sys
import time

from datasets import disable_progress_bars

from recipes.parts.arguments import parse_arguments, resumed_from
from recipes.parts.experiment import Experiment, StepTimer
from recipes.parts.provenance import peak_memory_bytes
from recipes.parts.report import Run, write_report
from smt_trainer import SMTTrainer, plot_selection
from smt_trainer.delta.onto import in_words
from smt_trainer.model.quantised import quantization_of


def main() -> None:
    started = time.perf_counter()
    recipe, decoding, smt_config, training = parse_arguments()
    logging.basicConfig(level=logging.INFO if training.should_log else logging.WARNING, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # bitsandbytes logs a line for each product in 8 bits.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    disable_progress_bars()

    experiment, timer = Experiment(recipe, decoding, training), StepTimer()
    trainer = SMTTrainer(
        model=experiment.load_base(),
        args=training,
        train_dataset=experiment.train_dataset(),
        data_collator=experiment.collator(),
        processing_class=experiment.tokenizer,
        callbacks=[timer],
        smt_config=smt_config,
    )
    before = experiment.evaluate_untuned(trainer)
    trainer.train(resume_from_checkpoint=resumed_from(training))
    peak_memory = peak_memory_bytes()
    trainer.save_model(str(experiment.delta))
    after = experiment.evaluate_tuned(trainer)
    beside = experiment.train_beside(trainer) if recipe.beside else None

    if trainer.is_world_process_zero():
        plot_selection(trainer.smt_selection, experiment.output / "selection.png")
        quantization = quantization_of(trainer.model)
        run = Run(
            task=experiment.task,
            model=recipe.model,
            dtype=experiment.dtype,
            quantization=in_words(quantization) if quantization else None,
            evaluated_on=recipe.evaluate_on,
            before=before,
            after=after,
            merged=experiment.merge(trainer.model),
            beside=beside,
            selection=trainer.smt_selection,
            steps=trainer.state.global_step,
            seconds_per_step=statistics.median(timer.seconds) if timer.seconds else None,
            peak_memory_bytes=peak_memory,
            delta_folder=experiment.delta,
            seed=training.seed,
            total_seconds=time.perf_counter() - started,
        )
        write_report(run, experiment.output)
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    sys.exit(main())
