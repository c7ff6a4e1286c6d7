"""How a class of models is loaded, and the task that the hub files it under."""

import pytest
import transformers

from smt_trainer.delta.auto_class import TABLES, loaded_by

CASES = {
    "LlamaForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "GPT2LMHeadModel": ("AutoModelForCausalLM", "text-generation"),
    "T5ForConditionalGeneration": ("AutoModelForSeq2SeqLM", "text2text-generation"),
    "BertForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "BertForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "BertForQuestionAnswering": ("AutoModelForQuestionAnswering", "question-answering"),
    "BertForMultipleChoice": ("AutoModelForMultipleChoice", "multiple-choice"),
    "BertForMaskedLM": ("AutoModelForMaskedLM", "fill-mask"),
    "BertModel": ("AutoModel", "feature-extraction"),
    "ViTForImageClassification": ("AutoModelForImageClassification", "image-classification"),
    "VisionEncoderDecoderModel": ("AutoModelForImageTextToText", "image-text-to-text"),
    "LlavaForConditionalGeneration": ("AutoModelForImageTextToText", "image-text-to-text"),
    "DetrForObjectDetection": ("AutoModelForObjectDetection", "object-detection"),
    "SegformerForSemanticSegmentation": ("AutoModelForSemanticSegmentation", "image-segmentation"),
    "WhisperForConditionalGeneration": ("AutoModelForSpeechSeq2Seq", "automatic-speech-recognition"),
    "Wav2Vec2ForCTC": ("AutoModelForCTC", "automatic-speech-recognition"),
    "Wav2Vec2ForSequenceClassification": ("AutoModelForAudioClassification", "audio-classification"),
    # No auto class gives these for their configuration.
    "T5EncoderModel": ("T5EncoderModel", None),
    "GPT2DoubleHeadsModel": ("GPT2DoubleHeadsModel", None),
}


@pytest.mark.parametrize(("architecture", "expected"), CASES.items(), ids=CASES)
def test_a_class_goes_by_the_auto_class_that_gives_it(architecture, expected):
    found = loaded_by(architecture)
    assert (found.name, found.task) == expected and found.is_known


def test_a_class_of_another_library_goes_by_its_name():
    assert loaded_by("MyModel") == ("MyModel", False, None)


def test_every_auto_class_exists():
    assert {name for name, _, _ in TABLES} == {found for found, task in CASES.values() if task}
    assert all(hasattr(transformers, name) for name, _, _ in TABLES)
