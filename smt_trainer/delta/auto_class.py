"""Which transformers class loads a trained model, and which task the hub lists it under."""

from __future__ import annotations

from typing import NamedTuple

# (auto class, its table of classes, the hub's name of its task). For a class in several tables, the first counts.
TABLES = (
    ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING", "text-generation"),
    ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING", "text2text-generation"),
    ("AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING", "text-classification"),
    ("AutoModelForTokenClassification", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING", "token-classification"),
    ("AutoModelForQuestionAnswering", "MODEL_FOR_QUESTION_ANSWERING_MAPPING", "question-answering"),
    ("AutoModelForMultipleChoice", "MODEL_FOR_MULTIPLE_CHOICE_MAPPING", "multiple-choice"),
    ("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING", "fill-mask"),
    ("AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING", "image-classification"),
    ("AutoModelForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", "image-text-to-text"),
    ("AutoModelForObjectDetection", "MODEL_FOR_OBJECT_DETECTION_MAPPING", "object-detection"),
    ("AutoModelForSemanticSegmentation", "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING", "image-segmentation"),
    ("AutoModelForCTC", "MODEL_FOR_CTC_MAPPING", "automatic-speech-recognition"),
    ("AutoModelForSpeechSeq2Seq", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING", "automatic-speech-recognition"),
    ("AutoModelForAudioClassification", "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING", "audio-classification"),
    ("AutoModel", "MODEL_MAPPING", "feature-extraction"),
)


class LoadedBy(NamedTuple):
    """The name of the class that loads a model, whether transformers has it, and the hub's name of the task, if any."""

    name: str
    is_known: bool
    task: str | None


def loaded_by(architecture: str) -> LoadedBy:
    """Return what loads a model class: the auto class that maps its configuration to exactly this class, or else the
    class itself.

    Args:
        architecture: name of the model class, such as "LlamaForCausalLM".
    """
    import transformers

    kind = getattr(transformers, architecture, None)
    config = getattr(kind, "config_class", None)
    if config is not None:
        for name, table, task in TABLES:
            if getattr(transformers, table).get(config, None) is kind:
                return LoadedBy(name, True, task)
    return LoadedBy(architecture, kind is not None, None)
