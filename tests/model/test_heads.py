"""The new head of a model for a task: which it is, that it is no target, and that it is trained whole and stored."""

import pytest
import tiny
import torch
import transformers
from architectures import inputs_of

from smt_trainer import BlockScores, Delta, SMTConfig, SMTError, convert_to_smt, from_delta
from smt_trainer.model.heads import head_names
from smt_trainer.model.targets import find_targets

IMAGES = {"image_size": 8, "patch_size": 4, "num_labels": 3}
STAGES = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "num_labels": 3}
CLIP = {
    "vision_config": IMAGES | {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    "num_labels": 3,
}
HEADS = {
    "LlamaForSequenceClassification": ({}, ["score"]),
    "ModernBertForTokenClassification": ({}, ["head", "classifier"]),
    "BertForMultipleChoice": ({}, ["classifier"]),
    "BertForQuestionAnswering": ({}, ["qa_outputs"]),
    "T5ForQuestionAnswering": ({"d_kv": 16, "d_ff": 96}, ["qa_outputs"]),
    "ViTForImageClassification": (IMAGES, ["classifier"]),
    "DeiTForImageClassificationWithTeacher": (IMAGES, ["cls_classifier", "distillation_classifier"]),
    "CLIPForImageClassification": (CLIP, ["classifier"]),
    "ResNetForImageClassification": (STAGES, ["classifier"]),
    "PoolFormerForImageClassification": ({}, ["classifier"]),
    "VideoMAEForVideoClassification": (IMAGES, ["classifier"]),
    "Wav2Vec2ForSequenceClassification": ({}, ["projector", "classifier"]),
    "WhisperForAudioClassification": ({}, ["classifier"]),
    "Wav2Vec2ForCTC": ({"vocab_size": 32}, ["lm_head"]),
    "LlamaForCausalLM": ({}, []),
    "BertModel": ({}, []),
}


@pytest.mark.parametrize(("architecture", "fields", "expected"), [(name, *rest) for name, rest in HEADS.items()])
def test_the_head_is_what_lies_beside_the_base_and_no_keyword_means_it(architecture, fields, expected):
    kind = getattr(transformers, architecture)
    with torch.device("meta"):
        model = kind(kind.config_class(**fields))
    assert head_names(model) == expected
    targets = find_targets(
        model,
        SMTConfig(target_modules="all-conv" if architecture.startswith(("ResNet", "PoolFormer")) else "all-linear"),
    )
    assert targets and not any(target.split(".")[0] in expected for target in targets)


def test_a_new_head_of_images_is_trained_whole_stored_and_loaded(tmp_path):
    vit = tiny.build("ViTForImageClassification", **IMAGES)
    vit.vit.save_pretrained(tmp_path / "base")
    config = tiny.config(target_modules="all-linear", score="random", budget=4)
    model = type(vit).from_pretrained(tmp_path / "base", num_labels=3)
    before = tiny.weights(model)
    convert_to_smt(model, tiny.choose(model, config))
    inputs = inputs_of(model)
    tiny.step(model, **inputs)
    after = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert all(
        not torch.equal(after[f"classifier.{part}"], before[f"classifier.{part}"]) for part in ("weight", "bias")
    )
    delta = Delta.of(model)
    delta.save(tmp_path / "delta")
    assert delta.whole.keys() == {"classifier.weight", "classifier.bias"}
    again = from_delta(tmp_path / "delta", base=str(tmp_path / "base"))
    assert torch.equal(tiny.logits(again, **inputs), tiny.logits(model, **inputs))


def test_naming_the_head_as_a_target_says_what_to_do():
    model = tiny.build("ViTForImageClassification", **IMAGES)
    config = tiny.config(target_modules=["classifier"], block_size=1, score="random")
    with pytest.raises(SMTError, match=r"`classifier` is a target but lies in `classifier`.*modules_to_save"):
        BlockScores.of(model, config, [])
