"""Turn AI2 documents into records in LLM-Adapters' format.

A record is `{"instruction", "input", "output", "answer"}`: four strings, `input` always empty. The instruction
holds the question, the choices and, at its end, "Answer format: a/b/c". The records equal LLM-Adapters' files byte for
byte, including their oddities: WinoGrande has no blank line before its answer format, PIQA has one between its choices.
"""

import re
from collections.abc import Sequence

from recipes.parts.source import Document
from recipes.parts.task import Record

OUTPUT = "the correct answer is {answer}"


def labels(stem: str, count: int) -> tuple[str, ...]:
    """Return the labels `stem1` to `stem<count>`."""
    return tuple(f"{stem}{number}" for number in range(1, count + 1))


def named_answers(instruction: str) -> tuple[str, ...]:
    """Return the labels in the closing "Answer format: a/b/c" of `instruction`.

    Raises:
        ValueError: `instruction` does not end with an answer format.
    """
    match = re.search(r"Answer format: (\S+)\s*$", instruction)
    if match is None:
        raise ValueError(
            f"Expected an instruction that ends in 'Answer format: a/b/c', got {instruction[-80:]!r}. "
            "Use records in LLM-Adapters' commonsense format."
        )
    return tuple(match[1].split("/"))


def boolq(doc: Document) -> Record:
    """Write a BoolQ question without its passage, as LLM-Adapters does."""
    question = doc["query"].rpartition("\nQuestion: ")[2].removesuffix("\nAnswer:")
    instruction = f"Please answer the following question with true or false, question: {question}"
    return _record(instruction, ("true", "false"), doc["gold"])


def piqa(doc: Document) -> Record:
    """Write a PIQA goal and its two solutions."""
    solutions = _numbered("Solution", (doc["sol1"], doc["sol2"]), separator="\n\n")
    instruction = f"Please choose the correct solution to the question: {doc['goal']}\n\n{solutions}"
    return _record(instruction, labels("solution", 2), doc["gold"])


def social_i_qa(doc: Document) -> Record:
    """Write a Social IQa question after its context."""
    choices = (doc["answerA"], doc["answerB"], doc["answerC"])
    return _question(f"{doc['context']} {doc['question']}", choices, doc["gold"])


def science(doc: Document) -> Record:
    """Write a question of ARC-Easy, ARC-Challenge or OpenBookQA, with its three to five choices."""
    question = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    return _question(question, doc["choices"], doc["gold"])


def hellaswag_request(doc: Document) -> Record:
    """Write a HellaSwag request of AI2, which lacks WikiHow's marks "[header]", "[title]", "[step]"."""
    return _ending(_uncapitalize_fragment(doc["query"]), doc["choices"], doc["gold"])


def hellaswag_row(doc: Document) -> Record:
    """Write a HellaSwag row of the original data set, which has the marks."""
    return _ending(f"{doc['activity_label']}: {doc['ctx']}", doc["endings"], int(doc["label"]))


def winogrande(doc: Document) -> Record:
    """Write a WinoGrande sentence with its blank `_`, and the two options."""
    opening = "Please choose the correct answer to fill in the blank to complete the given sentence"
    options = _numbered("Option", (doc["option1"], doc["option2"]))
    instruction = f"{opening}: {doc['sentence']}\n\n{options}"
    return _record(instruction, labels("option", 2), int(doc["answer"]) - 1, before_format=" ")


def _record(instruction: str, answers: Sequence[str], gold: int, before_format: str = "\n\n") -> Record:
    return {
        "instruction": f"{instruction}{before_format}Answer format: {'/'.join(answers)}",
        "input": "",
        "output": OUTPUT.format(answer=answers[gold]),
        "answer": answers[gold],
    }


def _numbered(stem: str, choices: Sequence[str], separator: str = " ") -> str:
    return separator.join(f"{stem}{number}: {choice}" for number, choice in enumerate(choices, 1))


def _question(question: str, choices: Sequence[str], gold: int) -> Record:
    opening = "Please choose the correct answer to the question"
    instruction = f"{opening}: {question}\n\n{_numbered('Answer', choices)}"
    return _record(instruction, labels("answer", len(choices)), gold)


def _ending(sentence: str, endings: Sequence[str], gold: int) -> Record:
    opening = "Please choose the correct ending to complete the given sentence"
    return _record(f"{opening}: {sentence}\n\n{_numbered('Ending', endings)}", labels("ending", 4), gold)


def _uncapitalize_fragment(sentence: str) -> str:
    """Undo AI2's capital at the start of an unfinished last sentence. AI2 did not change finished ones."""
    if sentence.endswith("."):
        return sentence
    finished, stop, fragment = sentence.rpartition(". ")
    return finished + stop + fragment[:1].lower() + fragment[1:]
