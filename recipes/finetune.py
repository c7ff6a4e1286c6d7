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
from recipes.parts.experiment import Experiment
from recipes.parts.provenance import peak_memory_bytes
from recipes.parts.report import Run, write_report
from smt_trainer import plot_selection
from smt_trainer.delta.onto import in_words


def main() -> None:
    started = time.perf_counter()
    recipe, decoding, smt_config, training = parse_arguments()
    logging.basicConfig(level=logging.INFO if training.should_log else logging.WARNING, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # bitsandbytes logs a line for each product in 8 bits.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    disable_progress_bars()

    experiment = Experiment(recipe, decoding, smt_config, training)
    trainer, output = experiment.trainer, experiment.output
    checkpoint = resumed_from(training)
    before = experiment.evaluate_untuned()
    trainer.train(resume_from_checkpoint=checkpoint)
    peak_memory = peak_memory_bytes()
    trainer.save_model(str(output / "delta"))
    after = experiment.evaluate_tuned()
    beside = experiment.train_beside() if recipe.beside else None

    if trainer.is_world_process_zero():
        plot_selection(trainer.smt_selection, output / "selection.png")
        run = Run(
            task=experiment.task,
            model=recipe.model,
            dtype=experiment.dtype,
            quantization=in_words(experiment.quantization) if experiment.quantization else None,
            evaluated_on=recipe.evaluate_on,
            before=before,
            after=after,
            merged_onto=experiment.merged_onto,
            merged=experiment.merge(),
            beside=beside,
            selection=trainer.smt_selection,
            steps=trainer.state.global_step,
            seconds_per_step=statistics.median(experiment.timer.seconds) if experiment.timer.seconds else None,
            peak_memory_bytes=peak_memory,
            delta_folder=output / "delta",
            seed=training.seed,
            total_seconds=time.perf_counter() - started,
        )
        write_report(run, output)
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    sys.exit(main())
